"""S3Delta: one gate per candidate, learned with the modules under a budget that all gates share.

put every candidate on the model, each multiplied by a gate
train the modules and the logits of the gates; the gates' expected cost is the budget, always
keep the most probable modules that fit; train them from fresh values
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from prunepeft.batches import derive_seed
from prunepeft.criteria.select import prune_to, removal_order
from prunepeft.errors import ConfigError
from prunepeft.evaluate import Watched
from prunepeft.space import Placement
from prunepeft.strategies.base import Problem, SearchResult, Strategy
from prunepeft.strategies.gate_search import UPDATES, GateSearch
from prunepeft.strategies.shifted_sigmoid import GRADIENTS


@dataclass(frozen=True)
class S3Delta(Strategy):
    """Sparse structure search by gates.

    The length of the search is `Fidelity`. A module is kept at its largest size or not at all;
    those that alone are over the budget take no part.

    How the two halves of the data come about: the steps of one training alternate. Steps 1, 3, ...
    train the modules, steps 2, 4, ... the logits, so both never see the same rows in a step, and
    every epoch, whose order is new, splits the rows anew.

    Attributes:
        update: `alternate`, as above, or `joint`: each step trains both on the same rows.
        gradient: `implicit`, the exact derivative under the budget, or `detach`, as released.
        logit_lr: Learning rate of the logits; falls to zero along a line.
        beta: Temperature of the sigmoid; larger lets the gates differ less.
        max_grad_norm: Gradients of the logits are scaled down to this norm.
    References:
        Sparse Structure Search for Delta Tuning, NeurIPS 2022, arXiv 2206.07382. Differs from
        released code: the gradient of the logits is first-order (it unrolls one step of the
        modules, at four passes a step), the rows alternate in place of two fixed halves, the last
        logits count and not those of the best validation, and any kind can be searched.
    """

    name: ClassVar[str] = "s3delta"
    section: ClassVar[str] = "s3delta"

    update: str = "alternate"
    gradient: str = "implicit"
    logit_lr: float = 0.1
    beta: float = 1.0
    max_grad_norm: float = 2.0

    def __post_init__(self) -> None:
        for name, known in (("update", UPDATES), ("gradient", GRADIENTS)):
            if getattr(self, name) not in known:
                raise ConfigError(
                    f"s3delta.{name} {getattr(self, name)!r} is unknown; use {', '.join(known)}."
                )
        for name in ("logit_lr", "beta", "max_grad_norm"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ConfigError(f"s3delta.{name} must be above 0; got {getattr(self, name)!r}.")

    def search(self, problem: Problem) -> SearchResult:
        """See `Strategy.search`. If all candidates that could stay fit, nothing is trained."""
        problem.check()
        full = problem.space.full()
        costs = {i: n for i, n in problem.slot_costs().items() if n <= problem.limit}
        fitting = full.without(set(full.ids) - set(costs))
        result = SearchResult(fitting)
        result.history = {
            "mode": "s3delta",
            "space": full.to_dict(),
            "partitions": {s.id: s.partition for s in full},
            "warmup": None,
            "strategy": {},
            "rounds": [],
            "too_large": [i for i in full.ids if i not in costs],
        }
        if sum(costs.values()) <= problem.limit:
            return result
        watched = self._train(problem, fitting, costs)
        result.add(watched)
        p = dict(zip(costs, watched.tensors["probability"].tolist(), strict=True))
        order = removal_order({i: 1 - p[i] for i in p}, fitting.ids)
        result.placement = fitting.without(set(prune_to(costs, order, problem.limit)))
        result.history["rounds"].append(_entry(problem, result.placement, p, watched))
        logits = watched.tensors["logit"].tolist()
        result.history["logits"] = dict(zip(costs, logits, strict=True))
        cost = problem.cost(result.placement)
        problem.on_event("round", round=1, modules=len(result.placement), cost=cost)
        return result

    def _train(self, problem: Problem, placement: Placement, costs: dict[str, int]) -> Watched:
        watcher = GateSearch(
            costs,
            problem.limit,
            seed=derive_seed(problem.seed, "gates"),
            lr=self.logit_lr,
            beta=self.beta,
            gradient=self.gradient,
            update=self.update,
            max_grad_norm=self.max_grad_norm,
        )
        return problem.evaluator.watch(
            placement,
            watcher,
            name="gates",
            fidelity=problem.fidelity,
            seed=derive_seed(problem.seed, "gates-rows"),
            init_seed=derive_seed(problem.seed, "init", 1),
        )


def _entry(
    problem: Problem, kept: Placement, p: dict[str, float], watched: Watched
) -> dict[str, Any]:
    """The search as one round; the saliency of a module is the probability of its gate."""
    full = problem.space.full()
    return {
        "round": 1,
        "cost_before": problem.cost(full),
        "cost_after": problem.cost(kept),
        "removed": [i for i in full.ids if i not in set(kept.ids)],
        "returned": [],
        "saliency": {"gate": p},
        "probability": {i: 1 - v for i, v in p.items()},
        "seconds": watched.seconds,
        "steps": watched.steps,
        "rows": watched.rows,
    }
