"""BIPEFT: which modules, and how large, learned in turns while the budget is closed in on.

put every candidate on the model with a gate for its presence and gates for its ranks
train in turns: the modules, the logits of presence, the modules, the logits of dimensions
whenever the most sensitive modules that fit stay the same: remove some, hold some dimensions
keep the most sensitive modules that fit; train them from fresh values
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from prunepeft.batches import derive_seed
from prunepeft.criteria.select import prune_to
from prunepeft.errors import ConfigError
from prunepeft.evaluate import Watched
from prunepeft.kinds import slot_cost, slot_kind
from prunepeft.space import Placement, Slot
from prunepeft.strategies.base import Problem, SearchResult, Strategy
from prunepeft.strategies.bipeft_gates import has_rank_gates
from prunepeft.strategies.bipeft_rules import CRITERIA
from prunepeft.strategies.bipeft_search import BipeftSearch


@dataclass(frozen=True)
class Bipeft(Strategy):
    """Budgeted search that decides on presence and on dimensions in turns.

    The length of the search is `Fidelity`; its steps alternate between modules and structure, so
    that both never see the same rows in a step. Candidate dimensions are the sizes of a slot; if
    there is only one, its halvings. Kinds without ranks, or whose ranks cannot be gated, and all
    kinds under a budget in modules, are present at one size or absent. Dimensions that alone are
    over the budget take no part.

    Attributes:
        arch_lr: Learning rate of the logits.
        prune_steps: Fires in which the budget is reached, K; None: half of those there can be in a
            search of this length, at most 100.
        threshold: Mean cosine of selections from which pruning fires.
        begin: Share of the search before it may.
        tau_first, tau_last: Temperature of the samples at the start and at the end.
        criterion: Sensitivity of a module, see `importance`.
        window: Selections compared.
        decay: Of the smoothed sensitivity.
        dimensions: Candidates made of one size by halving it; 1: presence alone is searched.
        l1: Factor of mean |softmax(a) - a| in the loss of the logits a.
    References:
        BIPEFT, Findings of EMNLP 2024, arXiv 2410.09079. Differs from released code: see
        docs/methods/bipeft.md.
    """

    name: ClassVar[str] = "bipeft"
    section: ClassVar[str] = "bipeft"

    arch_lr: float = 0.01
    prune_steps: int | None = None
    threshold: float = 0.85
    begin: float = 0.2
    tau_first: float = 5.0
    tau_last: float = 1.0
    criterion: str = "mixed"
    window: int = 5
    decay: float = 0.85
    dimensions: int = 4
    l1: float = 0.0

    def __post_init__(self) -> None:
        if self.criterion not in CRITERIA:
            raise ConfigError(
                f"bipeft.criterion {self.criterion!r} is unknown; use {', '.join(CRITERIA)}."
            )
        for name in ("arch_lr", "tau_first", "tau_last"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ConfigError(f"bipeft.{name} must be above 0; got {getattr(self, name)!r}.")
        for name in ("threshold", "begin", "decay"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"bipeft.{name} must be in [0, 1]; got {getattr(self, name)!r}.")
        for name in ("prune_steps", "window", "dimensions"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ConfigError(f"bipeft.{name} must be 1 or more; got {getattr(self, name)!r}.")
        if not 0 <= self.l1 < float("inf"):
            raise ConfigError(f"bipeft.l1 must be 0 or more; got {self.l1!r}.")

    def check(self, problem: Problem) -> None:
        """See `Strategy.check`; a module may have its smallest dimension."""
        if not self.candidates(problem):
            problem.check(smallest=True)

    def candidates(self, problem: Problem) -> dict[Slot, list[int]]:
        """Slot -> its dimensions that fit the budget alone, ascending; slots without are left out.

        Example:
            A slot of LoRA with sizes (8,) has 1, 2, 4 and 8; with sizes (1, 8) it has these.
        """
        found: dict[Slot, list[int]] = {}
        for slot in problem.space:
            kind = slot_kind(slot)
            searched = (
                self.dimensions > 1
                and problem.unit != "modules"
                and all(has_rank_gates(kind, site) for site in slot.sites)
            )
            sizes = list(slot.sizes)
            if searched and len(sizes) == 1:
                sizes = sorted({sizes[0] >> k for k in range(self.dimensions)} - {0})
            sizes = [n for n in sizes if slot_cost(slot, n, problem.unit) <= problem.limit]
            if sizes:
                found[slot] = sizes if searched else sizes[-1:]
        return found

    def search(self, problem: Problem) -> SearchResult:
        """See `Strategy.search`. If all candidates that could stay fit, nothing is trained."""
        self.check(problem)
        candidates = self.candidates(problem)
        largest = Placement({slot: sizes[-1] for slot, sizes in candidates.items()})
        full = problem.space.full()
        result = SearchResult(largest)
        result.history = {
            "mode": "bipeft",
            "space": full.to_dict(),
            "partitions": {s.id: s.partition for s in full},
            "warmup": None,
            "strategy": {},
            "rounds": [],
            "too_large": [s.id for s in full if s not in candidates],
            "dimensions": {s.id: sizes for s, sizes in candidates.items()},
        }
        if problem.cost(largest) <= problem.limit:
            return result
        watched = self._train(problem, largest, candidates)
        result.add(watched)
        result.placement = projected(problem, candidates, watched)
        entry = _entry(problem, largest, result.placement, watched)
        result.history["rounds"].append(entry)
        result.history["fires"] = [
            dict(zip(("step", "cost_before", "cost_after", "removed", "held"), fire, strict=True))
            for fire in watched.tensors["fires"].tolist()
        ]
        problem.on_event("round", round=1, modules=len(result.placement), cost=entry["cost_after"])
        return result

    def _train(
        self, problem: Problem, placement: Placement, candidates: dict[Slot, list[int]]
    ) -> Watched:
        watcher = BipeftSearch(
            {s.id: [slot_cost(s, n, problem.unit) for n in ns] for s, ns in candidates.items()},
            {s.id: ns for s, ns in candidates.items()},
            problem.limit,
            seed=derive_seed(problem.seed, "gates"),
            arch_lr=self.arch_lr,
            prune_steps=self.prune_steps,
            threshold=self.threshold,
            begin=self.begin,
            tau=(self.tau_first, self.tau_last),
            criterion=self.criterion,
            window=self.window,
            decay=self.decay,
            l1=self.l1,
        )
        return problem.evaluator.watch(
            placement,
            watcher,
            name="structure",
            fidelity=problem.fidelity,
            seed=derive_seed(problem.seed, "structure-rows"),
            init_seed=derive_seed(problem.seed, "init", 1),
        )


def projected(problem: Problem, candidates: dict[Slot, list[int]], watched: Watched) -> Placement:
    """The placement: modules at their dimensions, the most sensitive first, each that still fits.

    Modules that the search removed come after all others, the last removed first, so they return
    only where the budget has room left.
    """
    removed, sensitivity, best = (
        watched.tensors[name].tolist() for name in ("removed", "sensitivity", "dimension")
    )
    slots = list(candidates)
    sizes = [candidates[s][k] for s, k in zip(slots, best, strict=True)]
    costs = {s.id: slot_cost(s, n, problem.unit) for s, n in zip(slots, sizes, strict=True)}

    def first_to_go(i: int) -> tuple[bool, float]:
        return (not removed[i], removed[i] or sensitivity[i])

    order = [slots[i].id for i in sorted(range(len(slots)), key=first_to_go)]
    gone = set(prune_to(costs, order, problem.limit))
    return Placement({s: n for s, n in zip(slots, sizes, strict=True) if s.id not in gone})


def _entry(
    problem: Problem, before: Placement, kept: Placement, watched: Watched
) -> dict[str, Any]:
    """The search as one round; the saliency of a module is its sensitivity."""
    ids, tensors = before.ids, watched.tensors
    full = problem.space.full()
    return {
        "round": 1,
        "cost_before": problem.cost(full),
        "cost_after": problem.cost(kept),
        "removed": [i for i in full.ids if i not in set(kept.ids)],
        "returned": [],
        "saliency": {"sensitivity": dict(zip(ids, tensors["sensitivity"].tolist(), strict=True))},
        "probability": {},
        "presence": dict(zip(ids, tensors["presence"].tolist(), strict=True)),
        "sizes": {slot.id: n for slot, n in kept.sizes.items()},
        "seconds": watched.seconds,
        "steps": watched.steps,
        "rows": watched.rows,
    }
