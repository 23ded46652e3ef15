"""Backends on a mock evaluator: order, results, deaths and errors are those of the serial one."""

import contextlib
import importlib.util
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial

import pytest

from prunepeft.backends import Serial, check_backend, make_backend
from prunepeft.backends.base import Batch
from prunepeft.backends.choose import n_threads
from prunepeft.backends.pool import Pool
from prunepeft.backends.processes import DEVICES, Processes, _one_device
from prunepeft.backends.ray_actors import RayActors
from prunepeft.backends.worker import Worker, describe, raise_described
from prunepeft.budget import Fidelity
from prunepeft.config import load_config
from prunepeft.errors import (
    BudgetError,
    CheckpointError,
    ConfigError,
    DataError,
    MissingExtraError,
    OutOfMemoryError,
    StateError,
)
from prunepeft.progress import SilentProgress
from prunepeft.strategies import METHODS, Problem, RandomSearch
from tests.trial_world import SPACE, FakeEvaluator, cannot_build, dies_at_birth, placements

PARALLEL = ("process", "ray")
FLAGS = {"model": "m", "data": "d", "budget": "1%", "method": "random"}


@pytest.fixture
def make(request):
    """Makes a backend of this name with workers that build what is given."""

    with contextlib.ExitStack() as open_ones:

        def make(name, build, workers=2):
            if name == "ray":
                request.getfixturevalue("ray_cluster")
            kind = {"process": Processes, "ray": RayActors}[name]
            return open_ones.enter_context(kind(build, workers, 1))

        yield make


def batch(n, fidelity=1.0, seed=3):
    tried = placements(n)
    names = [f"trial {i + 1}" for i in range(n)]
    return Batch(tried, names, Fidelity(fidelity), seed, steps=3)


def trained(log):
    """Process numbers and digests of all trainings."""
    return [line.split() for line in log.read_text().splitlines()] if log.exists() else []


# --- who does what, without processes ------------------------------------------------------------


class Scripted(Pool):
    """Workers in this process. The last who was asked answers first; they die as they are told.

    Args:
        stillborn: Which hires die before they are ready.
    """

    name = "scripted"

    def __init__(self, build, workers, stillborn=()) -> None:
        super().__init__(build, workers, 1)
        self.stillborn, self.hired, self.most = set(stillborn), [], 0
        self.who = lambda hands: hands[-1:]

    def hire(self, number):
        self.hired.append(number)
        return ScriptedHand(self, len(self.hired) in self.stillborn)

    def wait(self, hands):
        self.most = max(self.most, len(self._busy))
        return [(hand, hand.answer) for hand in self._starting or self.who(list(hands))]


class ScriptedHand:
    def __init__(self, pool, dead) -> None:
        self.worker, self.stopped = Worker(pool.build, 1), False
        self.answer = None if dead else self.worker.start()

    def send(self, message):
        total = sum(s["size"] for s in message["placement"]["slots"])
        fault = self.worker.evaluator.faults.get(total, "")
        once = self.worker.evaluator.log.with_name(f"died-{total}")
        dies = fault == "dies" or (fault == "dies once" and not once.exists())
        once.touch()
        self.worker.evaluator.faults = {k: v for k, v in FAULTS.items() if "dies" not in v}
        self.answer = None if dies else self.worker.trial(message)
        self.worker.evaluator.faults = FAULTS

    def stop(self):
        assert not self.stopped
        self.stopped = True


FAULTS = {3: "fails", 4: "dies once", 6: "dies"}


@pytest.fixture
def scripted(tmp_path):
    def make(workers=2, stillborn=()):
        return Scripted(partial(FakeEvaluator, tmp_path / "log", FAULTS), workers, stillborn)

    return make


@pytest.mark.parametrize("workers", [1, 2, 3, 9])
def test_order_failures_and_deaths(scripted, tmp_path, workers):
    expected = list(Serial().trials(FakeEvaluator(tmp_path / "a", {3: "fails"}), batch(8)))
    evaluator = FakeEvaluator(tmp_path / "b")
    with scripted(workers) as pool:
        found = list(pool.trials(evaluator, batch(8)))
    lost = found.pop(5)
    assert lost.error == "StateError: 3 workers died over this trial"
    assert (lost.metrics, lost.steps) == ({}, 3)
    assert found == expected[:5] + expected[6:]
    assert evaluator.kept[lost.key] == lost
    order = list(evaluator.kept)
    assert (order == [t.key for t in [*found[:5], lost, *found[5:]]]) == (workers == 1)
    assert pool.most == min(workers, 8)
    assert set(pool.hired) == set(range(min(workers, 8)))  # who died is followed by its number
    assert pool._numbers == {}


def test_what_was_asked_twice_is_trained_once(scripted, tmp_path):
    evaluator = FakeEvaluator(tmp_path / "b")
    twice = Batch(placements(2) * 2, ["t"] * 4, Fidelity(), 3, 3)
    with scripted() as pool:
        first, second, *again = pool.trials(evaluator, twice)
        assert again == [first, second]
        assert len(trained(tmp_path / "log")) == 2
        list(pool.trials(evaluator, batch(3)))
        assert len(trained(tmp_path / "log")) == 3
        assert pool.hired == [0, 1]


def test_fewer_workers_do_where_no_more_can_start(scripted, tmp_path, caplog):
    with scripted(3, stillborn=range(2, 99)) as pool:
        found = list(pool.trials(FakeEvaluator(tmp_path / "b"), batch(3)))
    assert len(found) == 3
    assert "no more than 1 workers can be started" in caplog.text
    with scripted(2, stillborn=range(1, 99)) as pool, pytest.raises(StateError, match="3 workers"):
        list(pool.trials(FakeEvaluator(tmp_path / "b"), batch(5, seed=4)))


def test_leaving_early_stops_who_is_busy(scripted, tmp_path):
    evaluator = FakeEvaluator(tmp_path / "b")
    with scripted(3) as pool:
        pool.who = lambda hands: hands[:1]
        results = pool.trials(evaluator, batch(5))
        next(results)
        busy = list(pool._busy)
        results.close()
        assert busy
        assert all(hand.stopped for hand in busy)
        assert len(list(pool.trials(evaluator, batch(5)))) == 5


def test_a_worker_that_is_ready_with_the_last_result_is_not_forgotten(scripted, tmp_path):
    """Each worker answers once; who left with the last result of a batch must not lose others."""

    def wait(hands):  # the second worker is ready when the first one is through with all
        first = min(hands, key=pool._numbers.__getitem__)
        late = first in pool._starting or any(t.name == "trial 1" for t in pool._busy.values())
        heard = [first] if late else [*hands]
        assert not answered.intersection((hand, str(hand.answer)) for hand in heard)
        answered.update((hand, str(hand.answer)) for hand in heard)
        return sorted(((hand, hand.answer) for hand in heard), key=lambda told: told[1] == {})

    answered = set()
    with scripted(2) as pool:
        pool.wait = wait
        assert len(list(pool.trials(FakeEvaluator(tmp_path / "b"), batch(2)))) == 2
        assert (len(pool._idle), pool._starting) == (2, [])


def test_a_batch_that_is_cut_by_steps_is_that_of_one_process(scripted, tmp_path):
    problem = Problem(SPACE, 3, "modules", FakeEvaluator(tmp_path / "a"), 32, Fidelity(), 1)
    problem = replace(problem, metric="accuracy")
    strategy = RandomSearch(n_trials=9, max_steps=10)
    one = strategy.search(problem)
    with scripted(4) as pool:
        fresh = {"evaluator": FakeEvaluator(tmp_path / "b"), "backend": pool}
        several = strategy.search(replace(problem, **fresh))
    assert replace(several, seconds=one.seconds) == one  # proposals take their time, too
    assert 0 < len(one.history["trials"]) < 9


# --- workers -------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", PARALLEL)
def test_a_worker_that_is_killed_is_replaced_and_errors_are_raised(make, tmp_path, name):
    """One pool, several batches: starting workers is what takes time."""
    faults = {2: "fails", 3: "dies once", 6: "DataError", 7: "OSError"}
    log = tmp_path / "log"
    expected = list(Serial().trials(FakeEvaluator(log, {2: "fails"}), batch(4)))
    log.unlink()
    evaluator = FakeEvaluator(tmp_path / "here")
    pool = make(name, partial(FakeEvaluator, log, faults))
    assert list(pool.trials(evaluator, batch(4))) == expected
    pids = {pid for pid, _ in trained(log)}
    assert 2 <= len(pids) <= 3  # one that died, and one or two that did not
    assert str(os.getpid()) not in pids
    assert len(trained(log)) == 5
    wrong = Batch(placements(6)[5:], ["trial 6"], Fidelity(), 3, 3)
    with pytest.raises(DataError) as caught:
        list(pool.trials(evaluator, wrong))
    assert str(caught.value) == "a bad row in trial 6"
    assert "In a worker" in caught.value.__notes__[0]
    full = Batch(placements(7)[6:], ["trial 7"], Fidelity(), 3, 3)
    with pytest.raises(OSError, match="No space left") as disk:
        list(pool.trials(evaluator, full))
    assert disk.value.errno == 28
    assert len(evaluator.kept) == 4


@pytest.mark.slow
@pytest.mark.parametrize("name", PARALLEL)
def test_an_evaluator_that_cannot_be_built_is_one_error(make, tmp_path, name):
    pool = make(name, cannot_build, workers=1)
    with pytest.raises(DataError, match="the data has changed"):
        list(pool.trials(FakeEvaluator(tmp_path / "log"), batch(2)))


@pytest.mark.slow
@pytest.mark.parametrize("name", PARALLEL)
def test_workers_that_never_start_end_in_one_error(make, tmp_path, name):
    pool = make(name, dies_at_birth)
    with pytest.raises(StateError, match=rf"workers of backend {name} ended before they were"):
        list(pool.trials(FakeEvaluator(tmp_path / "log"), batch(3)))


def test_what_is_known_starts_no_worker(tmp_path):
    evaluator = FakeEvaluator(tmp_path / "log")
    expected = list(Serial().trials(evaluator, batch(3)))
    with Processes(cannot_build, 2, 1) as pool:
        assert list(pool.trials(evaluator, batch(3))) == expected


@pytest.mark.parametrize(
    "error", [BudgetError("no"), CheckpointError("bad"), OutOfMemoryError("o"), MemoryError("m")]
)
def test_errors_cross_as_they_are(error):
    with pytest.raises(type(error), match=str(error)):
        raise_described(describe(error))


def test_unknown_errors_name_their_type():
    with pytest.raises(RuntimeError, match="KeyError in a worker: 'x'"):
        raise_described(describe(KeyError("x")))


# --- settings ------------------------------------------------------------------------------------


def config(*overrides, **flags):
    return load_config(None, overrides, FLAGS | flags)


def test_settings_make_their_backend(tmp_path):
    def make(*overrides):
        return make_backend(config(*overrides), cannot_build, SilentProgress(), tmp_path / "log")

    assert isinstance(make(), Serial)
    assert make("backend=process").workers == 2
    assert make("backend=process", "workers=5").workers == 5


@pytest.mark.parametrize(
    ("overrides", "match"),
    [
        (("workers=2",), "give backend=process or ray"),
        (("ray_address=auto", "backend=process"), "ray_address is read by backend=ray alone"),
        (("backend=dask",), "backend"),
        (("backend=process", "workers=0"), "workers"),
    ],
)
def test_settings_that_say_nothing_are_refused(overrides, match):
    with pytest.raises(ConfigError, match=match):
        config(*overrides)


def test_methods_without_trials_and_torchrun_are_refused(monkeypatch):
    with pytest.raises(ConfigError, match="method smam has no independent trials"):
        check_backend(config("backend=process", method="smam"), has_trials=False)
    given = config("backend=process", "arch=a.json")
    with pytest.raises(ConfigError, match="training a given arch has no independent trials"):
        check_backend(given, has_trials=True)
    check_backend(config(method="smam"), has_trials=False)
    check_backend(config("backend=process"), has_trials=True)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="use backend=serial under torchrun"):
        check_backend(config("backend=process"), has_trials=True)
    assert {n for n in METHODS.names() if METHODS.get(n).has_trials} >= {"random", "asha"}


def test_without_ray_the_error_names_the_install_line(monkeypatch):
    real = importlib.util.find_spec
    hidden = "prunepeft.backends.ray_actors.find_spec"
    monkeypatch.setattr(hidden, lambda n: None if n == "ray" else real(n))
    with pytest.raises(MissingExtraError, match=r'pip install "prunepeft\[ray\]"'):
        check_backend(config("backend=ray"), has_trials=True)


@pytest.mark.slow
def test_ray_is_not_imported_before_it_is_needed():
    code = "import sys, prunepeft.run; sys.exit('ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_one_device_a_worker_in_turn(monkeypatch):
    monkeypatch.setenv(DEVICES, "4,7")
    seen = []
    for number in range(3):
        with _one_device(["4", "7"], number):
            seen.append(os.environ[DEVICES])
    assert seen == ["4", "7", "4"]
    assert os.environ[DEVICES] == "4,7"
    monkeypatch.delenv(DEVICES)
    with _one_device(["0"], 1):
        assert os.environ[DEVICES] == "0"
    assert DEVICES not in os.environ


def test_threads_are_shared_and_not_more_than_here():
    assert n_threads(1) == n_threads(64) == 1  # tests run on one thread


@pytest.mark.slow
def test_closing_ends_the_processes(tmp_path):
    faults = {2: "slow"}
    evaluator = FakeEvaluator(tmp_path / "here")
    pool = Processes(partial(FakeEvaluator, tmp_path / "log", faults), 2, 1)
    with pool:
        results = pool.trials(evaluator, batch(2))
        next(results)
        hands = [*pool._idle, *pool._busy]
        results.close()
    assert hands
    assert all(hand.process.exitcode is not None for hand in hands)
