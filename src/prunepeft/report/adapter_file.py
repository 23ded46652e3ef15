"""Adapter folders as they lie on the disk: which tensors, of which shape, under which settings."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from prunepeft.errors import CheckpointError
from prunepeft.report.grid import Module, place_of, plain
from prunepeft.space import Placement

Shapes = Mapping[str, tuple[int, ...]]

_PREFIX = "base_model.model."
_LORA = re.compile(r"\.lora_(A|B|magnitude_vector|embedding_A|embedding_B)\b.*$", re.DOTALL)
_ADAPTER = re.compile(r"\.(union_|lora_)[^.]+(\.weight)?$")


@dataclass(frozen=True)
class LoraSettings:
    """The fields of a LoRA config that decide what is served, and how."""

    r: int
    alpha: float
    rank_pattern: Mapping[str, Any]
    alpha_pattern: Mapping[str, Any]
    is_dora: bool
    is_rslora: bool
    has_bias: bool
    has_head: bool
    is_regex: bool


def read_header(path: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors of a safetensors file, without reading their values.

    Raises:
        CheckpointError: if there is no such file or it is damaged.
    """
    if not path.is_file():
        pickled = sorted(p.name for p in path.parent.glob("*.bin"))
        why = f"; {pickled[0]} is a pickle, which is never read" if pickled else ""
        raise CheckpointError(
            f"{path} does not exist{why}. Save the adapter as safetensors (the default of peft)."
        )
    try:
        with safe_open(path, framework="np") as file:
            return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} is not a sound safetensors file ({plain(error, 120)}). "
            "Copy or export it again."
        ) from error


def union_modules(placement: Placement, shapes: Shapes, source: Path) -> list[Module]:
    """The modules of a union checkpoint, with their parameters counted in the file.

    Raises:
        CheckpointError: if a module of the placement has no tensors in the file.
    """
    found = []
    kinds = sorted(placement.kinds, key=len, reverse=True)  # the longest name that fits is meant
    by_home: dict[str, list[tuple[int, ...]]] = {}
    for name, shape in shapes.items():
        path, _, tensor = name.removesuffix(".weight").removeprefix(_PREFIX).rpartition(".union_")
        kind = next((k for k in kinds if tensor.startswith(f"{k}_")), "")
        by_home.setdefault(f"{path}:{kind}", []).append(shape)
    for slot, size in placement.sizes.items():
        homes = [by_home.get(f"{site.path}:{slot.kind}") for site in slot.sites]
        if not all(homes):
            raise CheckpointError(
                f"{source} holds no tensors for {slot.id}, which the placement lists. The adapter "
                "is incomplete: copy or export it again."
            )
        n_params = sum(math.prod(shape) for home in homes for shape in home or ())
        paths = tuple(site.path for site in slot.sites)
        found.append(Module(slot.id, *place_of(slot), size, n_params, paths))
    return found


def read_lora_settings(config: Mapping[str, Any], source: Path) -> LoraSettings:
    """The settings of a plain LoRA adapter. Raises CheckpointError on a field of the wrong type."""

    def field(name: str, kinds: type | tuple[type, ...], default: Any) -> Any:
        value = config.get(name)
        if value is None:
            return default
        if not isinstance(value, kinds) or (isinstance(value, bool) and kinds is not bool):
            raise CheckpointError(
                f"{source}: {name} is {plain(repr(value), 60)}, which is not allowed there. The "
                "file is damaged: save the adapter again."
            )
        return value

    return LoraSettings(
        r=field("r", int, 8),
        alpha=field("lora_alpha", (int, float), 8),
        rank_pattern=field("rank_pattern", Mapping, {}),
        alpha_pattern=field("alpha_pattern", Mapping, {}),
        is_dora=field("use_dora", bool, False),
        is_rslora=field("use_rslora", bool, False),
        has_bias=field("bias", str, "none") != "none",
        has_head=bool(field("modules_to_save", list, [])),
        is_regex=isinstance(config.get("target_modules"), str)
        and config.get("target_modules") != "all-linear",
    )


def lora_modules(shapes: Shapes, settings: LoraSettings, source: Path) -> list[Module]:
    """The modules of a plain LoRA checkpoint, told from its tensors.

    Raises:
        CheckpointError: if there are none, or an A has no B of its rank.
    """
    by_path: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, shape in shapes.items():
        if match := _LORA.search(name):
            by_path.setdefault(name[: match.start()].removeprefix(_PREFIX), {})[match[1]] = shape
    if not by_path:
        raise CheckpointError(f"{source} holds no LoRA tensors. Is it the right folder?")
    kind = "dora" if settings.is_dora else "lora"
    return [
        Module(
            f"{path}:{kind}",
            *_place(path, kind),
            size=_rank(path, tensors, source),
            n_params=sum(math.prod(shape) for shape in tensors.values()),
            paths=(path,),
        )
        for path, tensors in by_path.items()
    ]


def head_params(shapes: Shapes) -> int:
    """Parameters in the file that belong to no module: the task head."""
    return sum(math.prod(s) for name, s in shapes.items() if not _ADAPTER.search(name))


def _rank(path: str, tensors: Mapping[str, tuple[int, ...]], source: Path) -> int:
    down = tensors.get("A") or tensors.get("embedding_A")
    up = tensors.get("B") or tensors.get("embedding_B")
    if not down or not up or len(down) < 2 or len(up) < 2 or down[0] != up[1] or down[0] < 1:
        raise CheckpointError(
            f"{source}: the LoRA tensors of {plain(path, 100)!r} have shapes {down} and {up}, "
            "which do not fit together. The file is damaged: copy or export it again."
        )
    return down[0]


def _place(path: str, kind: str) -> tuple[tuple[str, int], tuple[str, str, str]]:
    """Row and column of a module path: split at its first number, the layer."""
    parts = path.split(".")
    at = next((i for i, part in enumerate(parts) if part.isdigit() and len(part) < 7), None)
    if at is None:
        return ("model", 0), ("", path, kind)
    stack = next((p for p in parts[:at] if p in ("encoder", "decoder")), "model")
    rest = parts[at + 1 :] or ["layer"]
    return (stack, int(parts[at])), (".".join(rest[:-1]), rest[-1], kind)
