"""Training on the transformers Trainer: phases, brief trainings that are watched, full ones."""

from prunepeft.training.evaluator import TrainerEvaluator
from prunepeft.training.phases import PhaseLog, Phases, make_optimizer, make_scheduler

__all__ = ["PhaseLog", "Phases", "TrainerEvaluator", "make_optimizer", "make_scheduler"]
