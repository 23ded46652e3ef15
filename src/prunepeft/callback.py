"""Prune a union model to a budget inside any transformers Trainer."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import TrainerCallback

from prunepeft.budget import Budget
from prunepeft.criteria.base import needs_of, score_units
from prunepeft.criteria.combine import fallback_strategy, hybrid_probability
from prunepeft.criteria.record import Recorder
from prunepeft.criteria.select import prune_to, removal_order
from prunepeft.errors import BudgetError, ConfigError, StateError
from prunepeft.kinds import cost, slot_cost
from prunepeft.schedules import linear
from prunepeft.space import Placement
from prunepeft.supernet import placement_of, remove_slots

logger = logging.getLogger(__name__)


class PruneCallback(TrainerCallback):
    """Removes modules in place at evenly spaced steps until the budget is met, then trains on.

    The model must carry a union adapter (`prunepeft.attach`, or `get_peft_model` with a
    `UnionConfig`). It works in one process; under data parallel use `prunepeft.search`, which
    prunes between phases.

    Args:
        budget: What may stay, in any form of `Budget.parse`.
        rounds: Number of prune events.
        start, end: Share of the training steps before the first and at the last event.
        strategy: Criteria of each partition (`stack.depth.kind`); default: the authors' table.
        criteria: One list of criteria for all modules, instead of `strategy`.
    Raises:
        ConfigError: for settings that cannot work.
        StateError: when training ends and the budget was not reached.
    """

    def __init__(
        self,
        budget: str | int | Budget,
        *,
        rounds: int = 3,
        start: float = 0.1,
        end: float = 0.5,
        strategy: Mapping[str, Sequence[str]] | None = None,
        criteria: Sequence[str] | None = None,
    ) -> None:
        if not 0 <= start < end <= 1 or rounds < 1:
            raise ConfigError(
                f"PruneCallback needs rounds >= 1 and 0 <= start < end <= 1; got rounds={rounds}, "
                f"start={start}, end={end}."
            )
        if strategy is not None and criteria is not None:
            raise ConfigError("give PruneCallback either strategy or criteria, not both.")
        self.budget = Budget.parse(budget)
        self.rounds, self.start, self.end = rounds, start, end
        self.strategy, self.criteria = strategy, tuple(criteria or ())
        self.history: list[dict[str, Any]] = []
        self._placement: Placement | None = None
        self._recorder: Recorder | None = None

    @property
    def placement(self) -> Placement:
        """What is left. Raises StateError if no training ran with this callback."""
        if self._placement is None:
            raise StateError(
                "this PruneCallback never ran: pass it to the Trainer (callbacks=[...]) that "
                "trains the model, and call train()."
            )
        return self._placement

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if args.world_size > 1:
            raise ConfigError(
                f"PruneCallback removes modules in one process, but {args.world_size} train here; "
                "use prunepeft.search, or prune on one device first."
            )
        if args.load_best_model_at_end:
            raise ConfigError(
                "load_best_model_at_end would load a checkpoint from before a prune event; turn it "
                "off and retrain the placement that is left."
            )
        full = placement_of(model)
        self._placement = full
        self.history = []
        self._leave()  # a training that broke off is still being recorded
        n_base = sum(p.numel() for n, p in model.named_parameters() if not p.requires_grad)
        self._limit = self.budget.limit(n_base)
        self._first_cost = cost(full, self.budget.unit)
        smallest = min(slot_cost(s, n, self.budget.unit) for s, n in full.sizes.items())
        if smallest > self._limit:
            raise BudgetError(
                f"the smallest module costs {smallest:,} {self.budget.unit}, the budget allows "
                f"{self._limit:,}; raise the budget or use smaller sizes."
            )
        partitions = {s.id: "all" if self.criteria else s.partition for s in full}
        self._partitions = partitions
        if self.criteria:
            self._used = {"all": list(self.criteria)}
        else:
            self._used = {
                p: list(c) for p, c in (self.strategy or fallback_strategy(partitions)).items()
            }
        span = self.end - self.start
        self._events = [
            max(1, round(state.max_steps * (self.start + span * (i + 1) / self.rounds)))
            for i in range(self.rounds)
        ]
        self._record(model)

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if self._recorder is not None:
            self._recorder.step()

    def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        if self._recorder is None or state.global_step < self._events[len(self.history)]:
            return
        record = self._recorder.read()
        self._leave()
        self._prune(model, optimizer, record, state.global_step)
        if len(self.history) < self.rounds:
            self._record(model)

    def on_train_end(self, args, state, control, model=None, **kwargs):
        self._leave()
        left = cost(placement_of(model), self.budget.unit)
        if left > self._limit:
            raise StateError(
                f"training ended after {state.global_step} steps with {left:,} {self.budget.unit} "
                f"left, over the budget of {self._limit:,}: {len(self.history)} of {self.rounds} "
                f"prune events ran (due at steps {self._events}). Train longer or lower `end`."
            )

    def _record(self, model) -> None:
        names = {c for used in self._used.values() for c in used}
        self._recorder = Recorder.for_net(model, needs_of(names)).__enter__()

    def _leave(self) -> None:
        if self._recorder is not None:
            self._recorder.__exit__(None, None, None)
            self._recorder = None

    def _prune(self, model, optimizer, record, step: int) -> None:
        placement = placement_of(model)
        saliency = score_units(record, sorted({c for used in self._used.values() for c in used}))
        here = {i: self._partitions[i] for i in placement.ids}
        probability = hybrid_probability(
            saliency, here, self._used, scales={s.id: s.kind for s in placement}
        )
        costs = {s.id: slot_cost(s, n, self.budget.unit) for s, n in placement.sizes.items()}
        number = len(self.history) + 1
        done = linear(number / self.rounds)
        target = round(self._first_cost - (self._first_cost - self._limit) * done)
        order = removal_order(probability, placement.ids)
        last = number == self.rounds
        target = self._limit if last else max(target, self._limit)
        gone = prune_to(costs, order, target, refill=last)
        remove_slots(model, gone)
        self._placement = placement_of(model)
        _forget(optimizer, model)
        self.history.append({"step": step, "removed": gone, "probability": probability})
        logger.info("step %d: removed %d modules, %d left", step, len(gone), len(self._placement))


def _forget(optimizer: Any, model: torch.nn.Module) -> None:
    """Drop parameters that are gone from the optimiser; groups stay, schedulers index them."""
    inner = getattr(optimizer, "optimizer", optimizer)
    alive = {id(p) for p in model.parameters()}
    for group in inner.param_groups:
        group["params"] = [p for p in group["params"] if id(p) in alive]
    for parameter in [p for p in inner.state if id(p) not in alive]:
        del inner.state[parameter]
