"""Light-PEFT: one short training of everything, then heads, neurons, modules and ranks go at once.

train every candidate module, and masks of the base model's heads and neurons, for a short while
take the weakest heads and neurons out of the base model, and the weakest modules and ranks
train what is left on, from the values it has
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from prunepeft.batches import derive_seed
from prunepeft.criteria.select import prune_to
from prunepeft.errors import BudgetError, ConfigError
from prunepeft.kinds import slot_cost, slot_kind
from prunepeft.space import Placement, Slot
from prunepeft.strategies.base import Problem, SearchResult, Strategy
from prunepeft.structured.cut import Cut, check_ratio, choose_units
from prunepeft.structured.groups import Group
from prunepeft.structured.importance import RANK_IMPORTANCE
from prunepeft.structured.keep import Ranks, fit, keep_modules, keep_ranks, n_gone, slots_after
from prunepeft.structured.light_peft import EarlyScores

SCOPES = ("layer", "global")
THIRD = 1 / 3


@dataclass(frozen=True)
class LightPeft(Strategy):
    """Early pruning of the base model and of the modules, from one short training.

    The budget holds whatever the ratios are. It counts what the modules cost on the cut base, where
    they are smaller. A module keeps the scaling of its first size when ranks go.

    Attributes:
        head_ratio: Share of the heads of each layer that go; 0: the heads are left alone. None: a
            third, or as near to it as whole groups of heads come.
        neuron_ratio: Share of the feed-forward neurons that go; 0: they are left alone; None: a
            third.
        module_ratio: Share of the modules that go. None: the best ones stay, as many as fit the
            budget with the ranks that `rank_ratio` leaves them.
        rank_ratio: Share of the ranks of the modules left that go. If they are still over the
            budget, the ranks that score lowest go on to go.
        neuron_scope: `layer`: the same number in each layer, so all stay equally wide; `global`:
            over all layers together, as the authors' training script does.
        rank_scope: `layer`: the same share of each module's ranks; `global`: of all together, as
            the authors' script does; a module that loses all its ranks goes.
        rank_importance: `mean` (as released), `sum` or `abs`, see `rank_importance`.
        l1: Factor of the L1 norm of the masks in the loss.
    References:
        Light-PEFT, 2024, arXiv 2406.03792. Differs from released code: counts are exact (it
        compares with an interpolated quantile), the budget bounds the result, modules score by
        optimiser steps (see `EarlyScores`), and the masks have no learning rate of their own.
    """

    name: ClassVar[str] = "light-peft"
    section: ClassVar[str] = "light_peft"
    cuts_base: ClassVar[bool] = True
    needs_whole_base: ClassVar[bool] = True

    head_ratio: float | None = None
    neuron_ratio: float | None = None
    module_ratio: float | None = None
    rank_ratio: float = 0.5
    neuron_scope: str = "layer"
    rank_scope: str = "global"
    rank_importance: str = "mean"
    l1: float = 1e-4

    def __post_init__(self) -> None:
        for name in ("head_ratio", "neuron_ratio", "module_ratio", "rank_ratio"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < 1:
                raise ConfigError(f"light_peft.{name} must be in [0, 1); got {value!r}.")
        scopes = {name: SCOPES for name in ("neuron_scope", "rank_scope")}
        for name, known in (scopes | {"rank_importance": RANK_IMPORTANCE}).items():
            if getattr(self, name) not in known:
                raise ConfigError(
                    f"light_peft.{name} {getattr(self, name)!r} is unknown; use {', '.join(known)}."
                )

    def ratios(self, groups: Sequence[Group]) -> dict[str, float]:
        """Share of each sort of unit that goes; nothing of what is not named or not there."""
        given = {"heads": self.head_ratio, "neurons": self.neuron_ratio}
        ratios = {what: THIRD if ratio is None else ratio for what, ratio in given.items()}
        there = {group.what for group in groups}
        return {what: ratio for what, ratio in ratios.items() if ratio > 0 and what in there}

    def check(self, problem: Problem) -> None:
        """See `Strategy.check`: the budget, and ratios that the base model cannot have."""
        super().check(problem)
        for what, ratio in (("heads", self.head_ratio), ("neurons", self.neuron_ratio)):
            if ratio is not None and what in self.ratios(problem.groups):
                check_ratio(problem.groups, what, ratio)
        _check_kinds(problem, self.ratios(problem.groups))

    def search(self, problem: Problem) -> SearchResult:
        """See `Strategy.search`. Without groups the base model stays whole."""
        self.check(problem)
        full = problem.space.full()
        ratios = self.ratios(problem.groups)
        groups = tuple(group for group in problem.groups if group.what in ratios)
        watched = problem.evaluator.watch(
            full,
            self._watcher(problem, full, groups),
            name="estimation",
            fidelity=problem.fidelity,
            seed=derive_seed(problem.seed, "estimation"),
            init_seed=derive_seed(problem.seed, "init", 1),
        )
        cut = None
        if groups:
            masks = _named(watched.tensors, "mask.")
            cut = choose_units(groups, masks, ratios, {"neurons": self.neuron_scope})
        keep, note = self._keep(problem, slots_after(full, groups, cut), watched.tensors)
        placement, key = problem.evaluator.carry(full, watched.key, cut, keep)
        if (total := problem.cost(placement)) > problem.limit:
            raise BudgetError(
                f"what is left costs {total:,} {problem.unit}, over the budget of "
                f"{problem.limit:,}; give light_peft.module_ratio or use other kinds."
            )
        result = SearchResult(placement, start=key, cut=cut)
        result.add(watched)
        result.history = _history(problem, result, watched.tensors, groups)
        result.history["rounds"][0]["rows"] = watched.rows
        result.history |= {"kept_ranks": keep, "note": note}
        problem.on_event("round", round=1, modules=len(placement), cost=total)
        return result

    def _watcher(self, problem: Problem, full: Placement, groups: tuple[Group, ...]) -> EarlyScores:
        """Scores of all that may go."""
        may_go = self.module_ratio != 0 or self.rank_ratio > 0
        may_go = may_go or problem.cost(full) > problem.limit
        how = self.rank_importance
        return EarlyScores(groups, l1=self.l1, modules=may_go, ranks=may_go, how=how)

    def _keep(
        self, problem: Problem, slots: Mapping[str, Slot], found: Mapping[str, Tensor]
    ) -> tuple[Ranks, str]:
        """Ranks that stay of each slot that stays, and what to say of it."""
        modules = {i: s.item() for i, s in _named(found, "module.").items() if i in slots}
        ranks = {i: s for i, s in _named(found, "rank.").items() if i in slots}

        def cost(slot_id: str, size: int) -> int:
            return slot_cost(slots[slot_id], size, problem.unit) if size else 0

        if not modules:  # all of them fit: only the base model is pruned
            return {i: list(range(s.sizes[-1])) for i, s in slots.items()}, "no module was scored"
        if self.module_ratio is None:
            sizes = {i: slots[i].sizes[-1] for i in modules}
            sizes |= {i: n - n_gone(n, self.rank_ratio) for i, n in sizes.items() if i in ranks}
            order = sorted(modules, key=lambda i: modules[i])
            gone = set(prune_to({i: cost(i, n) for i, n in sizes.items()}, order, problem.limit))
            stay = [i for i in modules if i not in gone]
        else:
            stay = keep_modules(modules, self.module_ratio)
        kept: Ranks = {i: list(range(slots[i].sizes[-1])) for i in stay if i not in ranks}
        ranked = {i: ranks[i] for i in stay if i in ranks}
        kept |= keep_ranks(ranked, self.rank_ratio, self.rank_scope)
        fitted = fit(kept, modules, ranks, cost, problem.limit)
        n_more = sum(map(len, kept.values())) - sum(map(len, fitted.values()))
        note = f"{n_more} more ranks went to meet the budget" if n_more else ""
        return {i: fitted[i] for i in modules if i in fitted}, note


def _check_kinds(problem: Problem, ratios: Mapping[str, float]) -> None:
    """Raise ConfigError for modules that neither shrink with their layer nor fold into it."""
    cut = {(p.path, p.side) for g in problem.groups if g.what in ratios for p in g.parts}
    for slot in problem.space:
        kind = slot_kind(slot)
        stuck = [
            site.path
            for site in slot.sites
            for side in ("out", "in")
            if (site.path, side) in cut and kind.feature_axes(site, side) is None
        ]
        if stuck and not kind.mergeable:
            raise ConfigError(
                f"kind {slot.kind!r} on {stuck[0]} mixes features of a layer that loses heads or "
                f"neurons, and cannot be folded into its weight. Place it with roles.{slot.kind}="
                "o,down, or leave those whole (light_peft.head_ratio=0, light_peft.neuron_ratio=0)."
            )


def _named(found: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """What was found under names with this prefix, by the rest of the name."""
    return {n.removeprefix(prefix): t for n, t in found.items() if n.startswith(prefix)}


def _history(
    problem: Problem,
    result: SearchResult,
    found: Mapping[str, Tensor],
    groups: tuple[Group, ...],
) -> dict[str, Any]:
    """What a report needs, as plain JSON values."""
    full = problem.space.full()
    modules = {i: s.item() for i, s in _named(found, "module.").items()}
    kept = set(result.placement.ids)
    entry = {
        "round": 1,
        "cost_before": problem.cost(full),
        "cost_after": problem.cost(result.placement),
        "removed": [i for i in full.ids if i not in kept],
        "returned": [],
        "saliency": {"relative_change": modules} if modules else {},
        "probability": {},
        "seconds": result.seconds,
        "steps": result.steps,
    }
    return {
        "mode": "light-peft",
        "space": full.to_dict(),
        "partitions": {s.id: s.partition for s in full},
        "warmup": None,
        "strategy": {},
        "rounds": [entry],
        "base": [_group_entry(group, result.cut, found) for group in groups],
        "ranks": {i: s.tolist() for i, s in _named(found, "rank.").items()},
    }


def _group_entry(group: Group, cut: Cut | None, found: Mapping[str, Tensor]) -> dict[str, Any]:
    """What stays of a group, with the masks of heads; the neurons kept are listed in the cut."""
    masks = found[f"mask.{group.id}"]
    kept = {} if cut is None else cut.keep
    stays = list(kept.get(group.id, range(group.n_units)))
    entry = {"group": group.id, "what": group.what, "stack": group.stack, "layer": group.layer}
    entry |= {"n_units": group.n_units, "n_kept": len(stays)}
    entry |= {"mask_min": masks.min().item(), "mask_max": masks.max().item()}
    if group.what == "heads":
        entry |= {"kept": stays, "masks": masks.tolist()}
    return entry
