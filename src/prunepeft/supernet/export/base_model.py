"""The base model an adapter was made for: found, built without weights, or loaded."""

import copy
import logging
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from prunepeft.errors import CheckpointError, ConfigError, SiteError
from prunepeft.sites import layer_dims
from prunepeft.structured.opening import empty_model, open_model
from prunepeft.supernet.base_digest import check_base
from prunepeft.supernet.export.source import SavedAdapter

logger = logging.getLogger(__name__)

UNCHECKED = (
    "the base model was not found on this machine, so the names of its layers were not checked; "
    "pass base= to check them"
)
_AUTO = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}
_LAST_HEAD_LAYERS = ("score", "classifier.out_proj", "classifier", "qa_outputs")


@dataclass(frozen=True)
class Base:
    """What is known of the base model.

    Attributes:
        name: Folder or hub id.
        revision: Revision on the hub.
        model: The model itself, if the caller gave it.
        labels: Names of the classes.
    """

    name: str | None = None
    revision: str | None = None
    model: nn.Module | None = None
    labels: tuple[str, ...] = ()


def make_skeleton(adapter: SavedAdapter, base: Base) -> nn.Module | None:
    """The base model, or one like it without weights; None if it is not on this machine."""
    if base.model is not None:
        if any(name.endswith(".base_layer") for name, _ in base.model.named_modules()):
            raise SiteError(
                "the base model carries an adapter already; pass the plain model "
                "(prunepeft.detach takes modules off again)."
            )
        return base.model
    if base.name is None:
        return None
    try:
        config = AutoConfig.from_pretrained(
            base.name, revision=base.revision, local_files_only=True, trust_remote_code=False
        )
        config = _with_labels(config, adapter, base)
        return empty_model(_model_class(adapter, config), config)
    except CheckpointError:
        raise
    except (OSError, ValueError, KeyError, AttributeError, ConfigError) as error:
        logger.info("cannot build %s without weights: %s", base.name, error)
        return None


def load_base(adapter: SavedAdapter, base: Base) -> tuple[PreTrainedModel, torch.dtype]:
    """Load the base model in float32, and say what its own dtype is.

    Raises:
        ConfigError: if it is unknown, cannot be loaded, or is quantised.
    """
    if base.model is not None:
        _refuse_quantised(base.model.config, base.model)
        dtype = next(base.model.parameters()).dtype
        return copy.deepcopy(base.model).float().eval(), dtype
    if base.name is None:
        raise ConfigError(
            "the adapter does not say which base model it was made for; pass base= (a model, or "
            "its folder or hub id)."
        )
    source = {"revision": base.revision, "trust_remote_code": False}
    try:
        config = AutoConfig.from_pretrained(base.name, **source)
        _refuse_quantised(config, None)
        dtype = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
        cls = _model_class(adapter, config)
        config = _with_labels(config, adapter, base)
        model, info = open_model(
            cls,
            base.name,
            config,
            dtype=torch.float32,
            ignore_mismatched_sizes=True,  # a head for other classes is replaced
            output_loading_info=True,
            **source,
        )
    except (ConfigError, CheckpointError):
        raise
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(
            f"the base model {base.name!r} cannot be loaded: {error}. Pass base= with the folder "
            "or the model itself."
        ) from error
    wrong = sorted({key[0] for key in info["mismatched_keys"]} - adapter.head.keys())
    if wrong:
        raise _mismatch(base, wrong[0])
    return model.eval(), dtype


def _mismatch(base: Base, name: str) -> ConfigError:
    return ConfigError(
        f"the weights of the base model {base.name!r} do not fit its config.json (the shape of "
        f"{name} differs); pass base= with the folder of the whole model."
    )


def check_fit(adapter: SavedAdapter, model: nn.Module | None) -> str:
    """Check that every tensor has its place in the base model; returns a note that says so.

    Raises:
        CheckpointError: naming the first layer or head tensor without one.
    """
    if model is None:
        return UNCHECKED
    check_base(adapter.base_digest, model)
    modules = dict(model.named_modules())
    paths = {m.site.path: m.site for m in adapter.modules}
    dims = {path: layer_dims(modules[path]) for path in paths if path in modules}
    fits = {path for path, site in paths.items() if dims.get(path) == (site.d_in, site.d_out)}
    missing = sorted(paths.keys() - fits)
    if missing:
        raise CheckpointError(
            f"{len(fits)} of {len(paths)} modules fit {type(model).__name__}; it has no layer "
            f"{missing[0]!r} of the right shape. Give the base model the adapter was trained on."
        )
    own = {name: p.shape for name, p in (*model.named_parameters(), *model.named_buffers())}
    for name, tensor in adapter.head.items():
        if own.get(name) != tensor.shape:
            found = tuple(own[name]) if name in own else "none"
            raise CheckpointError(
                f"the head tensor {name!r} has shape {tuple(tensor.shape)}, that of "
                f"{type(model).__name__} {found}. Give the base model the adapter was trained on, "
                "with as many labels."
            )
    return f"{len(fits)} of {len(paths)} modules applied"


def _model_class(adapter: SavedAdapter, config: PretrainedConfig) -> Any:
    if adapter.task_type is not None:
        auto = getattr(transformers, _AUTO[adapter.task_type])
        if type(config) not in auto._model_mapping:
            raise ConfigError(
                f"{type(config).__name__} has no model for task type {adapter.task_type}; pass "
                "base= with the model itself."
            )
        return auto._model_mapping[type(config)]
    trained_on = (adapter.auto_mapping or {}).get("base_model_class")
    names = [trained_on] if trained_on else config.architectures or []
    cls = getattr(transformers, str(names[0]), None) if names else None
    if not (isinstance(cls, type) and issubclass(cls, PreTrainedModel)):
        raise ConfigError(
            f"the class of the base model is unknown to transformers ({names}); pass base= with "
            "the model itself."
        )
    return cls


def _with_labels(config: PretrainedConfig, adapter: SavedAdapter, base: Base) -> PretrainedConfig:
    """Set the number of classes, which a head trained here need not share with the base's file."""
    if adapter.task_type not in ("SEQ_CLS", "TOKEN_CLS") and not classifies_images(adapter):
        return config
    n_labels = _n_labels(adapter.head) or len(base.labels)
    if n_labels and n_labels != config.num_labels:
        config.num_labels = n_labels
    if base.labels and len(base.labels) == config.num_labels:
        config.id2label = dict(enumerate(base.labels))
        config.label2id = {label: i for i, label in enumerate(base.labels)}
    return config


def classifies_images(adapter: SavedAdapter) -> bool:
    """Whether the base model is an image classifier, for which peft has no task type."""
    return "ForImageClassification" in (adapter.auto_mapping or {}).get("base_model_class", "")


def _n_labels(head: dict[str, Tensor]) -> int | None:
    for layer in _LAST_HEAD_LAYERS:
        for name, tensor in head.items():
            if f".{name}".endswith(f".{layer}.weight"):
                return tensor.shape[0]
    return None


def _refuse_quantised(config: Any, model: nn.Module | None) -> None:
    flags = ("is_quantized", "is_loaded_in_4bit", "is_loaded_in_8bit")
    quantised = getattr(config, "quantization_config", None) is not None
    if quantised or any(getattr(model, flag, False) for flag in flags):
        raise ConfigError(
            "the base model is quantised; merging would round every weight again and change the "
            "model. Pass base= with the full precision model it was made from, or use the format "
            "peft."
        )
