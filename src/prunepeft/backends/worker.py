"""What a worker does: build an evaluator once, then train what it is sent. Messages are plain."""

import traceback
from collections.abc import Callable
from dataclasses import asdict
from typing import Any, Protocol

import torch

from prunepeft import errors
from prunepeft.budget import Fidelity
from prunepeft.errors import PrunePeftError
from prunepeft.evaluate import Tried
from prunepeft.space import Placement

Message = dict[str, Any]


class TrialRunner(Protocol):
    """The part of an evaluator that a worker needs."""

    def trial(self, placement: Placement, *, name: str, fidelity: Fidelity, seed: int) -> Tried:
        """See `Evaluator.trial`."""


Build = Callable[[], TrialRunner]  # a function that can be sent to another process


class Worker:
    """Runs trials in a process of its own.

    Args:
        build: Makes the evaluator; called once, in the worker.
        threads: Of torch.
    """

    def __init__(self, build: Build, threads: int) -> None:
        self.build = build
        self.threads = threads

    def start(self) -> Message:
        """Build the evaluator; `{}`, or what went wrong."""
        try:
            torch.set_num_threads(self.threads)
            self.evaluator = self.build()
        except Exception as error:
            return {"error": describe(error)}
        return {}

    def trial(self, message: Message) -> Message:
        """Run one trial: `{"tried": ...}`, or what is wrong with the run."""
        try:
            tried = self.evaluator.trial(
                Placement.from_dict(message["placement"]),
                name=message["name"],
                fidelity=Fidelity(**message["fidelity"]),
                seed=message["seed"],
            )
        except Exception as error:
            return {"error": describe(error)}
        return {"tried": asdict(tried)}


def ask(placement: Placement, name: str, fidelity: Fidelity, seed: int) -> Message:
    """The message that asks for a trial."""
    return {
        "placement": placement.to_dict(),
        "name": name,
        "fidelity": asdict(fidelity),
        "seed": seed,
    }


def describe(error: Exception) -> Message:
    """An error as plain values."""
    number = error.errno if isinstance(error, OSError) else None
    return {
        "type": type(error).__name__,
        "text": str(error),
        "errno": number,
        "traceback": "".join(traceback.format_exception(error)),
    }


def raise_described(error: Message) -> None:
    """Raise the error of a worker here, as the same class where it is one of ours."""
    known = getattr(errors, error["type"], None)
    if isinstance(known, type) and issubclass(known, PrunePeftError):
        raised: Exception = known(error["text"])
    elif error["errno"] is not None:
        raised = OSError(error["errno"], error["text"])
    elif error["type"] == "MemoryError":
        raised = MemoryError(error["text"])
    else:
        raised = RuntimeError(f"{error['type']} in a worker: {error['text']}")
    raised.add_note(f"In a worker:\n{error['traceback']}")
    raise raised
