"""RunConfig: every setting of a run, with its default, its limits and one line of help."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from prunepeft.budget import Budget
from prunepeft.config.fields import (
    BaseMethod,
    Count,
    Criteria,
    FullShare,
    Kinds,
    Method,
    Mode,
    NotNegative,
    Options,
    Pair,
    Positive,
    Rates,
    Roles,
    Scope,
    Seed,
    Share,
    Sizes,
    TaskName,
    Text,
)
from prunepeft.config.names import (
    BASE_METHOD_NAMES,
    CRITERION_NAMES,
    KIND_NAMES,
    KIND_PRESETS,
    METHOD_NAMES,
    PAPER_CRITERION_NAMES,
    TASK_NAMES,
)
from prunepeft.errors import ConfigError

__all__ = [
    "BASE_METHOD_NAMES",
    "CRITERION_NAMES",
    "KIND_NAMES",
    "KIND_PRESETS",
    "METHOD_NAMES",
    "TASK_NAMES",
    "BaseSettings",
    "BlackBoxSettings",
    "LightPeftSettings",
    "RunConfig",
    "S3DeltaSettings",
    "SMamSettings",
    "SearchSettings",
    "TrainSettings",
]


class _Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, coerce_numbers_to_str=True)


def _about(default: Any, text: str, **limits: Any) -> Any:
    """A field with its help, which `template` prints as a comment."""
    if isinstance(default, list | dict):
        return Field(default_factory=lambda: type(default)(default), description=text, **limits)
    return Field(default, description=text, **limits)


class TrainSettings(_Settings):
    """How the survivor is trained; the search trains the same way unless it says otherwise."""

    epochs: Count = _about(3, "passes over the training rows")
    lr: Positive = _about(5e-4, "peak learning rate")
    lr_by_kind: Rates = _about({}, "learning rate of single kinds, e.g. {lora: 2e-4}")
    batch_size: Count = _about(16, "rows per optimiser step, over all devices")
    gradient_accumulation: Count = _about(1, "pieces a batch is cut into, to save memory")
    max_length: Count | None = _about(
        None, "longest row in tokens (text); null: from model and data"
    )
    max_rows: Pair | None = _about(None, "use at most this many training rows, chosen by seed")
    weight_decay: NotNegative = _about(0.01, "decay of the modules' weights")
    warmup_ratio: Share = _about(0.06, "share of the steps in which the rate rises")
    lr_schedule: Literal["linear", "cosine", "constant"] = _about("linear", "fall of the rate")
    max_grad_norm: Positive = _about(1.0, "gradients are scaled down to this norm")
    gradient_checkpointing: bool = _about(False, "recompute activations to save memory")
    eval_batch_size: Count = _about(64, "rows per batch in evaluation")


class SearchSettings(_Settings):
    """How the modules to keep are found."""

    fidelity: FullShare = _about(1.0, "share of the training rows the search sees")
    rounds: Count = _about(3, "train-and-prune rounds")
    warmup: bool = _about(True, "choose the criteria of every partition on the task itself")
    per_round: Count | None = _about(None, "modules removed per round; null: from the budget")
    epochs: Count = _about(1, "passes per round")
    reinit: Literal["reset", "keep", "init"] = _about(
        "reset", "weights at the start of a round: fresh, those trained so far, or the first ones"
    )
    criteria: Criteria = _about(list(PAPER_CRITERION_NAMES), "candidates for the partitions")
    mode: Mode = _about(
        "hybrid", "hybrid, none, random, no_partitions, or single:<criterion> (ablations)"
    )
    paper_exact: bool = _about(False, "probabilities as published, inside each partition")
    warmup_rows: Count = _about(100, "rows of the warm-up, stratified by label")
    warmup_epochs: Count = _about(3, "passes per warm-up turn")
    warmup_turns: Count = _about(3, "warm-up turns per criterion")
    lr: Positive | None = _about(None, "learning rate of the search; null: train.lr")


class BaseSettings(_Settings):
    """How the frozen model itself is made smaller, if base_ratio is over 0 or by light-peft."""

    method: BaseMethod = _about(
        "light-peft",
        "light-peft (trained masks), loraprune, magnitude, wanda, taylor, salience or random",
    )
    stock: bool = _about(
        True, "only cuts that stock transformers can open: equal widths, heads where it can say so"
    )
    heads: bool = _about(True, "attention heads go too, not only feed-forward neurons")
    scope: Scope = _about(
        "layer", "neurons are ranked within each layer, or over all (needs stock=false)"
    )
    epochs: Count = _about(1, "passes in which the model is judged, or pruned step by step")
    fidelity: FullShare = _about(1.0, "share of the training rows this sees")
    rank: Count = _about(8, "rank of the LoRA that trains meanwhile, on every linear layer")
    every: Count = _about(10, "optimiser steps between two prunings (not light-peft)")


class LightPeftSettings(_Settings):
    """What method light-peft removes after one short training of everything."""

    head_ratio: Share | None = _about(
        None, "share of the attention heads of each layer that go; null: base_ratio, else 1/3"
    )
    neuron_ratio: Share | None = _about(
        None, "share of the feed-forward neurons that go; null: base_ratio, else 1/3"
    )
    module_ratio: Share | None = _about(
        None, "share of the modules that go; null: the best ones that fit the budget stay"
    )
    rank_ratio: Share = _about(0.5, "share of the ranks of the modules left that go")
    rank_scope: Scope = _about("global", "ranks compared in each layer's module, or global")
    rank_importance: Literal["mean", "sum", "abs"] = _about(
        "mean", "first-order scores: as released, for any width, or without cancelling"
    )
    l1: NotNegative = _about(1e-4, "factor of the L1 norm of the masks in the loss")


class BlackBoxSettings(_Settings):
    """How methods that train one placement after another search: random, asha and evolution."""

    n_trials: Count = _about(27, "placements tried; asha trains the better ones again")
    fidelity: FullShare = _about(
        1.0, "share of the training rows a trial sees, in asha one of the last rung"
    )
    epochs: Count = _about(1, "passes of a trial over its rows")
    max_steps: Count | None = _about(
        None, "optimiser steps of all trials together; the search ends before there are more"
    )
    eta: Pair = _about(
        3, "asha: one in so many goes on to the next rung, with so many times the rows"
    )
    population: Pair = _about(12, "evolution: placements alive at a time; the oldest dies")
    sample: Count = _about(4, "evolution: of so many, drawn at random, the best is the parent")


class SMamSettings(_Settings):
    """How method smam prunes; a round is as long as search.fidelity and search.epochs say."""

    rounds: Count = _about(5, "train-and-prune rounds")
    schedule: Literal["linear", "geometric"] = _about(
        "linear", "the cost falls by equal amounts, or by equal factors"
    )
    aggregate: Literal["mean", "sum", "signed"] = _about(
        "mean", "first-order scores of a rank: per weight, summed, or summed with their signs"
    )
    balanced: bool = _about(True, "start both factors from noise and subtract what they add")


class S3DeltaSettings(_Settings):
    """How method s3delta learns its gates, in one training as long as the search section says."""

    update: Literal["alternate", "joint"] = _about(
        "alternate", "modules and gates learn in turn on other rows, or both in every step"
    )
    gradient: Literal["implicit", "detach"] = _about(
        "implicit", "gradient of the gates: exact under the budget, or as released"
    )
    logit_lr: Positive = _about(0.1, "learning rate of the gates' logits; falls to zero")
    beta: Positive = _about(1.0, "temperature of the gates")
    max_grad_norm: Positive = _about(2.0, "gradients of the logits are scaled down to this norm")


class RunConfig(_Settings):
    """Every setting of a run."""

    model: Text = Field(description="folder or hub id of the base model")
    data: Text = Field(
        description="jsonl, csv, tsv, parquet, npz, folder of splits or images, or hub id"
    )
    budget: str | None = _about(None, "0.5%, 120k, 1.2M, '12 modules' or rank:64")
    task: TaskName | None = _about(
        None, "seq-cls, regression, causal-lm or image-cls; null: from the data"
    )
    columns: dict[str, Text] | None = _about(None, "role -> column, e.g. {text: sentence}")
    metric: Text | None = _about(None, "what decides; null: the task's default")
    validation_fraction: Share = _about(
        0.1, "split off the training rows if the data has no validation split", gt=0
    )
    method: Method = _about("prunepeft", "how to search")
    kinds: Kinds = _about(["lora", "serial_adapter"], "kinds of module to choose from")
    space: Literal["default", "paper"] = _about("default", "sizes scaled to the budget, or fixed")
    sizes: Sizes = _about({}, "allowed sizes per kind, e.g. {lora: [4, 8]}")
    options: Options = _about({}, "options per kind, e.g. {lora: {rslora: true}}")
    roles: Roles = _about({}, "where a kind goes; + ties roles, e.g. {lora: q+v}")
    output: Text | None = _about(None, "run folder; null: runs/<data>-<method>-<seed>")
    seed: Seed = _about(0, "fixes splits, initial values and the order of rows")
    device: Literal["auto", "cpu", "cuda"] = _about("auto", "where to compute")
    precision: Literal["auto", "fp32", "bf16"] = _about("auto", "number format of the base model")
    baseline: Literal["none", "lora", "lora-all"] = _about(
        "none", "also train plain LoRA at equal budget: on query and value, or on all linears"
    )
    arch: Text | None = _about(None, "arch.json to train instead of searching")
    strategy: Text | None = _about(None, "strategy.json to use instead of a warm-up")
    base_ratio: Share = _about(
        0.0, "share of the frozen model's attention heads and feed-forward neurons to remove"
    )
    offline: bool = _about(False, "never ask the network")
    trust_remote_code: bool = Field(
        False, description="run code that comes with the model (command line only)", exclude=True
    )
    train: TrainSettings = Field(default_factory=TrainSettings)
    search: SearchSettings = Field(default_factory=SearchSettings)
    base: BaseSettings = Field(default_factory=BaseSettings)
    light_peft: LightPeftSettings = Field(default_factory=LightPeftSettings)
    black_box: BlackBoxSettings = Field(default_factory=BlackBoxSettings)
    smam: SMamSettings = Field(default_factory=SMamSettings)
    s3delta: S3DeltaSettings = Field(default_factory=S3DeltaSettings)

    @model_validator(mode="after")
    def _check(self) -> "RunConfig":
        if self.budget is None and self.arch is None and not self.base_ratio:
            raise ConfigError(
                "budget is missing; give for example budget=1% (or arch=arch.json; prune-base "
                "takes ratio=0.3 instead)"
            )
        self._check_sections()
        if self.base_ratio and self.arch is not None:
            raise ConfigError(
                "arch.json fits the base model it was made on, so base_ratio cannot cut that "
                "here; run prune-base first and search on its base/, or leave base_ratio out"
            )
        if self.base.scope == "global" and self.base.stock:
            raise ConfigError(
                "base.scope=global gives every layer a width of its own, which stock transformers "
                "cannot open; add base.stock=false, or leave base.scope=layer"
            )
        if self.budget is not None:
            Budget.parse(self.budget)
        for name in ("sizes", "options", "roles"):
            unused = sorted(set(getattr(self, name)) - set(self.kinds))
            if unused and self.arch is None:
                raise ConfigError(
                    f"{name} names {', '.join(unused)}, which is not among kinds "
                    f"({', '.join(self.kinds)}); add it to kinds or drop it from {name}"
                )
        return self

    def _check_sections(self) -> None:
        """Refuse settings of the base or of Light-PEFT that this method does not read."""
        own, base = LightPeftSettings(), BaseSettings()
        if self.method == "light-peft":
            unread = ("method", "epochs", "fidelity", "rank", "every")
            changed = [n for n in unread if getattr(self.base, n) != getattr(base, n)]
            if changed:
                raise ConfigError(
                    f"method light-peft cuts the base in its own training, so base.{changed[0]} "
                    "says nothing; leave it out (search.epochs and search.fidelity say how long "
                    "that training is)"
                )
        elif self.light_peft != own:
            raise ConfigError(
                "light_peft.* is read by method=light-peft alone; leave it out, or give "
                "method=light-peft"
            )

    def to_dict(self) -> dict[str, Any]:
        """All settings as plain JSON types; `trust_remote_code` is never written to a file."""
        return self.model_dump(mode="json")
