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
from prunepeft.budget import Fidelity
from prunepeft.criteria import CRITERIA, PAPER_CRITERIA
from prunepeft.criteria.combine import (
    assign_criteria,
    fallback_strategy,
    hybrid_probability,
    tendency,
)
from prunepeft.criteria.select import prune_to, removal_order
from prunepeft.errors import ConfigError
from prunepeft.evaluate import Scored
from prunepeft.space import Placement
from prunepeft.strategies.base import Problem, SearchResult, Strategy

MODES = ("hybrid", "no_partitions", "none", "random")  # and single:<criterion>
REINIT = ("reset", "keep", "init")


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
        warmup_rows, warmup_epochs, warmup_turns: Size of the warm-up.
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
    warmup_turns: int = 3
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
        for value in self.strategy.values():
            for criterion in value:
                CRITERIA.get(criterion)

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
        removed = self._warm_up(problem, result)
        counts = tendency(removed, partitions)
        result.history["warmup"]["tendency"] = counts
        return assign_criteria(counts)

    def _warm_up(self, problem: Problem, result: SearchResult) -> dict[str, list[str]]:
        """What each criterion alone would remove in a few turns on a small sample.

        Criteria that have removed the same modules so far train the same model on the same data
        with the same seed, so they share that run: in the first turn all of them do.
        """
        full = problem.space.full()
        per_turn = max(1, round(len(full) / 16))
        share = min(1.0, self.warmup_rows / problem.n_train)
        fidelity = Fidelity(share, self.warmup_epochs)
        removed: dict[str, list[str]] = {c: [] for c in self.criteria}
        log: dict[str, Any] = {"turns": [], "runs": 0, "runs_unshared": 0}
        for turn in range(1, self.warmup_turns + 1):
            runs: dict[frozenset[str], Scored] = {}
            for criterion in self.criteria:
                gone = frozenset(removed[criterion])
                if len(full) - len(gone) <= per_turn:
                    continue
                log["runs_unshared"] += 1
                if gone not in runs:
                    seed = derive_seed(problem.seed, "warmup", turn)
                    runs[gone] = problem.evaluator.score(
                        full.without(gone),
                        self.criteria,
                        name=f"warm-up turn {turn}/{self.warmup_turns}, run {len(runs) + 1}",
                        fidelity=fidelity,
                        seed=seed,
                        init_seed=seed,
                    )
                    log["runs"] += 1
                    result.add(runs[gone])
                scores = runs[gone].saliency[criterion]
                taken = sorted(scores, key=lambda i: scores[i])[:per_turn]
                removed[criterion] += taken
                log["turns"].append(
                    {"turn": turn, "criterion": criterion, "removed": taken, "run": runs[gone].key}
                )
        result.history["warmup"] = log
        problem.on_event("warmup", runs=log["runs"], runs_unshared=log["runs_unshared"])
        return removed

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
            probability = hybrid_probability(
                scored.saliency,
                {i: partitions[i] for i in kept.ids},
                strategy,
                scales=self._scales(kept),
                paper_exact=self.paper_exact,
            )
            gone = self._choose(problem, kept, probability, number, first_cost)
            graveyard += gone
            before, kept = kept, kept.without(gone)
            if problem.cost(kept) <= problem.limit:
                kept = problem.space.full().without(
                    set(graveyard) - _refill(problem, kept, graveyard)
                )
            entry = _entry(problem, number, before, kept, gone)
            entry |= {"saliency": scored.saliency, "probability": probability}
            entry |= {"seconds": scored.seconds, "steps": scored.steps, "rows": scored.rows}
            result.history["rounds"].append(entry)
            problem.on_event("round", round=number, modules=len(kept), cost=entry["cost_after"])
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
        )

    def _choose(
        self,
        problem: Problem,
        kept: Placement,
        probability: Mapping[str, float],
        number: int,
        first_cost: int,
    ) -> list[str]:
        """Ids to remove in this round, first to go first."""
        order = removal_order(probability, kept.ids)
        costs = {i: c for i, c in problem.slot_costs().items() if i in set(order)}
        if self.per_round is not None:
            gone = order[: self.per_round]
            if sum(costs.values()) - sum(costs[i] for i in gone) > problem.limit:
                return gone
        elif number < self.rounds:
            target = first_cost - (first_cost - problem.limit) * number // self.rounds
            return prune_to(costs, order, max(target, problem.limit), refill=False)
        if min(costs.values()) > problem.limit:
            return order
        return prune_to(costs, order, problem.limit)

    def _random(self, problem: Problem, full: Placement, history: dict[str, Any]) -> Placement:
        """Remove in random order, without any training."""
        generator = torch.Generator().manual_seed(derive_seed(problem.seed, "random"))
        order = [full.ids[i] for i in torch.randperm(len(full), generator=generator)]
        gone = prune_to(problem.slot_costs(), order, problem.limit)
        kept = full.without(gone)
        entry = _entry(problem, 1, full, kept, gone)
        entry |= {"saliency": {}, "probability": {}, "seconds": 0.0, "steps": 0, "rows": 0}
        history["rounds"].append(entry)
        return kept


def _entry(
    problem: Problem, number: int, before: Placement, after: Placement, gone: Sequence[str]
) -> dict[str, Any]:
    """What a round changed; `returned` modules went in an earlier round and fit after all."""
    kept = set(after.ids)
    return {
        "round": number,
        "cost_before": problem.cost(before),
        "cost_after": problem.cost(after),
        "removed": [i for i in gone if i not in kept],
        "returned": [i for i in after.ids if i not in before.ids],
    }


def _refill(problem: Problem, kept: Placement, graveyard: Sequence[str]) -> set[str]:
    """Removed modules that still fit, the last removed first: afterwards none fits."""
    costs = problem.slot_costs()
    room = problem.limit - problem.cost(kept)
    back: set[str] = set()
    for slot_id in reversed(graveyard):
        if slot_id not in back and costs[slot_id] <= room:
            back.add(slot_id)
            room -= costs[slot_id]
    return back
