"""Signals: the first one raises, the second one ends the process."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from prunepeft.interrupts import Interrupted, graceful_interrupts

LOOP = """
import os, signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)
from prunepeft.interrupts import Interrupted, graceful_interrupts
with graceful_interrupts():
    try:
        print("ready", flush=True)
        for _ in range(1000):  # a signal just before a long sleep would wait for its end
            time.sleep(0.02)
    except Interrupted as error:
        print("saving", error.signum, flush=True)
        time.sleep(60 if sys.argv[1] == "slow" else 0)
        print("saved", flush=True)
        os._exit(128 + error.signum)
"""


def start(mode):
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2] / "src")}
    process = subprocess.Popen(
        [sys.executable, "-c", LOOP, mode], stdout=subprocess.PIPE, text=True, env=env
    )
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_leaves_time_to_save(number):
    process = start("fast")
    process.send_signal(number)
    assert process.communicate(timeout=20)[0] == f"saving {int(number)}\nsaved\n"
    assert process.returncode == 128 + number


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
def test_the_second_signal_ends_the_process_at_once(first, second):
    process = start("slow")
    process.send_signal(first)
    assert process.stdout.readline() == f"saving {int(first)}\n"
    process.send_signal(second)
    assert process.communicate(timeout=20)[0] == ""
    assert process.returncode == -second


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_handlers_come_back(number):
    old = signal.signal(number, signal.default_int_handler)  # background jobs ignore SIGINT
    try:
        before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
        with pytest.raises(Interrupted, match=number.name) as error, graceful_interrupts():
            signal.raise_signal(number)
        assert error.value.signum == number
        assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == before
    finally:
        signal.signal(number, old)


def test_an_interrupt_is_no_ordinary_exception():
    assert issubclass(Interrupted, KeyboardInterrupt)
    assert not issubclass(Interrupted, Exception)


def test_an_ignored_signal_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with graceful_interrupts():
            signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_other_threads_change_nothing():
    seen = []

    def work():
        with graceful_interrupts():
            seen.append(signal.getsignal(signal.SIGTERM))

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before]
