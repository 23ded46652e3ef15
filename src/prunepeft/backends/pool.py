"""Several workers at a time: who gets which trial, and what happens when a worker dies."""

import contextlib
import logging
import time
from abc import abstractmethod
from collections import deque
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from prunepeft.backends.base import Backend, Batch
from prunepeft.backends.worker import Build, Message, ask, raise_described
from prunepeft.errors import StateError
from prunepeft.evaluate import Tried
from prunepeft.progress import Progress, SilentProgress
from prunepeft.space import Placement

logger = logging.getLogger(__name__)

MAX_LOST = 3  # workers that may die over one trial, or in a row before they are ready


class Hand(Protocol):
    """One worker as the main process sees it."""

    def send(self, message: Message) -> None:
        """Ask for a trial; a worker that died says so when it is waited for."""

    def stop(self) -> None:
        """End the worker, at once."""


@dataclass(eq=False)
class Task:
    """A trial on its way.

    Attributes:
        placement: What is tried.
        name: For messages.
        lost: Workers that died over it.
        began: When the first one got it.
    """

    placement: Placement
    name: str
    lost: int = 0
    began: float = 0.0


class Pool(Backend):
    """Base of the backends with workers; a worker has one trial at a time.

    Workers start when they are needed and stay until `close`. The main process alone writes the
    journal, as soon as a trial is finished. A trial whose worker died goes to another worker; after
    `MAX_LOST` deaths it counts as failed.

    Args:
        build: Makes the evaluator of a worker.
        workers: Workers at a time.
        threads: Threads of torch in each.
        progress: Where progress goes.
    """

    def __init__(
        self, build: Build, workers: int, threads: int, progress: Progress | None = None
    ) -> None:
        self.build = build
        self.workers = workers
        self.threads = threads
        self.progress = progress or SilentProgress()
        self._starting: list[Hand] = []
        self._idle: list[Hand] = []
        self._busy: dict[Hand, Task] = {}
        self._numbers: dict[Hand, int] = {}
        self._stillborn = 0

    @abstractmethod
    def hire(self, number: int) -> Hand:
        """Start a worker; its first answer says it is ready. Those alive have different numbers."""

    @abstractmethod
    def wait(self, hands: Sequence[Hand]) -> list[tuple[Hand, Message | None]]:
        """Answers of workers, at least one; None from one that died."""

    @property
    def where(self) -> str:
        """Where a worker that dies may have left a reason."""
        return ""

    def trials(self, evaluator: Any, batch: Batch) -> Generator[Tried, None, None]:
        """See `Backend.trials`."""
        done: dict[str, Tried] = {}
        tasks: dict[str, Task] = {}
        for placement, name in zip(batch.placements, batch.names, strict=True):
            found = evaluator.find_trial(placement, **batch.common)
            if found is not None:
                done[placement.digest] = found
            else:
                tasks.setdefault(placement.digest, Task(placement, name))
        left = len(tasks)
        if tasks:
            name = f"{left} trials on {min(left, self.workers)} workers"
            self.progress.start(name, left * batch.steps)
        with contextlib.closing(self._finish(list(tasks.values()), batch)) as finished:
            for placement in batch.placements:
                while placement.digest not in done:
                    task, tried = next(finished)
                    kept = evaluator.keep_trial(task.placement, tried, **batch.common)
                    done[task.placement.digest] = kept
                    if tried.error:
                        logger.warning("%s failed: %s", task.name, tried.error)
                    self.progress.advance(batch.steps)
                    left -= 1
                    if not left:
                        self.progress.finish()
                yield done[placement.digest]

    def close(self) -> None:
        """Stop all workers."""
        for hand in (*self._starting, *self._idle, *self._busy):
            self._dismiss(hand)
        self._starting, self._idle, self._busy = [], [], {}

    def _finish(self, tasks: list[Task], batch: Batch) -> Generator[tuple[Task, Tried], None, None]:
        """Each task with its result, as they are finished."""
        waiting = deque(tasks)
        try:
            while waiting or self._busy:
                self._staff(len(waiting))
                while waiting and self._idle:
                    self._give(self._idle.pop(), waiting.popleft(), batch)
                answers = self.wait([*self._starting, *self._busy])
                # All are taken in before any is told: who listens may leave, and none comes twice.
                taken = [self._take(hand, answer, waiting, batch) for hand, answer in answers]
                yield from (told for told in taken if isinstance(told, tuple))
                for told in taken:
                    if isinstance(told, dict):
                        raise_described(told)
        finally:  # after an error nobody waits for the others any more
            for hand in self._busy:
                self._dismiss(hand)
            self._busy = {}

    def _take(
        self, hand: Hand, answer: Message | None, waiting: deque[Task], batch: Batch
    ) -> tuple[Task, Tried] | Message | None:
        """A task with its result, or the error of a worker; None if there is neither."""
        task = self._busy.pop(hand, None)
        if answer is None:
            waiting.extendleft(self._bury(hand, task))
            if task is None or task.lost < MAX_LOST:
                return None
            return waiting.popleft(), _lost(task, batch)
        if task is None:
            self._starting.remove(hand)
            self._stillborn = 0
        if error := answer.get("error"):
            self._dismiss(hand)
            return error
        self._idle.append(hand)
        return None if task is None else (task, Tried(**answer["tried"]))

    def _staff(self, waiting: int) -> None:
        """Start workers for what is waiting."""
        free = len(self._starting) + len(self._idle)
        room = self.workers - len(self._numbers)
        for _ in range(min(room, waiting - free)):
            number = min(set(range(self.workers)) - set(self._numbers.values()))
            hand = self.hire(number)
            self._starting.append(hand)
            self._numbers[hand] = number

    def _dismiss(self, hand: Hand) -> None:
        hand.stop()
        del self._numbers[hand]

    def _give(self, hand: Hand, task: Task, batch: Batch) -> None:
        task.began = task.began or time.perf_counter()
        self._busy[hand] = task
        hand.send(ask(task.placement, task.name, batch.fidelity, batch.seed))

    def _bury(self, hand: Hand, task: Task | None) -> list[Task]:
        """A worker died; what it had is to be done again."""
        self._dismiss(hand)
        if task is not None:
            task.lost += 1
            logger.warning("a worker died over %s, death %d of it", task.name, task.lost)
            return [task]
        self._starting.remove(hand)
        self._stillborn += 1
        if self._stillborn >= MAX_LOST and self._numbers:
            self.workers, self._stillborn = len(self._numbers), 0
            logger.warning("no more than %d workers can be started", self.workers)
        elif self._stillborn >= MAX_LOST:
            raise StateError(
                f"{self._stillborn} workers of backend {self.name} ended before they were ready"
                f"{self.where}. A script that starts a search needs `if __name__ == '__main__':` "
                "around it; memory may be short: try workers=1, or backend=serial."
            )
        return []


def _lost(task: Task, batch: Batch) -> Tried:
    """The result of a trial over which too many workers died."""
    error = f"StateError: {task.lost} workers died over this trial"
    seconds = time.perf_counter() - task.began
    return Tried(error=error, seconds=seconds, steps=batch.steps)
