"""Which serving engine applies an exported adapter rightly, and how to start it.

What each does with a PEFT folder, r and alpha being those of its config, r_i the rank of a tensor:

    peft, transformers      alpha_i / r_i from the patterns
    vllm, tgi               alpha / r everywhere; tgi drops a type that one layer lacks
    sglang                  alpha / r, all ranks r, q/k/v and gate/up of a layer together
    llama.cpp, tensorrt-llm alpha / r_i
"""

import math
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from prunepeft.state import write_json

SERVING_FILE = "serving.json"
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what --max-lora-rank may be
WORKS, FLAGS, NO = "works", "works with flags", "no"
_USE_SERVE = "export with the format serve"
_SUPPORT = "if the engine supports LoRA for this architecture"
Row = tuple[str, str]


@dataclass(frozen=True)
class Facts:
    """What decides whether an engine applies the adapter rightly.

    Attributes:
        form: `lora`, `dora`, `ia3`, `union` or `serve`.
        r, alpha: As in the config.
        ranks, scalings: Of every module.
        targets: Leaf names of the adapted layers.
        every_layer: Every layer has every type that occurs.
        whole_groups: q/k/v and gate/up are adapted together.
        has_head: A task head was trained.
        generates: The base model writes text.
        base: Folder or hub id of the base model.
        path: Folder of the adapter.
        is_stock: Stock transformers can open the base model.
    """

    form: str
    r: int
    alpha: float
    ranks: tuple[int, ...]
    scalings: tuple[float, ...]
    targets: tuple[str, ...]
    every_layer: bool
    whole_groups: bool
    has_head: bool
    generates: bool
    base: str
    path: str
    is_stock: bool = True

    @property
    def max_rank(self) -> int | None:
        return next((rank for rank in RANKS if rank >= self.r), None)

    @property
    def one_scale(self) -> bool:
        """Whether alpha / r is every module's scaling."""
        return all(_close(s, self.alpha / self.r) for s in self.scalings)

    @property
    def scale_by_rank(self) -> bool:
        """Whether alpha / r_i is every module's scaling."""
        pairs = zip(self.scalings, self.ranks, strict=True)
        return all(_close(s, self.alpha / rank) for s, rank in pairs)


def write_serving(folder: Path, facts: Facts) -> None:
    """Write `serving.json`."""
    write_json(folder / SERVING_FILE, serving_table(facts))


def serving_table(facts: Facts) -> dict[str, dict[str, str]]:
    """Engine -> `status` (works, works with flags, no), `reason` and `command`."""
    commands = _commands(facts)
    table = {}
    for engine, judge in _JUDGES.items():
        status, reason = judge(facts)
        command = commands[engine] if status != NO else ""
        table[engine] = {"status": status, "reason": reason, "command": command}
    return table


def _peft(facts: Facts) -> Row:
    if not facts.is_stock:
        return FLAGS, "load the base model with prunepeft.load_base"
    if facts.form == "union":
        return FLAGS, "several kinds: import prunepeft before loading"
    if facts.form == "serve" and facts.has_head:
        return FLAGS, "load head/head.safetensors into the base model first"
    return WORKS, "an ordinary peft checkpoint"


def _refused(facts: Facts) -> Row | None:
    """Reasons that hold for every engine that reads LoRA folders."""
    if not facts.is_stock:
        return NO, "cannot open this base model, whose layers have widths of their own"
    if facts.form not in ("lora", "serve"):
        return NO, f"reads LoRA only, this is {facts.form}; export with the format merged"
    if not facts.generates:
        return NO, "serves LoRA on text generation models only; export with the format merged"
    if facts.has_head:
        return NO, "reads no task head (modules_to_save); export with the format merged"
    return None


def _vllm(facts: Facts) -> Row:
    if row := _refused(facts):
        return row
    if facts.max_rank is None:
        return NO, f"rank {facts.r} is above its limit {RANKS[-1]}; export with the format merged"
    if not facts.one_scale:
        return NO, f"applies one alpha / r to all modules, theirs differ; {_USE_SERVE}"
    return FLAGS, f"--max-lora-rank must be at least {facts.r}; {_SUPPORT}"


def _sglang(facts: Facts) -> Row:
    if row := _refused(facts):
        return row
    if not facts.one_scale or set(facts.ranks) != {facts.r}:
        return NO, f"needs one rank and one scale for all modules; {_USE_SERVE}"
    if not facts.whole_groups:
        return NO, f"needs q, k, v (and gate, up) of a layer together; {_USE_SERVE}"
    return FLAGS, f"rank and targets must be stated; {_SUPPORT}"


def _tgi(facts: Facts) -> Row:
    if row := _refused(facts):
        return row
    if not facts.every_layer:
        return NO, f"drops a type of layer that one layer lacks, without an error; {_USE_SERVE}"
    if not facts.one_scale:
        return NO, f"applies one alpha / r to all modules, theirs differ; {_USE_SERVE}"
    return FLAGS, f"--lora-adapters names the folder; {_SUPPORT}"


def _by_rank(facts: Facts) -> Row:
    if row := _refused(facts):
        return row
    if not facts.scale_by_rank:
        return NO, f"divides one alpha by each tensor's own rank; {_USE_SERVE}"
    return FLAGS, f"convert the folder first; {_SUPPORT}"


_JUDGES: dict[str, Callable[[Facts], Row]] = {
    "peft": _peft,
    "transformers": _peft,
    "vllm": _vllm,
    "sglang": _sglang,
    "tgi": _tgi,
    "llama.cpp": _by_rank,
    "tensorrt-llm": _by_rank,
}


def _commands(facts: Facts) -> dict[str, str]:
    base, path = shlex.quote(facts.base), shlex.quote(facts.path)
    adapter = shlex.quote(f"tuned={facts.path}")
    targets = shlex.join(facts.targets)
    return {
        "peft": f"PeftModel.from_pretrained(base, {facts.path!r})",
        "transformers": f"base.load_adapter({facts.path!r})",
        "vllm": f"vllm serve {base} --enable-lora --max-lora-rank {facts.max_rank} "
        f"--lora-modules {adapter}",
        "sglang": f"python -m sglang.launch_server --model-path {base} --enable-lora "
        f"--max-lora-rank {facts.max_rank} --lora-target-modules {targets} --lora-paths {adapter}",
        "tgi": f"text-generation-launcher --model-id {base} --lora-adapters {adapter}",
        "llama.cpp": f"python convert_lora_to_gguf.py {path} --base {base} --outfile tuned.gguf "
        "&& llama-server -m base.gguf --lora tuned.gguf",
        "tensorrt-llm": f"LLM({facts.base!r}, enable_lora=True) with "
        f"LoRARequest('tuned', 1, {facts.path!r})",
    }


def _close(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=1e-6)
