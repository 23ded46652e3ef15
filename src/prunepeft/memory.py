"""How much memory a phase took, and whether an error means that it ran out."""

import contextlib
import resource
from pathlib import Path

import torch


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory ran out, on the device or the host."""
    text = str(error).lower()
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(
        part in text for part in ("out of memory", "can't allocate memory", "not enough memory")
    )


def reset_peak_memory() -> None:
    """Start a new peak: on CUDA the allocator's, else the process's (Linux)."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


def peak_memory() -> int:
    """Peak bytes since `reset_peak_memory` (device memory on CUDA, resident memory on CPU)."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
