"""One training phase on the transformers Trainer: an epoch with its own seed, optimiser and order.

A phase's randomness is a function of (seed, epoch) alone, so training resumed at an epoch boundary
equals training that never stopped. Modules are pruned between phases, never inside one, which is
what data parallel needs.
"""

import hashlib
import itertools
import logging
import math
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from torch import nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainingArguments, get_scheduler
from transformers.trainer_callback import PrinterCallback

from prunepeft.config import TrainSettings
from prunepeft.criteria.record import Recorder
from prunepeft.errors import OutOfMemoryError, StateError
from prunepeft.memory import is_out_of_memory, peak_memory, reset_peak_memory
from prunepeft.progress import Progress
from prunepeft.supernet import slot_parameters

logger = logging.getLogger(__name__)

MEGABATCH = 50
MAX_HALVINGS = 4


@dataclass(frozen=True)
class PhaseLog:
    """What one phase cost and how it went."""

    loss: float
    steps: int
    seconds: float
    peak_memory_bytes: int


def derive_seed(*parts: object) -> int:
    """A 31-bit seed from these parts, the same on every machine."""
    digest = hashlib.sha256(":".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:4]) >> 1


def batch_indices(lengths: Sequence[int], batch: int, pieces: int, seed: int) -> list[list[int]]:
    """Micro-batches of one epoch: shuffled, like lengths together, the last part batch dropped.

    Args:
        lengths: Tokens of each row, (n,).
        batch: Rows of one optimiser step.
        pieces: Micro-batches one step is cut into (accumulation times processes).
        seed: Order.
    Returns:
        Lists of row indices, `pieces` consecutive lists to a step. Fewer rows than a batch are
        one step.
    """
    order = torch.randperm(len(lengths), generator=torch.Generator().manual_seed(seed)).tolist()
    size = min(batch, len(order))
    span = size * MEGABATCH
    grouped: list[int] = []
    for start in range(0, len(order), span):
        grouped += sorted(order[start : start + span], key=lambda i: -lengths[i])
    steps = [grouped[i : i + size] for i in range(0, len(grouped) - size + 1, size)]
    shuffle = torch.randperm(len(steps), generator=torch.Generator().manual_seed(seed + 1)).tolist()
    cuts = [size * p // pieces for p in range(pieces + 1)]
    spans = [(a, b) for a, b in itertools.pairwise(cuts) if b > a]
    return [steps[i][a:b] for i in shuffle for a, b in spans]


def n_steps(rows: int, batch: int) -> int:
    """Optimiser steps of one epoch."""
    return max(1, rows // batch)


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
    return torch.optim.AdamW(listed, lr=lr)


def make_scheduler(
    optimizer: torch.optim.Optimizer, settings: TrainSettings, total: int
) -> torch.optim.lr_scheduler.LRScheduler:
    """Learning rate schedule over `total` optimiser steps."""
    name = "constant_with_warmup" if settings.lr_schedule == "constant" else settings.lr_schedule
    warm = math.ceil(settings.warmup_ratio * total)
    return get_scheduler(name, optimizer, num_warmup_steps=warm, num_training_steps=total)


class _PhaseTrainer(Trainer):
    """Trainer with our batches; nothing else differs."""

    def __init__(self, *args: Any, batches: list[list[int]], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._batches = batches

    def get_train_dataloader(self) -> DataLoader:
        return self.accelerator.prepare(
            DataLoader(
                self.train_dataset, batch_sampler=self._batches, collate_fn=self.data_collator
            )
        )


class _PhaseCallback(TrainerCallback):
    """Records gradients before they are clipped, clips them, and reports progress."""

    def __init__(self, recorder: Recorder | None, max_grad_norm: float, progress: Progress) -> None:
        self.recorder = recorder
        self.max_grad_norm = max_grad_norm
        self.progress = progress

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if self.recorder is not None:
            self.recorder.step()
        if self.max_grad_norm > 0:
            trained = [p for p in model.parameters() if p.grad is not None]
            nn.utils.clip_grad_norm_(trained, self.max_grad_norm)

    def on_step_end(self, args, state, control, **kwargs):
        self.progress.advance(1)


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
    pieces: int = 1  # micro-batches per step and process; doubles when memory runs out

    def run(
        self,
        net: PeftModel,
        rows: Dataset,
        optimizer: torch.optim.Optimizer,
        scheduler: torch.optim.lr_scheduler.LRScheduler,
        seed: int,
        recorder: Recorder | None = None,
    ) -> PhaseLog:
        """Train one epoch over `rows`; on lack of memory, again with half the micro-batch."""
        self.pieces = max(self.pieces, self.settings.gradient_accumulation)
        start = {n: p.detach().clone() for n, p in net.named_parameters() if p.requires_grad}
        before = (_copy_state(optimizer.state_dict()), scheduler.state_dict())
        for _ in range(MAX_HALVINGS + 1):
            try:
                return self._run(net, rows, optimizer, scheduler, seed, recorder)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                logger.warning("out of memory with %d pieces a step; halving them", self.pieces)
            self.pieces *= 2
            net.zero_grad(set_to_none=True)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            with torch.no_grad():
                for name, parameter in net.named_parameters():
                    if name in start:
                        parameter.copy_(start[name])
            optimizer.load_state_dict(_copy_state(before[0]))
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
        if not math.isfinite(out.training_loss):
            raise StateError(
                f"the training loss became {out.training_loss}; lower train.lr (now "
                f"{self.settings.lr:g}) or use precision=fp32."
            )
        return PhaseLog(out.training_loss, out.global_step, seconds, peak_memory())

    def evaluate(self, net: PeftModel, rows: Dataset | None = None) -> dict[str, float]:
        """Metrics on the validation rows (or others), with the loss as `loss`."""
        trainer = self._trainer(net, 0, None, None, None, None)
        out = trainer.evaluate(self.validation if rows is None else rows, metric_key_prefix="eval")
        skip = ("eval_runtime", "eval_samples_per_second", "eval_steps_per_second", "epoch")
        kept = {
            k: v for k, v in out.items() if k not in skip and not k.startswith("eval_model_prep")
        }
        return {k.removeprefix("eval_"): float(v) for k, v in kept.items()}

    def _trainer(self, net, seed, rows, optimizer, scheduler, recorder) -> _PhaseTrainer:
        args = self._arguments(seed)
        pieces = self.pieces * args.world_size
        batches = []
        if rows is not None:
            batches = batch_indices(rows["length"], self.settings.batch_size, pieces, seed)
        steps = n_steps(len(rows), self.settings.batch_size) if rows is not None else 1
        args.gradient_accumulation_steps = max(1, len(batches) // steps // args.world_size)
        trainer = _PhaseTrainer(
            model=net,
            args=args,
            train_dataset=rows,
            data_collator=self.collator,
            optimizers=(optimizer, scheduler),
            compute_metrics=lambda p: self.compute(p.predictions, p.label_ids),
            preprocess_logits_for_metrics=self.preprocess_logits,
            callbacks=[_PhaseCallback(recorder, self.settings.max_grad_norm, self.progress)],
            batches=batches,
        )
        trainer.remove_callback(PrinterCallback)
        return trainer

    def _arguments(self, seed: int) -> TrainingArguments:
        args = TrainingArguments(
            output_dir=str(Path(tempfile.gettempdir()) / "prunepeft-trainer"),
            num_train_epochs=1,
            per_device_eval_batch_size=self.settings.eval_batch_size,
            max_grad_norm=0.0,
            seed=seed,
            bf16=self.bf16,
            use_cpu=self.device == "cpu",
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,
            label_names=["labels"],
            gradient_checkpointing=self.settings.gradient_checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": False},
            ddp_find_unused_parameters=False,
            dataloader_pin_memory=torch.cuda.is_available(),
        )
        args._n_gpu = min(
            args.n_gpu, 1
        )  # one process a device; DataParallel would split modules' state
        return args


def _copy_state(state: Any) -> Any:
    if isinstance(state, torch.Tensor):
        return state.clone()
    if isinstance(state, dict):
        return {k: _copy_state(v) for k, v in state.items()}
    return [_copy_state(v) for v in state] if isinstance(state, list) else state
