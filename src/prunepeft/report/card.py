"""The model card: README.md of a run folder."""

import math
import re
from typing import Any

import yaml

from prunepeft.report.base_table import base_sentence
from prunepeft.report.grid import modules_of, plain
from prunepeft.report.loading_code import loading_code, needs_prunepeft, quantization_sentence
from prunepeft.report.page import render
from prunepeft.report.record import Evidence, Result
from prunepeft.report.render import to_markdown
from prunepeft.report.tables import (
    budget_sentence,
    compare,
    cost_table,
    kept_table,
    kinds_in_words,
    metric_name,
)

_PIPELINES = {
    "seq-cls": "text-classification",
    "regression": "text-classification",
    "causal-lm": "text-generation",
    "image-cls": "image-classification",
}


def make_card(evidence: Evidence) -> str:
    """Write the model card of a run as Markdown with YAML front matter."""
    result = evidence.result
    header = _yaml(front_matter(evidence))
    modules = modules_of(evidence)
    return render(
        "card.md.jinja",
        header=header,
        result=result,
        title=_title(result),
        budget=budget_sentence(result),
        verdict=compare(result),
        results=to_markdown(cost_table(result)),
        result_note=cost_table(result).note,
        kept=to_markdown(kept_table(modules)) if modules else "",
        kept_words=", ".join(kinds_in_words(modules)),
        loading=fenced(loading_code(evidence), "python"),
        needs_prunepeft=needs_prunepeft(evidence),
        base=base_sentence(result.base),
        quantized=quantization_sentence(result.model.quantization),
        only_lora={m.kind for m in modules} == {"lora"},
        command=fenced(plain(result.command, 4000), "bash") if result.command else "",
        history=evidence.history,
        metric=metric_name(result),
    )


def front_matter(evidence: Evidence) -> dict[str, Any]:
    """What the model hubs read: base model, library, tags, metrics; and how it was made."""
    result = evidence.result
    pipeline = _PIPELINES.get(result.task.name)
    made = {
        "version": result.prunepeft_version,
        "method": result.method,
        "budget": result.budget.text,
        "trainable_parameters": result.placement.n_params,
        "kept_modules": [module.id for module in modules_of(evidence)],
        "seed": result.seed,
        "command": result.command,
    }
    return {
        "base_model": result.model.name,
        "library_name": "peft",
        **({"pipeline_tag": pipeline} if pipeline else {}),
        "tags": ["prunepeft", "peft", *sorted({module.kind for module in modules_of(evidence)})],
        **({"metrics": [result.metric.name]} if result.metric.name else {}),
        "prunepeft": made,
        "model-index": [{"name": _title(result), "results": _model_index(result, pipeline)}],
    }


def fenced(text: str, language: str) -> str:
    """A Markdown code block that no line of the text can close."""
    longest = max((len(ticks) for ticks in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"


def _yaml(data: dict[str, Any]) -> str:
    """YAML in which invisible characters are escaped."""
    text = yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=10_000)
    if text.replace("\n", "").isprintable():
        return text
    return yaml.safe_dump(data, sort_keys=False, width=10_000)


def _title(result: Result) -> str:
    base = plain(re.split(r"[/\\]", result.model.name.rstrip("/\\"))[-1] or "model")
    source = plain(re.split(r"[/\\]", result.data.source.rstrip("/\\"))[-1])
    return f"{base} tuned on {source}" if source else base


def _model_index(result: Result, pipeline: str | None) -> list[dict[str, Any]]:
    values = {result.metric.name: result.metric.value} | dict(result.metric.all)
    metrics = [
        {"type": name, "name": name, "value": value}
        for name, value in values.items()
        if name and isinstance(value, int | float) and math.isfinite(value)
    ]
    if not metrics:
        return []
    source = result.data.source or "unnamed"
    data = {"name": plain(source), "type": plain(source), "split": "validation"}
    task = {"type": pipeline or result.task.name or "other"}
    return [{"task": task, "dataset": data, "metrics": metrics}]
