"""How far a long work is: the interface, a silent one, and plain lines for logs."""

import sys
import time
from collections.abc import Callable
from typing import Protocol, TextIO


class Progress(Protocol):
    """Told about one phase after the other; phases do not nest."""

    def start(self, phase: str, total: int) -> None:
        """Begin a phase of `total` steps; an unfinished one before it ends."""

    def advance(self, n: int = 1) -> None:
        """Report `n` more steps as done."""

    def finish(self, note: str = "") -> None:
        """End the phase; `note` says how it went. Without a phase, nothing happens."""


class SilentProgress:
    """Says nothing."""

    def start(self, phase: str, total: int) -> None:
        """Ignore the phase."""

    def advance(self, n: int = 1) -> None:
        """Ignore the steps."""

    def finish(self, note: str = "") -> None:
        """Ignore the end."""


class PlainProgress:
    """One line at the start and end of a phase, and at most one per `every` seconds between."""

    def __init__(
        self,
        stream: TextIO | None = None,
        every: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._stream = stream or sys.stderr
        self._every = every
        self._clock = clock
        self._phase = ""

    def start(self, phase: str, total: int) -> None:
        """Begin a phase with its own line."""
        self.finish()
        self._phase, self._total, self._done = phase, total, 0
        self._began = self._last = self._clock()
        self._say(f"{total} steps" if total else "")

    def advance(self, n: int = 1) -> None:
        """Count the steps; a line only if the last one is old enough."""
        if not self._phase:
            return
        self._done += n
        now = self._clock()
        if now - self._last >= self._every:
            self._last = now
            left = time_left(self._done, self._total, now - self._began)
            share = f"{self._done}/{self._total}" if self._total else str(self._done)
            self._say(f"{share}{f', {left} left' if left else ''}")

    def finish(self, note: str = "") -> None:
        """Close the phase with its duration."""
        if self._phase:
            seconds = self._clock() - self._began
            self._say(f"done in {short_time(seconds)}{f': {note}' if note else ''}")
            self._phase = ""

    def _say(self, text: str) -> None:
        print(f"{self._phase}: {text}".rstrip(": "), file=self._stream, flush=True)


def short_time(seconds: float) -> str:
    """A duration for people.

    Example:
        >>> [short_time(s) for s in (4.26, 75, 7260)]
        ['4.3s', '1m15s', '2h01m']
    """
    if seconds < 60:
        return f"{seconds:.1f}s"
    if seconds < 3600:
        return f"{int(seconds // 60)}m{int(seconds % 60):02d}s"
    return f"{int(seconds // 3600)}h{int(seconds % 3600 // 60):02d}m"


def time_left(done: int, total: int, seconds: float) -> str:
    """What remains at the speed so far; empty if nothing is known yet."""
    if done <= 0 or total <= done:
        return ""
    return short_time(seconds / done * (total - done))
