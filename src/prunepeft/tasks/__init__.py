"""What a task needs: model head, tokenised rows, batches and metrics."""

from prunepeft.registry import Registry
from prunepeft.tasks.base import Collator, Task
from prunepeft.tasks.causal_lm import CausalLM
from prunepeft.tasks.classify import Regression, SequenceClassification

TASKS: Registry[Task] = Registry("task")
TASKS.register(SequenceClassification.name, SequenceClassification())
TASKS.register(Regression.name, Regression())
TASKS.register(CausalLM.name, CausalLM())

__all__ = ["TASKS", "CausalLM", "Collator", "Regression", "SequenceClassification", "Task"]
