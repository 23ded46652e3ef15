"""Merge adapters of the same modules: task arithmetic, average or TIES on their task vectors."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from prunepeft.compression.adapter import CompressedAdapter
from prunepeft.compression.arithmetic import ties_merge, weighted_sum
from prunepeft.compression.compeft import prune_only
from prunepeft.compression.folder import (
    AdapterFolder,
    adapter_path,
    check_output,
    is_compressed,
    read_adapter_folder,
    read_compressed,
    write_adapter,
)
from prunepeft.compression.starts import choose_starts, is_head, start_values
from prunepeft.compression.vectors import DenseVector, Joined
from prunepeft.errors import ConfigError
from prunepeft.supernet.export.source import CONFIG_FILE

METHODS = ("ties", "sum", "average")
TRIM = 0.2  # share of a dense task vector that TIES keeps; the paper's
# Fields that do not decide what the adapter computes.
_IGNORED = frozenset(
    "inference_mode base_model_name_or_path revision peft_version auto_mapping init_seed "
    "init_lora_weights lora_dropout runtime_config task_type".split()
)
_OTHER_START = (
    "the adapters count from different starting values (other seeds or other --start), so a "
    "compressed one cannot be added to the others. Compress them with --start zeros, or merge the "
    "adapters themselves."
)


def merge_adapters(
    adapters: Sequence[Path | str],
    output: Path | str,
    *,
    method: str = "ties",
    weights: Sequence[float] | None = None,
    scale: float = 1.0,
    trim: float | None = None,
) -> dict[str, Any]:
    """Merge adapters into one ordinary adapter folder.

    `sum` is start + scale * sum_j w_j tau_j (task arithmetic), `average` has weights made to sum to
    one, `ties` elects signs first. Parameters are merged, so A and B of LoRA each for itself. Task
    heads and other dense tensors are averaged with the weights that are over zero.

    Args:
        adapters: Two or more adapter folders, compressed folders or run folders.
        output: Folder to make.
        method: `ties`, `sum` or `average`.
        weights: One per adapter; default 1 each.
        scale: Factor of the merged task vector.
        trim: Share of a task vector that was not compressed which TIES keeps; default 0.2.
    Raises:
        ConfigError: if the adapters do not hold the same modules or a setting is not allowed.
    """
    weights, trim = _check(adapters, method, weights, trim)
    if not np.isfinite(scale):
        raise ConfigError(f"scale must be a finite number; got {scale!r}.")
    experts = [_read(path) for path in adapters]
    output = Path(output)
    check_output(output, *(adapter_path(path) for path in adapters))
    _check_alike(experts, adapters)
    starts, values = _common_start(experts)
    names = sorted(starts)
    vectors = [_vector(e, names, values, trim) for e in experts]
    if method == "ties":
        merged = ties_merge(vectors, weights)
    else:
        divisor = sum(weights) if method == "average" else 1.0
        merged = weighted_sum(vectors, [w / divisor for w in weights])
    tensors = _split(np.float32(scale) * merged, names, values, experts[0].shapes)
    tensors = {n: t.to(experts[0].dtypes[n]) for n, t in tensors.items()}
    dense = {n for e in experts for n in e.shapes} - tensors.keys()
    tensors |= {n: _mean([e.tensors[n] for e in experts], weights) for n in dense}
    report = {
        "path": str(output),
        "sources": [str(path) for path in adapters],
        "method": method,
        "weights": list(weights),
        "scale": scale,
        "n_params": int(merged.size),
        "n_averaged": sum(tensors[n].numel() for n in dense),
        "notes": _notes(experts),
    }
    write_adapter(output, experts[0].config_bytes, tensors, report)
    return report


@dataclass(frozen=True, eq=False)
class _Expert:
    """An adapter to merge: dense tensors, and the task vectors if it is compressed."""

    config_bytes: bytes
    config: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, torch.dtype]
    tensors: Mapping[str, Tensor]
    compressed: CompressedAdapter | None = None


def _read(path: Path | str) -> _Expert:
    if is_compressed(path):
        made = read_compressed(path)
        shapes = {n: tuple(t.shape) for n, t in made.dense.items()}
        dtypes = {n: t.dtype for n, t in made.dense.items()}
        shapes |= {e.name: e.shape for e in made.entries}
        dtypes |= {e.name: e.dtype for e in made.entries}
        config = (Path(path) / CONFIG_FILE).read_bytes()
        return _Expert(config, made.config, shapes, dtypes, made.dense, made)
    folder: AdapterFolder = read_adapter_folder(path)
    shapes = {n: tuple(t.shape) for n, t in folder.tensors.items()}
    dtypes = {n: t.dtype for n, t in folder.tensors.items()}
    return _Expert(folder.config_bytes, folder.config, shapes, dtypes, folder.tensors)


def _check(
    adapters: Sequence[Path | str], method: str, weights: Sequence[float] | None, trim: float | None
) -> tuple[list[float], float]:
    """The weights and the share that stays, with their defaults."""
    if method not in METHODS:
        raise ConfigError(f"method must be one of {', '.join(METHODS)}; got {method!r}.")
    if len(adapters) < 2:
        raise ConfigError(f"a merge needs two or more adapters; got {len(adapters)}.")
    weights = [1.0] * len(adapters) if weights is None else [float(w) for w in weights]
    if len(weights) != len(adapters):
        raise ConfigError(
            f"got {len(weights)} weights for {len(adapters)} adapters; give one for each, e.g. "
            f"--weights {','.join('1' * len(adapters))}."
        )
    if not all(np.isfinite(w) for w in weights) or (method != "sum" and min(weights) <= 0):
        rule = "finite" if method == "sum" else "positive"
        raise ConfigError(f"the weights of method {method} must be {rule}; got {weights}.")
    if method != "ties" and trim is not None:
        raise ConfigError(f"method {method} trims nothing; leave trim out, or use method ties.")
    if trim is None:
        trim = TRIM if method == "ties" else 1.0
    if not 0 < trim <= 1:
        raise ConfigError(f"trim must be a share in (0, 1]; got {trim!r}.")
    return weights, trim


def _check_alike(experts: Sequence[_Expert], paths: Sequence[Path | str]) -> None:
    first = experts[0]
    for expert, path in zip(experts[1:], paths[1:], strict=True):
        types = [e.config["peft_type"] for e in (first, expert)]
        if types[0] != types[1]:
            raise ConfigError(
                f"{path} is of type {types[1]!r:.60} and {paths[0]} of type {types[0]!r:.60}; "
                "merge adapters of one type and the same modules."
            )
        keys = (first.config.keys() | expert.config.keys()) - _IGNORED
        differing = sorted(
            k for k in keys if _plain(first.config.get(k)) != _plain(expert.config.get(k))
        )
        names = sorted(
            n
            for n in first.shapes.keys() | expert.shapes.keys()
            if first.shapes.get(n) != expert.shapes.get(n)
        )
        if differing or names:
            what = f"in the settings {differing[:4]}" if differing else f"in tensors {names[:2]}"
            raise ConfigError(
                f"{path} and {paths[0]} cannot be merged: they differ {what}. Merge adapters of "
                "the same modules and sizes; others can be merged into the base model instead "
                "(prunepeft export --format merged)."
            )


def _notes(experts: Sequence[_Expert]) -> list[str]:
    bases = {str(e.config.get("base_model_name_or_path")) for e in experts}
    if len(bases) == 1:
        return []
    names = ", ".join(sorted(bases))[:200]
    return [f"the adapters name different base models ({names}); merge only those of one base"]


def _plain(value: Any) -> Any:
    """Lists of names are sets to peft, which saves them in any order, some twice."""
    is_names = isinstance(value, list) and all(isinstance(v, str) for v in value)
    return set(value) if is_names else value


def _common_start(experts: Sequence[_Expert]) -> tuple[dict[str, str], dict[str, Tensor]]:
    """How the tensors started, and the values; compressed adapters decide."""
    packed = [e for e in experts if e.compressed is not None]
    if packed:
        starts = {e.name: e.start for e in packed[0].compressed.entries}
        values = packed[0].compressed.starts()
        for other in packed[1:]:
            same = {e.name: e.start for e in other.compressed.entries} == starts
            theirs = other.compressed.starts() if same else {}
            if not same or any(not torch.allclose(values[n], theirs[n]) for n in values):
                raise ConfigError(_OTHER_START)
        if "init" in starts.values() and _seeds(experts) > 1:
            raise ConfigError(_OTHER_START)
        return starts, values
    first = experts[0]
    own = {n: t for n, t in first.tensors.items() if not is_head(n, first.config)}
    starts = choose_starts(own, first.config, "auto", None)
    if _seeds(experts) > 1:
        starts = {n: "zeros" if s == "init" else s for n, s in starts.items()}
    return starts, start_values(starts, first.shapes, first.config)


def _seeds(experts: Sequence[_Expert]) -> int:
    return len({str(e.config.get("init_seed")) for e in experts})


def _vector(
    expert: _Expert, names: Sequence[str], starts: Mapping[str, Tensor], trim: float
) -> Joined:
    """The task vector over all tensors, in the order of names."""
    if expert.compressed is not None:
        places = expert.compressed.places()
        return Joined([places[name] for name in names])
    parts = [(expert.tensors[n].float() - starts[n]).flatten().numpy() for n in names]
    tau = np.concatenate(parts)
    values = prune_only(tau, trim) if trim < 1 else tau
    return Joined([(DenseVector(values), 0, values.size)])


def _split(
    change: np.ndarray,
    names: Sequence[str],
    starts: Mapping[str, Tensor],
    shapes: Mapping[str, tuple[int, ...]],
) -> dict[str, Tensor]:
    found, begin = {}, 0
    for name in names:
        end = begin + starts[name].numel()
        found[name] = starts[name] + torch.from_numpy(change[begin:end]).reshape(shapes[name])
        begin = end
    return found


def _mean(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Mean of tensors that have no start: what is taken away has no share in it."""
    shares = [max(w, 0.0) for w in weights]
    if not tensors[0].is_floating_point() or not any(shares):
        return tensors[0]
    total = sum(w * t.double() for w, t in zip(shares, tensors, strict=True))
    return (total / sum(shares)).to(tensors[0].dtype)
