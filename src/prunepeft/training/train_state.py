"""The exact state of a training loop in one file: going on equals never having stopped."""

import json
import logging
import math
import os
import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from prunepeft.errors import CheckpointError, StateError
from prunepeft.state.files import canonical_json, parse_json
from prunepeft.state.tensors import read_tensors_and_metadata, write_tensors

log = logging.getLogger(__name__)

SCHEMA_VERSION = 1
_KEY = "train_state"


@dataclass(frozen=True)
class TrainState:
    """What `load_train_state` gives back beside what it restores in place.

    Attributes:
        tensors: The trainable tensors by name, on the CPU, any shape.
        step: Optimiser steps done.
        epoch: Epochs done, possibly a fraction.
        extra: What the caller had added.
    """

    tensors: dict[str, Tensor]
    step: int
    epoch: float
    extra: dict[str, Any]


def save_train_state(
    path: str | os.PathLike[str],
    *,
    tensors: Mapping[str, Tensor],
    optimizer: Optimizer | None,
    scheduler: LRScheduler | None,
    step: int,
    epoch: float,
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Write weights, optimiser, learning-rate schedule, counters and all random states to `path`.

    Args:
        path: The file, replaced atomically.
        tensors: Trainable tensors by name, any shape and device.
        optimizer: Any whose `state_dict` holds tensors, numbers, text, lists and mappings.
        scheduler: As `optimizer`.
        step: Optimiser steps done.
        epoch: Epochs done.
        extra: More values of those types, for example the position in the data.

    Raises:
        StateError: if a state holds something else.
        DiskError: if the disk refuses; the old file is untouched.
    """
    random_tensors, random_values = rng_state()
    tree = {
        "schema_version": SCHEMA_VERSION,
        "step": step,
        "epoch": epoch,
        "tensors": dict(tensors),
        "optimizer": None if optimizer is None else optimizer.state_dict(),
        "optimizer_class": None if optimizer is None else type(optimizer).__name__,
        "scheduler": None if scheduler is None else scheduler.state_dict(),
        "scheduler_class": None if scheduler is None else type(scheduler).__name__,
        "random": [random_tensors, random_values],
        "extra": dict(extra or {}),
    }
    leaves: dict[str, Tensor] = {}
    plain = _flatten(tree, "", leaves)
    write_tensors(path, leaves, {_KEY: canonical_json(plain).decode("ascii")})


def load_train_state(
    path: str | os.PathLike[str],
    *,
    optimizer: Optimizer | None = None,
    scheduler: LRScheduler | None = None,
    restore_random: bool = True,
) -> TrainState:
    """Read what `save_train_state` wrote and put optimiser, schedule and random states back.

    The weights are returned, not loaded: put them into the model first.

    Args:
        path: The file.
        optimizer: A fresh one of the same class over the same parameters in the same order.
        scheduler: A fresh one of the same class.
        restore_random: Whether to set the random states of torch, numpy and Python.

    Raises:
        CheckpointError: if the file is damaged, or does not fit the optimiser or the schedule.
    """
    file = Path(path)
    leaves, metadata = read_tensors_and_metadata(file, sealed=True)
    if _KEY not in metadata:
        raise CheckpointError(f"{file} is no training state; give the file that a run saved.")
    try:
        tree = _unflatten(parse_json(metadata[_KEY].encode("utf-8"), file), leaves)
        if tree["schema_version"] != SCHEMA_VERSION:
            raise ValueError(
                f"its schema version is {tree['schema_version']}, not {SCHEMA_VERSION}"
            )
        state = TrainState(tree["tensors"], tree["step"], tree["epoch"], tree["extra"])
        for name, target in (("optimizer", optimizer), ("scheduler", scheduler)):
            if target is not None and tree[f"{name}_class"] != type(target).__name__:
                raise ValueError(
                    f"its {name} is {tree[f'{name}_class']}, not {type(target).__name__}"
                )
        if optimizer is not None:
            _restore_optimizer(optimizer, tree["optimizer"])
        if scheduler is not None:
            scheduler.load_state_dict(tree["scheduler"])
        if restore_random:
            set_rng_state(*tree["random"])
    except (KeyError, ValueError, TypeError, IndexError, RuntimeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(
            f"{file} does not fit this training loop: {error}. Resume with the same model, "
            "optimiser and settings, or start again in another --output."
        ) from error
    return state


def rng_state() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the random states of torch (CPU and every CUDA device), numpy and Python.

    Returns:
        Integer tensors by name: `torch` and `cuda.<i>` (bytes), `numpy` (624,), `python` (625,);
        and the few plain values that go with them.
    """
    version, words, gauss = random.getstate()
    numpy = np.random.get_state(legacy=False)
    tensors = {
        "torch": torch.get_rng_state(),
        "python": torch.tensor(words, dtype=torch.int64),
        "numpy": torch.from_numpy(numpy["state"]["key"].astype(np.int64)),
    }
    if torch.cuda.is_available():
        for index, device_state in enumerate(torch.cuda.get_rng_state_all()):
            tensors[f"cuda.{index}"] = device_state
    values = {
        "python": {"version": version, "gauss": gauss},
        "numpy": {
            "bit_generator": numpy["bit_generator"],
            "pos": int(numpy["state"]["pos"]),
            "has_gauss": int(numpy["has_gauss"]),
            "gauss": float(numpy["gauss"]),
        },
    }
    return tensors, values


def set_rng_state(tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
    """Put back what `rng_state` returned; states of CUDA devices that are not here are skipped."""
    torch.set_rng_state(tensors["torch"])
    python, numpy = values["python"], values["numpy"]
    random.setstate((python["version"], tuple(tensors["python"].tolist()), python["gauss"]))
    np.random.set_state(
        {
            "bit_generator": numpy["bit_generator"],
            "state": {"key": tensors["numpy"].numpy().astype(np.uint32), "pos": numpy["pos"]},
            "has_gauss": numpy["has_gauss"],
            "gauss": numpy["gauss"],
        }
    )
    devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    saved = sum(name.startswith("cuda.") for name in tensors)
    if saved != devices:
        log.warning("random states of %d CUDA devices were saved, %d are here", saved, devices)
    for index in range(min(saved, devices)):
        torch.cuda.set_rng_state(tensors[f"cuda.{index}"], index)


def _restore_optimizer(optimizer: Optimizer, saved: Mapping[str, Any]) -> None:
    """Load a state dict and keep the saved precision, which torch casts to the parameter's."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    order = [i for group in saved["param_groups"] for i in group["params"]]
    for parameter, index in zip(parameters, order, strict=True):
        for name, value in saved["state"].get(index, {}).items():
            first_moment = name in ("exp_avg", "momentum_buffer")
            if first_moment and isinstance(value, Tensor) and value.shape != parameter.shape:
                raise ValueError(
                    f"{name} has shape {tuple(value.shape)}, its parameter {tuple(parameter.shape)}"
                )
    optimizer.load_state_dict(dict(saved))
    for parameter, index in zip(parameters, order, strict=True):
        for name, value in saved["state"].get(index, {}).items():
            if isinstance(value, Tensor):
                loaded = optimizer.state[parameter][name]
                if loaded.dtype != value.dtype:
                    optimizer.state[parameter][name] = value.to(loaded.device, copy=True)


def _flatten(value: Any, path: str, leaves: dict[str, Tensor]) -> Any:
    """Return `value` as JSON, each tensor moved to `leaves` under its path in the tree.

    Every mapping becomes {"map": [[key, value], ...]}, so that whole-number keys survive.
    """
    if isinstance(value, Tensor):
        name = path if path not in leaves else f"{path}#{len(leaves)}"
        leaves[name] = value
        return {"tensor": name}
    if isinstance(value, np.generic):
        return _flatten(value.item(), path, leaves)
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {"float": repr(float(value))}
    if isinstance(value, Mapping):
        items = []
        for key, item in value.items():
            if not isinstance(key, str | int):
                raise StateError(
                    f"the training state has the key {key!r:.100} at {path}; use text."
                )
            items.append([key, _flatten(item, f"{path}/{key}" if path else str(key), leaves)])
        return {"map": items}
    if isinstance(value, tuple | list):
        items = [_flatten(item, f"{path}/{i}", leaves) for i, item in enumerate(value)]
        return {"tuple": items} if isinstance(value, tuple) else items
    raise StateError(
        f"the training state holds a {type(value).__name__} at {path}; only tensors, numbers, "
        "text, lists and mappings can be saved."
    )


def _unflatten(value: Any, leaves: Mapping[str, Tensor]) -> Any:
    """Undo `_flatten`."""
    if isinstance(value, list):
        return [_unflatten(item, leaves) for item in value]
    if not isinstance(value, dict):
        return value
    (form, content), *rest = value.items()
    if rest or form not in ("tensor", "float", "tuple", "map"):
        raise ValueError(f"{json.dumps(value):.100} is no part of a training state")
    if form == "tensor":
        return leaves[content]
    if form == "float":
        return float(content)
    if form == "tuple":
        return tuple(_unflatten(item, leaves) for item in content)
    return {key: _unflatten(item, leaves) for key, item in content}
