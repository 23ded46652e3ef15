"""Compressed adapters and ordinary ones on the disk: read strictly, written whole."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prunepeft.compression.adapter import (
    CompressedAdapter,
    Prepared,
    Settings,
    check_not_zeroed,
)
from prunepeft.compression.codecs import Encoded, decode, encode
from prunepeft.compression.header import Header, damaged, make_header
from prunepeft.compression.vectors import TernaryVector
from prunepeft.errors import CheckpointError, ConfigError
from prunepeft.state import (
    RunFolder,
    read_tensors,
    read_tensors_and_metadata,
    verify_folder,
    write_bytes,
    write_folder,
    write_json,
    write_tensors,
)
from prunepeft.state.files import parse_json, read_bytes
from prunepeft.supernet.export.source import CONFIG_FILE, WEIGHTS_FILE

COMPRESSED_FILE = "adapter_compressed.safetensors"
REPORT_FILE = "compression.json"
_HEADER, _DENSE, _PAYLOAD = "prunepeft_compressed", "dense.", "payload."
# A file of a few bytes must not claim a vector that fills the memory.
_MAX_FREE, _MAX_PER_BYTE = 1 << 20, 1 << 17


@dataclass(frozen=True, eq=False)
class AdapterFolder:
    """An ordinary adapter folder.

    Attributes:
        path: Where it is.
        config_bytes: `adapter_config.json` as it is.
        config: Its content.
        tensors: All tensors.
    """

    path: Path
    config_bytes: bytes
    config: Mapping[str, Any]
    tensors: dict[str, Tensor] = field(repr=False)


def adapter_path(path: Path | str) -> Path:
    """The adapter folder itself, or the one of a run folder."""
    folder = Path(path)
    run = RunFolder(folder)
    if run.is_run and not (folder / CONFIG_FILE).is_file():
        if not run.adapter_dir.is_dir() and run.done:
            raise ConfigError(f"{folder} is a run of prune-base, which makes no adapter.")
        if not run.adapter_dir.is_dir():
            raise ConfigError(
                f"{folder} is a run without an adapter; run the command that started it again, it "
                "goes on where it stopped."
            )
        return run.adapter_dir
    return folder


def read_adapter_folder(path: Path | str) -> AdapterFolder:
    """Read an ordinary adapter of any peft type; nothing in it is run or followed.

    Raises:
        CheckpointError: if a file is missing, damaged, pickled or not finite.
    """
    folder = adapter_path(path)
    config_bytes, config = _read_config(folder)
    if is_compressed(folder):
        raise ConfigError(
            f"{folder} is a compressed adapter and an ordinary one is needed; make it one with "
            f"prunepeft decompress {folder} --output DIR."
        )
    tensors = read_tensors(folder / WEIGHTS_FILE, finite=True)
    return AdapterFolder(folder, config_bytes, config, tensors)


def is_compressed(path: Path | str) -> bool:
    """Whether a folder holds a compressed adapter."""
    return (Path(path) / COMPRESSED_FILE).is_file()


def compress_adapter(
    adapter: Path | str,
    output: Path | str,
    settings: Settings | None = None,
    *,
    codec: str = "golomb",
    snapshot: Path | str | None = None,
    extra: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Compress an adapter folder or the adapter of a run into a folder.

    Args:
        adapter: Any peft adapter folder with safetensors, or a run folder.
        output: Folder to make; an earlier one of this kind is replaced.
        settings: How.
        codec: `golomb` (smallest) or `bitmask`.
        snapshot: The adapter as it was before training; needed again to decompress.
        extra: Further fields of the report.
    Returns:
        What was done: sizes, shares, notes; also in `compression.json`.
    Raises:
        ConfigError: if a setting is not allowed, or the result would change nothing.
        CheckpointError: if the adapter is damaged.
    """
    source = read_adapter_folder(adapter)
    output = Path(output)
    check_output(output, source.path)
    settings = settings or Settings()
    start = read_adapter_folder(snapshot).tensors if snapshot is not None else None
    made = Prepared(source.tensors, source.config, settings, start).compress(
        settings.density, settings.alpha
    )
    notes = check_not_zeroed(made, source.tensors, start)
    report: dict[str, Any] = {}

    def fill(folder: Path) -> None:
        write_bytes(folder / CONFIG_FILE, source.config_bytes)
        payload = write_compressed(folder / COMPRESSED_FILE, made, codec)
        report.update(_report(made, source, output, codec, payload), notes=notes, **(extra or {}))
        report["bytes"] = (folder / COMPRESSED_FILE).stat().st_size
        report["times_smaller"] = report["bytes_before"] / report["bytes"]
        write_json(folder / REPORT_FILE, report)

    write_folder(output, fill)
    return report


def decompress_adapter(
    folder: Path | str, output: Path | str, *, snapshot: Path | str | None = None
) -> dict[str, Any]:
    """Write a compressed adapter as an ordinary one, which plain peft loads.

    Args:
        folder: What `compress_adapter` made.
        output: Folder to make.
        snapshot: The starting values, if it was compressed with a snapshot.
    """
    source, output = Path(folder), Path(output)
    made = read_compressed(source)
    check_output(output, source)
    start = read_adapter_folder(snapshot).tensors if snapshot is not None else None
    tensors = made.restore(start)
    report = {"path": str(output), "source": str(source), "n_tensors": len(tensors)}
    write_adapter(output, (source / CONFIG_FILE).read_bytes(), tensors, report)
    return report


def write_adapter(
    output: Path, config: bytes, tensors: Mapping[str, Tensor], report: Mapping[str, Any]
) -> None:
    """Write an ordinary adapter folder whole. Raises ConfigError if a value is not finite."""
    bad = [n for n, t in tensors.items() if t.is_floating_point() and not t.isfinite().all()]
    if bad:
        raise ConfigError(
            f"values of {bad[0]!r:.200} would be too large for {tensors[bad[0]].dtype}; use a "
            "smaller scale, weight or alpha. Nothing was written."
        )

    def fill(folder: Path) -> None:
        write_bytes(folder / CONFIG_FILE, config)
        write_tensors(folder / WEIGHTS_FILE, tensors, {"format": "pt"})
        write_json(folder / REPORT_FILE, dict(report))

    write_folder(output, fill)


def write_compressed(file: Path, adapter: CompressedAdapter, codec: str = "golomb") -> int:
    """Write the one file of a compressed adapter; returns the bytes of all codes."""
    encoded = [encode(vector.signs(), codec) for vector in adapter.vectors]
    header = make_header(
        adapter.settings,
        encoded,
        [vector.scale for vector in adapter.vectors],
        adapter.entries,
        adapter.start_check,
    )
    tensors = {f"{_PAYLOAD}{i}": torch.from_numpy(e.payload) for i, e in enumerate(encoded)}
    tensors |= {f"{_DENSE}{name}": tensor for name, tensor in adapter.dense.items()}
    text = json.dumps(header, separators=(",", ":"), allow_nan=False)
    write_tensors(file, tensors, {_HEADER: text})
    return sum(e.payload.size for e in encoded)


def read_compressed(folder: Path | str) -> CompressedAdapter:
    """Read a compressed adapter folder.

    Raises:
        CheckpointError: if a file is missing, damaged or hostile.
    """
    folder = Path(folder)
    _, config = _read_config(folder)
    file = folder / COMPRESSED_FILE
    if (folder / WEIGHTS_FILE).is_file() and not file.is_file():
        raise ConfigError(f"{folder} is an ordinary adapter already; there is nothing to restore.")
    tensors, metadata = read_tensors_and_metadata(file, finite=True, sealed=True)
    if _HEADER not in metadata:
        raise damaged(file, "it holds no compressed adapter")
    header = Header(parse_json(metadata[_HEADER].encode("utf-8", "replace"), file), file)
    total = sum(group[1] for group in header.groups)
    if total > _MAX_FREE + _MAX_PER_BYTE * sum(t.nbytes for t in tensors.values()):
        raise damaged(file, f"it claims {total} entries, more than its bytes can stand for")
    vectors = []
    for index, (codec, size, n_kept, low_bits, scale) in enumerate(header.groups):
        payload = tensors.pop(f"{_PAYLOAD}{index}", None)
        if payload is None or payload.dtype != torch.uint8 or payload.ndim != 1:
            raise damaged(file, f"vector {index} has no code")
        signs = decode(Encoded(codec, size, n_kept, low_bits, payload.numpy()))
        vectors.append(TernaryVector.from_signs(signs, scale))
    dense = {name.removeprefix(_DENSE): tensor for name, tensor in tensors.items()}
    if not all(n.startswith(_DENSE) for n in tensors) or {e.name for e in header.entries} & {
        *dense
    }:
        raise damaged(file, "it holds tensors that do not belong to it")
    return CompressedAdapter(
        config, header.settings, tuple(vectors), header.entries, dense, header.start_check
    )


def check_output(output: Path, *sources: Path) -> None:
    """Refuse folders that hold anything but an earlier result: it would be replaced.

    Raises:
        ConfigError: if the output is in use or overlaps a source.
    """
    here = output.resolve()
    for source in (path.resolve() for path in sources):
        if here == source or here in source.parents or source in here.parents:
            raise ConfigError(f"the output {output} overlaps {source}; choose another folder.")
    if output.exists() and not output.is_dir():
        raise ConfigError(f"the output {output} is a file; give the name of a folder.")
    if output.is_dir() and any(output.iterdir()) and not (output / REPORT_FILE).is_file():
        raise ConfigError(
            f"the output {output} is not empty and holds no earlier result of this command; choose "
            "a new folder. Nothing was changed."
        )


def _read_config(folder: Path) -> tuple[bytes, dict[str, Any]]:
    if (folder / "manifest.json").is_file():
        verify_folder(folder)
    elif not (folder / CONFIG_FILE).is_file():
        raise CheckpointError(
            f"{folder} is no adapter folder: it has no {CONFIG_FILE}. Give the folder that holds "
            "one, or a finished run folder."
        )
    data = read_bytes(folder / CONFIG_FILE)
    config = parse_json(data, folder / CONFIG_FILE)
    if not isinstance(config, dict) or not isinstance(config.get("peft_type"), str):
        raise CheckpointError(
            f"{folder / CONFIG_FILE} names no peft_type, so it is no adapter's config; give the "
            "folder that save_pretrained wrote, or a run folder."
        )
    return data, config


def _report(
    made: CompressedAdapter, source: AdapterFolder, output: Path, codec: str, payload: int
) -> dict[str, Any]:
    settings = made.settings
    return {
        "path": str(output),
        "source": str(source.path),
        "method": settings.method,
        "density": settings.density,
        "alpha": settings.alpha,
        "scope": settings.scope,
        "codec": codec,
        "n_params": made.n_params,
        "n_kept": made.n_kept,
        "n_dense": sum(tensor.numel() for tensor in made.dense.values()),
        "bits_per_param": 8 * payload / max(1, made.n_params),
        "scales": [vector.scale for vector in made.vectors],
        "bytes_before": (source.path / WEIGHTS_FILE).stat().st_size,
    }
