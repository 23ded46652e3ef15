"""Every way a command can fail, in one place: one paragraph on stderr and an exit code."""

import errno
import functools
import json
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import typer

from prunepeft.cli.output import is_main_process
from prunepeft.errors import DiskError, OutOfMemoryError, PrunePeftError
from prunepeft.interrupts import Interrupted, graceful_interrupts

_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_FORBIDDEN = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR}
_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")
_RESUMABLE = ("search", "train", "compare")


def guarded(name: str, command: Callable[..., None]) -> Callable[..., None]:
    """The command with its failures turned into messages and exit codes.

    Args:
        name: The verb, which decides what is said about resuming.
        command: Has the keyword arguments `debug` and `json_out` among its own.
    """

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        debug, json_out = kwargs.get("debug", False), kwargs.get("json_out", False)
        try:
            with graceful_interrupts():
                command(*args, **kwargs)
        except (typer.Exit, typer.Abort, typer.BadParameter, BrokenPipeError):
            raise
        except BaseException as error:
            if isinstance(error, SystemExit | GeneratorExit):
                raise
            raise typer.Exit(_report(name, error, debug=debug, json_out=json_out)) from None

    return run


def report_usage(error: Any, args: Sequence[str]) -> int:
    """Print a mistake in the call, with where to look, and return its exit code."""
    text = " ".join(error.format_message().split()).replace("Value error, ", "")
    path = getattr(getattr(error, "ctx", None), "command_path", "prunepeft")
    if type(error).__name__ == "NoArgsIsHelpError":
        error.show()
        return 2
    _say("UsageError", f"{text} See `{path} --help`.", 2, json_out="--json" in args)
    return 2


def classify(name: str, error: BaseException) -> tuple[int, str]:
    """Exit code and paragraph of an exception that ended the command `name`."""
    if isinstance(error, PrunePeftError):
        return error.exit_code, str(error)
    if isinstance(error, KeyboardInterrupt):
        saved = "state saved; run the same command again to resume."
        text = f"interrupted; {saved}" if name in _RESUMABLE else "interrupted."
        number = error.signum if isinstance(error, Interrupted) else signal.SIGINT
        return 128 + number, text
    text = " ".join(str(error).split())
    is_oom = type(error).__name__ == "OutOfMemoryError" or isinstance(error, MemoryError)
    if is_oom or any(words in text.lower() for words in _OUT_OF_MEMORY):
        return OutOfMemoryError.exit_code, (
            f"out of memory ({text or 'no details'}); cut the batch with a larger "
            "train.gradient_accumulation, or use a shorter train.max_length or "
            "train.gradient_checkpointing=true."
        )
    if isinstance(error, OSError) and error.errno in _DISK:
        return DiskError.exit_code, (
            f"the disk is full or a file became too large ({text}); the last good state is kept. "
            "Free space or choose another --output, then run the same command again."
        )
    if isinstance(error, OSError) and error.errno in _FORBIDDEN:
        return PrunePeftError.exit_code, f"not permitted: {text}; choose another path."
    return 1, (
        f"internal error: {type(error).__name__}: {text or 'no details'}. "
        "Run the same command with --debug and report the traceback."
    )


def _report(name: str, error: BaseException, *, debug: bool, json_out: bool) -> int:
    code, text = classify(name, error)
    if debug and not isinstance(error, KeyboardInterrupt):
        traceback.print_exception(error, file=sys.stderr)
    # A mistake happens on every process alike; only what is unexpected may happen on one alone.
    if is_main_process() or code == 1:
        _say(type(error).__name__, text, code, json_out=json_out)
    return code


def _say(error: str, message: str, code: int, *, json_out: bool) -> None:
    print(f"error: {message}", file=sys.stderr, flush=True)
    if json_out:
        print(json.dumps({"error": error, "message": message, "exit_code": code}), flush=True)
