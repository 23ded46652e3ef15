"""Python lines that load the adapter of a run on its base model."""

import json

from prunepeft.report.grid import modules_of
from prunepeft.report.record import Evidence, QuantizationInfo, Result

_AUTO_CLASSES = {
    "seq-cls": "AutoModelForSequenceClassification",
    "regression": "AutoModelForSequenceClassification",
    "causal-lm": "AutoModelForCausalLM",
    "image-cls": "AutoModelForImageClassification",
}


def loading_code(evidence: Evidence) -> str:
    """Python lines that load the adapter of a run."""
    result = evidence.result
    cls = evidence.base_class or _AUTO_CLASSES.get(result.task.name, "AutoModel")
    is_image = result.task.name == "image-cls"
    tokenizer, processor = (
        ("processor", "AutoImageProcessor") if is_image else ("tokenizer", "AutoTokenizer")
    )
    name = quoted("base" if result.base else result.model.name)
    held = result.model.quantization
    stock = result.base is None or result.base.stock
    if stock:
        load = _opening(cls, name, _options(result, cls), held)
    else:
        load = f"base = prunepeft.load_base({name})"
    names = [cls, processor] if stock else [processor]
    if held and held.settings:
        names = sorted([*names, "BitsAndBytesConfig"])
    opener = "from prunepeft.tasks import open_quantized  # and makes peft know this adapter"
    lines = [
        opener if _is_read_back(held) else _import_line(evidence, stock),
        "from peft import PeftModel",
        f"from transformers import {', '.join(names)}",
        "",
        load,
        'model = PeftModel.from_pretrained(base, "best/adapter").eval()',
        f"{tokenizer} = {processor}.from_pretrained({name})",
    ]
    return "\n".join(lines).lstrip("\n")


def quantization_sentence(held: QuantizationInfo | None) -> str:
    """How the base model was held; empty if in plain numbers."""
    if held is None:
        return ""
    return (
        f"The frozen base model was held in {held.words} while the adapter was found, trained and "
        "measured. On the model in full precision its numbers are slightly different."
    )


def needs_prunepeft(evidence: Evidence) -> bool:
    """Whether the adapter opens only where prunepeft is imported."""
    if evidence.adapter_type:
        return evidence.adapter_type != "LORA"
    return {module.kind for module in modules_of(evidence)} != {"lora"}


def quoted(text: str) -> str:
    """A Python string literal, in double quotes where nothing has to be escaped."""
    return json.dumps(text, ensure_ascii=False) if text.isprintable() else ascii(text)


def _options(result: Result, cls: str) -> str:
    n_labels = 1 if result.task.name == "regression" else len(result.task.labels)
    labels = f", num_labels={n_labels}" if n_labels and "Classification" in cls else ""
    if result.task.name == "image-cls":
        labels += ", ignore_mismatched_sizes=True"  # pretrained on other classes, as most are
    return labels


def _opening(cls: str, name: str, options: str, held: QuantizationInfo | None) -> str:
    """Lines that make `base` of a stock model."""
    if _is_read_back(held):
        options = options.replace(", ignore_mismatched_sizes=True", "")
        return f"base = open_quantized({cls}, {name}, {_literal(held.head)}{options})"
    if held is None or not held.settings:
        return f"base = {cls}.from_pretrained({name}{options})"
    lines = [f"    {k}={_literal(v)}," for k, v in held.settings.items() if k.isidentifier()]
    return "\n".join(
        [
            "quantization = BitsAndBytesConfig(",
            *lines,
            ")",
            f"base = {cls}.from_pretrained({name}, quantization_config=quantization{options})",
        ]
    )


def _is_read_back(held: QuantizationInfo | None) -> bool:
    """Whether the base is quantised on disk with a head that has to be made, or read back."""
    return held is not None and not held.settings and bool(held.head)


def _literal(value: bool | str | list[str]) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(quoted, value))}]"
    return quoted(value) if isinstance(value, str) else repr(value)


def _import_line(evidence: Evidence, stock: bool) -> str:
    if not stock:
        return "import prunepeft  # opens this base model and makes peft know this adapter"
    return "import prunepeft  # makes peft know this adapter" if needs_prunepeft(evidence) else ""
