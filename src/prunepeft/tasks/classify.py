"""Sequence classification and regression, on one text or a pair."""

from typing import Any, ClassVar

import numpy as np
from datasets import Dataset
from torch import Tensor, nn
from transformers import (
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
)

from prunepeft.data import Splits
from prunepeft.errors import ConfigError
from prunepeft.metrics import classification_metrics, regression_metrics
from prunepeft.tasks.base import has_own_class
from prunepeft.tasks.text import TextTask


class SequenceClassification(TextTask):
    """One class for a text or a pair of texts."""

    name: ClassVar[str] = "seq-cls"
    peft_task_type: ClassVar[str] = "SEQ_CLS"
    default_metric: ClassVar[str] = "accuracy"
    default_max_length: ClassVar[int] = 128

    def auto_class(self) -> Any:
        """The transformers Auto class of the model."""
        return AutoModelForSequenceClassification

    def check_config(self, config: PreTrainedConfig, path: str) -> None:
        """Raise ConfigError if transformers has no classifier for this model type."""
        known = config.model_type in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES
        if not known and not has_own_class(config, "AutoModelForSequenceClassification"):
            raise ConfigError(
                f"model {path!r} is of type {config.model_type!r}, which has no sequence "
                f"classifier; "
                "choose a text model such as BERT, RoBERTa, GPT-2 or LLaMA."
            )

    def config_options(self, splits: Splits) -> dict[str, Any]:
        """Number and names of the classes."""
        return class_options(splits, self.name)

    def encode(
        self,
        dataset: Dataset,
        splits: Splits,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int | None = None,
    ) -> Dataset:
        """Tokenise texts, cut on the right (of a pair: the longer one); see `Task.encode`."""
        columns = splits.columns
        texts = list(dataset[columns["text"]])
        pairs = list(dataset[columns["text_pair"]]) if "text_pair" in columns else None
        if pairs and not _separates(tokenizer):
            texts, pairs = [f"{a}\n{b}" for a, b in zip(texts, pairs, strict=True)], None
        encoded = tokenizer(
            texts,
            pairs,
            truncation="longest_first",
            max_length=self._max_length(tokenizer, max_length),
        )
        data = {key: list(values) for key, values in encoded.items()}
        data["labels"] = list(dataset[columns["label"]])
        data["length"] = [len(ids) for ids in data["input_ids"]]
        kept = [row for row, length in enumerate(data["length"]) if length]
        self._check_left(len(dataset), len(kept), "the text is empty")
        return Dataset.from_dict(
            {key: [values[row] for row in kept] for key, values in data.items()}
        )

    def head_modules(self, model: PreTrainedModel) -> list[str]:
        """Modules between the encoder and the logits: the classifier, and the pooler it reads."""
        return find_head(model)

    def preprocess_logits(self, logits: Any, labels: Tensor) -> Tensor:
        """The logits alone, (B, C), without hidden states some models add."""
        return first_output(logits)

    def compute(self, predictions: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        """Accuracy, macro F1, Matthews correlation, and F1 for two classes."""
        return classification_metrics(np.asarray(predictions), np.asarray(labels))


def class_options(splits: Splits, task: str) -> dict[str, Any]:
    """Fields of a classifier's config: number and names of the classes.

    Raises:
        ConfigError: if the data has no classes.
    """
    names = splits.labels
    if names is None:
        raise ConfigError(f"task {task} needs classes, and {splits.source} was loaded without.")
    return {
        "num_labels": len(names),
        "id2label": dict(enumerate(names)),
        "label2id": {name: number for number, name in enumerate(names)},
        "problem_type": "single_label_classification",
    }


def find_head(model: PreTrainedModel) -> list[str]:
    """Names of the modules between the encoder and the logits of a classifier.

    A pooler inside the base model (BERT, ALBERT) belongs to the head: pretraining hardly touches
    it, or the checkpoint lacks it, and frozen it would starve the classifier. RoBERTa keeps the
    same layer in its classifier. A part with a list of blocks is an encoder, whatever its name.
    """
    base = model.base_model_prefix
    beside = {
        name: module
        for name, module in model.named_children()
        if name != base and not any(isinstance(part, nn.ModuleList) for part in module.modules())
    }
    pooler = getattr(getattr(model, base, None), "pooler", None)
    inside = {f"{base}.pooler": pooler} if isinstance(pooler, nn.Module) else {}
    return [name for name, module in (inside | beside).items() if _has_weights(module)]


def first_output(logits: Any) -> Tensor:
    """The logits of a model that may add hidden states to them."""
    return logits[0] if isinstance(logits, tuple | list) else logits


def _has_weights(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def _separates(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a special token stands between the two texts of a pair."""
    return tokenizer.num_special_tokens_to_add(pair=True) > tokenizer.num_special_tokens_to_add()


class Regression(SequenceClassification):
    """One number for a text or a pair of texts."""

    name: ClassVar[str] = "regression"
    default_metric: ClassVar[str] = "pearson"

    def config_options(self, splits: Splits) -> dict[str, Any]:
        """One output, trained by the squared error."""
        return {"num_labels": 1, "problem_type": "regression"}

    def compute(self, predictions: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        """Pearson, Spearman and mean squared error."""
        return regression_metrics(np.asarray(predictions), np.asarray(labels))
