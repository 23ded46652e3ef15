"""PrunePEFT: put every candidate in, train briefly, prune round by round by what suits each part.

    M <- supernet
    repeat: (re)initialise what remains, train one round, score, remove the least useful
    until the budget is met

Which criterion judges which partition (depth block x kind) is found out first, in a warm-up.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from prunepeft.batches import derive_seed
from prunepeft.criteria import CRITERIA, PAPER_CRITERIA
from prunepeft.criteria.combine import (
    assign_criteria,
    fallback_strategy,
    hybrid_probability,
    tendency,
    worth,
)
from prunepeft.criteria.select import free_low_layers, prune_to, removal_order
from prunepeft.criteria.settling import Settling
from prunepeft.errors import ConfigError
from prunepeft.evaluate import Scored
from prunepeft.space import Placement, depth_below
from prunepeft.strategies.base import Problem, SearchResult, Strategy
from prunepeft.strategies.rounds import entry, refill
from prunepeft.strategies.warm_up import WarmUp

MODES = ("hybrid", "no_partitions", "none", "random")  # and single:<criterion>
REINIT = ("reset", "keep", "init")
ROUNDS_SHARE = 0.5
LEAST_STEPS = 10


@dataclass(frozen=True)
class HybridPruning(Strategy):
    """Iterative hybrid pruning.

    Attributes:
        rounds: Rounds in which the budget is reached; the cost falls by equal amounts.
        per_round: Modules removed a round; then rounds go on until the budget is met.
        reinit: What a round starts from: `reset` (fresh values, as in the paper), `init` (the same
            first values every round) or `keep` (the weights of the round before).
        criteria: Candidate criteria.
        mode: `hybrid`; ablations `no_partitions`, `single:<criterion>`, `random`, `none`.
        warmup: Find out which criterion suits which partition; else the authors' fixed table.
        warmup_rows, warmup_epochs, warmup_turns: Size of the warm-up, see `WarmUp`.
        settle: A round ends when the ranking of its modules has settled, see `Settling`.
        cost_aware: What it is worth to free the lowest layers, see `free_low_layers`.
        strategy: Criteria of each partition, given instead of found (transfer from another task).
        paper_exact: Probabilities as in the paper, see `hybrid_probability`.
    References:
        PrunePEFT, 2025, arXiv 2506.07587, algorithm 1. Differs from released code: every criterion
        has one orientation, runs of the warm-up are shared where they are equal, the budget is met
        exactly. The docstrings of the criteria and of `hybrid_probability` list the rest.
    """

    name: ClassVar[str] = "prunepeft"

    rounds: int = 3
    per_round: int | None = None
    reinit: str = "reset"
    criteria: tuple[str, ...] = PAPER_CRITERIA
    mode: str = "hybrid"
    warmup: bool = True
    warmup_rows: int = 100
    warmup_epochs: int = 3
    warmup_turns: int | None = None
    settle: float | None = None
    cost_aware: float = 0.0
    strategy: Mapping[str, Sequence[str]] = field(default_factory=dict)
    paper_exact: bool = False

    def __post_init__(self) -> None:
        for criterion in self.criteria:
            CRITERIA.get(criterion)
        if not self.criteria:
            raise ConfigError("search.criteria is empty; name at least one (see: ls criteria).")
        if self.mode.startswith("single:"):
            CRITERIA.get(self.mode.removeprefix("single:"))
        elif self.mode not in MODES:
            raise ConfigError(
                f"search.mode {self.mode!r} is unknown; use {', '.join(MODES)} or "
                "single:<criterion>."
            )
        if self.reinit not in REINIT:
            raise ConfigError(f"search.reinit {self.reinit!r} is unknown; use {', '.join(REINIT)}.")
        if self.cost_aware < 0:
            raise ConfigError(f"search.cost_aware must be 0 or more; got {self.cost_aware}.")
        Settling(self.settle, 1)
        if self.cost_aware and self.per_round is not None:
            raise ConfigError(
                "search.per_round removes so many modules a round, whatever they cost; leave it "
                "out to let search.cost_aware clear low layers."
            )
        for name in ("cost_aware", "settle"):
            if getattr(self, name) and self.mode in ("none", "random"):
                raise ConfigError(
                    f"search.mode={self.mode} trains no rounds, so search.{name} says nothing; "
                    "leave it out."
                )
        for value in self.strategy.values():
            for criterion in value:
                CRITERIA.get(criterion)

    @property
    def warm_up(self) -> WarmUp:
        """How criteria are assigned to partitions."""
        return WarmUp(self.criteria, self.warmup_rows, self.warmup_epochs, self.warmup_turns)

    def default_share(self, problem: Problem) -> float:
        """Share of the rows a round sees: all rounds take half of the training's steps.

        In the paper's tables a search costs 0.3 of the training; with so little, what is found was
        worse than plain LoRA on CoLA. A round has ten steps at least.
        """
        if not problem.train_steps:
            return 1.0
        rounds = self.most_rounds(len(problem.space))
        steps = ROUNDS_SHARE * problem.train_steps / (rounds * problem.fidelity.epochs)
        return min(1.0, max(steps, LEAST_STEPS) * problem.batch_size / problem.n_train)

    def most_rounds(self, n_slots: int) -> int:
        """Rounds at most, of so many modules."""
        return self.rounds if self.per_round is None else -(-n_slots // self.per_round)

    def search(self, problem: Problem) -> SearchResult:
        """See `Strategy.search`. Mode `none` returns the supernet, over budget, as an ablation."""
        problem.check()
        full = problem.space.full()
        partitions = self._partitions(full)
        result = SearchResult(full)
        result.history = {
            "mode": self.mode,
            "space": full.to_dict(),
            "partitions": partitions,
            "warmup": None,
            "strategy": {},
            "rounds": [],
        }
        if self.mode == "none" or problem.cost(full) <= problem.limit:
            return result
        if self.mode == "random":
            result.placement = self._random(problem, full, result.history)
            return result
        strategy = self._strategy(problem, partitions, result)
        result.history["strategy"] = strategy
        result.placement = self._prune(problem, partitions, strategy, result)
        return result

    def _partitions(self, full: Placement) -> dict[str, str]:
        whole = self.mode == "no_partitions" or self.mode.startswith("single:")
        return {s.id: "all" if whole else s.partition for s in full}

    def _scales(self, kept: Placement) -> dict[str, str] | None:
        """Kinds have scales of their own; a single criterion judges all on its raw values."""
        return None if self.mode.startswith("single:") else {s.id: s.kind for s in kept}

    def _strategy(
        self, problem: Problem, partitions: Mapping[str, str], result: SearchResult
    ) -> dict[str, list[str]]:
        """Criteria of every partition."""
        names = list(dict.fromkeys(partitions.values()))
        if self.mode.startswith("single:"):
            return {"all": [self.mode.removeprefix("single:")]}
        if self.mode == "no_partitions":
            return {"all": list(self.criteria)}
        if self.strategy:
            if not set(names) & set(self.strategy):
                raise ConfigError(
                    f"the given strategy covers {', '.join(self.strategy)}, but the partitions "
                    f"here are {', '.join(names)}; it comes from another kind of model or space."
                )
            return {p: list(self.strategy.get(p, self.criteria)) for p in names}
        if not self.warmup:
            return fallback_strategy(partitions)
        removed = self.warm_up.run(problem, result)
        counts = tendency(removed, partitions)
        result.history["warmup"]["tendency"] = counts
        return assign_criteria(counts)

    def _prune(
        self,
        problem: Problem,
        partitions: Mapping[str, str],
        strategy: Mapping[str, Sequence[str]],
        result: SearchResult,
    ) -> Placement:
        kept = problem.space.full()
        first_cost = problem.cost(kept)
        graveyard: list[str] = []
        start, number = "", 0
        while problem.cost(kept) > problem.limit:
            number += 1
            scored = self._score(problem, kept, strategy, number, start)
            start = scored.key if self.reinit == "keep" else ""
            result.add(scored)
            here = {i: partitions[i] for i in kept.ids}
            probability = hybrid_probability(
                scored.saliency,
                here,
                strategy,
                scales=self._scales(kept),
                paper_exact=self.paper_exact,
            )
            judged = worth(scored.saliency, here, strategy, self._scales(kept))
            gone = self._choose(problem, kept, probability, judged, number, first_cost)
            graveyard += gone
            before, kept = kept, kept.without(gone)
            if problem.cost(kept) <= problem.limit:
                back = refill(problem, kept, graveyard, frees_layers=self.cost_aware > 0)
                kept = problem.space.full().without(set(graveyard) - back)
            log = entry(problem, number, before, kept, gone)
            log |= {"saliency": scored.saliency, "probability": probability}
            log |= {"seconds": scored.seconds, "steps": scored.steps, "rows": scored.rows}
            result.history["rounds"].append(log)
            problem.on_event("round", round=number, modules=len(kept), cost=log["cost_after"])
        return kept

    def _score(
        self,
        problem: Problem,
        kept: Placement,
        strategy: Mapping[str, Sequence[str]],
        number: int,
        start: str,
    ) -> Scored:
        """Train one round on what is left."""
        return problem.evaluator.score(
            kept,
            tuple(dict.fromkeys(c for used in strategy.values() for c in used)),
            name=f"round {number}" + ("" if self.per_round else f"/{self.rounds}"),
            fidelity=problem.fidelity,
            seed=derive_seed(problem.seed, "round", number),
            init_seed=derive_seed(problem.seed, "init", 0 if self.reinit == "init" else number),
            start=start,
            keep=self.reinit == "keep",
            settle=self.settle,
        )

    def _choose(
        self,
        problem: Problem,
        kept: Placement,
        probability: Mapping[str, float],
        judged: Mapping[str, float],
        number: int,
        first_cost: int,
    ) -> list[str]:
        """Ids to remove in this round, first to go first."""
        order = removal_order(probability, kept.ids)
        costs = {i: c for i, c in problem.slot_costs().items() if i in set(order)}
        depth = {i: d for i, d in depth_below(problem.space).items() if i in costs}
        freeing = {"depth": depth, "worth": judged, "price": self.cost_aware}
        if self.per_round is not None:
            gone = order[: self.per_round]
            if sum(costs.values()) - sum(costs[i] for i in gone) > problem.limit:
                return gone
        elif number < self.rounds:
            target = first_cost - (first_cost - problem.limit) * number // self.rounds
            target = max(target, problem.limit)
            return free_low_layers(costs, order, target, refill=False, **freeing)
        if min(costs.values()) > problem.limit:
            return order
        return free_low_layers(costs, order, problem.limit, **freeing)

    def _random(self, problem: Problem, full: Placement, history: dict[str, Any]) -> Placement:
        """Remove in random order, without any training."""
        generator = torch.Generator().manual_seed(derive_seed(problem.seed, "random"))
        order = [full.ids[i] for i in torch.randperm(len(full), generator=generator)]
        gone = prune_to(problem.slot_costs(), order, problem.limit)
        kept = full.without(gone)
        log = entry(problem, 1, full, kept, gone)
        log |= {"saliency": {}, "probability": {}, "seconds": 0.0, "steps": 0, "rows": 0}
        history["rounds"].append(log)
        return kept
