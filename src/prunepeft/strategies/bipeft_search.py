"""A watcher that learns which modules are there and how large they are, and prunes as it goes."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor, nn

from prunepeft.errors import StateError
from prunepeft.kinds import n_params, off_neutral, seeded
from prunepeft.strategies import bipeft_rules as rules
from prunepeft.strategies.bipeft_gates import ModuleGates
from prunepeft.strategies.bipeft_state import MAX_PRUNE_STEPS, Pruning, State
from prunepeft.supernet import neutral_values, placement_of, slot_layers, slot_parameters

_GATES = "bipeft_gates"  # name of the gates on the net


class BipeftSearch:
    """A `Watcher` that alternates the search for presence, that for dimensions, and training.

    Steps 1, 3, ... train the modules. Steps 2, 4, ... train the structure on their rows, in turn
    the logits of presence and those of the dimensions. Every other part is drawn or held: a step of
    the weights and one of presence take the best dimensions, one of the dimensions draws presence.
    One step alone trains both. All noise depends on the seed and the number of the step alone.

    Found, on the CPU, in the order of `costs`: `sensitivity`, `presence` (probability), `dimension`
    (the best one's index) and `removed` (0: still there, else its place among those removed), (N,);
    `dimension_logit` (N, C); `fires` (F, 5): step, expected cost before and after, modules removed,
    dimensions held.

    Args:
        costs: Slot id -> cost of every candidate dimension, for all slots of the placement.
        dimensions: Slot id -> candidate dimensions, ascending; the last is the slot's size now.
        budget: What is left may cost.
        seed: Of the noise.
        arch_lr: Learning rate of the logits.
        prune_steps: Fires in which the budget is reached; None: half of those there can be, at most
            100.
        threshold: Mean cosine of selections from which pruning fires.
        begin: Share of the training before it may.
        tau: First and last temperature.
        criterion: See `importance`.
        window: Selections compared.
        decay: Of the smoothed sensitivity.
        l1: Factor of mean |softmax(a) - a| in the loss of the logits a.
    References:
        BIPEFT, 2024, arXiv 2410.09079. See `Bipeft` for what differs from the released code.
    """

    def __init__(
        self,
        costs: Mapping[str, Sequence[int]],
        dimensions: Mapping[str, Sequence[int]],
        budget: int,
        *,
        seed: int,
        arch_lr: float = 0.01,
        prune_steps: int | None = None,
        threshold: float = 0.85,
        begin: float = 0.2,
        tau: tuple[float, float] = (5.0, 1.0),
        criterion: str = "mixed",
        window: int = 5,
        decay: float = 0.85,
        l1: float = 0.0,
    ) -> None:
        self.ids = list(costs)
        self.config: dict[str, Any] = {
            "watcher": "bipeft",
            "costs": {i: list(c) for i, c in costs.items()},
            "dimensions": {i: list(d) for i, d in dimensions.items()},
            "budget": budget,
            "seed": seed,
            "arch_lr": arch_lr,
            "prune_steps": prune_steps,
            "threshold": threshold,
            "begin": begin,
            "tau": list(tau),
            "criterion": criterion,
            "window": window,
            "decay": decay,
            "l1": l1,
        }
        widest = max(map(len, dimensions.values()))
        self._sizes = _table(dimensions.values(), widest)
        self._costs = _table(costs.values(), widest).double()
        self._net: PeftModel | None = None

    # --- Watcher ---------------------------------------------------------------------------

    def attach(self, net: PeftModel) -> None:
        """See `Watcher.attach`."""
        if self._net is not None:
            raise StateError("these gates are on a model already; stop that training first.")
        layers = slot_layers(net)
        if set(layers) != set(self.ids):
            raise StateError(
                f"{len(self.ids)} costs do not fit the {len(layers)} modules of this model; give "
                "one for each."
            )
        self._gates = nn.ModuleList(
            ModuleGates(layers[i], ranked=len(self.config["dimensions"][i]) > 1) for i in self.ids
        )
        net.add_module(_GATES, self._gates)
        slots = {slot.id: slot for slot in placement_of(net)}
        self._numel = [
            [n_params(slots[i], size) for size in self.config["dimensions"][i]] for i in self.ids
        ]
        parameters = slot_parameters(net)
        neutral = neutral_values(net)
        self._parameters = [list(parameters[i].values()) for i in self.ids]
        self._neutral = [list(neutral[i].values()) for i in self.ids]
        self._net = net
        self.start(0)

    def start(self, steps: int) -> None:
        """See `Watcher.start`."""
        self._steps = steps
        self._alternates = steps > 1
        pairs = steps // 2 if self._alternates else steps
        c = self.config
        begin = max(round(c["begin"] * pairs), c["window"])
        fires = c["prune_steps"] or min(MAX_PRUNE_STEPS, max(1, (pairs - begin) // 2))
        settings = (c["threshold"], c["window"], c["decay"])
        self._pruning = Pruning(self._costs, c["budget"], fires, begin, *settings)
        self._state = self._pruning.first(c["seed"])
        self.mark()
        self._draw()

    def mark(self) -> None:
        """See `Watcher.mark`."""
        self._marked = self._state

    def reset(self) -> None:
        """See `Watcher.reset`."""
        self._state = self._marked
        self._draw()

    def step(self) -> None:
        """See `Watcher.step`. What this step does not train, or was removed, loses its gradient."""
        state = self._state
        slopes = self._slopes()
        products = self._products()
        if not self._alternates:
            state = self._judged(self._learned(slopes), products, products)
        elif state.step % 2 == 0:
            state = replace(state, products=products)
        else:
            state = self._judged(self._learned(slopes), state.products, products)
            for parameter in self._net.parameters():
                parameter.grad = None
        for parameters, there in zip(self._parameters, state.kept.tolist(), strict=True):
            for parameter in [] if there else parameters:
                parameter.grad = None
        self._state = replace(state, step=state.step + 1)
        self._draw()

    def stop(self) -> dict[str, Tensor]:
        """See `Watcher.stop`."""
        state = self._state
        self.abandon()
        return {
            "sensitivity": state.sensitivity.clone(),
            "presence": torch.softmax(state.presence, -1)[:, 1].clone(),
            "dimension": state.best.clone(),
            "removed": state.removed.clone(),
            "dimension_logit": state.dimension.clone(),
            "fires": torch.tensor(state.fires, dtype=torch.float64).reshape(-1, 5),
        }

    def abandon(self) -> None:
        """See `Watcher.abandon`."""
        if self._net is not None:
            for gates in self._gates:
                gates.leave()
            delattr(self._net, _GATES)
            self._net = None
            self._gates, self._parameters, self._neutral = nn.ModuleList(), [], []

    # --- gates -----------------------------------------------------------------------------

    def stage(self, step: int) -> str:
        """What an optimiser step, counted from 0, trains: weights, presence or dimension."""
        if not self._alternates or step % 4 == 1:
            return "presence"
        if step % 2 == 0:
            return "weights"
        return "dimension" if self._sizes.shape[1] > 1 else "presence"

    def _sampled(self, state: State, presence: Tensor, dimension: Tensor) -> tuple[Tensor, Tensor]:
        """Presence (N,) and one-hot dimensions (N, C) of a step, from these logits."""
        draw = seeded(self.config["seed"], "gates", str(state.step))
        tau = rules.temperature(state.step, self._steps, *self.config["tau"])
        there = rules.one_hot_sample(presence, rules.gumbel(presence.shape, draw), tau)[:, 1]
        chosen = F.one_hot(state.best, dimension.shape[1]).double()
        if self.stage(state.step) == "dimension":
            there = there.detach()
            noise = rules.gumbel(dimension.shape, draw)
            drawn = rules.one_hot_sample(dimension, noise, tau)
            chosen = torch.where(state.frozen[:, None] >= 0, chosen, drawn)
        return there * state.kept, chosen

    @torch.no_grad()
    def _draw(self) -> None:
        """Fresh gates for the next step."""
        there, chosen = self._sampled(self._state, self._state.presence, self._state.dimension)
        self._shown = chosen.argmax(-1)
        sizes = self._sizes.gather(1, self._shown[:, None])[:, 0].tolist()
        for gates, on, size in zip(self._gates, there.tolist(), sizes, strict=True):
            gates.set(float(on), size)

    def _slopes(self) -> tuple[Tensor, Tensor]:
        """Derivatives of the loss by presence, (N,), and by the candidates, (N, C).

        What is not finite tells nothing and counts as 0.
        """
        found = [gates.take_gradients() for gates in self._gates]
        flat = torch.cat([g.flatten() for part in found for g in part])
        parts = iter(
            flat.cpu()
            .double()
            .nan_to_num(0.0, 0.0, 0.0)
            .split([g.numel() for part in found for g in part])
        )
        by_presence, by_candidate = [], torch.zeros_like(self._costs)
        for i, (gates, part) in enumerate(zip(self._gates, found, strict=True)):
            slope, ranks = gates.slopes([next(parts) for _ in part])
            by_presence.append(slope.sum())
            upto = F.pad(ranks.double().cumsum(0), (1, 0))  # of the first 0, 1, ... ranks
            by_candidate[i] = upto[self._sizes[i].clamp(max=len(ranks))]
        return torch.stack(by_presence), by_candidate

    # --- learning --------------------------------------------------------------------------

    def _learned(self, slopes: tuple[Tensor, Tensor]) -> State:
        """The state after one step of Adam on the logits that this step trains."""
        state, lr = self._state, self.config["arch_lr"]
        name = "presence" if self.stage(state.step) == "presence" else "dimension"
        logits = getattr(state, name).clone().requires_grad_(True)
        given = {"presence": state.presence, "dimension": state.dimension, name: logits}
        there, chosen = self._sampled(state, given["presence"], given["dimension"])
        loss = (there * slopes[0]).sum() + (chosen * slopes[1]).sum()
        if self.config["l1"]:
            exists = logits.detach().isfinite()
            distance = (torch.softmax(logits, -1) - logits)[exists].abs().mean()
            loss = loss + self.config["l1"] * distance
        (grad,) = torch.autograd.grad(loss, logits)
        moments = getattr(state, f"{name}_moments")
        new, moments = rules.adam(logits.detach(), grad, moments, lr)
        return replace(state, **{name: new, f"{name}_moments": moments})

    @torch.no_grad()
    def _products(self) -> tuple[list[Tensor], ...]:
        """Weight times gradient of this step, of every tensor of every module that is there.

        Weights count from their neutral value, see `Kind.neutral`.

        Divided by the parameters that the module shows in this step: another step may show more.
        """
        shown = [n[k] for n, k in zip(self._numel, self._shown.tolist(), strict=True)]
        kept = self._state.kept.tolist()
        return tuple(
            [
                torch.zeros_like(p) if p.grad is None else off_neutral(p.detach(), v) * p.grad / n
                for p, v in zip(parameters, neutral, strict=True)
            ]
            if there
            else []
            for parameters, neutral, n, there in zip(
                self._parameters, self._neutral, shown, kept, strict=True
            )
        )

    def _judged(
        self, state: State, weights: tuple[list[Tensor], ...], structure: tuple[list[Tensor], ...]
    ) -> State:
        """The state after a pair of steps with these products."""
        found = [
            rules.importance(a, b, 1, self.config["criterion"]).cpu()
            if b
            else torch.zeros(()).double()
            for a, b in zip(weights, structure, strict=True)
        ]
        return self._pruning.judged(state, torch.stack(found))


def _table(rows: Iterable[Sequence[int]], width: int) -> Tensor:
    """One row per module, filled up with zeros, (N, width)."""
    return torch.tensor([[*row, *[0] * (width - len(row))] for row in rows])
