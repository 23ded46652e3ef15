"""Format `merged`: the base model with the modules folded into its weights."""

import logging
import shutil
from pathlib import Path

import torch
from peft import PeftModel
from peft.utils import set_peft_model_state_dict
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import cached_file

from prunepeft.errors import CheckpointError, ConfigError
from prunepeft.structured.opening import open_model, renew_record
from prunepeft.supernet.attach import ADAPTER, attach
from prunepeft.supernet.export.base_model import Base, check_fit, load_base
from prunepeft.supernet.export.request import Request, Written
from prunepeft.supernet.export.source import KEY, SavedAdapter
from prunepeft.supernet.layer import PREFIX

logger = logging.getLogger(__name__)

TOLERANCE = 1e-3  # of the largest logit, in float32
PROCESSOR_FILES = (
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "chat_template.jinja",
)
_ENOUGH = ("tokenizer", "vocab", "spiece", "sentencepiece", "preprocessor", "processor")


def write_merged(request: Request, folder: Path) -> Written:
    """Merge in float32, save, load again and compare the logits.

    Raises:
        ConfigError: if a kind cannot be merged, or the base model is missing or quantised.
        CheckpointError: if the adapter does not fit, or what was saved computes something else.
    """
    adapter = request.adapter
    bad = sorted({m.kind.name for m in adapter.modules if not m.kind.mergeable})
    if bad:
        raise ConfigError(
            f"the adapter holds {', '.join(bad)}, which no linear layer can take in; use the "
            "format peft, or search with mergeable kinds (`prunepeft ls kinds` shows them)."
        )
    model, own_dtype = load_base(adapter, request.base)
    check_fit(adapter, model)
    dtype = getattr(torch, request.dtype) if request.dtype else own_dtype
    net = _attached(model, adapter)
    inputs = _probe(model)
    before = _logits(net, inputs)
    _keep_trained_heads(net)
    model = net.merge_and_unload(safe_merge=True).to(dtype)
    renew_record(model)
    model.save_pretrained(folder)
    cls, config = type(model), model.config
    del net, model
    after = _logits(open_model(cls, str(folder), config, dtype=torch.float32).eval(), inputs)
    difference = float((before - after).abs().max())
    limit = TOLERANCE * max(1.0, float(before.abs().max()))
    if dtype == torch.float32 and not difference <= limit:
        raise CheckpointError(
            f"the merged model differs from the adapter by {difference:.2e} in a logit, more than "
            f"{limit:.2e}; use the format peft and report this."
        )
    notes = [f"largest difference of a logit to the adapter: {difference:.2e} ({dtype})"]
    if not _copy_processor(request.base, folder):
        notes.append(
            "no tokenizer or image processor was found beside the base model; add it before serving"
        )
    return Written(notes, {"max_difference": difference})


def _attached(model: PreTrainedModel, adapter: SavedAdapter) -> PeftModel:
    net = attach(
        model,
        adapter.placement,
        modules_to_save=list(adapter.modules_to_save) or None,
        task_type=adapter.task_type,
    )
    state = {
        f"{KEY}{m.site.path}.{PREFIX}{m.kind.name}_{name}": tensor
        for m in adapter.modules
        for name, tensor in m.tensors.items()
    }
    set_peft_model_state_dict(net, state | {KEY + n: t for n, t in adapter.head.items()})
    return net.eval()


def _keep_trained_heads(net: PeftModel) -> None:
    """Put the trained heads in their places; peft can only unwrap heads of a single layer."""
    model = net.base_model.model
    for name, module in list(model.named_modules()):
        if isinstance(module, ModulesToSaveWrapper):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, module.modules_to_save[ADAPTER])


def _probe(model: PreTrainedModel) -> dict[str, Tensor]:
    """A small random input that fits the model."""
    generator = torch.Generator().manual_seed(0)
    config = model.config
    if model.main_input_name == "pixel_values":
        config = getattr(config, "vision_config", None) or config
        size = getattr(config, "image_size", 224)
        height, width = (size, size) if isinstance(size, int) else size
        shape = (1, config.num_channels, height, width)
        return {"pixel_values": torch.randn(shape, generator=generator)}
    vocabulary = config.get_text_config().vocab_size
    ids = torch.randint(0, vocabulary, (1, 8), generator=generator)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids[:, :4]
    return inputs


def _logits(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    device = next(model.parameters()).device
    with torch.no_grad():
        output = model(**{name: value.to(device) for name, value in inputs.items()})
    return (output.logits if "logits" in output else output[0]).float().cpu()


def _copy_processor(base: Base, folder: Path) -> bool:
    """Copy tokenizer and image processor from the base model's folder or cache."""
    if base.name is None:
        return False
    found = False
    for name in PROCESSOR_FILES:
        file = cached_file(
            base.name,
            name,
            revision=base.revision,
            local_files_only=True,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
            _raise_exceptions_for_gated_repo=False,
        )
        if file is not None and Path(file).is_file():
            shutil.copyfile(file, folder / name)
            found = found or name.startswith(_ENOUGH)
    return found
