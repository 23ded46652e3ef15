"""The abstract task."""

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import numpy as np
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from prunepeft.data import Splits
from prunepeft.errors import DataError
from prunepeft.quantized import Storage, stored
from prunepeft.tasks.loading import check_path, load_config, load_pretrained, make_empty
from prunepeft.tasks.quantized_opening import make_opening

logger = logging.getLogger(__name__)

IGNORED = -100  # label of a token that does not count


def has_own_class(config: PreTrainedConfig, auto_class: str) -> bool:
    """Whether the model brings its own code for an Auto class."""
    return auto_class in (getattr(config, "auto_map", None) or {})


class Task(ABC):
    """A kind of problem: how rows become tensors, which head the model gets, what is measured.

    Class attributes:
        name: Registered name.
        peft_task_type: Task type written into the adapter's config; None where peft has none.
        default_metric: Metric to select on.
    """

    name: ClassVar[str]
    peft_task_type: ClassVar[str | None]
    default_metric: ClassVar[str]

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
    def load_processor(self, path: str, *, trust_remote_code: bool = False) -> Any:
        """Load what turns raw values into the model's inputs: a tokenizer, or an image reader.

        Raises:
            ConfigError: if there is none or it does not fit the model.
        """

    @abstractmethod
    def encode(
        self, dataset: Dataset, splits: Splits, processor: Any, max_length: int | None = None
    ) -> Dataset:
        """Turn rows into the model's inputs, `labels` and `length`.

        Rows of text become `input_ids`, `attention_mask` and token types; those without a token to
        learn from are left out and counted in a warning.

        Args:
            dataset: Rows with the columns of `splits`.
            splits: Where columns and labels are looked up.
            processor: From `load_processor`.
            max_length: Longest row in tokens; None takes the default or the model's limit.

        Raises:
            ConfigError: if `max_length` is out of range.
            DataError: if no row is left.
        """

    @abstractmethod
    def collator(self, processor: Any) -> Callable[[list[dict[str, Any]]], Mapping[str, Tensor]]:
        """Make the function from encoded rows to a batch."""

    def packer(
        self, processor: Any, max_length: int | None
    ) -> Callable[[list[dict[str, Any]]], Mapping[str, Tensor]] | None:
        """Make the function that packs rows for training; None where rows cannot be packed."""
        return None

    @abstractmethod
    def count_tokens(self, config: PreTrainedConfig, max_length: int | None) -> int:
        """Tokens of a row as the model sees it, at most, for estimates of memory."""

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
        storage: Storage | None = None,
        device: str = "cpu",
        trust_remote_code: bool = False,
    ) -> PreTrainedModel:
        """Load a pretrained model, with a head for the data that is drawn from `seed`.

        Args:
            path: Folder or hub id.
            splits: Gives the number and names of classes.
            dtype: "float32", "bfloat16" or "float16".
            seed: Of the fresh weights; global random state is left alone.
            storage: How to quantise it; None opens it as it is on disk.
            device: Where a quantised model is put: `cpu` or `cuda`. Others can be moved later.
            trust_remote_code: Whether code that comes with the model may run.

        Raises:
            ConfigError: if there is no such model, or it cannot do the task, or it is quantised in
                a way that cannot be trained through.
            CheckpointError: if its files are damaged.
        """
        config = self._config(path, splits, trust_remote_code)
        how = {"dtype": dtype, "seed": seed, "trust_remote_code": trust_remote_code}
        storage = storage or stored(config)
        if storage is None:
            return load_pretrained(self.auto_class(), path, config, **how)
        empty = self.make_empty_model(path, splits, trust_remote_code=trust_remote_code)
        opening = make_opening(
            storage, config, empty, self.head_modules(empty), check_path(path), device, dtype
        )
        model = load_pretrained(self.auto_class(), path, config, **how, **opening.options)
        return opening.settle(model, seed, path)

    def make_empty_model(
        self, path: str, splits: Splits, *, trust_remote_code: bool = False
    ) -> PreTrainedModel:
        """Build the same model on the meta device: shapes and names, no weights read.

        Raises:
            ConfigError: if there is no such model or it cannot do the task.
        """
        config = self._config(path, splits, trust_remote_code)
        return make_empty(self.auto_class(), path, config, trust_remote_code=trust_remote_code)

    def _config(self, path: str, splits: Splits, trust_remote_code: bool) -> PreTrainedConfig:
        # Keys and values kept for generation are only ballast in training.
        options = {"use_cache": False} | self.config_options(splits)
        config = load_config(path, trust_remote_code=trust_remote_code, **options)
        self.check_config(config, path)
        return config

    def _check_left(self, n_rows: int, n_left: int, reason: str) -> None:
        """Raise DataError if no row is left, warn if some are gone."""
        if n_left == 0:
            raise DataError(f"none of {n_rows} rows can be used: {reason}.")
        if n_left < n_rows:
            logger.warning("%d of %d rows are left out: %s", n_rows - n_left, n_rows, reason)
