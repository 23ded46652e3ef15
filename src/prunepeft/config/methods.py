"""Settings of single methods: one section each, with the defaults and limits of its fields."""

from typing import Literal

from prunepeft.config.fields import Count, FullShare, NotNegative, Pair, Positive, Scope, Share
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
    """How methods that train one placement after another search: random, asha and evolution."""

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
