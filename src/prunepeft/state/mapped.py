"""Large tensors that live on the disk and are mapped into memory, gone with the process."""

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from prunepeft.state.files import disk_error

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def mapped_file(folder: Path, n_bytes: int) -> Path:
    """A new file of that size, its space reserved: writing to the map cannot fill the disk.

    The caller removes it when every process has mapped it; the maps stay good.

    Raises:
        DiskError: if there is no room.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "mapped"
    try:
        handle, name = tempfile.mkstemp(f"-{os.getpid()}", ".tmp-mapped-", folder)
        path = Path(name)
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(handle, 0, n_bytes)
            else:
                os.truncate(handle, n_bytes)
        finally:
            os.close(handle)
    except OSError as error:
        path.unlink(missing_ok=True)
        raise disk_error(path, error, n_bytes) from error
    return path


def map_tensor(path: Path, shape: tuple[int, ...], dtype: "torch.dtype") -> "Tensor":
    """The file as a tensor that all processes share; what is written to one is seen by all."""
    import torch

    size = torch.Size(shape).numel()
    return torch.from_file(str(path), shared=True, size=size, dtype=dtype).view(shape)
