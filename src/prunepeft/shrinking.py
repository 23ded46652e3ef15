"""Make the frozen base model smaller before modules are searched for on it."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from prunepeft.batches import derive_seed
from prunepeft.budget import Fidelity
from prunepeft.candidates import LORA_ALL_ROLES, make_space
from prunepeft.engine import Engine
from prunepeft.evaluate import Watched
from prunepeft.plan import Plan
from prunepeft.processes import on_main
from prunepeft.sites import count_base_params
from prunepeft.structured.base_criteria import make_base_criterion
from prunepeft.structured.cut import Cut, choose_units
from prunepeft.structured.groups import Group
from prunepeft.structured.light_peft import EarlyScores
from prunepeft.structured.lora_prune import GradualPruner, cut_of
from prunepeft.structured.opening import CUT_KEY, record_base
from prunepeft.structured.saving import save_base
from prunepeft.tasks.loading import check_path

LIGHT_PEFT = "light-peft"
CRITERION_OF = {"loraprune": "lora"}  # other methods are named like their criterion


@dataclass(frozen=True)
class Shrunk:
    """What was taken from the base model.

    Attributes:
        groups: Of the base model before the cut.
        cut: What stays.
        watched: The training in which it was found out; None if the search did it.
    """

    groups: tuple[Group, ...]
    cut: Cut
    watched: Watched | None = None


def shrink_base(plan: Plan, engine: Engine) -> Shrunk:
    """Find out in a short training what of the base model the task can do without, and cut it.

    LoRA on every linear layer trains meanwhile. `light-peft` judges by trained masks and leaves
    the kept weights as they were; the other methods prune step by step, and what LoRA learned to
    make up for it is merged into the base.
    """
    settings = plan.config.base
    placement = make_space(
        plan.sites,
        ("lora",),
        sizes={"lora": [settings.rank]},
        roles={"lora": LORA_ALL_ROLES},
    ).full()
    watched = engine.evaluator.watch(
        placement,
        _watcher(plan),
        name=f"base, {settings.method}",
        fidelity=Fidelity(settings.fidelity, settings.epochs),
        seed=derive_seed(plan.config.seed, "base"),
        init_seed=derive_seed(plan.config.seed, "base"),
    )
    if settings.method == LIGHT_PEFT:
        cut = _cut_by_masks(plan, watched.tensors)
        engine.evaluator.carry(placement, watched.key, cut, {})
    else:
        cut = cut_of(watched.tensors, plan.groups)
        engine.evaluator.merge(placement, watched.key, cut)
    return Shrunk(plan.groups, cut, watched)


def save_shrunk(plan: Plan, engine: Engine, shrunk: Shrunk) -> Plan:
    """Write the smaller base to the run folder; returns the plan as it is on that base."""
    model, folder = engine.model, engine.folder.base_dir
    groups, cut = shrunk.groups, shrunk.cut
    processor = _as_it_came(plan, engine)
    on_main(lambda: save_base(model, folder, groups=groups, cut=cut, processor=processor))
    record_base(model, groups, cut)
    model.name_or_path = model.config._name_or_path = str(folder.resolve())
    return plan.on(model)


def base_record(before: Plan, engine: Engine, shrunk: Shrunk) -> dict[str, Any]:
    """What was taken from the base model and what that cost, for result.json."""
    config = before.config
    kept: dict[str, dict[str, Any]] = {}
    for group in shrunk.groups:
        entry = kept.setdefault(group.what, {"before": 0, "kept": 0, "layers": {}})
        units = len(shrunk.cut.keep.get(group.id, range(group.n_units)))
        entry["before"] += group.n_units * group.heads_per_unit
        entry["kept"] += units * group.heads_per_unit
        pair = (units * group.heads_per_unit, group.n_units * group.heads_per_unit)
        entry["layers"][group.id] = pair
    watched = shrunk.watched
    cost = (
        {}
        if watched is None
        else {
            "seconds": watched.seconds,
            "steps": watched.steps,
            "peak_memory_bytes": watched.peak_memory_bytes,
        }
    )
    return {
        "method": config.base.method if watched else config.method,
        "dtype": str(next(engine.model.base_model.parameters()).dtype).removeprefix("torch."),
        "digest": shrunk.cut.digest,
        "stock": not hasattr(engine.model.config, CUT_KEY),
        "n_params_before": before.n_base,
        "n_params": count_base_params(engine.model),
        **kept,
        **cost,
    }


def _as_it_came(plan: Plan, engine: Engine) -> Any:
    """The model's own tokenizer; the one that trains here pads on the right."""
    if not isinstance(engine.processor, PreTrainedTokenizerBase):
        return engine.processor
    place = check_path(plan.config.model)
    return AutoTokenizer.from_pretrained(
        place,
        trust_remote_code=plan.config.trust_remote_code,
        local_files_only=Path(place).is_dir(),
    )


def _watcher(plan: Plan) -> EarlyScores | GradualPruner:
    """What looks on (and prunes) while LoRA trains."""
    settings = plan.config.base
    if settings.method == LIGHT_PEFT:
        return EarlyScores(plan.groups, modules=False, ranks=False)
    name = CRITERION_OF.get(settings.method, settings.method)
    options = {"seed": plan.config.seed} if name == "random" else {}
    return GradualPruner(
        plan.groups,
        plan.base_ratios,
        make_base_criterion(name, options),
        every=settings.every,
        scope={"neurons": settings.scope},
    )


def _cut_by_masks(plan: Plan, tensors: Mapping[str, Tensor]) -> Cut:
    """The heads and neurons whose trained masks are largest stay."""
    scores = {g.id: tensors[f"mask.{g.id}"] for g in plan.groups}
    return choose_units(
        plan.groups, scores, plan.base_ratios, scope={"neurons": plan.config.base.scope}
    )
