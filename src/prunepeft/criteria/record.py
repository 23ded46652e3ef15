"""Statistics of a training pass as running sums on the device; nothing of a step is kept."""

import weakref
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from types import TracebackType
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from prunepeft.criteria.base import NEEDS, RECORDED, Record, unit_means
from prunepeft.criteria.sums import GradientSums, OutputSums, by_device, n_processes, summed
from prunepeft.errors import ConfigError, StateError
from prunepeft.kinds import off_neutral

_WATCHED: weakref.WeakSet[Any] = weakref.WeakSet()  # layers whose outputs are being recorded


class Module(Protocol):
    """One module on a layer, as the layer hands it to its observer."""

    slot_id: str


class Observable(Protocol):
    """A layer that calls `observer(module, delta, base)` in forward for each module on it.

    `delta` is what the module adds, `base` what it adds it to, both (..., width).
    """

    training: bool
    observer: Callable[[Module, Tensor, Tensor], None] | None


class Trials(Protocol):
    """What judges layers by turning them down, see `sparse_tuning.LayerTrials`."""

    def start(self) -> None: ...
    def stop(self) -> None: ...
    def reset(self) -> None: ...
    def step(self) -> None: ...
    def importance(self, units: Mapping[str, Sequence[nn.Parameter]]) -> Tensor: ...


class Recorder:
    """Records what criteria need while a model trains; a context manager.

    Call `step()` once per optimiser step, between backward and `optimizer.step()`, when the
    gradients of all micro-batches are summed. With a loss scaler, call it after unscaling and
    only for steps that are not skipped. `step()` waits for the device only where `suppression` is
    needed, whose trials read losses.

    Args:
        units: Unit id -> its trainable parameters over all tied sites.
        layers: Layers to watch for outputs; a module counts for the unit of its `slot_id`.
        needs: What to collect, a subset of `NEEDS`.
        output_every: Outputs are sampled in the first and second step, then every so many steps.
        trials: What turns layers down, where `suppression` is needed.
        neutral: Unit id -> value of each of its parameters at which that changes nothing, if not 0.
    Raises:
        ConfigError: if `needs` or `output_every` is not allowed.
    Example:
        >>> layer = nn.Linear(2, 1, bias=False)
        >>> with Recorder({"a": [layer.weight]}, needs={"gradients"}) as recorder:
        ...     layer(torch.tensor([[1.0, 3.0]])).sum().backward()
        ...     recorder.step()
        >>> recorder.read().abs_grad_mean.tolist()
        [2.0]
    """

    def __init__(
        self,
        units: Mapping[str, Sequence[nn.Parameter]],
        layers: Sequence[Observable] = (),
        needs: Collection[str] = RECORDED,
        output_every: int = 4,
        trials: Trials | None = None,
        neutral: Mapping[str, Sequence[Tensor | float]] | None = None,
    ) -> None:
        if unknown := sorted(set(needs) - NEEDS):
            raise ConfigError(
                f"cannot record {', '.join(unknown)}; allowed: {', '.join(sorted(NEEDS))}."
            )
        if output_every < 1:
            raise ConfigError(f"output_every must be 1 or more; got {output_every}.")
        if "suppression" in needs and trials is None:
            raise ConfigError(
                "suppression needs the whole model; make the recorder with Recorder.for_net."
            )
        self.units = {unit: tuple(parameters) for unit, parameters in units.items()}
        self.neutral = {
            id(p): value
            for unit, values in (neutral or {}).items()
            for p, value in zip(self.units[unit], values, strict=True)
        }
        self.layers = tuple(layers)
        self.needs = frozenset(needs)
        self.output_every = output_every
        self.trials = trials if "suppression" in needs else None
        self._recording = self._watching = False
        self._init_rms = torch.empty(0)
        self._sums: list[GradientSums] = []
        self.reset()

    @classmethod
    def for_net(
        cls, net: nn.Module, needs: Collection[str] = RECORDED, output_every: int = 4
    ) -> "Recorder":
        """Recorder of all modules of a supernet."""
        # The supernet needs peft; recording plain modules does not.
        from prunepeft.sparse_tuning.trials import LayerTrials
        from prunepeft.supernet.attach import neutral_values, slot_layers, slot_parameters

        units = {unit: tuple(named.values()) for unit, named in slot_parameters(net).items()}
        hosts = [layer for pairs in slot_layers(net).values() for layer, _ in pairs]
        trials = LayerTrials(net) if "suppression" in needs else None
        neutral = {unit: tuple(named.values()) for unit, named in neutral_values(net).items()}
        return cls(units, tuple(dict.fromkeys(hosts)), needs, output_every, trials, neutral)

    def __enter__(self) -> "Recorder":
        watched = self.layers if "outputs" in self.needs else ()
        if self._recording or any(layer in _WATCHED for layer in watched):
            raise StateError(
                "these layers are being recorded already; leave the other recorder first."
            )
        _WATCHED.update(watched)
        self.reset()
        self._recording = True
        if "weights" in self.needs:
            self._init_rms = unit_means(
                (w.square() for w in unit) for unit in self._weights()
            ).sqrt()
        self._watch()
        if self.trials is not None:
            self.trials.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._recording:
            _WATCHED.difference_update(self.layers if "outputs" in self.needs else ())
        self._recording = False
        if self.trials is not None:
            self.trials.stop()
        self._watch()

    def reset(self) -> None:
        """Forget the steps so far, as before a pass that is repeated; `init_rms` stays."""
        self.steps = 0
        self._sums = []
        self._outputs = OutputSums(self.units)
        if self.trials is not None:
            self.trials.reset()
        self._watch()

    def step(self) -> None:
        """Take the gradients of one optimiser step into the sums.

        A parameter without a gradient counts as gradient zero.

        Raises:
            StateError: if the recorder is not active.
        """
        if not self._recording:
            raise StateError(
                "step() was called outside the recorder; use `with recorder:` around training."
            )
        if "gradients" in self.needs:
            # Not before the first step: a trainer may move the model when training begins.
            groups = [] if self._sums else by_device(self.units)
            self._sums += [GradientSums(group, self.neutral) for group in groups]
        for sums in self._sums:
            sums.add()
        if self.trials is not None:
            self.trials.step()
        self.steps += 1
        self._watch()

    def read(self) -> Record:
        """Return the record so far, with the weights of this moment, on the CPU.

        Under torch.distributed every process must call this: gradients are averaged over the
        processes (what one process would see), outputs pooled.

        Raises:
            StateError: if there was no step, or outputs were asked for and none was seen.
        """
        collected: dict[str, Any] = {}
        if self.steps and "gradients" in self.needs:
            signed, means = self._read_gradients()
            collected |= {"grad_sum": signed}
            collected |= {"abs_grad_mean": means[0], "abs_weight_grad_mean": means[1]}
        if self.steps and "outputs" in self.needs:
            collected["output_abs_mean"] = self._outputs.read()
        if self.steps and self.trials is not None:
            collected["layer_importance"] = self.trials.importance(self.units)
        if "weights" in self.needs:
            weights = tuple(tuple(unit) for unit in self._weights())
            collected |= {"weights": weights, "init_rms": self._init_rms}
        return Record(units=tuple(self.units), steps=self.steps, **collected)

    def _watch(self) -> None:
        """Look at the outputs of the next step or do not, see `output_every`."""
        # The first step tells little (LoRA starts at zero), but it may be the only one.
        due = self.steps == 0 or self.steps % self.output_every == 1 % self.output_every
        due = due and self._recording and "outputs" in self.needs
        if due == self._watching:
            return
        for layer in self.layers:
            layer.observer = partial(self._observe, layer) if due else None
        self._watching = due

    def _observe(self, layer: Observable, module: Module, delta: Tensor, base: Tensor) -> None:
        # A graph task runs while gradient checkpointing repeats a forward pass that was counted.
        repeated = torch._C._current_graph_task_id() != -1
        if layer.training and not repeated:
            self._outputs.add(module.slot_id, delta)

    def _weights(self) -> Iterator[Iterator[Tensor]]:
        for unit in self.units.values():
            yield (
                off_neutral(
                    p.detach().to("cpu", torch.float32, copy=True), self.neutral.get(id(p), 0.0)
                )
                for p in unit
            )

    def _read_gradients(self) -> tuple[tuple[tuple[Tensor, ...], ...], Tensor]:
        """Signed sums as in the units, and means of |g| and |w * g|, (2, N)."""
        signed: dict[int, Tensor] = {}
        absolute: dict[int, Tensor] = {}
        share = 1 / n_processes()
        for sums in self._sums:
            columns = summed(sums.absolute).cpu().double().unbind(1)
            for parameter, tensor, column in zip(
                sums.parameters, sums.signed, columns, strict=True
            ):
                signed[id(parameter)] = summed(tensor).to("cpu", copy=True).mul_(share)
                absolute[id(parameter)] = column * share
        means = torch.zeros(2, len(self.units), dtype=torch.float64)
        for i, unit in enumerate(self.units.values()):
            n_terms = max(1, sum(p.numel() for p in unit)) * self.steps
            means[:, i] = sum(absolute[id(p)] for p in unit) / n_terms
        return tuple(tuple(signed[id(p)] for p in unit) for unit in self.units.values()), means
