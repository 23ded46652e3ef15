"""Which pruned base model an adapter was made on: a digest of its content, and its check."""

import hashlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from prunepeft.errors import CheckpointError, StateError
from prunepeft.state.files import canonical_json

BASE_KEY = "prunepeft_base"  # in the config.json of a pruned base
_POOLER = "pooler"


def content_digest(model: PreTrainedModel) -> str:
    """SHA-256 of the base model's tensors, 64 hex digits: names, types, shapes and bytes.

    Left out is what a task replaces: its head, the pooler and the output embeddings. So a base
    opened under another head has the same digest; one of another dtype has not.
    """
    return tensors_digest(_base_tensors(model))


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of tensors of a plain model, 64 hex digits: names, types, shapes and bytes."""
    hasher = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        if tensor.is_meta or ".base_layer." in name:
            why = "has no weights (meta device)" if tensor.is_meta else "carries an adapter"
            raise StateError(
                f"a base model that {why} has no digest; load the plain model, or take the adapter "
                "off with prunepeft.detach."
            )
        for part_name, part in _parts(name, tensor.detach()):
            hasher.update(canonical_json([part_name, str(part.dtype), list(part.shape)]))
            flat = part.cpu().contiguous().flatten()
            hasher.update(memoryview(flat.view(torch.uint8).numpy()))
    return hasher.hexdigest()


def _parts(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """A tensor by its name; of one that wraps several (torchao's codes and scales), these."""
    flatten = getattr(tensor, "__tensor_flatten__", None)
    if flatten is None:
        yield name, tensor
        return
    for inner in flatten()[0]:
        yield from _parts(f"{name}.{inner}", getattr(tensor, inner))


def read_record(config: Any) -> dict[str, Any] | None:
    """The entry that `save_base` leaves in a model's config; None for any other model.

    Raises:
        CheckpointError: if it is damaged.
    """
    record = getattr(config, BASE_KEY, None)
    if record is None:
        return None
    if not isinstance(record, Mapping) or not is_digest(record.get("digest")):
        raise CheckpointError(
            f"the config.json of the base model has the entry {BASE_KEY} {record!r:.100} without a "
            "SHA-256 digest; it is damaged. Restore the folder, or save the pruned base again."
        )
    return dict(record)


def base_digest(model: nn.Module) -> str | None:
    """The digest that a pruned base carries in its config; None for an unpruned one."""
    record = read_record(getattr(model, "config", None))
    return None if record is None else str(record["digest"])


def is_digest(value: object) -> bool:
    """Whether it is a SHA-256 in hex."""
    return isinstance(value, str) and re.fullmatch(r"[0-9a-f]{64}", value) is not None


def check_base(wanted: str | None, model: nn.Module) -> None:
    """Check that the adapter belongs to this base model.

    Args:
        wanted: `base_digest` of the adapter's config; None if it was made on an unpruned base.
        model: The base model.

    Raises:
        CheckpointError: if one of them is pruned and the other is not, or pruned differently.
    """
    found = base_digest(model)
    if wanted == found:
        return
    made_on = "an unpruned base" if wanted is None else f"the pruned base {str(wanted)[:12]}"
    given = "an unpruned base" if found is None else f"the pruned base {found[:12]}"
    raise CheckpointError(
        f"the adapter was made on {made_on}, but this {type(model).__name__} is {given}; the "
        "features it acts on are others. Load the base the adapter was made on: the folder saved "
        "with it (prunepeft.load_base), or the unpruned model and its cut (prunepeft.load_cut)."
    )


def _base_tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """Tensors of the base model by their names in it, on whatever head it sits."""
    base = model.base_model
    output = base.get_output_embeddings()
    heads = {name for name, module in base.named_modules() if output is module}
    return {
        name: tensor
        for name, tensor in base.state_dict().items()
        if name.rpartition(".")[0] not in heads and _POOLER not in name.split(".")
    }
