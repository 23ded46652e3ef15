"""One process per run folder."""

import contextlib
import json
import logging
import os
import secrets
import socket
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from prunepeft.errors import CheckpointError, LockedError
from prunepeft.state.files import disk_error, parse_json, write_all

log = logging.getLogger(__name__)

_SECONDS_TO_FILL = 1.0


class FolderLock:
    """A lock file that says who works in a folder; the lock of a process that died is taken over.

    The same object may acquire it more than once; it is free after as many releases.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._depth = 0
        self._token = ""

    def acquire(self) -> None:
        """Take the lock.

        Raises:
            LockedError: if a live process, or one on another host, holds it.
            DiskError: if the lock file cannot be written.
        """
        if self._depth == 0:
            with _guard(self.path.parent):
                self._create()
        self._depth += 1

    def release(self) -> None:
        """Give the lock back; one that another process has taken since is left alone."""
        self._depth -= 1
        if self._depth > 0:
            return
        with _guard(self.path.parent):
            owner = _read_owner(self.path)
            if owner and (owner["pid"], owner.get("token")) == (os.getpid(), self._token):
                self.path.unlink(missing_ok=True)

    def _create(self) -> None:
        owner = _this_process()
        data = json.dumps(owner).encode("utf-8")
        while True:
            try:
                handle = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
            except FileExistsError:
                self._take_over()
                continue
            except OSError as error:
                raise disk_error(self.path, error, len(data)) from error
            break
        try:
            write_all(handle, data)
            os.fsync(handle)
        except OSError as error:
            self.path.unlink(missing_ok=True)
            raise disk_error(self.path, error, len(data)) from error
        finally:
            os.close(handle)
        self._token = owner["token"]

    def _take_over(self) -> None:
        """Remove the lock file if its owner is gone.

        Raises:
            LockedError: if it is not, or that cannot be seen from here.
        """
        owner = _read_owner(self.path)
        folder = self.path.parent
        if owner is None:
            log.warning("removed the unreadable lock %s, left by a process that died", self.path)
        elif owner["host"] != socket.gethostname():
            raise LockedError(
                f"{folder} is locked by process {owner['pid']} on host {owner['host']} since "
                f"{owner['started']}, and from this host it cannot be seen whether it still runs. "
                f"If it does not, remove {self.path} and run the same command again."
            )
        elif _is_alive(owner):
            raise LockedError(
                f"{folder} is in use by process {owner['pid']} on host {owner['host']} since "
                f"{owner['started']}; wait until it ends, stop it, or use another --output."
            )
        else:
            log.warning("removed the lock of process %s, which has ended", owner["pid"])
        self.path.unlink(missing_ok=True)


def _this_process() -> dict[str, Any]:
    return {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "boot": _boot_id(),
        "process_start": _process_start(os.getpid()),
        "token": secrets.token_hex(8),
    }


def _read_owner(path: Path) -> dict[str, Any] | None:
    """Return who holds the lock; None if the file stays unreadable or is gone.

    An owner that has made the file but not yet filled it gets a moment to do so.
    """
    deadline = time.monotonic() + _SECONDS_TO_FILL
    while path.exists():
        with contextlib.suppress(CheckpointError, OSError):
            owner = parse_json(path.read_bytes(), path)
            if isinstance(owner, dict) and {"pid", "host", "started"} <= set(owner):
                return owner
        if time.monotonic() > deadline:
            return None
        time.sleep(0.05)
    return None


def _is_alive(owner: dict[str, Any]) -> bool:
    """Return whether the process that wrote the lock, and not a later one of its number, runs."""
    pid = owner["pid"]
    if not isinstance(pid, int) or pid <= 0 or owner.get("boot") != _boot_id():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # it runs, as another user
    except OverflowError:
        return False
    start = owner.get("process_start")
    return start is None or start == _process_start(pid)


def _boot_id() -> str | None:
    """Return what changes with every start of this machine, where the system tells (Linux)."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return None


def _process_start(pid: int) -> int | None:
    """Return when a process began, in ticks since boot; None if it ended or the system is mute."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()  # the name before it may hold spaces and brackets
    return None if fields[0] == "Z" else int(fields[19])


@contextlib.contextmanager
def _guard(folder: Path) -> Iterator[None]:
    """Let one process of this host at a time look at the lock file and act on what it saw.

    The kernel drops this guard when a process dies. Where there is none, O_EXCL alone must do.
    """
    try:
        import fcntl

        handle = os.open(folder, os.O_RDONLY)
    except (ImportError, OSError):
        yield
        return
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
