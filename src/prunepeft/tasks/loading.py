"""Load what makes a model from a folder or the hub, with errors a user can act on."""

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.image_processing_utils import BaseImageProcessor
from transformers.utils import logging as hf_logging

from prunepeft.errors import CheckpointError, ConfigError, PrunePeftError
from prunepeft.structured.opening import empty_model, open_model

logger = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
# Families whose position numbers start after the padding token.
OFFSET_FAMILIES = (
    "roberta",
    "xlm-roberta",
    "xlm-roberta-xl",
    "camembert",
    "mpnet",
    "longformer",
    "xmod",
)
LOAD_ERRORS = (
    OSError,
    ValueError,
    TypeError,
    LookupError,
    ImportError,
    AttributeError,
    RuntimeError,
    StrictDataclassError,
)
MAX_MISSING = 0.5  # share of the base model's tensors that a checkpoint may lack
POOLER = "pooler"


def check_path(path: str) -> str:
    """Return the folder or hub id to load from.

    Raises:
        ConfigError: if it is neither.
    """
    if not isinstance(path, str) or not path.strip() or "\0" in path:
        raise ConfigError(f"model is {path!r}; give a model folder or a hub id such as owner/name.")
    try:
        folder = Path(path).expanduser()
        is_folder, is_there = folder.is_dir(), folder.exists()
    except (OSError, RuntimeError) as error:
        raise ConfigError(
            f"model {path[:200]!r} cannot be looked up ({error}); give a folder."
        ) from error
    if is_folder:
        _check_folder(folder)
        return str(folder)
    if is_there:
        raise ConfigError(f"model {path!r} is a file; give the folder that holds config.json.")
    if not HUB_ID.fullmatch(path):
        raise ConfigError(
            f"model {path!r} does not exist; give a folder with config.json and weights, "
            "or a hub id such as owner/name."
        )
    return path


def _check_folder(folder: Path) -> None:
    if (folder / "config.json").is_file():
        return
    if (folder / "adapter_config.json").is_file():
        raise ConfigError(
            f"model {str(folder)!r} holds an adapter, not a model; give the base model named in "
            "its adapter_config.json, or merge the adapter first."
        )
    found = ", ".join(sorted(item.name for item in folder.iterdir())[:8]) or "nothing"
    raise ConfigError(
        f"model {str(folder)!r} is not a model folder: it has no config.json (found: {found}). "
        "Give a folder written by save_pretrained, or a hub id."
    )


def load_config(path: str, *, trust_remote_code: bool = False, **options: Any) -> PreTrainedConfig:
    """Load a model's config with some fields replaced.

    Raises:
        ConfigError: if there is none or it cannot be read.
    """
    place = check_path(path)
    with _errors("config", path):
        return AutoConfig.from_pretrained(
            place,
            trust_remote_code=trust_remote_code,
            local_files_only=Path(place).is_dir(),
            **options,
        )


@contextmanager
def _errors(what: str, path: str) -> Iterator[None]:
    """Turn what transformers raises into our errors, and keep its chatter out of the output."""
    verbosity = hf_logging.get_verbosity()
    bars = hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        yield
    except (torch.OutOfMemoryError, PrunePeftError):
        raise
    except SafetensorError as error:
        raise CheckpointError(
            f"the weights of model {path!r} are damaged ({error}); download or save them again."
        ) from error
    except LOAD_ERRORS as error:
        if "trust_remote_code" in str(error):
            raise ConfigError(
                f"model {path!r} brings its own Python code, which is not run unless you allow it. "
                "Read the code, and if you trust it pass trust_remote_code (--trust-remote-code)."
            ) from error
        reason = " ".join(str(error).split())[:400] or type(error).__name__
        raise ConfigError(
            f"the {what} of model {path!r} could not be loaded ({reason}). Give a complete model "
            "folder, or a hub id that is in the local cache or reachable over the network."
        ) from error
    finally:
        hf_logging.set_verbosity(verbosity)
        if bars:
            hf_logging.enable_progress_bar()


def load_pretrained(
    auto_class: Any,
    path: str,
    config: PreTrainedConfig,
    *,
    dtype: str,
    seed: int,
    **options: Any,
) -> PreTrainedModel:
    """Load weights into the architecture of `config`; fresh tensors are drawn from `seed`.

    Raises:
        ConfigError: if the dtype is unknown or the weights are not of this architecture.
        CheckpointError: if the weights are damaged.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"dtype is {dtype!r}; allowed are {', '.join(DTYPES)}.")
    place = check_path(path)
    with _errors("weights", path), seeded(seed):
        model, info = open_model(
            auto_class,
            place,
            config,
            dtype=DTYPES[dtype],
            local_files_only=Path(place).is_dir(),
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **options,
        )
    _check_fresh(model, info, path)
    return model


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw from `seed`, and leave torch's global random state as it was."""
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield


def _check_fresh(model: PreTrainedModel, info: dict[str, Any], path: str) -> None:
    """Fresh weights are expected in the head; in the base model they mean a wrong checkpoint."""
    prefix = f"{model.base_model_prefix}."
    mismatched = {key[0] for key in info["mismatched_keys"]}
    wrong = sorted(key for key in mismatched if key.startswith(prefix))
    missing = sorted(key for key in info["missing_keys"] if key.startswith(prefix))
    n_base = sum(name.startswith(prefix) for name in model.state_dict())
    if wrong or len(missing) > MAX_MISSING * n_base:
        what = (
            f"the shape of {wrong[0]} differs"
            if wrong
            else f"{len(missing)} of {n_base} tensors are missing"
        )
        raise ConfigError(
            f"the weights of model {path!r} do not fit its config.json ({what}); "
            "give a folder whose weights and config belong together."
        )
    odd = [key for key in missing if POOLER not in key]
    if odd:
        logger.warning("%s has no weights for %s and others; they start at random", path, odd[0])
    fresh = sorted(mismatched | set(info["missing_keys"]))
    if fresh:
        logger.info("fresh weights in %s: %s", path, ", ".join(fresh))


def make_empty(
    auto_class: Any, path: str, config: PreTrainedConfig, *, trust_remote_code: bool = False
) -> PreTrainedModel:
    """Build the architecture of `config` on the meta device, without weights."""
    with _errors("architecture", path):
        return empty_model(auto_class, config, trust_remote_code=trust_remote_code).eval()


def find_max_positions(config: PreTrainedConfig) -> int | None:
    """Longest input in tokens that the position embeddings allow; None if there is no limit."""
    text = config.get_text_config()
    n = getattr(text, "max_position_embeddings", None) or getattr(text, "n_positions", None)
    if not isinstance(n, int) or n <= 0 or text.model_type == "t5":
        return None
    return n - (text.pad_token_id or 0) - 1 if text.model_type in OFFSET_FAMILIES else n


def load_tokenizer(path: str, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load a tokenizer that pads on the right and knows the longest input of its model.

    A tokenizer without a usable pad token gets its end token (or unknown token) as pad token:
    padding is masked, so that its number never matters.

    Raises:
        ConfigError: if there is no tokenizer or it has no token to pad with.
    """
    config = load_config(path, trust_remote_code=trust_remote_code)
    place = check_path(path)
    with _errors("tokenizer", path):
        tokenizer = AutoTokenizer.from_pretrained(
            place, trust_remote_code=trust_remote_code, local_files_only=Path(place).is_dir()
        )
    text = config.get_text_config()
    n_tokens = getattr(text, "vocab_size", None) or len(tokenizer)
    _check_vocabulary(tokenizer, n_tokens, path)
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id >= n_tokens:
        usable = (tokenizer.eos_token, tokenizer.unk_token, tokenizer.bos_token)
        token = next(
            (t for t in usable if t and tokenizer.convert_tokens_to_ids(t) < n_tokens), None
        )
        if token is None:
            raise ConfigError(
                f"the tokenizer of model {path!r} has no pad, end or unknown token; add one."
            )
        tokenizer.pad_token = token
    if getattr(text, "type_vocab_size", 0) < 2:  # one kind of token, or no input for it
        names = tokenizer.model_input_names
        tokenizer.model_input_names = [name for name in names if name != "token_type_ids"]
    tokenizer.padding_side = tokenizer.truncation_side = "right"
    limit = find_max_positions(config)
    if limit is not None:
        tokenizer.model_max_length = min(tokenizer.model_max_length, limit)
    return tokenizer


def load_image_processor(path: str, *, trust_remote_code: bool = False) -> BaseImageProcessor:
    """Load the image processor of a model, the one that computes with Pillow where there is one.

    So the pixels do not depend on whether torchvision is installed.

    Raises:
        ConfigError: if there is none.
    """
    place = check_path(path)
    with _errors("image processor", path):
        return AutoImageProcessor.from_pretrained(
            place,
            backend="pil",
            trust_remote_code=trust_remote_code,
            local_files_only=Path(place).is_dir(),
        )


def _check_vocabulary(tokenizer: PreTrainedTokenizerBase, n_tokens: int, path: str) -> None:
    """Raise ConfigError for an empty tokenizer (a folder without one) or that of another model."""
    special = set(tokenizer.all_special_tokens) | set(tokenizer.get_added_vocab())
    ids = [number for token, number in tokenizer.get_vocab().items() if token not in special]
    if not ids:
        raise ConfigError(
            f"model {path!r} comes without a tokenizer; put the tokenizer's files (tokenizer.json) "
            "into its folder."
        )
    if max(ids) >= n_tokens:
        raise ConfigError(
            f"the tokenizer of model {path!r} has tokens up to number {max(ids)}, but the model "
            f"knows only {n_tokens}; they do not belong together. Give the tokenizer of this model."
        )
