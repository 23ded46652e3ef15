"""Trials on Ray: a small cluster of this machine, or a real one that is there already."""

import contextlib
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from typing import Any, ClassVar

from prunepeft.backends.pool import Hand, Pool
from prunepeft.backends.worker import Build, Message, Worker
from prunepeft.errors import ConfigError, MissingExtraError, StateError
from prunepeft.progress import Progress

STORE_BYTES = 80_000_000  # results are small; Ray wants 75 MB at least


class RayHand:
    """A worker that is an actor, and what it was last asked for."""

    def __init__(self, actor: Any) -> None:
        self.actor = actor
        self.answer = actor.start.remote()

    def send(self, message: Message) -> None:
        """See `Hand.send`."""
        self.answer = self.actor.trial.remote(message)

    def stop(self) -> None:
        """See `Hand.stop`."""
        import ray

        with contextlib.suppress(Exception):  # it, or the cluster, may be gone
            ray.kill(self.actor)


class RayActors(Pool):
    """One actor a worker. `Pool` replaces an actor that died, so Ray itself restarts none.

    Args:
        build, workers, threads, progress: See `Pool`. An actor claims as many CPUs as threads.
        address: Of a running cluster, e.g. `auto` or `ray://host:10001`; None: a local one of its
            own, which ends with the search. A session that this process has already is used.
        gpus: GPUs that each actor claims.
    """

    name: ClassVar[str] = "ray"

    def __init__(
        self,
        build: Build,
        workers: int,
        threads: int,
        progress: Progress | None = None,
        *,
        address: str | None = None,
        gpus: float = 0,
    ) -> None:
        super().__init__(build, workers, threads, progress)
        check_ray()
        self.address = address
        self.gpus = gpus
        self._ours = False

    @property
    def where(self) -> str:
        return " (see the logs of Ray)"

    def hire(self, number: int) -> Hand:
        """See `Pool.hire`."""
        import ray

        if not ray.is_initialized():
            self._connect()
        claims = {"num_cpus": self.threads, "num_gpus": self.gpus}
        _check_room(ray.cluster_resources(), self.threads, self.gpus)
        actor = ray.remote(max_restarts=0, **claims)(Worker)
        return RayHand(actor.remote(self.build, self.threads))

    def wait(self, hands: Sequence[Hand]) -> list[tuple[Hand, Message | None]]:
        """See `Pool.wait`."""
        import ray

        by_answer = {hand.answer: hand for hand in hands}
        ready, _ = ray.wait(list(by_answer), num_returns=1)
        return [(by_answer[answer], _receive(answer)) for answer in ready]

    def close(self) -> None:
        """Stop the actors, and the cluster if it was started here."""
        super().close()
        if self._ours:
            import ray

            ray.shutdown()
            self._ours = False

    def _connect(self) -> None:
        with _own_handlers():
            if self.address is None:
                start_local(self.workers * self.threads, self.workers * self.gpus)
            else:
                join_cluster(self.address)
        self._ours = True


def check_ray() -> None:
    """Raise MissingExtraError if Ray is not installed."""
    if find_spec("ray") is None:
        raise MissingExtraError(
            'backend=ray needs Ray: pip install "prunepeft[ray]", or use backend=process.'
        )


def start_local(cpus: int, gpus: float = 0) -> None:
    """Start a small cluster on this machine, without dashboard and messages."""
    import ray

    path = os.pathsep.join(p for p in sys.path if p)
    try:
        ray.init(
            "local",
            num_cpus=cpus,
            num_gpus=round(gpus),
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            object_store_memory=STORE_BYTES,
            runtime_env={"env_vars": {"PYTHONPATH": path}},
        )
    except Exception as error:  # Ray raises a plain one where it takes too long
        ray.shutdown()
        raise StateError(
            f"Ray could not be started on this machine ({_line(error)}); run the same "
            "command again, or use backend=process."
        ) from error


def join_cluster(address: str) -> None:
    """Join a cluster that runs."""
    import ray

    try:
        ray.init(address, log_to_driver=False, logging_level=logging.ERROR)
    except Exception as error:
        raise ConfigError(
            f"no Ray cluster can be joined at ray_address={address} ({_line(error)}); give "
            "the address of one that runs, or leave ray_address out for a local one."
        ) from error


def _line(error: Exception) -> str:
    return " ".join(str(error).split())


def _receive(answer: Any) -> Message | None:
    import ray

    try:
        return ray.get(answer)
    except ray.exceptions.RayTaskError:  # the worker lives, and something is wrong with it
        raise
    except ray.exceptions.RayError:  # the actor, its process or its node died
        return None


def _check_room(there: dict[str, float], cpus: int, gpus: float) -> None:
    """Raise ConfigError if no worker can ever start, instead of waiting for it."""
    for name, needed in (("CPU", cpus), ("GPU", gpus)):
        if there.get(name, 0) < needed:
            raise ConfigError(
                f"a worker needs {needed:g} {name}, but the Ray cluster has "
                f"{there.get(name, 0):g} in all; use a larger one, or backend=process."
            )


@contextlib.contextmanager
def _own_handlers() -> Iterator[None]:
    """Keep the handler of SIGTERM, which Ray replaces when it starts."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)
