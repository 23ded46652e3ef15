"""Frozen linear layers whose weights are held in few bits: which they are, and how they are read.

Their forward pass is opaque. Packages that quantise are imported where they are needed, and so is
peft, which imports the tuner that imports this.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.quantizers import HfQuantizer

from prunepeft.errors import ConfigError, MissingExtraError

if TYPE_CHECKING:
    from peft.utils.quantization_utils import QuantizationBackend

BITS = {"8bit": 8, "4bit": 4}
BITSANDBYTES = "bitsandbytes"
# Bytes of a weight with its share of the scales: one float a row, or nf4 with double quantisation.
BYTES = {8: 1.0, 4: 0.516}


@dataclass(frozen=True)
class Storage:
    """How the weights of the frozen linear layers are held.

    Attributes:
        method: Who quantised them, e.g. `bitsandbytes`.
        bits: Bits of a weight; None if the method does not say.
        settings: Arguments of transformers' `BitsAndBytesConfig` but one, see `arguments`; empty if
            the model is quantised on disk and is opened as it is.
    """

    method: str
    bits: int | None
    settings: Mapping[str, Any] = field(default_factory=dict)

    def arguments(self, dtype: str) -> dict[str, Any]:
        """Settings for a model whose other layers are in this number format, e.g. `bfloat16`."""
        compute = {"bnb_4bit_compute_dtype": dtype} if self.bits == 4 else {}
        return {**self.settings, **compute} if self.settings else {}

    @property
    def in_words(self) -> str:
        """For people, e.g. `4 bits (bitsandbytes)`."""
        bits = "few bits" if self.bits is None else f"{self.bits} bits"
        return f"{bits} ({self.method}{'' if self.settings else ', as it is on disk'})"


def stored(config: Any) -> Storage | None:
    """How a model is quantised on disk by its config; None if it is not."""
    entry = getattr(config, "quantization_config", None)
    if entry is None:
        return None
    data = entry if isinstance(entry, Mapping) else entry.to_dict()
    if data.get("load_in_8bit") or data.get("load_in_4bit"):
        return Storage(BITSANDBYTES, 8 if data.get("load_in_8bit") else 4)
    method = data.get("quant_method", "unknown method")
    method = str(getattr(method, "value", method))
    bits = next((data[k] for k in ("bits", "w_bit", "nbits") if isinstance(data.get(k), int)), None)
    if bits is None and (found := re.search(r"Int(\d)Weight", repr(data.get("quant_type")))):
        bits = int(found[1])
    return Storage(method, bits)


def asked(word: str, model: PreTrainedModel, head: Sequence[str]) -> Storage:
    """How a plain model becomes quantised when it is opened.

    The head and the output embeddings stay plain; of the rest all linear layers are quantised.

    Args:
        word: A key of `BITS`.
        model: The model, with or without weights.
        head: Names of its modules that are trained in full.
    """
    kept = {*HfQuantizer.get_modules_to_not_convert(model), *head}
    plain = sorted(name for name, _ in model.named_modules() if name in kept)
    settings: dict[str, Any] = {f"load_in_{word}": True, "llm_int8_skip_modules": plain}
    if word == "4bit":
        settings |= {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    return Storage(BITSANDBYTES, BITS[word], settings)


def require(storage: Storage) -> None:
    """Raise MissingExtraError if bitsandbytes is needed and not installed."""
    if storage.method == BITSANDBYTES and find_spec(BITSANDBYTES) is None:
        bits = "few" if storage.bits is None else storage.bits
        raise MissingExtraError(
            f"a base model in {bits} bits needs {BITSANDBYTES}, which is not installed. Install "
            'it: pip install "prunepeft[quant]".'
        )


def is_quantized(linear: nn.Module) -> bool:
    """Whether the weight of a linear layer is anything but plain floating point numbers."""
    weight = getattr(linear, "weight", None)
    if _is_plain(weight):
        return False
    codes = weight is None or not weight.is_floating_point() or weight.element_size() < 2
    return codes or backend_of(linear) is not None


def backend_of(linear: nn.Module) -> "QuantizationBackend | None":
    """How peft reads the weight of a quantised layer; None for plain layers, and if it cannot."""
    if _is_plain(getattr(linear, "weight", None)):
        return None  # the usual case, in which no package is looked for
    from peft.utils.quantization_utils import resolve_quantization_backend

    return resolve_quantization_backend(linear, get_apply_tensor_subclass=_never)


def is_readable(linear: nn.Module) -> bool:
    """Whether `dense_weight` works."""
    from peft.utils.quantization_utils import ForwardOnlyQuantizationBackend

    backend = backend_of(linear)
    if backend is None:
        return not is_quantized(linear)
    return not isinstance(backend, ForwardOnlyQuantizationBackend)


def dense_weight(linear: nn.Module) -> Tensor:
    """The weight as plain numbers, as the layer stores it: (d_out, d_in), transposed for `Conv1D`.

    Raises:
        ConfigError: if the method that quantised it has no way back.
    """
    if not is_readable(linear):
        raise ConfigError(
            f"the weight of a {type(linear).__name__} is quantised in a way that cannot be read "
            "back, and it is needed here. Use other kinds than dora, or a base model in full "
            "precision, 8bit or 4bit."
        )
    backend = backend_of(linear)
    return linear.weight.data if backend is None else backend.get_base_weight(linear).detach()


def stay_trainable(model: nn.Module) -> None:
    """Keep 4-bit layers of bitsandbytes from arranging their weights anew for inference.

    On processors with AVX-512 BF16 they do so in the first forward pass in evaluation mode. A
    layer so arranged gives no gradient any more, its weight cannot be read, and widths that are
    not multiples of 32 fail.
    """
    for layer in model.modules():
        if getattr(layer, "support_avx512bf16_for_cpu", False):
            layer.support_avx512bf16_for_cpu = False
            state = getattr(layer.weight, "quant_state", None)
            if getattr(state, "packing_format_for_cpu", False):
                layer.state_dict()  # arranges it back


def _is_plain(weight: Tensor | None) -> bool:
    return type(weight) is nn.Parameter and weight.dtype in (
        torch.float16,
        torch.bfloat16,
        torch.float32,
        torch.float64,
    )


def _never() -> None:
    """Stands for how torchao quantises anew, which is never asked for: no weight is written."""
