"""IST inside any transformers Trainer."""

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from prunepeft.errors import CheckpointError, ConfigError, StateError
from prunepeft.sparse_tuning.ist import IstSettings
from prunepeft.sparse_tuning.tuning import SparseTuning


class IstCallback(TrainerCallback, ExportableState):
    """Trains the PEFT modules of a few layers in each step, the important ones more often.

    The model may carry any per-layer PEFT: a union of ours, or LoRA, DoRA, IA3 ... of peft. What
    trains outside such modules (a head, norms) trains in every step. Scores and draws are part of
    the Trainer's checkpoints. If training breaks off with an error, call `restore` before the
    model is trained again.

    Args:
        settings: See `IstSettings`; a mapping of its fields will do.
        seed: Fixes which layers are drawn.
        rows: Rows for the trials, by number; default: those of the Trainer.
        collator: List of rows to a batch; default: that of the Trainer.
    Raises:
        ConfigError: when training begins, if the Trainer or the model cannot work with it.
    """

    def __init__(
        self,
        settings: IstSettings | Mapping[str, Any] | None = None,
        *,
        seed: int = 0,
        rows: Any = None,
        collator: Callable[[list[Any]], Mapping[str, Any]] | None = None,
    ) -> None:
        self.settings = (
            settings if isinstance(settings, IstSettings) else IstSettings(**(settings or {}))
        )
        self.seed, self.rows, self.collator = seed, rows, collator
        self._tuning: SparseTuning | None = None

    @property
    def importance(self) -> dict[str, float]:
        """Layer -> importance, as learnt so far. Raises StateError before training."""
        if self._tuning is None:
            raise StateError(
                "this IstCallback never ran: pass it to the Trainer (callbacks=[...]) that trains "
                "the model, and call train()."
            )
        return self._tuning.importance

    def restore(self) -> None:
        """Let all layers train again; the end of a training does it by itself."""
        if self._tuning is not None:
            self._tuning.restore()

    def state(self) -> dict[str, Any]:
        """What the Trainer saves in a checkpoint."""
        saved = None if self._tuning is None else self._tuning.state_dict()
        args = {"settings": asdict(self.settings), "seed": self.seed}
        return {"args": args, "attributes": {"saved": saved}}

    def on_train_begin(
        self, args, state, control, model=None, optimizer=None, train_dataloader=None, **kwargs
    ):
        _check_arguments(args)
        rows = train_dataloader.dataset if self.rows is None else self.rows
        if self.settings.sampling == "importance" and not hasattr(rows, "__len__"):
            raise ConfigError(
                f"IST draws training rows by number for its trials, and {type(rows).__name__} is a "
                "stream; give IstCallback rows=[...] (some hundred rows of the training data), or "
                "sampling='uniform'."
            )
        collator = self.collator or train_dataloader.collate_fn
        self._tuning = SparseTuning(model, self.settings, self.seed, rows, collator)
        _check_optimizer(optimizer, self._tuning)
        name = type(self).__name__
        if state.global_step:
            self._resume(state.stateful_callbacks.get(name))
        # Else the Trainer cannot save into a state that was loaded from one without this entry.
        state.stateful_callbacks[name] = self.state()

    def on_step_begin(self, args, state, control, optimizer=None, **kwargs):
        self._tuning.begin_step(optimizer)

    def on_train_end(self, args, state, control, **kwargs):
        self.restore()

    def _resume(self, entry: Any) -> None:
        """Go on from what a checkpoint holds."""
        entries = entry if isinstance(entry, list) else [entry]
        entry = entries[-1] or {}
        saved = entry.get("attributes", {}).get("saved")
        if saved is None:
            raise CheckpointError(
                "this checkpoint was saved without IstCallback, so IST cannot go on from it; train "
                "on without the callback, or start again with it."
            )
        if entry["args"] != self.state()["args"]:
            raise CheckpointError(
                f"this checkpoint was trained with IST as {entry['args']}, this callback says "
                f"{self.state()['args']}; give it the same settings and seed."
            )
        self._tuning.load_state_dict(saved)


def _check_arguments(args: Any) -> None:
    if args.fsdp or args.deepspeed:
        raise ConfigError(
            "IST freezes other parameters in every step, which FSDP and DeepSpeed cannot follow; "
            "use data parallel (torchrun alone) or one device."
        )
    unused = args.ddp_find_unused_parameters
    recomputes = getattr(args, "activation_checkpointing", args.gradient_checkpointing)
    if unused is None:
        unused = not recomputes
    if args.world_size > 1 and not unused:
        raise ConfigError(
            "IST leaves most parameters without a gradient, and data parallel must know: give "
            "TrainingArguments(ddp_find_unused_parameters=True), with gradient checkpointing also "
            "gradient_checkpointing_kwargs={'use_reentrant': False}."
        )


def _check_optimizer(optimizer: Any, tuning: SparseTuning) -> None:
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    lost = [x.name for x in tuning.layers if any(id(p) not in held for p in x.parameters)]
    if lost:
        raise ConfigError(
            f"the optimiser does not hold the modules of layer {lost[0]}; make it when all modules "
            "require gradients (after a training that broke off: IstCallback.restore first)."
        )
