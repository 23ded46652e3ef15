"""Judging modules: record statistics, score them, combine the scores, choose what goes."""

from prunepeft.criteria.activation import Activation
from prunepeft.criteria.base import CRITERIA, Criterion, Record, needs_of, score_units
from prunepeft.criteria.gradient import Gradient, GradientMean, Snip, SnipMean
from prunepeft.criteria.layer_importance import Ist
from prunepeft.criteria.magnitude import MinimumWeight, Threshold, ThresholdRelative, Zeros

CRITERIA.register(MinimumWeight.name, MinimumWeight())
CRITERIA.register(Zeros.name, Zeros())
CRITERIA.register(Threshold.name, Threshold())
CRITERIA.register(Activation.name, Activation())
CRITERIA.register(Snip.name, Snip())
CRITERIA.register(Gradient.name, Gradient())
CRITERIA.register(SnipMean.name, SnipMean())
CRITERIA.register(GradientMean.name, GradientMean())
CRITERIA.register(ThresholdRelative.name, ThresholdRelative())
CRITERIA.register(Ist.name, Ist())

PAPER_CRITERIA = ("minimum_weight", "zeros", "threshold", "activation", "snip", "gradient")

__all__ = ["CRITERIA", "PAPER_CRITERIA", "Criterion", "Record", "needs_of", "score_units"]
