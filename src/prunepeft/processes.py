"""The processes of a data-parallel run: which is the main one, and how the others learn from it.

All processes walk through the same calls; the main one alone reads and writes the run folder. What
depends on the folder or the clock is therefore shared before anything is decided by it.
"""

import atexit
import os
import time
from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")
LAST_WAIT = 0.2  # seconds


def n_processes() -> int:
    """How many processes torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def join(device: str) -> bool:
    """Join the group that torchrun made, if any; returns whether this is the main process.

    Args:
        device: `cpu` or `cuda`.
    """
    if n_processes() == 1:
        return True
    from accelerate import PartialState

    # Threads of gloo hold the tensors of its last call for a moment, and abort the process if the
    # interpreter is gone by then.
    atexit.unregister(_wait)
    atexit.register(_wait)
    return PartialState(cpu=device == "cpu").is_main_process


def share(value: T) -> T:
    """The main process's value, on every process; none goes on before all are here."""
    if not _are_several():
        return value
    box: list[Any] = [value]
    dist.broadcast_object_list(box, src=0)
    dist.barrier()
    return box[0]


def on_main(call: Callable[[], T]) -> T:
    """Call on the main process only; what it returns or raises reaches every process.

    Without the error the others would wait for a process that has gone.
    """
    if not _are_several():
        return call()
    value, error = None, None
    if dist.get_rank() == 0:
        try:
            value = call()
        except Exception as caught:
            error = caught
    value, error = share((value, error))
    if error is not None:
        raise error
    return value


def is_cut(tensor: Tensor) -> bool:
    """Whether each process holds a part of it; it is a DTensor, whose module has moved about."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """The full tensor of one that is cut over the processes, all of which must ask; others as is.

    Args:
        tensor: Any shape.
    """
    return tensor.full_tensor() if is_cut(tensor) else tensor


def own_part(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor, (part of the rows, ...)."""
    return tensor.to_local() if is_cut(tensor) else tensor


def _wait() -> None:
    time.sleep(LAST_WAIT)


def _are_several() -> bool:
    return dist.is_available() and dist.is_initialized()
