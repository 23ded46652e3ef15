"""A server that imports everything once and runs each command line in a forked child, with faults.

Nothing in the package knows of it: a fault is a patch of a function in the child. It takes one JSON
request a line on stdin and gives one JSON answer a line on stdout; `forked_runs.py` is the client.

A fault is {"call": "module:dotted.name", "match": text, "when": "before" or "after", "number": n,
"until": m, "do": what}. It strikes at calls n to m (m = n by default) whose arguments, as text,
contain `match`; an open file counts as its path.
"""

import errno
import gc
import importlib
import json
import os
import random
import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

REAL_WRITE, REAL_OPEN = os.write, os.open


def main() -> None:
    """Serve until stdin ends."""
    warm_up()
    print("ready", flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        pid = request.get("wait") or fork(request)
        print(json.dumps(wait(pid, request.get("strike"))), flush=True)


def warm_up() -> None:
    """Import what a run needs and draw no figures; torch computes nothing before the forks."""
    import scipy.stats  # noqa: F401
    import torch
    import transformers.models.bert.modeling_bert  # noqa: F401
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    import prunepeft.cli.progress
    import prunepeft.report.plots as plots
    import prunepeft.report.write as write
    import prunepeft.run  # noqa: F401

    torch.set_num_threads(1)
    get_checkpoint_conversion_mapping("bert")
    picture = plots.Picture("one", "One", "Caption.", "<svg></svg>", b"<svg></svg>", b"png")
    write.make_pictures = lambda evidence: [picture]
    gc.collect()
    gc.freeze()  # else every collection in a child walks all that was imported


def fork(request: dict[str, Any]) -> int:
    """Start a child that runs the command line, and return its number."""
    pid = os.fork()
    if pid == 0:
        code = 70
        try:
            code = run(request)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return pid


def run(request: dict[str, Any]) -> int:
    """In the child: be like a fresh process, install the faults, run."""
    import numpy as np
    import torch

    for number, name in ((1, "stdout"), (2, "stderr")):
        handle = REAL_OPEN(request[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(handle, number)
    for name, value in request["env"].items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value
    random.seed()
    np.random.seed()
    torch.seed()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    log = REAL_OPEN(request["calls"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
    for fault in request["faults"]:
        install(fault, log)
    from prunepeft.cli import main as command

    try:
        command(request["args"])
    except SystemExit as left:
        return int(left.code or 0)
    return 71


def wait(pid: int, strike: list[float] | None) -> dict[str, Any]:
    """Wait until a child ends or stops; `strike` is [seconds, signal] to send on the way."""
    began = time.monotonic()
    while strike and time.monotonic() - began < strike[0]:
        if os.waitid(os.P_PID, pid, os.WEXITED | os.WSTOPPED | os.WNOHANG | os.WNOWAIT):
            strike = None
        time.sleep(0.003)
    if strike:
        os.kill(pid, int(strike[1]))
    status = os.waitpid(pid, os.WUNTRACED)[1]
    code = "stopped" if os.WIFSTOPPED(status) else os.waitstatus_to_exitcode(status)
    return {"code": code, "pid": pid, "seconds": time.monotonic() - began}


def install(fault: dict[str, Any], log: int) -> None:
    """Patch the function that a fault is about."""
    module, _, dotted = fault["call"].partition(":")
    owner: Any = importlib.import_module(module)
    *path, name = dotted.split(".")
    for part in path:
        owner = getattr(owner, part)
    real, seen = getattr(owner, name), 0
    match, first = fault.get("match", ""), fault.get("number", 0)
    last = fault.get("until", first)
    act, after = ACTIONS[fault["do"]], fault.get("when") == "after"

    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal seen
        if match and match not in as_text(args):
            return real(*args, **kwargs)
        seen += 1
        strikes = first <= seen <= last
        if fault["do"] == "count":
            REAL_WRITE(log, f"{fault['call']}\n".encode())
        if strikes and not after:
            act(None)
        result = real(*args, **kwargs)
        return act(result) if strikes and after else result

    setattr(owner, name, call)


def as_text(args: tuple[Any, ...]) -> str:
    """Arguments as text; a whole number that is an open file becomes its path."""
    parts = []
    for arg in args:
        place = Path(f"/proc/self/fd/{arg}")
        is_file = type(arg) is int and place.is_symlink()
        parts.append(os.readlink(place) if is_file else str(arg) if not callable(arg) else "")
    return " ".join(parts)


def disk_full(result: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def limit_files(result: Any) -> Any:
    """Let the system itself refuse every file above 4 KiB from now on."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
    return result


def out_of_memory(result: Any) -> None:
    raise RuntimeError("DefaultCPUAllocator: not enough memory: out of memory")


def send(number: signal.Signals) -> Callable[[Any], Any]:
    def act(result: Any) -> Any:
        os.kill(os.getpid(), number)
        return result

    return act


ACTIONS: dict[str, Callable[[Any], Any]] = {
    "count": lambda result: result,
    "kill": send(signal.SIGKILL),
    "interrupt": send(signal.SIGINT),
    "terminate": send(signal.SIGTERM),
    "stop": send(signal.SIGSTOP),
    "disk full": disk_full,
    "limit files": limit_files,
    "out of memory": out_of_memory,
    "nan": lambda result: result * float("nan"),
}

if __name__ == "__main__":
    main()
