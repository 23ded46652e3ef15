"""Where an adapter's tensors started: a task vector is what training added to that."""

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from torch import Tensor

from prunepeft.errors import CheckpointError, ConfigError, PrunePeftError
from prunepeft.kinds import seeded, slot_kind
from prunepeft.space import Placement, Site
from prunepeft.supernet.export.source import KEY, PEFT_TYPE
from prunepeft.supernet.layer import PREFIX

# How a tensor started. `zeros` and `ones` are the paper's for LoRA and (IA)^3; `init` are the first
# values that prunepeft draws from the adapter's seed; `snapshot` is another adapter folder.
STARTS = ("zeros", "ones", "init", "snapshot")
Tensors = Mapping[str, Tensor]

_PEFT_STARTS = {
    re.compile(r"\.lora_(A|B|embedding_A|embedding_B)(\.weight|\.bias)?$"): "zeros",
    re.compile(r"\.ia3_l(\.weight)?$"): "ones",
}


def choose_starts(
    tensors: Tensors, config: Mapping[str, Any], start: str, snapshot: Tensors | None
) -> dict[str, str]:
    """Tensor name -> one of `STARTS`, for every tensor whose start is known. The others stay dense.

    With `auto`, tensors of prunepeft's own adapters start at `init`, or at zero where that is
    nearer (a module that was not trained from first values); peft's LoRA at zero, its (IA)^3 at
    one. A DoRA magnitude starts at norms of the base model, so it stays dense.

    Args:
        tensors: The adapter's tensors, without task heads.
        config: Its `adapter_config.json`.
        start: `auto`, `zeros`, `ones`, `init` or `snapshot`.
        snapshot: Values of `snapshot`.
    Raises:
        ConfigError: if nothing has a known start.
    """
    floating = {name: t for name, t in tensors.items() if t.is_floating_point()}
    if start in ("zeros", "ones"):
        return dict.fromkeys(floating, start)
    if start == "snapshot":
        own = snapshot or {}
        same = {n for n, t in floating.items() if n in own and own[n].shape == t.shape}
        return _known(dict.fromkeys(sorted(same), "snapshot"), config, start)
    if config.get("peft_type") == PEFT_TYPE:
        first = first_values(config)
        found = {n: "init" for n in floating if n in first and first[n].isfinite().all()}
        if start == "auto":
            found = {n: _nearer(floating[n], first[n]) for n in found}
        return _known(found, config, start)
    if start == "init":
        raise ConfigError(
            f"the first values of an adapter of type {config.get('peft_type')!r:.60} are not "
            "known; use --start auto, zeros, ones or the folder of an adapter as it was before "
            "training."
        )
    return _known(_peft_starts(floating), config, start)


def start_values(
    starts: Mapping[str, str],
    shapes: Mapping[str, tuple[int, ...]],
    config: Mapping[str, Any],
    snapshot: Tensors | None = None,
) -> dict[str, Tensor]:
    """The values at the start, in float32.

    Raises:
        CheckpointError: if the seed or the snapshot does not give a tensor of this shape.
    """
    first = first_values(config) if "init" in starts.values() else {}
    found = {}
    for name, start in starts.items():
        if start in ("zeros", "ones"):
            found[name] = torch.full(shapes[name], float(start == "ones"))
            continue
        value = (first if start == "init" else snapshot or {}).get(name)
        if value is None or tuple(value.shape) != tuple(shapes[name]):
            where = "the adapter's config" if start == "init" else "the snapshot (--start FOLDER)"
            raise CheckpointError(
                f"{where} does not give the starting values of tensor {name!r:.200}; give the "
                "same one that the adapter was compressed with."
            )
        found[name] = value.float()
    return found


def first_values(config: Mapping[str, Any]) -> dict[str, Tensor]:
    """First values of an adapter of prunepeft by the names they are saved under, from its seed.

    What depends on the base model is NaN.
    """
    try:
        placement = Placement.from_dict(config.get("placement"))
        found = {}
        for slot, size in placement.sizes.items():
            kind = slot_kind(slot)
            for site in slot.sites:
                generator = seeded(_seed(config), slot.id, site.path)
                values = kind.init(kind.shapes(site, size), _UnknownLayer(site), generator)
                for name, value in values.items():
                    found[f"{KEY}{site.path}.{PREFIX}{slot.kind}_{name}"] = value
    except PrunePeftError as error:
        raise CheckpointError(f"the adapter's config has a bad placement: {error}") from error
    return found


def fingerprint(values: Tensors) -> list[float]:
    """Sum and norm of starting values that a file does not hold, to know them again."""
    doubles = [values[name].double() for name in sorted(values)]
    total = sum(float(v.sum()) for v in doubles)
    return [total, math.sqrt(sum(float(v.square().sum()) for v in doubles))]


def same_fingerprint(a: list[float], b: list[float]) -> bool:
    """Whether two fingerprints agree; another processor may round the last bit differently."""
    return all(abs(x - y) <= 1e-4 * max(1e-12, a[1]) for x, y in zip(a, b, strict=True))


class _UnknownLayer:
    """A layer of a base model that is not at hand."""

    training = False

    def __init__(self, site: Site) -> None:
        self._site = site

    def frozen_weight(self) -> Tensor:
        return torch.full((self._site.d_out, self._site.d_in), torch.nan)

    def frozen_row_norm(self) -> Tensor:
        return torch.full((self._site.d_out,), torch.nan)

    def frozen_linear(self, x: Tensor) -> Tensor:
        return torch.full((*x.shape[:-1], self._site.d_out), torch.nan)

    def sublayer_input(self) -> Tensor:
        return torch.full((self._site.d_in,), torch.nan)


def is_head(name: str, config: Mapping[str, Any]) -> bool:
    """Whether a tensor belongs to a module that is trained in full, such as a task head.

    That is every tensor that does not carry the prefix of the adapter's type. Types without one
    (prompt tuning) know their heads by `modules_to_save`.
    """
    prefix = PEFT_TYPE_TO_PREFIX_MAPPING.get(config.get("peft_type"))
    if prefix is not None:
        return f".{prefix}" not in name
    heads = config.get("modules_to_save") or []
    return any(isinstance(head, str) and f"{head}." in name for head in heads)


def _peft_starts(tensors: Tensors) -> dict[str, str]:
    pairs = ((n, known, start) for n in tensors for known, start in _PEFT_STARTS.items())
    return {name: start for name, known, start in pairs if known.search(name)}


def _nearer(tensor: Tensor, first: Tensor) -> str:
    if tensor.shape != first.shape:
        return "zeros"
    value = tensor.float()
    return "init" if (value - first).norm() <= value.norm() else "zeros"


def _known(found: dict[str, str], config: Mapping[str, Any], start: str) -> dict[str, str]:
    if not found:
        raise ConfigError(
            f"no tensor of this adapter (type {config.get('peft_type')!r:.60}) has a known "
            f"starting value with --start {start}; give --start with the folder of the adapter "
            "as it was before training, or --start zeros to compress the values themselves."
        )
    return found


def _seed(config: Mapping[str, Any]) -> int:
    seed = config.get("init_seed", 0)
    if not isinstance(seed, int):
        raise CheckpointError(f"init_seed in the adapter's config is {seed!r:.60}, not a number.")
    return seed
