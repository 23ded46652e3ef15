"""What a task needs: model head, encoded rows, batches and metrics."""

from prunepeft.registry import Registry
from prunepeft.tasks.base import Task
from prunepeft.tasks.causal_lm import CausalLM
from prunepeft.tasks.classify import Regression, SequenceClassification
from prunepeft.tasks.images import ImageClassification
from prunepeft.tasks.quantized_opening import open_quantized
from prunepeft.tasks.text import Collator

TASKS: Registry[Task] = Registry("task")
TASKS.register(SequenceClassification.name, SequenceClassification())
TASKS.register(Regression.name, Regression())
TASKS.register(CausalLM.name, CausalLM())
TASKS.register(ImageClassification.name, ImageClassification())

__all__ = [
    "TASKS",
    "CausalLM",
    "Collator",
    "ImageClassification",
    "Regression",
    "SequenceClassification",
    "Task",
    "open_quantized",
]
