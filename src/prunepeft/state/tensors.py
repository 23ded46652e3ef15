"""Tensors on disk: safetensors only, checked before a byte of it is believed. No pickle."""

import hashlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prunepeft.errors import CheckpointError, StateError
from prunepeft.state.files import parse_json, read_bytes, write_bytes

if TYPE_CHECKING:
    from torch import Tensor

MAX_HEADER = 100_000_000
SEAL = "prunepeft_sha256"
_BITS = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E4M3FNUZ", "F8_E5M2", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
}
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
_NO_PICKLE = (
    "Such a file can run code when it is opened; convert it to safetensors with a tool you trust."
)


def write_tensors(
    path: str | os.PathLike[str],
    tensors: "Mapping[str, Tensor]",
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Replace the file `path` by `tensors` in safetensors form.

    The same tensors and metadata always give the same bytes. The metadata also gets a SHA-256 of
    everything else, under `prunepeft_sha256`, which `read_tensors` checks.

    Args:
        path: The file.
        tensors: Name to dense tensor of any shape and device; views of one storage are allowed.
        metadata: Text to text.

    Raises:
        StateError: if a tensor has no data (meta device) or is not dense, or metadata is no text.
        DiskError: if the disk refuses; the old file is untouched.
    """
    write_bytes(path, tensors_to_bytes(tensors, metadata))


def tensors_to_bytes(
    tensors: "Mapping[str, Tensor]", metadata: Mapping[str, str] | None = None
) -> bytes:
    """Return the bytes that `write_tensors` writes."""
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import save

    for name, tensor in tensors.items():
        if tensor.is_meta or tensor.layout != torch.strided:
            kind = "has no data (meta device)" if tensor.is_meta else f"has layout {tensor.layout}"
            raise StateError(f"tensor {name!r} {kind}; only dense tensors with data can be saved.")
    copies = {
        name: tensor.detach().to("cpu", copy=True).clone(memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }
    try:
        raw = save(copies)
    except (SafetensorError, KeyError, ValueError) as error:
        raise StateError(f"these tensors cannot be saved as safetensors: {error}.") from error
    return _seal(raw, dict(metadata or {}))


def _seal(raw: bytes, metadata: dict[str, str]) -> bytes:
    """Rewrite the header with sorted keys and the hash; the library's metadata order is random."""
    if not all(isinstance(item, str) for pair in metadata.items() for item in pair):
        raise StateError(f"tensor metadata must map text to text; got {metadata!r:.200}.")
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    data = memoryview(raw)[8 + length :]
    header["__metadata__"] = metadata
    metadata[SEAL] = _digest(header, data)
    text = json.dumps(header, sort_keys=True, separators=(",", ":")).encode("ascii")
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER:
        raise StateError(
            f"names and metadata take {len(text)} bytes; safetensors allows {MAX_HEADER}."
        )
    return b"".join((len(text).to_bytes(8, "little"), text, data))


def _digest(header: Mapping[str, Any], data: bytes | memoryview) -> str:
    """Return the SHA-256 of the header, without the hash it may hold, and the data."""
    metadata = {k: v for k, v in header.get("__metadata__", {}).items() if k != SEAL}
    text = json.dumps({**header, "__metadata__": metadata}, sort_keys=True, separators=(",", ":"))
    hasher = hashlib.sha256(text.encode("ascii"))
    hasher.update(data)
    return hasher.hexdigest()


def read_tensors(
    path: str | os.PathLike[str], *, finite: bool = False, sealed: bool = False
) -> "dict[str, Tensor]":
    """Return the tensors of a safetensors file, on the CPU.

    Args:
        path: The file.
        finite: Refuse NaN and infinite values.
        sealed: Refuse a file without the hash that `write_tensors` adds. A hash that is there is
            always checked.

    Raises:
        CheckpointError: if the file is missing, damaged, hostile, pickled, or not finite.
    """
    return read_tensors_and_metadata(path, finite=finite, sealed=sealed)[0]


def read_tensors_and_metadata(
    path: str | os.PathLike[str], *, finite: bool = False, sealed: bool = False
) -> "tuple[dict[str, Tensor], dict[str, str]]":
    """Return what `read_tensors` does, and the metadata without the hash."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    file = Path(path)
    data = _read_weight_bytes(file)
    header, start = _read_header(data, file)
    metadata = header.get("__metadata__", {})
    if SEAL in metadata:
        if metadata[SEAL] != _digest(header, memoryview(data)[start:]):
            raise _damaged(file, "its content does not match its SHA-256")
    elif sealed:
        raise _damaged(file, f"it holds no {SEAL}, so prunepeft did not write it")
    try:
        tensors = load(data)
    except (SafetensorError, KeyError, ValueError, TypeError, RuntimeError, OverflowError) as error:
        raise _damaged(file, str(error)) from error
    del data
    if finite:
        _check_finite(tensors, file)
    return tensors, {key: value for key, value in metadata.items() if key != SEAL}


def _read_weight_bytes(file: Path) -> bytes:
    if file.suffix in _PICKLE_SUFFIXES:
        raise CheckpointError(
            f"{file} is a pickled weight file; only .safetensors is read. {_NO_PICKLE}"
        )
    if not file.exists() and file.parent.is_dir():
        pickled = sorted(p.name for p in file.parent.iterdir() if p.suffix in _PICKLE_SUFFIXES)
        if pickled:
            raise CheckpointError(
                f"{file} does not exist; the folder only holds pickled weights ({pickled[0]}), "
                f"which are not read. {_NO_PICKLE}"
            )
    return read_bytes(file)


def _read_header(data: bytes, file: Path) -> tuple[dict[str, Any], int]:
    """Return the checked header and where the tensors start."""
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or length > len(data) - 8:
        raise _damaged(file, _explain_length(data, length))
    if length > MAX_HEADER:
        raise _damaged(file, f"its header takes {length} bytes, more than the {MAX_HEADER} allowed")
    header = parse_json(data[8 : 8 + length], file)
    if not isinstance(header, dict):
        raise _damaged(file, "its header is not a JSON object")
    metadata = header.get("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise _damaged(file, "its metadata does not map text to text")
    spans = []
    for name, entry in header.items():
        if name != "__metadata__":
            spans.append((*_span(name, entry, file), name))
    end = 0
    for begin, stop, name in sorted(spans):
        if begin != end:
            problem = "overlaps the one before it" if begin < end else "leaves a hole before it"
            raise _damaged(file, f"tensor {name[:100]!r} {problem}")
        end = stop
    if end != len(data) - 8 - length:
        raise _damaged(file, f"its tensors take {end} bytes but {len(data) - 8 - length} are there")
    return header, 8 + length


def _span(name: str, entry: Any, file: Path) -> tuple[int, int]:
    """Return where one tensor lies, after checking that its shape and dtype fill exactly that."""
    label = repr(name[:100])
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise _damaged(file, f"the entry of tensor {label} is not dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise _damaged(file, f"tensor {label} has the unknown dtype {dtype!r:.40}")
    if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
        raise _damaged(file, f"tensor {label} has a shape or offsets that are not whole numbers")
    # An empty tensor may still claim absurd sizes in its other axes.
    if math.prod(size for size in shape if size) >= 2**60 or len(shape) > 64:
        raise _damaged(file, f"tensor {label} claims the impossible shape {shape!r:.80}")
    if math.prod(shape) * _BITS[dtype] // 8 != offsets[1] - offsets[0]:
        raise _damaged(
            file, f"tensor {label} of shape {shape!r:.80} and dtype {dtype} does not fill its bytes"
        )
    return offsets[0], offsets[1]


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(v) is int and 0 <= v < 2**63 for v in value)


def _explain_length(data: bytes, length: int) -> str:
    if data.startswith(b"PK\x03\x04"):
        return f"it is a zip archive, most likely pickled weights under a wrong name. {_NO_PICKLE}"
    if data[:1] == b"\x80" and data[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return f"it is a pickle under a wrong name. {_NO_PICKLE}"
    if data.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer; fetch the real file with git lfs pull"
    if len(data) < 8:
        return f"it has {len(data)} bytes, too few for a header"
    return f"its header claims {length} bytes but only {len(data) - 8} follow"


def _check_finite(tensors: "Mapping[str, Tensor]", file: Path) -> None:
    import torch

    for name, tensor in tensors.items():
        if not (tensor.is_floating_point() or tensor.is_complex()):
            continue
        values = tensor.float() if tensor.element_size() == 1 else tensor
        if not torch.isfinite(values).all():
            raise _damaged(file, f"tensor {name[:100]!r} holds NaN or infinite values")


def _damaged(file: Path, reason: str) -> CheckpointError:
    return CheckpointError(
        f"{file} is not a usable safetensors file: {reason.rstrip('.')}. "
        "Restore it from a copy, or make it again."
    )
