"""Settings of single methods: one section each, with the defaults and limits of its fields."""

from typing import Literal

from prunepeft.config.fields import (
    Count,
    Factor,
    FullShare,
    NotNegative,
    Pair,
    Positive,
    Ratio,
    Scope,
    Share,
)
from prunepeft.config.sections import Section, about


class LightPeftSettings(Section):
    """What method light-peft removes after one short training of everything."""

    head_ratio: Share | None = about(
        None, "share of the attention heads of each layer that go; null: base_ratio, else 1/3"
    )
    neuron_ratio: Share | None = about(
        None, "share of the feed-forward neurons that go; null: base_ratio, else 1/3"
    )
    module_ratio: Share | None = about(
        None, "share of the modules that go; null: the best ones that fit the budget stay"
    )
    rank_ratio: Share = about(0.5, "share of the ranks of the modules left that go")
    rank_scope: Scope = about("global", "ranks compared in each layer's module, or global")
    rank_importance: Literal["mean", "sum", "abs"] = about(
        "mean", "first-order scores: as released, for any width, or without cancelling"
    )
    l1: NotNegative = about(1e-4, "factor of the L1 norm of the masks in the loss")


class BlackBoxSettings(Section):
    """How autopeft, random, asha and evolution search: they train one placement after another."""

    n_trials: Count = about(27, "placements tried; asha trains the better ones again")
    fidelity: FullShare = about(
        1.0, "share of the training rows a trial sees, in asha one of the last rung"
    )
    epochs: Count = about(1, "passes of a trial over its rows")
    max_steps: Count | None = about(
        None, "optimiser steps of all trials together; the search ends before there are more"
    )
    eta: Pair = about(
        3, "asha: one in so many goes on to the next rung, with so many times the rows"
    )
    population: Pair = about(12, "evolution: placements alive at a time; the oldest dies")
    sample: Count = about(4, "evolution: of so many, drawn at random, the best is the parent")
    initial: Pair | None = about(
        None, "autopeft: random placements at the start; null: a third of n_trials"
    )
    batch: Count = about(4, "autopeft: placements proposed from one surrogate")
    surrogate: Literal["map-saas", "nuts", "gp"] = about(
        "map-saas", "autopeft: sparse prior at its mode, or sampled (slow), or a plain kernel"
    )


class SMamSettings(Section):
    """How method smam prunes; a round is as long as search.fidelity and search.epochs say."""

    rounds: Count = about(5, "train-and-prune rounds")
    schedule: Literal["linear", "geometric"] = about(
        "linear", "the cost falls by equal amounts, or by equal factors"
    )
    aggregate: Literal["mean", "sum", "signed"] = about(
        "mean", "first-order scores of a rank: per weight, summed, or summed with their signs"
    )
    balanced: bool = about(True, "start both factors from noise and subtract what they add")


class S3DeltaSettings(Section):
    """How method s3delta learns its gates, in one training as long as the search section says."""

    update: Literal["alternate", "joint"] = about(
        "alternate", "modules and gates learn in turn on other rows, or both in every step"
    )
    gradient: Literal["implicit", "detach"] = about(
        "implicit", "gradient of the gates: exact under the budget, or as released"
    )
    logit_lr: Positive = about(0.1, "learning rate of the gates' logits; falls to zero")
    beta: Positive = about(1.0, "temperature of the gates")
    max_grad_norm: Positive = about(2.0, "gradients of the logits are scaled down to this norm")


class BipeftSettings(Section):
    """How method bipeft searches, in one training as long as the search section says."""

    arch_lr: Positive = about(0.01, "learning rate of the logits of presence and dimensions")
    prune_steps: Count | None = about(
        None, "fires in which the budget is reached; null: from the length of the search, up to 100"
    )
    threshold: FullShare = about(0.85, "how alike selections must be for pruning to fire")
    begin: Share = about(0.2, "share of the search before pruning may fire")
    tau_first: Positive = about(5.0, "temperature of the samples at the start")
    tau_last: Positive = about(1.0, "and at the end")
    criterion: Literal["mixed", "weights", "structure", "sum", "agreed"] = about(
        "mixed", "sensitivity of a module: from rows of the weights, of the structure, or both"
    )
    window: Count = about(5, "earlier selections that a new one is compared with")
    decay: Share = about(0.85, "smoothing of the sensitivity")
    dimensions: Count = about(4, "sizes made of one by halving it; 1: only presence is searched")
    l1: NotNegative = about(
        0.0, "factor of the mean distance of logits and their softmax in the loss"
    )


class AllocateSettings(Section):
    """How eva, gora, fisher, lora_drop, kappatune and adalora give out ranks after one look."""

    batches: Count = about(64, "eva, gora, fisher: batches of training rows looked at, at most")
    max_factor: Factor | None = about(
        None, "largest rank, in times the uniform one; null: the method's own"
    )
    min_factor: Ratio = about(0.5, "gora: smallest rank, in times the uniform one, rounded down")
    warm_head: bool = about(True, "gora, fisher: train the task head alone first")
    tau: Ratio = about(0.99, "eva: cosine at which the directions of a layer are settled")
    keep: FullShare | None = about(
        None, "kappatune: share of the modules, lora_drop: of the importance, that stays"
    )


class IstSection(Section):
    """Train the result with IST: a few layers in each step. `ist=on` is short for enabled."""

    enabled: bool = about(False, "train a few layers in each step; ist=on for short")
    layers: FullShare = about(0.25, "share of the layers with modules that train in a step")
    suppressed: FullShare = about(0.5, "share of the layers that a trial turns down")
    beta: Share = about(0.25, "what is left of modules that are turned down; 0 hides them")
    every: Count = about(10, "optimiser steps between two updates of the layers' scores")
    trials: Count = about(3, "sets of layers tried in an update")
    score_lr: Positive = about(10.0, "learning rate of the scores")
    probe_rows: Count = about(16, "training rows on which an update's trials run")
    reward: Literal["exp", "relative"] = about(
        "exp", "of a trial: e^-loss as released, or over the best trial's, for large losses"
    )
    sampling: Literal["importance", "uniform"] = about(
        "importance", "important layers train more often, or all alike (the control RST)"
    )
    optimizer_state: Literal["keep", "offload", "drop"] = about(
        "keep", "of layers that do not train: kept, moved to the host's memory, or dropped"
    )
