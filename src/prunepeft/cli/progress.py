"""Progress for people: a bar with the time left on a terminal, plain lines elsewhere."""

import sys

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bars

from prunepeft.cli.output import Output, is_main_process
from prunepeft.progress import PlainProgress, Progress, SilentProgress


def make_progress(output: Output) -> Progress:
    """The progress that suits stderr, the verbosity and the rank of this process."""
    if not is_main_process() or output.verbosity < 0:
        return SilentProgress()
    return RichProgress() if sys.stderr.isatty() else PlainProgress()


class RichProgress:
    """One live bar per phase; it stays on the screen when the phase ends."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True)
        self._bars: Bars | None = None
        self._task = TaskID(0)

    def start(self, phase: str, total: int) -> None:
        """Begin a phase of `total` steps; an unfinished one before it ends."""
        self.finish()
        self._bars = Bars(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}", markup=False),
            console=self._console,
            redirect_stdout=False,
        )
        self._task = self._bars.add_task(phase, total=total or None, note="")
        self._bars.start()

    def advance(self, n: int = 1) -> None:
        """Move the bar."""
        if self._bars is not None:
            self._bars.advance(self._task, n)

    def finish(self, note: str = "") -> None:
        """Stop the bar and leave `note` behind it."""
        if self._bars is not None:
            self._bars.update(self._task, note=note)
            self._bars.stop()
            self._bars = None
