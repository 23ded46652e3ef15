"""What a run would do, found out without reading weights: data, sites, candidates, budget, cost."""

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from prunepeft.budget import Budget
from prunepeft.candidates import LORA_ALL_ROLES, make_lora_baseline, make_space, paper_space
from prunepeft.config import RunConfig
from prunepeft.data import Splits, load_data
from prunepeft.errors import BudgetError, ConfigError
from prunepeft.kinds import cost
from prunepeft.metrics import check_metric
from prunepeft.sites import count_base_params, find_sites
from prunepeft.space import Placement, SearchSpace, Site
from prunepeft.state import read_json
from prunepeft.strategies import METHODS, Problem, Strategy
from prunepeft.tasks import TASKS, Task

logger = logging.getLogger(__name__)

# Sizes double, so the default space costs 1.4 to 2.8 budgets (unless size 1 or 64 ends the choice).
SUPERNET_OVER_BUDGET = 2.83
BASELINE_ROLES = {"lora": (("q", "v"),), "lora-all": LORA_ALL_ROLES}


@dataclass
class Plan:
    """Everything known before weights are read.

    Attributes:
        config: The settings.
        splits: Checked data.
        task: The task.
        metric: Name of the metric that decides.
        n_base: Parameters of the base model.
        family: Model type, e.g. `bert`.
        sites: Where modules may go.
        space: The candidates; None when an architecture was given.
        given: The architecture that was given instead of a search.
        budget: The budget; None when only an architecture was given.
        limit: The budget as a whole number.
        head: Modules trained in full, and how many parameters they have.
        n_tokens: Tokens of the longest row, for estimates.
    """

    config: RunConfig
    splits: Splits
    task: Task
    metric: str
    n_base: int
    family: str
    sites: tuple[Site, ...]
    space: SearchSpace | None
    given: Placement | None
    budget: Budget | None
    limit: int
    head: dict[str, int]
    n_tokens: int

    @property
    def strategy(self) -> Strategy:
        return make_strategy(self.config)

    def baseline(self, limit: int | None = None) -> Placement | None:
        """Plain LoRA at equal budget, if asked for."""
        if self.config.baseline == "none":
            return None
        return make_lora_baseline(
            self.sites, limit or self.limit, roles=BASELINE_ROLES[self.config.baseline]
        )


def make_plan(config: RunConfig) -> Plan:
    """Check everything that can be checked in seconds.

    Raises:
        PrunePeftError: whatever is wrong with the settings, the data, the model or the budget.
    """
    check_device(config.device)
    if config.offline:
        os.environ["HF_HUB_OFFLINE"] = "1"
    splits = load_data(
        config.data,
        task=config.task,
        columns=config.columns,
        seed=config.seed,
        validation_fraction=config.validation_fraction,
        max_rows=config.train.max_rows,
        offline=config.offline,
    )
    task = TASKS.get(config.task or splits.task)
    metric = config.metric or task.default_metric
    check_metric(metric, task.name, len(splits.labels or ()) or None)
    trust = config.trust_remote_code
    model = task.make_empty_model(config.model, splits, trust_remote_code=trust)
    sites = find_sites(model)
    n_base = count_base_params(model)
    budget = Budget.parse(config.budget) if config.budget is not None else None
    limit = budget.limit(n_base) if budget else 0
    given = read_architecture(config.arch) if config.arch else None
    plan = Plan(
        config=config,
        splits=splits,
        task=task,
        metric=metric,
        n_base=n_base,
        family=getattr(model.config, "model_type", type(model).__name__),
        sites=sites,
        space=None if given else _space(config, sites, budget, limit),
        given=given,
        budget=budget,
        limit=limit,
        head={name: _size(model.get_submodule(name)) for name in task.head_modules(model)},
        n_tokens=task.count_tokens(model.config, config.train.max_length),
    )
    _check_budget(plan)
    return plan


def _size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def make_strategy(config: RunConfig) -> Strategy:
    """The strategy with the settings of `search`."""
    search = config.search.model_dump(exclude={"fidelity", "epochs", "lr"})
    search["criteria"] = tuple(search["criteria"])
    if config.strategy:
        data = read_json(Path(config.strategy))
        if not isinstance(data, dict) or not isinstance(data.get("strategy"), dict):
            raise ConfigError(
                f"{config.strategy} holds no strategy; give best/strategy.json of a finished run."
            )
        search["strategy"] = data["strategy"]
    return METHODS.get(config.method)(**search)


def read_architecture(path: str) -> Placement:
    """Placement of an `arch.json`, or of the run folder that holds one."""
    file = Path(path)
    if file.is_dir():
        file = next(
            (f for f in (file / "best" / "arch.json", file / "arch.json") if f.is_file()), file
        )
    if not file.is_file():
        raise ConfigError(
            f"arch {path!r} is no arch.json and no run folder that holds one; give either."
        )
    return Placement.from_dict(read_json(file))


def check_device(device: str) -> str:
    """`cpu` or `cuda`. Raises ConfigError if a GPU is asked for and absent."""
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device=cuda, but no CUDA device is visible; use device=cpu or auto.")
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return device


def problem_of(plan: Plan, evaluator: Any, on_event: Any) -> Problem:
    """The search problem of a plan."""
    from prunepeft.budget import Fidelity

    search = plan.config.search
    return Problem(
        space=plan.space,
        limit=plan.limit,
        unit=plan.budget.unit,
        evaluator=evaluator,
        n_train=len(plan.splits.train),
        fidelity=Fidelity(search.fidelity, search.epochs),
        seed=plan.config.seed,
        on_event=on_event,
    )


def _space(
    config: RunConfig, sites: tuple[Site, ...], budget: Budget | None, limit: int
) -> SearchSpace:
    if config.space == "paper":
        return _paper_space(config, sites)
    target = None
    if budget is not None and budget.unit == "parameters":
        target = int(SUPERNET_OVER_BUDGET * limit)
    return make_space(
        sites,
        tuple(config.kinds),
        sizes=config.sizes or None,
        options=config.options or None,
        roles=config.roles or None,
        target_params=target,
    )


def _paper_space(config: RunConfig, sites: tuple[Site, ...]) -> SearchSpace:
    """The paper's space, of the kinds asked for; its sizes, options and roles are fixed."""
    given = [name for name in ("sizes", "options", "roles") if getattr(config, name)]
    slots = tuple(s for s in paper_space(sites) if s.kind in config.kinds)
    if given or not slots:
        raise ConfigError(
            f"space=paper holds lora and serial_adapter at fixed sizes; got kinds "
            f"{', '.join(config.kinds)}" + (f" and {', '.join(given)}" if given else "") + ". Use "
            "space=default for a choice of your own."
        )
    return SearchSpace(slots)


def _check_budget(plan: Plan) -> None:
    if plan.given is not None:
        if plan.budget and (n := cost(plan.given, plan.budget.unit)) > plan.limit:
            raise BudgetError(
                f"the given architecture costs {n:,} {plan.budget.unit}, over the budget of "
                f"{plan.limit:,}; raise the budget or leave it out."
            )
        return
    problem_of(plan, None, None).check()
    plan.baseline()
