"""Read a saved adapter strictly: the folder may come from anyone."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prunepeft.errors import CheckpointError, ConfigError, PrunePeftError
from prunepeft.kinds import Kind, slot_kind
from prunepeft.space import Placement, Site
from prunepeft.state import read_json, read_tensors, verify_folder
from prunepeft.supernet.base_digest import is_digest
from prunepeft.supernet.layer import PREFIX

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
KEY = "base_model.model."
PEFT_TYPE = "PRUNEPEFT"
TASK_TYPES = (
    "SEQ_CLS",
    "CAUSAL_LM",
    "SEQ_2_SEQ_LM",
    "TOKEN_CLS",
    "QUESTION_ANS",
    "FEATURE_EXTRACTION",
)


@dataclass(frozen=True)
class Module:
    """One module on one layer.

    Attributes:
        site: The layer.
        kind: The kind with its options.
        size: Its size.
        scaling: Factor of its update.
        tensors: Its tensors by the names the kind uses.
    """

    site: Site
    kind: Kind
    size: int
    scaling: float
    tensors: dict[str, Tensor] = field(repr=False)


@dataclass(frozen=True)
class SavedAdapter:
    """A union adapter on the disk, checked.

    Attributes:
        folder: Where it is.
        placement: What it holds.
        modules: One entry per layer and kind, in the order of the placement.
        head: Tensors of the task head by their names in the base model.
        base_name: Folder or hub id of the base model, if known.
        revision: Revision of the base model.
        task_type: One of `TASK_TYPES` or None.
        modules_to_save: Names of the head modules.
        auto_mapping: Class of the base model, for peft's own loader.
        init_seed: Seed of the first values.
        base_digest: Content digest of the pruned base model; None on an unpruned one.
    """

    folder: Path
    placement: Placement
    modules: tuple[Module, ...]
    head: dict[str, Tensor] = field(repr=False)
    base_name: str | None
    revision: str | None
    task_type: str | None
    modules_to_save: tuple[str, ...]
    auto_mapping: dict[str, str] | None
    init_seed: int
    base_digest: str | None = None

    @property
    def kinds(self) -> tuple[str, ...]:
        return self.placement.kinds


def read_adapter(folder: Path) -> SavedAdapter:
    """Read and check an adapter folder; nothing in it is run or followed.

    Raises:
        CheckpointError: if a file is missing or damaged, a tensor is missing, unexpected, of
            another shape or not finite, or every module is still as it was made.
    """
    folder = Path(folder)
    if (folder / "manifest.json").is_file():
        verify_folder(folder)
    data = read_json(folder / CONFIG_FILE)
    if not isinstance(data, dict) or data.get("peft_type") != PEFT_TYPE:
        found = data.get("peft_type") if isinstance(data, dict) else type(data).__name__
        raise CheckpointError(
            f"{folder / CONFIG_FILE} has peft_type {found!r:.60}; only adapters of type "
            f"{PEFT_TYPE} can be exported. Give the folder best/adapter of a run."
        )
    placement = _placement(data, folder)
    head_names = _texts(data, "modules_to_save", folder)
    tensors = read_tensors(folder / WEIGHTS_FILE, finite=True)
    modules = tuple(_modules(placement, tensors, folder))
    head = _head(tensors, head_names, folder)
    if all(_is_neutral(m) for m in modules):
        raise CheckpointError(
            f"no module in {folder} was ever trained: each still changes nothing (for LoRA, B is "
            "all zeros). Export the adapter of a finished training."
        )
    return SavedAdapter(
        folder=folder,
        placement=placement,
        modules=modules,
        head=head,
        base_name=_text(data, "base_model_name_or_path", folder),
        revision=_text(data, "revision", folder),
        task_type=_task_type(data, folder),
        modules_to_save=tuple(dict.fromkeys(head_names)),
        auto_mapping=_auto_mapping(data.get("auto_mapping")),
        init_seed=seed if isinstance(seed := data.get("init_seed", 0), int) else 0,
        base_digest=_digest(data, folder),
    )


def _placement(data: Mapping[str, Any], folder: Path) -> Placement:
    try:
        placement = Placement.from_dict(data.get("placement"))
        for slot in placement:
            slot_kind(slot)
    except PrunePeftError as error:
        raise CheckpointError(f"{folder / CONFIG_FILE} has a bad placement: {error}") from error
    if not len(placement):
        raise ConfigError(
            f"the adapter in {folder} holds no module, so there is nothing to export; "
            "search with a larger budget."
        )
    return placement


def _modules(placement: Placement, tensors: dict[str, Tensor], folder: Path) -> list[Module]:
    """Take every module's tensors out of `tensors`."""
    found = []
    for slot, size in placement.sizes.items():
        kind = slot_kind(slot)
        for site in slot.sites:
            own = {}
            for name, shape in kind.shapes(site, size).items():
                key = f"{KEY}{site.path}.{PREFIX}{slot.kind}_{name}"
                if key not in tensors:
                    raise _misfit(folder, f"tensor {key!r} is missing")
                own[name] = tensors.pop(key)
                if tuple(own[name].shape) != shape or not own[name].is_floating_point():
                    got = f"{tuple(own[name].shape)} {own[name].dtype}"
                    raise _misfit(folder, f"tensor {key!r} is {got} and should be {shape}")
                own[name] = own[name].float()
            found.append(Module(site, kind, size, kind.scaling(slot.sizes[-1]), own))
    return found


def _head(tensors: Mapping[str, Tensor], names: tuple[str, ...], folder: Path) -> dict[str, Tensor]:
    head = {}
    for key, tensor in tensors.items():
        name = key.removeprefix(KEY)
        if name == key or not any(f"{n}." in name for n in names):  # as peft: pre_classifier too
            raise _misfit(folder, f"tensor {key[:100]!r} belongs to no module of it")
        head[name] = tensor
    return head


def _is_neutral(module: Module) -> bool:
    """Whether it changes nothing, as most kinds do before they are trained."""
    if "l" in module.tensors:
        return bool(torch.all(module.tensors["l"] == 1))
    last = [module.tensors[n] for n in ("B", "up", "up_bias") if n in module.tensors]
    return bool(last) and not any(torch.any(tensor) for tensor in last)


def _text(data: Mapping[str, Any], name: str, folder: Path) -> str | None:
    value = data.get(name)
    if value is None or value == "":
        return None
    if not isinstance(value, str) or len(value) > 1000 or not value.isprintable():
        raise CheckpointError(
            f"{folder / CONFIG_FILE}: {name} must be plain text; got {value!r:.80}."
        )
    return value


def _digest(data: Mapping[str, Any], folder: Path) -> str | None:
    value = data.get("base_digest")
    if value is not None and not is_digest(value):
        raise CheckpointError(
            f"{folder / CONFIG_FILE}: base_digest must be a SHA-256 in hex; got {value!r:.80}."
        )
    return value


def _texts(data: Mapping[str, Any], name: str, folder: Path) -> tuple[str, ...]:
    value = data.get(name) or []
    if not isinstance(value, list) or len(value) > 100:
        raise CheckpointError(f"{folder / CONFIG_FILE}: {name} must be a list of names.")
    for item in value:
        if not isinstance(item, str) or not re.fullmatch(r"\w+(\.\w+)*", item):
            raise CheckpointError(f"{folder / CONFIG_FILE}: {name} holds {item!r:.80}, not a name.")
    return tuple(value)


def _task_type(data: Mapping[str, Any], folder: Path) -> str | None:
    value = _text(data, "task_type", folder)
    if value is not None and value not in TASK_TYPES:
        known = ", ".join(TASK_TYPES)
        raise CheckpointError(
            f"{folder / CONFIG_FILE}: task_type {value!r:.60} is unknown; it is one of {known}."
        )
    return value


def _auto_mapping(value: Any) -> dict[str, str] | None:
    """The mapping if it names a class of transformers; peft imports whatever it says."""
    if not isinstance(value, Mapping):
        return None
    cls, library = value.get("base_model_class"), value.get("parent_library")
    if not isinstance(cls, str) or not isinstance(library, str):
        return None
    if not re.fullmatch(r"transformers(\.models(\.\w+)*)?", library) or not cls.isidentifier():
        return None
    return {"base_model_class": cls, "parent_library": library}


def _misfit(folder: Path, reason: str) -> CheckpointError:
    return CheckpointError(
        f"the tensors in {folder} do not fit its placement: {reason}. The folder is damaged or was "
        "edited by hand; restore it from a copy."
    )
