"""The abstract task and the batch maker all tasks share."""

import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from prunepeft.data import Splits
from prunepeft.errors import ConfigError, DataError
from prunepeft.tasks.loading import load_config, load_pretrained, load_tokenizer, make_empty

logger = logging.getLogger(__name__)

INPUTS = ("input_ids", "attention_mask", "token_type_ids")
IGNORED = -100  # label of a token that does not count


@dataclass(frozen=True)
class Collator:
    """Pads rows on the right to the longest of the batch; drops columns that no model reads.

    Args:
        pad_token_id: Fills `input_ids`; masks and types are filled with 0, token labels with -100.
    """

    pad_token_id: int

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """Make a batch: inputs (B, T) int64; labels (B, T) or (B,) int64, or (B,) float32.

        T is that of the longest row, or at least `width` where the rows name one.
        """
        width = max(*(len(row["input_ids"]) for row in rows), rows[0].get("width", 0))
        fill = {"input_ids": self.pad_token_id}
        batch = {
            name: torch.tensor([_pad(row[name], width, fill.get(name, 0)) for row in rows])
            for name in INPUTS
            if name in rows[0]
        }
        labels = [row["labels"] for row in rows]
        if isinstance(labels[0], float):
            return batch | {"labels": torch.tensor(labels, dtype=torch.float32)}
        if not isinstance(labels[0], int):
            labels = [_pad(label, width, IGNORED) for label in labels]
        return batch | {"labels": torch.tensor(labels)}


def _pad(values: Sequence[int], width: int, fill: int) -> list[int]:
    return [*values, *[fill] * (width - len(values))]


def has_own_class(config: PreTrainedConfig, auto_class: str) -> bool:
    """Whether the model brings its own code for an Auto class."""
    return auto_class in (getattr(config, "auto_map", None) or {})


class Task(ABC):
    """A kind of problem: how rows become tensors, which head the model gets, what is measured.

    Class attributes:
        name: Registered name.
        peft_task_type: Task type written into the adapter's config.
        default_metric: Metric to select on.
        default_max_length: Longest row in tokens if the user names none.
    """

    name: ClassVar[str]
    peft_task_type: ClassVar[str]
    default_metric: ClassVar[str]
    default_max_length: ClassVar[int]

    @abstractmethod
    def auto_class(self) -> Any:
        """The transformers Auto class of the model."""

    @abstractmethod
    def check_config(self, config: PreTrainedConfig, path: str) -> None:
        """Raise ConfigError if a model of this kind cannot do the task."""

    @abstractmethod
    def config_options(self, splits: Splits) -> dict[str, Any]:
        """Fields of the model's config that depend on the data."""

    @abstractmethod
    def encode(
        self,
        dataset: Dataset,
        splits: Splits,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int | None = None,
    ) -> Dataset:
        """Tokenise rows into `input_ids`, `attention_mask`, `labels`, `length` (and token types).

        Rows without a token to learn from are left out and counted in a warning.

        Args:
            dataset: Rows with the columns of `splits`.
            splits: Where columns and labels are looked up.
            tokenizer: From `load_tokenizer`.
            max_length: Longest row in tokens; None takes the default or the model's limit.

        Raises:
            ConfigError: if `max_length` is out of range.
            DataError: if no row is left.
        """

    @abstractmethod
    def head_modules(self, model: PreTrainedModel) -> list[str]:
        """Names of the modules that must be trained in full beside the adapter."""

    @abstractmethod
    def preprocess_logits(self, logits: Any, labels: Tensor) -> Tensor:
        """Reduce the output for a batch to what `compute` needs, so that memory stays bounded."""

    @abstractmethod
    def compute(self, predictions: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        """Compute all metrics of the task from the preprocessed outputs of all rows."""

    def load_model(
        self,
        path: str,
        splits: Splits,
        *,
        dtype: str = "float32",
        seed: int = 0,
        trust_remote_code: bool = False,
    ) -> PreTrainedModel:
        """Load a pretrained model, with a head for the data that is drawn from `seed`.

        Args:
            path: Folder or hub id.
            splits: Gives the number and names of classes.
            dtype: "float32", "bfloat16" or "float16".
            seed: Of the fresh weights; global random state is left alone.
            trust_remote_code: Whether code that comes with the model may run.

        Raises:
            ConfigError: if there is no such model or it cannot do the task.
            CheckpointError: if its files are damaged.
        """
        config = self._config(path, splits, trust_remote_code)
        model = load_pretrained(
            self.auto_class(),
            path,
            config,
            dtype=dtype,
            seed=seed,
            trust_remote_code=trust_remote_code,
        )
        tokenizer = self.load_tokenizer(path, trust_remote_code=trust_remote_code)
        model.config.pad_token_id = tokenizer.pad_token_id
        model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
        return model

    def make_empty_model(
        self, path: str, splits: Splits, *, trust_remote_code: bool = False
    ) -> PreTrainedModel:
        """Build the same model on the meta device: shapes and names, no weights read.

        Raises:
            ConfigError: if there is no such model or it cannot do the task.
        """
        config = self._config(path, splits, trust_remote_code)
        return make_empty(self.auto_class(), path, config, trust_remote_code=trust_remote_code)

    def load_tokenizer(
        self, path: str, *, trust_remote_code: bool = False
    ) -> PreTrainedTokenizerBase:
        """Load the model's tokenizer; it has a pad token and knows the model's longest input.

        Raises:
            ConfigError: if there is none or its tokens do not fit the model.
        """
        return load_tokenizer(path, trust_remote_code=trust_remote_code)

    def collator(self, tokenizer: PreTrainedTokenizerBase) -> Collator:
        """Make the function from rows to a padded batch."""
        return Collator(tokenizer.pad_token_id)

    def _config(self, path: str, splits: Splits, trust_remote_code: bool) -> PreTrainedConfig:
        # Keys and values kept for generation are only ballast in training.
        options = {"use_cache": False} | self.config_options(splits)
        config = load_config(path, trust_remote_code=trust_remote_code, **options)
        self.check_config(config, path)
        return config

    def _max_length(self, tokenizer: PreTrainedTokenizerBase, requested: int | None) -> int:
        """The longest row in tokens, special ones included."""
        limit, least = (
            tokenizer.model_max_length,
            tokenizer.num_special_tokens_to_add(pair=True) + 2,
        )
        if requested is None:
            return min(self.default_max_length, limit)
        if not least <= requested <= limit:
            raise ConfigError(
                f"max_length is {requested}; this model and tokenizer allow {least} to "
                f"{limit} tokens."
            )
        return requested

    def _check_left(self, n_rows: int, n_left: int, reason: str) -> None:
        """Raise DataError if no row is left, warn if some are gone."""
        if n_left == 0:
            raise DataError(f"none of {n_rows} rows can be used: {reason}.")
        if n_left < n_rows:
            logger.warning("%d of %d rows are left out: %s", n_rows - n_left, n_rows, reason)
