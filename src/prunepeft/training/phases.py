"""One training phase on the transformers Trainer: an epoch with its own seed, optimiser and order.

A phase's randomness is a function of (seed, epoch) alone, so training resumed at an epoch boundary
equals training that never stopped. Modules are pruned between phases, never inside one, which is
what data parallel needs.
"""

import copy
import gc
import logging
import math
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from torch import nn
from transformers import TrainingArguments, get_scheduler
from transformers.trainer_callback import PrinterCallback

from prunepeft.batches import batch_indices, judged_batches
from prunepeft.config import TrainSettings
from prunepeft.criteria.record import Recorder
from prunepeft.errors import ConfigError, OutOfMemoryError, StateError
from prunepeft.memory import is_out_of_memory, peak_memory, reset_peak_memory
from prunepeft.prefix.reuse import PrefixReuse
from prunepeft.processes import n_processes
from prunepeft.progress import Progress
from prunepeft.sharding import ShardedArguments
from prunepeft.sparse_tuning import SparseTuning
from prunepeft.supernet import slot_parameters
from prunepeft.supernet.compiling import compiled
from prunepeft.training.phase_trainer import PhaseCallback, PhaseTrainer, checkpointing

logger = logging.getLogger(__name__)

MAX_HALVINGS = 4
COMPILED_STEPS = 100  # fewer are over before the model is compiled


@dataclass(frozen=True)
class PhaseLog:
    """What one phase cost and how it went."""

    loss: float
    steps: int
    seconds: float
    peak_memory_bytes: int


def make_optimizer(net: PeftModel, settings: TrainSettings, lr: float) -> torch.optim.Optimizer:
    """AdamW with a learning rate per kind; only matrices decay (no biases, scales or vectors)."""
    kind_of = {
        id(p): slot_id.rpartition(":")[2]
        for slot_id, params in slot_parameters(net).items()
        for p in params.values()
    }
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for parameter in (p for p in net.parameters() if p.requires_grad):
        rate = settings.lr_by_kind.get(kind_of.get(id(parameter), "head"), lr)
        decay = settings.weight_decay if parameter.ndim > 1 else 0.0
        groups.setdefault((rate, decay), []).append(parameter)
    listed = [{"params": ps, "lr": rate, "weight_decay": d} for (rate, d), ps in groups.items()]
    return torch.optim.AdamW(listed, lr=lr, fused=True)


def make_scheduler(
    optimizer: torch.optim.Optimizer, settings: TrainSettings, total: int
) -> torch.optim.lr_scheduler.LRScheduler:
    """Learning rate schedule over `total` optimiser steps."""
    name = "constant_with_warmup" if settings.lr_schedule == "constant" else settings.lr_schedule
    warm = math.ceil(settings.warmup_ratio * total)
    return get_scheduler(name, optimizer, num_warmup_steps=warm, num_training_steps=total)


@dataclass
class Phases:
    """Everything phases share: the data, how to batch it, and how to judge.

    Attributes:
        train: Encoded rows with `length`.
        validation: Encoded rows.
        collator: Rows to a batch of tensors.
        compute: (predictions, labels) -> metrics, or None for the loss alone.
        preprocess_logits: See the task.
        settings: Training settings.
        device: `auto`, `cpu` or `cuda`.
        bf16: Whether to autocast to bfloat16.
        progress: Where progress goes.
        prefix: Output of frozen layers that is kept; None runs all layers in every step.
        packer: Rows to a batch for training, if not the collator.
        sharded: Whether the base model is cut over the processes.
    """

    train: Dataset
    validation: Dataset
    collator: Callable[[list[dict]], Mapping[str, torch.Tensor]]
    compute: Callable[..., dict[str, float]]
    preprocess_logits: Callable[..., Any] | None
    settings: TrainSettings
    device: str
    bf16: bool
    progress: Progress
    prefix: PrefixReuse | None = None
    packer: Callable[[list[dict]], Mapping[str, torch.Tensor]] | None = None
    sharded: bool = False
    pieces: int = 1  # micro-batches per step and process; doubles when memory runs out
    eval_pieces: int = 1  # the same for a batch of evaluation

    @property
    def micro_batch(self) -> int:
        """Rows of a forward pass of training in one process."""
        pieces = max(self.pieces, self.settings.gradient_accumulation)
        return max(1, self.settings.batch_size // pieces)

    @property
    def eval_batch(self) -> int:
        """Rows of a forward pass of evaluation in one process."""
        return max(1, self.settings.eval_batch_size // self.eval_pieces)

    def judged_batches(self, rows: Dataset) -> list[list[int]]:
        """Rows of each forward pass of an evaluation."""
        return judged_batches(rows["length"], self.eval_batch, n_processes())

    def reusing(
        self, net: nn.Module, rows: Dataset, epochs: int, name: str
    ) -> AbstractContextManager[None]:
        """Where it pays, frozen layers do not run in the phases inside; see `PrefixReuse.over`."""
        if self.prefix is None or self.packer is not None:  # states are kept for rows, not packs
            return nullcontext()
        return self.prefix.over(net, self, rows, epochs, name)

    def compiling(self, net: nn.Module, steps: int) -> AbstractContextManager[None]:
        """The model is compiled inside, if asked for and worth it; not while layers are skipped."""
        backend, is_reusing = self.settings.compile, self.prefix is not None and self.prefix.is_used
        if backend is None or steps < COMPILED_STEPS or is_reusing:
            return nullcontext()
        return compiled(net, backend)

    def run(
        self,
        net: PeftModel,
        rows: Dataset,
        optimizer: torch.optim.Optimizer,
        scheduler: torch.optim.lr_scheduler.LRScheduler,
        seed: int,
        recorder: Recorder | SparseTuning | None = None,
    ) -> PhaseLog:
        """Train one epoch over `rows`; on lack of memory, again with half the micro-batch."""
        self.pieces = max(self.pieces, self.settings.gradient_accumulation)
        learns = {id(p) for group in optimizer.param_groups for p in group["params"]}
        start = {n: p.detach().clone() for n, p in net.named_parameters() if id(p) in learns}
        before = (copy.deepcopy(optimizer.state_dict()), scheduler.state_dict())
        for _ in range(MAX_HALVINGS + 1):
            try:
                return self._run(net, rows, optimizer, scheduler, seed, recorder)
            except (RuntimeError, MemoryError) as error:
                if not _may_try_again(error):
                    raise
                logger.warning("out of memory with %d pieces a step; halving them", self.pieces)
            self.pieces *= 2
            net.zero_grad(set_to_none=True)
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            with torch.no_grad():
                for name, parameter in net.named_parameters():
                    if name in start:
                        parameter.copy_(start[name])
            optimizer.load_state_dict(copy.deepcopy(before[0]))
            scheduler.load_state_dict(before[1])
            if recorder is not None:
                recorder.reset()
        raise OutOfMemoryError(
            f"memory ran out even with each batch of {self.settings.batch_size} cut into "
            f"{self.pieces // 2}; lower train.max_length, use precision=bf16, or set "
            "train.gradient_checkpointing=true."
        )

    def _run(self, net, rows, optimizer, scheduler, seed, recorder) -> PhaseLog:
        trainer = self._trainer(net, seed, rows, optimizer, scheduler, recorder)
        reset_peak_memory()
        began = time.perf_counter()
        out = trainer.train()
        seconds = time.perf_counter() - began
        if self.prefix is not None:
            seconds += self.prefix.take_seconds()
        mine = torch.tensor(out.training_loss, dtype=torch.float64).to(trainer.args.device)
        loss = float(trainer.accelerator.reduce(mine, "mean"))
        if not math.isfinite(loss):
            raise StateError(
                f"the training loss became {loss}; lower train.lr (now {self.settings.lr:g}) or "
                "use precision=fp32."
            )
        return PhaseLog(loss, out.global_step, seconds, peak_memory())

    def evaluate(self, net: PeftModel, rows: Dataset | None = None) -> dict[str, float]:
        """Metrics on the validation rows (or others), with the loss as `loss`.

        On lack of memory, again with half the batch.
        """
        for _ in range(MAX_HALVINGS + 1):
            try:
                return self._evaluate(net, self.validation if rows is None else rows)
            except (RuntimeError, MemoryError) as error:
                if not _may_try_again(error):
                    raise
                logger.warning("out of memory in evaluation; halving its batch")
            self.eval_pieces *= 2
        raise OutOfMemoryError(
            "memory ran out in evaluation even with a small batch; lower train.eval_batch_size "
            f"(now {self.settings.eval_batch_size}) or train.max_length, or use precision=bf16."
        )

    def _evaluate(self, net: PeftModel, rows: Dataset) -> dict[str, float]:
        trainer = self._trainer(net, 0, None, None, None, None, judged=rows)
        out = trainer.evaluate(metric_key_prefix="eval")
        skip = ("eval_runtime", "eval_samples_per_second", "eval_steps_per_second", "epoch")
        kept = {
            k: v for k, v in out.items() if k not in skip and not k.startswith("eval_model_prep")
        }
        return {k.removeprefix("eval_"): float(v) for k, v in kept.items()}

    def _trainer(
        self, net, seed, rows, optimizer, scheduler, recorder, judged=None
    ) -> PhaseTrainer:
        args = self.arguments(seed)
        args.ddp_find_unused_parameters = isinstance(recorder, SparseTuning)
        pieces = 1
        if rows is None:
            batches = self.judged_batches(judged)
        else:
            pieces = self._cuts(min(self.settings.batch_size, len(rows)), args.world_size)
            args.gradient_accumulation_steps = pieces // args.world_size
            batches = batch_indices(rows["length"], self.settings.batch_size, pieces, seed)
        trainer = PhaseTrainer(
            model=net,
            args=args,
            train_dataset=rows,
            eval_dataset=judged,
            data_collator=self.packer if rows is not None and self.packer else self.collator,
            optimizers=(optimizer, scheduler),
            compute_metrics=lambda p: self.compute(p.predictions, p.label_ids),
            preprocess_logits_for_metrics=self.preprocess_logits,
            callbacks=[PhaseCallback(recorder, self.settings.max_grad_norm, self.progress)],
            batches=batches,
            pieces=pieces,
            states=self.prefix and self.prefix.of(judged if rows is None else rows),
        )
        trainer.remove_callback(PrinterCallback)
        return trainer

    def _cuts(self, size: int, processes: int) -> int:
        """Micro-batches of one step of `size` rows: as many for every process, none empty."""
        if size < processes:
            raise ConfigError(
                f"a step of {size} rows cannot be shared by {processes} processes; raise "
                "train.batch_size (or search.warmup_rows), or start fewer processes."
            )
        return min(self.pieces, size // processes) * processes

    def arguments(self, seed: int) -> TrainingArguments:
        """Settings of the Trainer; they know the device."""
        args = (ShardedArguments if self.sharded else TrainingArguments)(
            output_dir=str(Path(tempfile.gettempdir()) / "prunepeft-trainer"),
            num_train_epochs=1,
            per_device_eval_batch_size=self.eval_batch,
            max_grad_norm=0.0,
            seed=seed,
            bf16=self.bf16,
            use_cpu=self.device == "cpu",
            save_strategy="no",
            logging_strategy="no",
            logging_nan_inf_filter=False,
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,
            label_names=["labels"],
            **checkpointing(self.settings.gradient_checkpointing),
            dataloader_pin_memory=torch.cuda.is_available(),
        )
        args._n_gpu = min(args.n_gpu, 1)  # one process a device; DataParallel would copy modules
        return args


def _may_try_again(error: BaseException) -> bool:
    """Whether memory ran out and no other process waits: one may have had enough and gone on."""
    return is_out_of_memory(error) and not torch.distributed.is_initialized()
