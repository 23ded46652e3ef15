"""The transformers Trainer of one phase: our batches, and a loss that does not mind their cut."""

from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainingArguments

from prunepeft.criteria.record import Recorder
from prunepeft.prefix.states import NumberedRows, RowStates, skipping, split_states
from prunepeft.progress import Progress
from prunepeft.sharding import ShardedArguments, average_gradients, leave_as_is
from prunepeft.sparse_tuning import SparseTuning
from prunepeft.supernet import base_of
from prunepeft.tasks.base import IGNORED


class PhaseTrainer(Trainer):
    """Trainer with given batches; the gradient is that of the mean over a step's labels.

    A step may be cut over micro-batches and processes. Models return the mean over a piece, so each
    piece counts by its share of the labels, as if the step had been one batch.

    Batch normalisation keeps the statistics of the base model, which is frozen: no training leaves
    a trace in it, and none depends on those before it.

    With states of the rows, the frozen layers below the lowest module do not run.
    """

    def __init__(
        self,
        *args: Any,
        batches: list[list[int]],
        pieces: int = 1,
        states: RowStates | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._batches = batches
        self._pieces = pieces
        self._states = states
        if states is not None:
            self.data_collator = states.collator(self.data_collator)
            if self.eval_dataset is not None:
                self.eval_dataset = NumberedRows(self.eval_dataset)
        if isinstance(self.args, ShardedArguments):
            leave_as_is(self.accelerator)
        # A new accelerator holds nothing; to look for garbage takes longer than a short phase.
        self.accelerator.free_memory = lambda *objects: list(objects)
        # PhaseCallback clips; the Trainer would take the norm of all gradients once more.
        self.accelerator.clip_grad_norm_ = lambda *args, **kwargs: None
        if self.args.world_size > 1:
            # An evaluation leaves this mark, and the next training would go without data parallel.
            vars(self.model).pop("_is_accelerate_prepared", None)
        # Else the Trainer counts no labels, or divides the loss by the number of pieces once more.
        self.model_accepts_loss_kwargs = True
        norms = nn.modules.batchnorm._BatchNorm
        self._held = [m for m in self.model.modules() if isinstance(m, norms)]

    def get_train_dataloader(self) -> DataLoader:
        rows = self.train_dataset
        if self._pieces > 1:
            rows = _EqualWidths(rows, self._batches, self._pieces)
        if self._states is not None:
            rows = NumberedRows(rows)
        return self.accelerator.prepare(
            DataLoader(rows, batch_sampler=self._batches, collate_fn=self.data_collator)
        )

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        if self.args.world_size > 1:
            return super().get_eval_dataloader(eval_dataset)
        loader = DataLoader(
            self.eval_dataset, batch_sampler=self._batches, collate_fn=self.data_collator
        )
        return self.accelerator.prepare(loader)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], Tensor | None]:
        """The micro-batches of one step, and how many labels the step has over all processes."""
        samples, _ = super().get_batch_samples(*args, **kwargs)
        if not samples:
            return samples, None
        total = sum(_n_labels(batch["labels"]) for batch in samples).to(self.args.device)
        return samples, self.accelerator.reduce(total, "sum")

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Not counted: the Trainer would walk through all parameters in every step."""
        return 0

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Any:
        """The piece's part of the step's loss; in an evaluation the batch's, by its rows."""
        for module in self._held:
            module.eval()
        inputs, states = split_states(inputs)
        with skipping(self._states, states):
            outputs = model(**inputs)
        loss = outputs["loss"]
        if model.training and num_items_in_batch is not None:
            share = _n_labels(inputs["labels"]) / num_items_in_batch
            # Data parallel averages the gradients of the processes; the parts must add up.
            loss = loss * share.to(loss) * self.args.world_size
        elif not model.training and self.args.world_size == 1:
            loss = loss * (len(inputs["labels"]) * len(self._batches) / len(self.eval_dataset))
        return (loss, outputs) if return_outputs else loss


class _EqualWidths:
    """Rows that say how wide their step is: a piece of it is padded as the whole would be.

    What is recorded of the modules' outputs includes padding.
    """

    def __init__(self, rows: Dataset, batches: list[list[int]], pieces: int) -> None:
        self.rows = rows
        self.widths: dict[int, int] = {}
        lengths = rows["length"]
        for start in range(0, len(batches), pieces):
            step = [i for piece in batches[start : start + pieces] for i in piece]
            self.widths |= dict.fromkeys(step, max(lengths[i] for i in step))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        rows = self.rows.__getitems__(indices)
        return [row | {"width": self.widths[i]} for row, i in zip(rows, indices, strict=True)]


class PhaseCallback(TrainerCallback):
    """Records gradients before they are clipped, clips them, and reports progress.

    With sparse tuning in the place of a recorder, some layers train in each step.
    """

    def __init__(
        self,
        recorder: Recorder | SparseTuning | None,
        max_grad_norm: float,
        progress: Progress,
    ) -> None:
        self.recorder = recorder
        self.max_grad_norm = max_grad_norm
        self.progress = progress
        self.is_enough = False

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        # The Trainer lets inputs require gradients where activations are recomputed. Only the
        # reentrant form needs that, and layers below all modules would be back-propagated.
        base = base_of(model)
        if getattr(base, "_require_grads_hook", None) is not None:
            base.disable_input_require_grads()

    def on_step_begin(self, args, state, control, optimizer=None, **kwargs):
        if isinstance(self.recorder, SparseTuning):
            self.recorder.begin_step(optimizer)

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        trained = [p for group in optimizer.param_groups for p in group["params"]]
        if isinstance(args, ShardedArguments):
            average_gradients(trained)
        if self.recorder is not None:
            self.is_enough = bool(self.recorder.step())
        if self.max_grad_norm > 0:
            nn.utils.clip_grad_norm_(trained, self.max_grad_norm)

    def on_step_end(self, args, state, control, **kwargs):
        self.progress.advance(1)
        control.should_training_stop |= self.is_enough

    def on_train_end(self, args, state, control, **kwargs):
        if isinstance(self.recorder, SparseTuning):
            self.recorder.restore()


def checkpointing(wanted: bool) -> dict[str, Any]:
    """Arguments for activation checkpointing, by the names this transformers prefers."""
    if not wanted:
        return {}
    fields = TrainingArguments.__dataclass_fields__
    name = "activation" if "activation_checkpointing" in fields else "gradient"
    return {
        f"{name}_checkpointing": True,
        f"{name}_checkpointing_kwargs": {"use_reentrant": False},
    }


def _n_labels(labels: Tensor) -> Tensor:
    """Labels that a batch is judged on: rows, or tokens after the first, which none predicts."""
    if labels.ndim == 1:
        return torch.tensor(len(labels), device=labels.device)
    return labels[..., 1:].ne(IGNORED).sum()
