"""Which inference engines can serve an adapter as it is, and if not, why."""

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from prunepeft.report.adapter_file import LoraSettings
from prunepeft.report.grid import Module

PEFT, VLLM, SGLANG, LLAMA_CPP = "peft, transformers", "vLLM", "SGLang", "llama.cpp"
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
_MERGEABLE = {"lora", "dora", "ia3"}
_EXPORT_FIRST = "only LoRA is left: prunepeft export RUN --format {}"
_SERVE = "Export with --format serve."

Verdict = dict[str, str]


def union_verdicts(kinds: Collection[str], *, trained: bool) -> list[Verdict]:
    """Verdicts for a union checkpoint, or for a placement that has no weights yet."""
    engines = (VLLM, SGLANG, LLAMA_CPP)
    if not trained:
        return [_verdict(e, "no", "it has no weights; train it first") for e in (PEFT, *engines)]
    if set(kinds) == {"lora"}:
        own = _verdict(PEFT, "after import", "import prunepeft, or export --format peft")
        return [own, *(_verdict(e, "after export", _EXPORT_FIRST.format("serve")) for e in engines)]
    own = _verdict(PEFT, "after import", "import prunepeft before loading")
    stuck = sorted(set(kinds) - _MERGEABLE)
    if stuck:
        reason = f"{', '.join(stuck)} cannot be merged and no engine knows it"
        return [own, *(_verdict(e, "no", reason) for e in engines)]
    return [own, *(_verdict(e, "after merging", "export --format merged") for e in engines)]


def lora_verdicts(modules: Sequence[Module], settings: LoraSettings) -> list[Verdict]:
    """Verdicts for a plain LoRA adapter."""
    own = _verdict(PEFT, "works", "every rank and scale pattern is understood")
    ranks, scales = {m.size for m in modules}, _scales(modules, settings)
    return [
        own,
        _vllm(ranks, scales, settings),
        _sglang(modules, ranks, scales, settings),
        _llama_cpp(modules, scales, settings),
    ]


def _vllm(ranks: set[int], scales: Mapping[str, float] | None, settings: LoraSettings) -> Verdict:
    if problem := _refused(settings):
        return _verdict(VLLM, "no", problem)
    if problem := _wrong_scale(scales, _one_scale(settings)):
        return _verdict(VLLM, "no", f"{problem} {_SERVE}")
    largest = max(*ranks, settings.r)
    allowed = next((r for r in VLLM_RANKS if r >= largest), None)
    if allowed is None:
        return _verdict(VLLM, "no", f"rank {largest} is above {VLLM_RANKS[-1]}")
    return _verdict(VLLM, "works with flags", f"--enable-lora --max-lora-rank {allowed}")


def _sglang(
    modules: Sequence[Module],
    ranks: set[int],
    scales: Mapping[str, float] | None,
    settings: LoraSettings,
) -> Verdict:
    if problem := _refused(settings):
        return _verdict(SGLANG, "no", problem)
    if ranks != {settings.r}:
        reason = f"it needs one rank everywhere; here: {sorted(ranks)}. {_SERVE}"
        return _verdict(SGLANG, "no", reason)
    if settings.is_regex:
        return _verdict(SGLANG, "no", f"it rejects a regular expression as target. {_SERVE}")
    if problem := _wrong_scale(scales, _one_scale(settings)):
        return _verdict(SGLANG, "no", f"{problem} {_SERVE}")
    if layers := _broken_qkv(modules):
        reason = f"q and v must come together in a layer; they do not in {layers}. {_SERVE}"
        return _verdict(SGLANG, "no", reason)
    return _verdict(SGLANG, "works with flags", "--enable-lora --lora-paths NAME=PATH")


def _llama_cpp(
    modules: Sequence[Module], scales: Mapping[str, float] | None, settings: LoraSettings
) -> Verdict:
    """It divides the one alpha by each tensor's own rank."""
    if problem := _refused(settings):
        return _verdict(LLAMA_CPP, "no", problem)
    expected = {m.id: settings.alpha / m.size for m in modules}
    if problem := _wrong_scale(scales, expected):
        return _verdict(LLAMA_CPP, "no", f"{problem} {_SERVE}")
    return _verdict(LLAMA_CPP, "works with flags", "convert_lora_to_gguf.py --base MODEL; --lora")


def _scales(modules: Sequence[Module], settings: LoraSettings) -> dict[str, float] | None:
    """Scale of each module by peft's rules; None if a pattern is more than a literal path."""
    patterns: dict[str, float] = {}
    for key, value in settings.alpha_pattern.items():
        literal = _literal(key)
        if literal is None or isinstance(value, bool) or not isinstance(value, int | float):
            return None
        patterns.setdefault(literal, value)
    scales = {}
    for module in modules:
        tails = _tails(module.paths[0])
        alpha = next((a for key, a in patterns.items() if key in tails), settings.alpha)
        scales[module.id] = alpha / (module.size**0.5 if settings.is_rslora else module.size)
    return scales


def _wrong_scale(scales: Mapping[str, float] | None, expected: Any) -> str:
    """Why the engine's scale would be wrong, or empty. `expected`: one scale, or one per module."""
    if scales is None:
        return "alpha_pattern holds regular expressions, which are not evaluated here."
    each = expected if isinstance(expected, Mapping) else dict.fromkeys(scales, expected)
    wrong = sum(abs(scale - each[key]) > 1e-6 * abs(scale) for key, scale in scales.items())
    return f"{wrong} of {len(scales)} modules would get the wrong scale." if wrong else ""


def _one_scale(settings: LoraSettings) -> float:
    rank = max(settings.r, 1)
    return settings.alpha / (rank**0.5 if settings.is_rslora else rank)


def _refused(settings: LoraSettings) -> str:
    parts = {
        "DoRA": settings.is_dora,
        "trained biases": settings.has_bias,
        "modules_to_save (a task head)": settings.has_head,
    }
    found = [name for name, is_there in parts.items() if is_there]
    return f"{' and '.join(found)}: refused. Export with --format merged." if found else ""


def _broken_qkv(modules: Sequence[Module]) -> str:
    """Layers in which one of q, k, v is adapted but q or v is not."""
    by_layer: dict[tuple[str, int], set[str]] = {}
    for module in modules:
        name = module.column[1]
        if name in ("q_proj", "k_proj", "v_proj"):
            by_layer.setdefault(module.row, set()).add(name)
    broken = [row for row, names in sorted(by_layer.items()) if not {"q_proj", "v_proj"} <= names]
    more = f" and {len(broken) - 3} more" if len(broken) > 3 else ""
    return ", ".join(f"layer {layer}" for _, layer in broken[:3]) + more


def _literal(pattern: str) -> str | None:
    """The path a pattern stands for if it is one, anchored or not; None for a real expression."""
    bare = pattern.removeprefix("^").removesuffix("$")
    path = re.sub(r"\\([^A-Za-z0-9])", r"\1", bare)
    return path if len(path) < 1000 and re.fullmatch(r"[\w.-]+", path) else None


def _tails(path: str) -> set[str]:
    parts = path.split(".")
    return {".".join(parts[i:]) for i in range(len(parts))}


def _verdict(engine: str, verdict: str, reason: str) -> Verdict:
    return {"engine": engine, "verdict": verdict, "reason": reason}
