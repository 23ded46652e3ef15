"""Stop on Ctrl-C and SIGTERM with time to save, and at once when asked twice."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(KeyboardInterrupt):
    """The user or the system asked the process to stop.

    Attributes:
        signum: The signal's number; a shell expects the exit code 128 + signum.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.signum = int(signum)


@contextlib.contextmanager
def graceful_interrupts() -> Iterator[None]:
    """Raise `Interrupted` in the main thread at the first SIGINT or SIGTERM.

    From then on both signals do what the system does by default: end the process at once. The
    handlers from before come back at the end of the block. A signal that the process was started
    to ignore stays ignored, and outside the main thread nothing is changed.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}
    caught = [number for number, handler in before.items() if handler != signal.SIG_IGN]

    def stop(signum: int, frame: FrameType | None) -> None:
        for number in caught:
            signal.signal(number, signal.SIG_DFL)
        raise Interrupted(signum)

    try:
        for number in caught:
            signal.signal(number, stop)
        yield
    finally:
        for number in caught:
            # None stands for a handler that was not set from Python and cannot be set from it.
            signal.signal(number, before[number] or signal.SIG_DFL)
