"""What every run has: how to train, how to search, how to make the base model smaller."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from prunepeft.config.fields import (
    BaseMethod,
    Count,
    Criteria,
    FullShare,
    Mode,
    NotNegative,
    Pair,
    Positive,
    Rates,
    Scope,
    Share,
    Text,
)
from prunepeft.config.names import PAPER_CRITERION_NAMES


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, coerce_numbers_to_str=True)


def about(default: Any, text: str, **limits: Any) -> Any:
    """A field with its help, which `template` prints as a comment."""
    if isinstance(default, list | dict):
        return Field(default_factory=lambda: type(default)(default), description=text, **limits)
    return Field(default, description=text, **limits)


class TrainSettings(Section):
    """How the survivor is trained; the search trains the same way unless it says otherwise."""

    epochs: Count = about(3, "passes over the training rows")
    lr: Positive = about(5e-4, "peak learning rate")
    lr_by_kind: Rates = about({}, "learning rate of single kinds, e.g. {lora: 2e-4}")
    batch_size: Count = about(16, "rows per optimiser step, over all devices")
    gradient_accumulation: Count = about(1, "pieces a batch is cut into, to save memory")
    max_length: Count | None = about(
        None, "longest row in tokens (text); null: from model and data"
    )
    max_rows: Pair | None = about(None, "use at most this many training rows, chosen by seed")
    weight_decay: NotNegative = about(0.01, "decay of the modules' weights")
    warmup_ratio: Share = about(0.06, "share of the steps in which the rate rises")
    lr_schedule: Literal["linear", "cosine", "constant"] = about("linear", "fall of the rate")
    max_grad_norm: Positive = about(1.0, "gradients are scaled down to this norm")
    gradient_checkpointing: bool = about(False, "recompute activations to save memory")
    eval_batch_size: Count = about(64, "rows per batch in evaluation")
    compile: Text | None = about(
        None, "backend of torch.compile for rounds and trainings of 100 steps or more; null: off"
    )
    packing: bool = about(False, "causal-lm: put rows of a step behind each other, not padded")
    prefix_cache_gb: NotNegative = about(
        4.0, "disk for the output of layers below all modules, which then run once per row; 0: off"
    )


class SearchSettings(Section):
    """How the modules to keep are found."""

    fidelity: FullShare | None = about(
        None,
        "share of the training rows the search sees; null: prunepeft takes half of the training's "
        "steps for its rounds, other methods see all rows",
    )
    rounds: Count = about(3, "train-and-prune rounds")
    warmup: bool = about(True, "choose the criteria of every partition on the task itself")
    per_round: Count | None = about(None, "modules removed per round; null: from the budget")
    epochs: Count = about(1, "passes per round")
    reinit: Literal["reset", "keep", "init"] = about(
        "reset", "weights at the start of a round: fresh, those trained so far, or the first ones"
    )
    criteria: Criteria = about(list(PAPER_CRITERION_NAMES), "candidates for the partitions")
    mode: Mode = about(
        "hybrid", "hybrid, none, random, no_partitions, or single:<criterion> (ablations)"
    )
    paper_exact: bool = about(False, "probabilities as published, inside each partition")
    warmup_rows: Count = about(100, "rows of the warm-up, stratified by label")
    warmup_epochs: Count = about(3, "passes per warm-up turn")
    warmup_turns: Count | None = about(
        None,
        "warm-up turns; null: as many of 3 as take a tenth of the training's steps, or 1",
    )
    settle: FullShare | None = about(
        None, "end a round when rankings agree this well with those at half its steps, e.g. 0.9"
    )
    cost_aware: NotNegative = about(
        0.0, "share of the modules' worth given up to free all layers from the bottom; 0: none"
    )
    lr: Positive | None = about(None, "learning rate of the search; null: train.lr")


class BaseSettings(Section):
    """How the frozen model itself is made smaller, if base_ratio is over 0 or by light-peft."""

    method: BaseMethod = about(
        "light-peft",
        "light-peft (trained masks), loraprune, magnitude, wanda, taylor, salience or random",
    )
    stock: bool = about(
        True, "only cuts that stock transformers can open: equal widths, heads where it can say so"
    )
    heads: bool = about(True, "attention heads go too, not only feed-forward neurons")
    scope: Scope = about(
        "layer", "neurons are ranked within each layer, or over all (needs stock=false)"
    )
    epochs: Count = about(1, "passes in which the model is judged, or pruned step by step")
    fidelity: FullShare = about(1.0, "share of the training rows this sees")
    rank: Count = about(8, "rank of the LoRA that trains meanwhile, on every linear layer")
    every: Count = about(10, "optimiser steps between two prunings (not light-peft)")
