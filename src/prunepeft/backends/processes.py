"""Trials in processes of this machine, started afresh: no fork of a process that has threads."""

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import ClassVar

import torch

from prunepeft.backends.pool import Hand, Pool
from prunepeft.backends.worker import Build, Message, Worker
from prunepeft.progress import Progress

SECONDS_TO_END = 10.0
DEVICES = "CUDA_VISIBLE_DEVICES"


class ProcessHand:
    """A worker process and the pipe to it."""

    def __init__(self, build: Build, threads: int, log: Path | None) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(
            target=_work, args=(theirs, build, threads, log), name="prunepeft worker", daemon=True
        )
        self.process.start()
        theirs.close()

    def send(self, message: Message) -> None:
        """See `Hand.send`."""
        with contextlib.suppress(OSError):
            self.pipe.send(message)

    def receive(self) -> Message | None:
        """The answer; None if the process ended."""
        try:
            return self.pipe.recv()
        except (EOFError, OSError):
            return None

    def stop(self) -> None:
        """See `Hand.stop`."""
        self.process.terminate()
        self.process.join(SECONDS_TO_END)
        if self.process.exitcode is None:
            self.process.kill()
            self.process.join()
        self.pipe.close()


class Processes(Pool):
    """Worker processes; on CUDA each sees one device, in turn.

    Args:
        build, workers, threads, progress: See `Pool`.
        cuda: Whether workers compute on CUDA.
        log: File to which workers write what they would print.
    """

    name: ClassVar[str] = "process"

    def __init__(
        self,
        build: Build,
        workers: int,
        threads: int,
        progress: Progress | None = None,
        *,
        cuda: bool = False,
        log: Path | None = None,
    ) -> None:
        super().__init__(build, workers, threads, progress)
        self.devices = visible_devices() if cuda else []
        self.log = log

    @property
    def where(self) -> str:
        return f" (see {self.log})" if self.log else ""

    def hire(self, number: int) -> Hand:
        """See `Pool.hire`."""
        with _one_device(self.devices, number):
            return ProcessHand(self.build, self.threads, self.log)

    def wait(self, hands: Sequence[Hand]) -> list[tuple[Hand, Message | None]]:
        """See `Pool.wait`."""
        by_pipe = {hand.pipe: hand for hand in hands}
        return [(by_pipe[pipe], by_pipe[pipe].receive()) for pipe in wait(list(by_pipe))]


def visible_devices() -> list[str]:
    """Names of the CUDA devices that this process sees."""
    named = os.environ.get(DEVICES)
    if named is not None:
        return [name for name in named.split(",") if name]
    return [str(i) for i in range(torch.cuda.device_count())]


@contextlib.contextmanager
def _one_device(devices: Sequence[str], number: int) -> Iterator[None]:
    """A process that starts meanwhile sees one of the devices; with none nothing is changed."""
    before = os.environ.get(DEVICES)
    if devices:
        os.environ[DEVICES] = devices[number % len(devices)]
    try:
        yield
    finally:
        if devices and before is None:
            del os.environ[DEVICES]
        elif devices:
            os.environ[DEVICES] = before


def _work(pipe: Connection, build: Build, threads: int, log: Path | None) -> None:
    """In the worker: answer until the main process is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the main process decides
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if log is not None:
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
    worker = Worker(build, threads)
    answer = worker.start()
    with contextlib.suppress(EOFError, OSError):
        while True:
            pipe.send(answer)
            answer = worker.trial(pipe.recv())


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)
