"""Passes over the plain base model for a probe, which leave the model as it was."""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from datasets import Dataset
from peft import PeftModel
from torch import Tensor, nn

from prunepeft.batches import batch_indices, derive_seed, n_steps
from prunepeft.errors import ConfigError
from prunepeft.evaluate import Target
from prunepeft.memory import peak_memory, reset_peak_memory
from prunepeft.probes import Probe, Recorder
from prunepeft.supernet.tuner import UnionConfig
from prunepeft.training.phases import Phases, make_optimizer, make_scheduler


class BasePasses:
    """See `Passes`: rows run through the base model as training runs them through modules.

    Args:
        model: The base model with its head.
        phases: How to train and evaluate.
        target: What to train towards.
        rows: Encoded rows.
        epochs: Passes over them where something learns.
        name: For the progress line.
        seed: Order and dropout.
    """

    def __init__(
        self,
        model: nn.Module,
        phases: Phases,
        target: Target,
        rows: Dataset,
        epochs: int,
        name: str,
        seed: int,
    ) -> None:
        self.model, self.phases, self.rows, self.epochs = model, phases, rows, epochs
        self.name, self.seed, self.lr = name, seed, target.search_lr
        self.head, self.task_type = list(target.head), target.task_type
        self.n_steps = n_steps(len(rows), phases.settings.batch_size) * epochs
        self.device = str(phases.arguments(seed).device)
        self._steps, self._rows, self._loss, self._peak = 0, 0, 0.0, 0

    def run(self, probe: Probe) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What the probe found, and what it cost."""
        began = time.perf_counter()
        with restored(self.model, self.head):
            if not (getattr(self.model, "is_quantized", False) or self.phases.sharded):
                self.model.to(self.device)
            reset_peak_memory()
            found = probe.measure(self)
        cost = {"loss": self._loss, "seconds": time.perf_counter() - began, "steps": self._steps}
        return found, cost | {"rows": self._rows, "peak_memory_bytes": self._peak}

    @property
    def whole(self) -> bool:
        """Whether gradients of a step come in one piece, on one process."""
        several = dist.is_available() and dist.is_initialized()
        return not several and max(self.phases.pieces, self._settings.gradient_accumulation) == 1

    @torch.no_grad()
    def look(self, net: nn.Module, on_batch: Callable[[Mapping[str, Tensor]], bool]) -> None:
        """See `Passes.look`."""
        settings = self._settings
        batches = batch_indices(
            self.rows["length"],
            settings.batch_size,
            settings.gradient_accumulation,
            derive_seed(self.seed, "look"),
        )
        self._begin(len(batches))
        reset_peak_memory()
        net.eval()
        device = torch.device(self.device)
        for indices in batches:
            batch = self.phases.collator(self.rows.__getitems__(indices))
            batch = {name: tensor.to(device) for name, tensor in batch.items()}
            if not on_batch(batch):
                break
            with torch.autocast(device.type, torch.bfloat16, enabled=self.phases.bf16):
                net(**batch)
            self._steps += 1
            self.phases.progress.advance(1)
        self._peak = max(self._peak, peak_memory())

    def gradients(self, weights: Sequence[nn.Parameter], recorder: Recorder) -> None:
        """See `Passes.gradients`."""
        if quantised := [w for w in weights if not w.is_floating_point()]:
            raise ConfigError(
                f"gradients of frozen weights are needed, and {len(quantised)} of them are "
                "quantised; load the model in full or half precision, or use method=eva."
            )
        _learn_only(self.model, weights)
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(()))], lr=0.0)
        self._begin(n_steps(len(self.rows), self._settings.batch_size))
        self._epoch(self.model, optimizer, derive_seed(self.seed, "gradients"), recorder)
        self.model.zero_grad(set_to_none=True)

    def learn(
        self,
        net: nn.Module,
        *,
        recorder: Recorder | None = None,
        after_step: Callable[[], None] | None = None,
    ) -> None:
        """See `Passes.learn`."""
        optimizer = self._optimizer(net)
        if after_step is not None:
            optimizer.register_step_post_hook(lambda *_: after_step())
        self._begin(self.n_steps)
        scheduler = make_scheduler(optimizer, self._settings, self.n_steps)
        for epoch in range(1, self.epochs + 1):
            phase_seed = derive_seed(self.seed, "epoch", epoch)
            self._epoch(net, optimizer, phase_seed, recorder, scheduler)

    def learn_head(self) -> None:
        """Train the task head alone, if there is one."""
        if parameters := head_parameters(self.model, self.head):
            _learn_only(self.model, parameters)
            self.learn(self.model)

    @property
    def _settings(self):
        return self.phases.settings

    def _begin(self, steps: int) -> None:
        self._rows = max(self._rows, len(self.rows))
        self.phases.progress.start(self.name, steps)

    def _epoch(self, net, optimizer, seed, recorder, scheduler=None) -> None:
        if recorder is not None:
            recorder.mark()
        scheduler = scheduler or torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
        log = self.phases.run(net, self.rows, optimizer, scheduler, seed, recorder)
        self._steps += log.steps
        self._loss = log.loss
        self._peak = max(self._peak, log.peak_memory_bytes)

    def _optimizer(self, net: nn.Module) -> torch.optim.Optimizer:
        """AdamW over what is trainable; with a learning rate per kind on our own modules."""
        configs = getattr(net, "peft_config", {}).values() if isinstance(net, PeftModel) else ()
        if any(isinstance(config, UnionConfig) for config in configs):
            return make_optimizer(net, self._settings, self.lr)
        trained = [p for p in net.parameters() if p.requires_grad]
        decays = [p for p in trained if p.ndim > 1]
        groups = [{"params": decays, "weight_decay": self._settings.weight_decay}]
        groups.append({"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0})
        return torch.optim.AdamW([g for g in groups if g["params"]], lr=self.lr, fused=True)


@contextlib.contextmanager
def restored(model: nn.Module, head: Sequence[str]) -> Iterator[None]:
    """Give back modes, values of the head, and what is trainable, whatever happens inside.

    Of the model itself also its own attributes: a trainer wraps its forward, and marks it as
    prepared, which every peft model around it would pass for.
    """
    trainable = [p for p in model.parameters() if p.requires_grad]
    modes = [(m, m.training) for m in model.modules()]
    values = [(p, p.detach().clone()) for p in head_parameters(model, head)]
    own = dict(vars(model))
    try:
        yield
    finally:
        for parameter, value in values:
            parameter.data.copy_(value)
        vars(model).clear()
        vars(model).update(own)
        for module, training in modes:
            module.training = training
        _learn_only(model, trainable)
        model.zero_grad(set_to_none=True)


def _learn_only(model: nn.Module, parameters: Sequence[nn.Parameter]) -> None:
    chosen = {id(p) for p in parameters}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in chosen)


def head_parameters(model: nn.Module, head: Sequence[str]) -> list[nn.Parameter]:
    """Parameters of the modules of these names; peft adds names that a model may lack."""
    modules = dict(model.named_modules())
    return [
        p for name in dict.fromkeys(head) if name in modules for p in modules[name].parameters()
    ]
