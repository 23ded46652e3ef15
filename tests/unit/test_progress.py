import io

import pytest
from rich.console import Console

from prunepeft.cli.output import Output
from prunepeft.cli.progress import RichProgress, make_progress
from prunepeft.progress import PlainProgress, Progress, SilentProgress, short_time, time_left


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_plain_lines_come_at_most_every_ten_seconds() -> None:
    stream, clock = io.StringIO(), Clock()
    progress = PlainProgress(stream, every=10, clock=clock)
    progress.start("round 1", 100)
    for _ in range(100):
        clock.now += 0.5
        progress.advance()
    progress.finish("loss 0.5")
    assert stream.getvalue().splitlines() == [
        "round 1: 100 steps",
        "round 1: 20/100, 40.0s left",
        "round 1: 40/100, 30.0s left",
        "round 1: 60/100, 20.0s left",
        "round 1: 80/100, 10.0s left",
        "round 1: 100/100",
        "round 1: done in 50.0s: loss 0.5",
    ]


def test_a_new_phase_ends_the_one_before() -> None:
    stream, clock = io.StringIO(), Clock()
    progress = PlainProgress(stream, clock=clock)
    progress.start("a", 0)
    progress.start("b", 2)
    progress.finish()
    progress.finish("again")
    progress.advance()
    assert stream.getvalue().split("\n") == [
        "a",
        "a: done in 0.0s",
        "b: 2 steps",
        "b: done in 0.0s",
        "",
    ]


@pytest.mark.parametrize(
    "make", [SilentProgress, lambda: RichProgress(Console(file=io.StringIO()))]
)
def test_every_progress_takes_the_same_calls(make: type[SilentProgress]) -> None:
    progress: Progress = make()
    progress.finish()
    progress.advance()
    progress.start("a", 3)
    progress.advance(2)
    progress.start("b", 0)
    progress.finish("done")


def test_the_bar_shows_phase_count_and_note() -> None:
    stream = io.StringIO()
    progress = RichProgress(Console(file=stream, force_terminal=True, width=100))
    progress.start("round [1]", 3)
    progress.advance(3)
    progress.finish("loss 0.1")
    assert "round [1]" in stream.getvalue()
    assert "3/3" in stream.getvalue()
    assert "loss 0.1" in stream.getvalue()


def test_ranks_and_quiet_are_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(make_progress(Output()), PlainProgress)
    assert isinstance(make_progress(Output(verbosity=-1)), SilentProgress)
    monkeypatch.setenv("RANK", "1")
    assert isinstance(make_progress(Output()), SilentProgress)


def test_times_are_short() -> None:
    assert [short_time(s) for s in (0, 59.94, 60, 3600)] == ["0.0s", "59.9s", "1m00s", "1h00m"]
    assert time_left(0, 5, 1) == time_left(5, 5, 1) == ""
    assert time_left(1, 3, 2) == "4.0s"
