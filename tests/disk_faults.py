"""Faults for tests of what reaches the disk."""

import contextlib
import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

FAULTS = ("write", "fsync", "replace", "rename")


@contextlib.contextmanager
def failing_call(number, code=errno.ENOSPC):
    """Let the `number`-th disk call of this block fail; yields the list of calls made."""
    made = []

    def wrap(name, real):
        def call(*args, **kwargs):
            made.append(name)
            if len(made) == number:
                raise OSError(code, os.strerror(code))
            return real(*args, **kwargs)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in FAULTS:
            patch.setattr(os, name, wrap(name, getattr(os, name)))
        yield made


def calls_in(action):
    with failing_call(0) as made:
        action()
    return len(made)


def leftovers(folder):
    return [p for p in folder.rglob("*") if p.name.startswith(".tmp-")]


def damaged_versions(data):
    """Every truncation, and a flipped bit at 16 places (all eight bits at the first and last)."""
    yield from (data[:length] for length in range(len(data)))
    for index in range(16):
        place = index * (len(data) - 1) // 15
        for bit in range(8) if index in (0, 15) else (index % 8,):
            yield data[:place] + bytes([data[place] ^ (1 << bit)]) + data[place + 1 :]


def run_python(code, *args):
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1] / "src")}
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, args)], capture_output=True, text=True, env=env
    )
