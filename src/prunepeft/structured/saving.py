"""Pruned base models on the disk, in the form of transformers.

A cut that the stock config can say (the same width in every layer) is opened by any stock class. Of
any other cut the config keeps the widths it can say, and `prunepeft_cut` holds the rest: group id
-> [units kept, units by the config]. Stock classes then refuse the weights, whose shapes differ.
"""

import copy
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from prunepeft.errors import ConfigError, StateError
from prunepeft.state import write_folder, write_json
from prunepeft.structured.cut import Cut
from prunepeft.structured.groups import Group, find_groups
from prunepeft.structured.opening import (
    CUT_FILE,
    CUT_KEY,
    FORMAT_VERSION,
    build_empty,
    record_base,
    shrink,
)
from prunepeft.supernet.base_digest import BASE_KEY


def save_base(
    model: PreTrainedModel,
    folder: str | os.PathLike[str],
    *,
    groups: tuple[Group, ...],
    cut: Cut,
    processor: Any = None,
) -> str:
    """Save a base model that was cut, whole or not at all, without pickle.

    Written are the weights (safetensors) with the head the model has, `config.json`,
    `generation_config.json` where there is one, `cut.json` (which units of the unpruned model are
    left) and the tokenizer or image processor. The digest also goes into `model.config`, so that
    adapters made on this model from now on carry it.

    Args:
        model: The cut model, without an adapter.
        folder: Where to; an earlier pruned base there is replaced.
        groups: Groups of the model before the cut.
        cut: What was kept.
        processor: Tokenizer or image processor to save beside.
    Returns:
        The content digest, see `supernet.base_digest.content_digest`.
    Raises:
        ConfigError: if the folder holds something else, or a per-layer cut is that of a model whose
            class is not one of transformers.
        StateError: if the model carries an adapter, or was not cut as `cut` says.
    """
    place = Path(folder)
    _check_place(place)
    if any(name.endswith(".base_layer") for name, _ in model.named_modules()):
        raise StateError(
            "the model carries an adapter; take it off with prunepeft.detach, then save the base."
        )
    widths = _unsaid_widths(model, groups, cut)
    digest = record_base(model, groups, cut)
    if widths:
        entry = {"format_version": FORMAT_VERSION, "units": {k: list(v) for k, v in widths.items()}}
        setattr(model.config, CUT_KEY, entry)

    def fill(temporary: Path) -> None:
        model.save_pretrained(temporary)
        write_json(temporary / CUT_FILE, cut.to_dict())
        if processor is not None:
            inner = processor if hasattr(processor, "save_pretrained") else processor.processor
            inner.save_pretrained(temporary)

    write_folder(place, fill)
    return digest


def _unsaid_widths(
    model: PreTrainedModel, groups: tuple[Group, ...], cut: Cut
) -> dict[str, tuple[int, int]]:
    """Group id -> (units kept, units by the config) where the config does not say what is left."""
    config = copy.deepcopy(model.config)
    for key in (CUT_KEY, BASE_KEY):
        config.__dict__.pop(key, None)
    model.config.__dict__.pop(CUT_KEY, None)
    empty = build_empty(type(model), config)
    if not _differing(empty, model):
        return {}
    kept = {g.id: len(cut.keep.get(g.id, range(g.n_units))) for g in groups}
    said = {g.id: g.n_units for g in find_groups(empty)}
    widths = {k: (kept[k], n) for k, n in said.items() if k in kept and kept[k] != n}
    if widths:
        shrink(empty, widths)
    if wrong := _differing(empty, model):
        raise StateError(
            f"the model does not have the shapes that its cut says ({wrong} differs); cut it with "
            "structured.surgery.apply_cut and pass the groups and the cut given there."
        )
    if not type(model).__module__.startswith("transformers."):
        raise ConfigError(
            f"{type(model).__name__} is not a class of transformers, and its layers have widths "
            "of their own, so that nobody could open it again; cut every layer alike."
        )
    return widths


def _differing(empty: PreTrainedModel, model: PreTrainedModel) -> str | None:
    """Name of a tensor whose shape differs."""
    ours, others = _shapes(empty.state_dict()), _shapes(model.state_dict())
    wrong = (n for n in ours.keys() | others.keys() if ours.get(n) != others.get(n))
    return min(wrong, default=None)


def _shapes(state: dict[str, Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in state.items()}


def _check_place(place: Path) -> None:
    if place.exists() and not place.is_dir():
        raise ConfigError(f"the folder {place} for the pruned base is a file; give another name.")
    if place.is_dir() and any(place.iterdir()) and not (place / CUT_FILE).is_file():
        raise ConfigError(
            f"{place} is not empty and holds no pruned base ({CUT_FILE} is missing); choose a new "
            "folder. Nothing was changed."
        )
