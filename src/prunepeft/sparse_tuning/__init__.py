"""Sparse tuning: a few layers train in each step (IST)."""

from prunepeft.sparse_tuning.callback import IstCallback
from prunepeft.sparse_tuning.ist import IstSettings, LayerSampler, update_scores
from prunepeft.sparse_tuning.layers import PeftLayer, peft_layers, suppressed
from prunepeft.sparse_tuning.trials import LayerTrials
from prunepeft.sparse_tuning.tuning import SparseTuning, layer_importance

__all__ = [
    "IstCallback",
    "IstSettings",
    "LayerSampler",
    "LayerTrials",
    "PeftLayer",
    "SparseTuning",
    "layer_importance",
    "peft_layers",
    "suppressed",
    "update_scores",
]
