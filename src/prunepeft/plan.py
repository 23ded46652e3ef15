"""What a run would do, found out without reading weights: data, sites, candidates, budget, cost."""

import logging
import os
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from prunepeft.architecture import check_fits, read_architecture
from prunepeft.backends import Backend, Serial, check_backend
from prunepeft.base_plan import narrowed_sites, plan_groups, plan_storage
from prunepeft.batches import n_steps
from prunepeft.budget import Budget, Fidelity
from prunepeft.candidates import LORA_ALL_ROLES, make_lora_baseline, make_space, paper_space
from prunepeft.config import RunConfig
from prunepeft.data import Splits, load_data
from prunepeft.errors import BudgetError, ConfigError
from prunepeft.kinds import cost
from prunepeft.metrics import METRICS, check_metric
from prunepeft.quantized import Storage
from prunepeft.sharding import check_shard
from prunepeft.sites import count_base_params, find_sites
from prunepeft.space import Placement, SearchSpace, Site
from prunepeft.sparse_tuning import IstSettings
from prunepeft.strategies import METHODS, Problem, Strategy
from prunepeft.strategies.make import make_strategy
from prunepeft.structured.groups import Group
from prunepeft.tasks import TASKS, Task

logger = logging.getLogger(__name__)

# Sizes double, so the default space costs 1.4 to 2.8 budgets (unless size 1 or 64 ends the choice).
SUPERNET_OVER_BUDGET = 2.83
BF16_PARAMS = 10_000_000  # a smaller model gains nothing on a processor
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
        space: The candidates; None when an architecture was given, or nothing is searched.
        given: The architecture that was given instead of a search.
        budget: The budget; None when only an architecture was given.
        limit: The budget as a whole number.
        head: Modules trained in full, and how many parameters they have.
        n_tokens: Tokens of the longest row, for estimates.
        groups: What may be cut from the base model; empty if it stays whole.
        storage: How the base model is quantised; None if it is not.
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
    groups: tuple[Group, ...] = ()
    storage: Storage | None = None

    @property
    def base_ratios(self) -> dict[str, float]:
        """Share of the heads and of the neurons that go."""
        return dict.fromkeys({g.what for g in self.groups}, self.config.base_ratio)

    def on(self, model: nn.Module) -> "Plan":
        """The same plan on a base model that was cut: its sites and candidates are narrower.

        The budget stays the number it was on the whole model.
        """
        sites = find_sites(model)
        space = None if self.space is None else _space(self.config, sites, self.budget, self.limit)
        return replace(self, sites=sites, space=space, n_base=count_base_params(model))

    def uses_bf16(self, device: str) -> bool:
        """Whether the base model is in bfloat16: as asked for, or where the device is fast in it.

        On a processor that pays for models of some size, and a base that is cut, and so saved,
        stays in full precision there.
        """
        if self.config.precision != "auto":
            return self.config.precision == "bf16"
        if device == "cuda":
            return torch.cuda.is_bf16_supported(including_emulation=False)
        return not self.groups and self.n_base >= BF16_PARAMS and _cpu_has_bf16()

    @property
    def strategy(self) -> Strategy:
        return make_strategy(self.config)

    @property
    def ist(self) -> IstSettings | None:
        """How the result is trained if not all layers train in every step."""
        given = self.config.ist.model_dump(exclude={"enabled"})
        return IstSettings(**given) if self.config.ist.enabled else None

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
    method = METHODS.get(config.method)
    _check_place(config, method)
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
    metric = _metric(config, task, splits)
    model = task.make_empty_model(config.model, splits, trust_remote_code=config.trust_remote_code)
    check_shard(config, model.config, needs_whole_base=method.needs_whole_base)
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
        space=None if given or budget is None else _space(config, sites, budget, limit),
        given=given,
        budget=budget,
        limit=limit,
        head={name: _size(model.get_submodule(name)) for name in task.head_modules(model)},
        n_tokens=task.count_tokens(model.config, config.train.max_length),
        groups=plan_groups(config, model, cuts_base=method.cuts_base),
        storage=plan_storage(config, model, task.head_modules(model)),
    )
    _check_budget(plan, model)
    return plan


def _metric(config: RunConfig, task: Task, splits: Splits) -> str:
    metric = config.metric or task.default_metric
    check_metric(metric, task.name, len(splits.labels or ()) or None)
    return metric


def _check_place(config: RunConfig, method: type[Strategy]) -> None:
    check_device(config.device)
    check_backend(config, has_trials=method.has_trials)
    if config.offline:
        os.environ["HF_HUB_OFFLINE"] = "1"


def _size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _cpu_has_bf16() -> bool:
    """Whether the processor multiplies matrices in bfloat16."""
    found = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return any(found.get(name) for name in ("avx512_bf16", "amx_bf16"))


def check_device(device: str) -> str:
    """`cpu` or `cuda`. Raises ConfigError if a GPU is asked for and absent."""
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device=cuda, but no CUDA device is visible; use device=cpu or auto.")
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return device


def problem_of(
    plan: Plan, evaluator: Any, on_event: Any, backend: Backend | None = None
) -> Problem:
    """The search problem of a plan."""
    search, train = plan.config.search, plan.config.train
    problem = Problem(
        space=plan.space,
        limit=plan.limit,
        unit=plan.budget.unit,
        evaluator=evaluator,
        n_train=len(plan.splits.train),
        fidelity=Fidelity(search.fidelity or 1.0, search.epochs),
        seed=plan.config.seed,
        on_event=on_event,
        groups=plan.groups,
        metric=plan.metric,
        greater_is_better=METRICS.get(plan.metric).greater_is_better,
        batch_size=train.batch_size,
        backend=backend or Serial(),
        train_steps=train.epochs * n_steps(len(plan.splits.train), train.batch_size),
        n_classes=plan.splits.n_classes,
    )
    if search.fidelity is not None:
        return problem
    share = plan.strategy.default_share(problem)
    return replace(problem, fidelity=Fidelity(share, search.epochs))


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


def _check_budget(plan: Plan, model: nn.Module) -> None:
    if plan.given is not None:
        if plan.budget and (n := cost(plan.given, plan.budget.unit)) > plan.limit:
            raise BudgetError(
                f"the given architecture costs {n:,} {plan.budget.unit}, over the budget of "
                f"{plan.limit:,}; raise the budget or leave it out."
            )
        check_fits(plan.given, plan.sites)
        return
    if plan.budget is None:  # no search: only the base is cut
        return
    plan.strategy.check(problem_of(plan, None, None))
    if plan.budget.unit == "parameters":
        plan.baseline()
    _check_narrowed(plan, model)


def _check_narrowed(plan: Plan, model: nn.Module) -> None:
    """Raise an error if the candidates do not fit the base model as it will be after the cut."""
    if plan.space is not None and plan.config.base_ratio and not plan.strategy.cuts_base:
        sites = narrowed_sites(model, plan.groups, plan.base_ratios)
        _space(plan.config, sites, plan.budget, plan.limit)
