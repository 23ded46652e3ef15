"""Open pruned base models: layers take their widths before weights are read. No code is run."""

import copy
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.auto_factory import _get_model_class

from prunepeft.errors import CheckpointError, ConfigError, SiteError
from prunepeft.state import read_json
from prunepeft.structured.cut import Cut
from prunepeft.structured.groups import Group, find_groups
from prunepeft.structured.surgery import apply_cut
from prunepeft.supernet.base_digest import BASE_KEY, content_digest, read_record

logger = logging.getLogger(__name__)

CUT_KEY = "prunepeft_cut"  # in the config.json of a base whose layers differ in width
CUT_FILE = "cut.json"
FORMAT_VERSION = 1


def open_model(model_class: Any, place: str, config: PreTrainedConfig, **options: Any) -> Any:
    """Do what `model_class.from_pretrained(place, config=config, **options)` does, cut or not.

    Args:
        model_class: Auto class or model class.
        place: Folder or hub id.
        config: Its config.
        options: Of `from_pretrained`.
    Returns:
        What `from_pretrained` returns: the model, or the model and the loading info.
    Raises:
        CheckpointError: if the config names groups or sizes that the architecture does not have.
    """
    widths = read_widths(config)
    if not widths:
        return model_class.from_pretrained(place, config=config, **options)
    options.pop("trust_remote_code", None)
    plain = _resolve(model_class, config)
    result = _cut_class(plain, widths).from_pretrained(place, config=config, **options)
    model = result[0] if isinstance(result, tuple) else result
    model.__class__ = plain
    return result


def empty_model(model_class: Any, config: PreTrainedConfig, **options: Any) -> PreTrainedModel:
    """The architecture of a config on the meta device, cut or not; no weights are read.

    Args:
        model_class: Auto class or model class.
        config: The config.
        options: Of `from_config` of Auto classes.
    """
    widths = read_widths(config)
    if widths:
        plain = _resolve(model_class, config)
        model = build_empty(_cut_class(plain, widths), config)
        model.__class__ = plain
        return model
    if isinstance(model_class, type) and issubclass(model_class, PreTrainedModel):
        return build_empty(model_class, config)
    with torch.device("meta"):
        return model_class.from_config(config, **options)


def build_empty(cls: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    """A model of this class on the meta device."""
    with torch.device("meta"):
        return cls._from_config(config)


def load_base(
    folder: str | os.PathLike[str], *, verify: bool = False, **options: Any
) -> PreTrainedModel:
    """Load a pruned base model that `save_base` wrote, with the head it was saved with.

    Args:
        folder: The folder, or a hub id.
        verify: Compute the content digest of what was loaded and compare it with the one in
            `config.json`. It needs the dtype the base was saved in.
        options: Of `from_pretrained`; dtype is that of the file if not given.
    Returns:
        The model in evaluation mode.
    Raises:
        ConfigError: if there is no model or its class is unknown.
        CheckpointError: if config or weights are damaged, or do not belong together.
    """
    place = str(folder)
    local = {"local_files_only": Path(place).is_dir(), "trust_remote_code": False}
    try:
        config = AutoConfig.from_pretrained(place, **local)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{place!r} holds no model that can be opened ({_reason(error)}); give the folder of a "
            "pruned base."
        ) from error
    record = read_record(config)
    names = config.architectures or [""]
    cls = getattr(transformers, str(names[0]), None)
    if not (isinstance(cls, type) and issubclass(cls, PreTrainedModel)):
        raise ConfigError(f"the class of {place!r} is unknown to transformers ({names!r:.80}).")
    options = {"dtype": "auto", **local, **options, "output_loading_info": True}
    try:
        model, info = open_model(cls, place, config, **options)
    except (CheckpointError, torch.OutOfMemoryError):
        raise
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(
            f"the weights of {place!r} cannot be loaded ({_reason(error)}); they are damaged or do "
            "not fit its config.json. Restore the folder, or save the pruned base again."
        ) from error
    if missing := sorted(info["missing_keys"]):
        raise CheckpointError(
            f"{place!r} lacks {len(missing)} tensors, as {missing[0]}; the weights are incomplete. "
            "Restore the folder, or save the pruned base again."
        )
    if verify:
        _verify(model, record, place)
    return model.eval()


def load_cut(model: PreTrainedModel, cut: Cut | str | os.PathLike[str]) -> PreTrainedModel:
    """Cut an unpruned model again, so that an adapter made on the pruned base fits it exactly.

    The model is changed in place and gets the digest of the pruned base, which is the same only if
    weights and dtype are those the base was made of.

    Args:
        model: The unpruned model, under any head.
        cut: What was kept, the file `cut.json`, or a folder that holds it.
    Returns:
        The model.
    Raises:
        ConfigError: if the cut does not fit the model.
        CheckpointError: if the file is missing or damaged.
    """
    if not isinstance(cut, Cut):
        cut = read_cut(cut)
    if read_record(model.config) is not None:
        raise ConfigError("the model is pruned already; give the unpruned model the cut is of.")
    groups = find_groups(model)
    apply_cut(model, groups, cut)
    record_base(model, groups, cut)
    return model


def read_cut(path: str | os.PathLike[str]) -> Cut:
    """Read a `cut.json`, or that of a folder. Raises CheckpointError if it is not sound."""
    file = Path(path)
    file = file / CUT_FILE if file.is_dir() else file
    try:
        return Cut.from_dict(read_json(file))
    except ConfigError as error:
        raise CheckpointError(f"{file} holds no cut: {error}") from error


def record_base(model: PreTrainedModel, groups: tuple[Group, ...], cut: Cut) -> str:
    """Write the content digest of a cut model and what was kept into its config; return it."""
    units: dict[str, list[int]] = {}
    for group in groups:
        total = units.setdefault(group.what, [0, 0])
        total[0] += len(cut.keep.get(group.id, range(group.n_units)))
        total[1] += group.n_units
    digest = content_digest(model)
    record = {"format_version": FORMAT_VERSION, "digest": digest, "units": units}
    setattr(model.config, BASE_KEY, record)
    return digest


def renew_record(model: PreTrainedModel) -> None:
    """Compute the digest of a pruned base anew, whose weights were changed; others stay as is."""
    record = read_record(model.config)
    if record is not None:
        setattr(model.config, BASE_KEY, record | {"digest": content_digest(model)})


def read_widths(config: PreTrainedConfig) -> dict[str, tuple[int, int]]:
    """Group id -> (units kept, units by the config); empty if the config says all.

    Raises:
        CheckpointError: if the entry is damaged.
    """
    entry = getattr(config, CUT_KEY, None)
    if entry is None:
        return {}
    units = entry.get("units") if isinstance(entry, Mapping) else None
    if not isinstance(units, Mapping) or set(entry) != {"format_version", "units"}:
        raise _damaged(f"{entry!r:.100} is not a mapping of format_version and units")
    if entry["format_version"] != FORMAT_VERSION:
        raise _damaged(
            f"format {entry['format_version']!r:.20} is not supported, this version reads "
            f"{FORMAT_VERSION}"
        )
    for name, pair in units.items():
        whole = isinstance(pair, list | tuple) and all(type(n) is int for n in pair)
        if not whole or len(pair) != 2 or not 0 <= pair[0] < pair[1]:
            raise _damaged(f"group {name!r:.60} has {pair!r:.60}; it must be [kept, of], kept < of")
    return {str(name): (pair[0], pair[1]) for name, pair in units.items()}


def shrink(model: PreTrainedModel, widths: Mapping[str, tuple[int, int]]) -> None:
    """Cut a stock model of unknown weights to these widths; its config stays as it is.

    Raises:
        CheckpointError: if it has no such group, or not that many units.
    """
    try:
        groups = {group.id: group for group in find_groups(model)}
    except SiteError as error:
        raise _damaged(f"{type(model).__name__} has no groups that could be cut") from error
    for name, (kept, of) in widths.items():
        group = groups.get(name)
        if group is None:
            raise _damaged(f"{type(model).__name__} has no group {name!r:.60}")
        if group.n_units != of or (kept == 0 and group.what == "heads"):
            raise _damaged(f"group {name!r} has {group.n_units} {group.what}, not {kept} of {of}")
    cut = Cut(
        keep={name: tuple(range(kept)) for name, (kept, _) in widths.items()},
        n_units={name: of for name, (_, of) in widths.items()},
    )
    said = copy.deepcopy(model.config.__dict__)
    with torch.device("cpu"):  # indices need values, also where the model is made without
        apply_cut(model, tuple(groups.values()), cut)
    model.config.__dict__.clear()
    model.config.__dict__.update(said)


def _cut_class(
    cls: type[PreTrainedModel], widths: Mapping[str, tuple[int, int]]
) -> type[PreTrainedModel]:
    """The class with cut layers. It keeps the name, by which transformers looks things up."""

    def __init__(self: Any, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        cls.__init__(self, config, *args, **kwargs)
        shrink(self, widths)

    return type(cls.__name__, (cls,), {"__init__": __init__, "__module__": cls.__module__})


def _resolve(model_class: Any, config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The model class; only those of transformers can be opened cut."""
    if isinstance(model_class, type) and issubclass(model_class, PreTrainedModel):
        return model_class
    if type(config) not in model_class._model_mapping:
        raise ConfigError(
            f"{model_class.__name__} has no model for {type(config).__name__}; use an Auto class "
            "that fits the architecture of the pruned base."
        )
    return _get_model_class(config, model_class._model_mapping)


def _verify(model: PreTrainedModel, record: dict[str, Any] | None, place: str) -> None:
    if record is None:
        raise CheckpointError(
            f"{place!r} has no digest in its config.json, so it is no pruned base of prunepeft and "
            "cannot be verified; open it without verify."
        )
    found = content_digest(model)
    if found != record["digest"]:
        raise CheckpointError(
            f"the weights of {place!r} are not those that were saved: their digest is "
            f"{found[:12]}, config.json says {record['digest'][:12]}. They were changed, or loaded "
            "in another dtype. Restore the folder, or save the pruned base again."
        )


def _damaged(reason: str) -> CheckpointError:
    return CheckpointError(
        f"{CUT_KEY} in the config.json of the base model cannot be used: {reason}. The file is "
        "damaged or was edited by hand; restore it, or save the pruned base again."
    )


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
