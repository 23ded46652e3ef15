"""What tasks on text share: tokenizer, lengths and padded batches."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from prunepeft.data import Splits
from prunepeft.errors import ConfigError
from prunepeft.tasks.base import IGNORED, Task
from prunepeft.tasks.loading import load_tokenizer

INPUTS = ("input_ids", "attention_mask", "token_type_ids")


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


class TextTask(Task):
    """A task whose rows are token numbers.

    Class attributes:
        default_max_length: Longest row in tokens if the user names none.
    """

    default_max_length: ClassVar[int]

    def load_model(
        self,
        path: str,
        splits: Splits,
        *,
        trust_remote_code: bool = False,
        **options: Any,
    ) -> PreTrainedModel:
        """See `Task.load_model`; the model learns the pad token of its tokenizer."""
        model = super().load_model(path, splits, trust_remote_code=trust_remote_code, **options)
        tokenizer = self.load_processor(path, trust_remote_code=trust_remote_code)
        model.config.pad_token_id = tokenizer.pad_token_id
        model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
        return model

    def load_processor(
        self, path: str, *, trust_remote_code: bool = False
    ) -> PreTrainedTokenizerBase:
        """Load the model's tokenizer; it has a pad token and knows the model's longest input.

        Raises:
            ConfigError: if there is none or its tokens do not fit the model.
        """
        return load_tokenizer(path, trust_remote_code=trust_remote_code)

    def collator(self, processor: PreTrainedTokenizerBase) -> Collator:
        """Make the function from rows to a padded batch."""
        return Collator(processor.pad_token_id)

    def count_tokens(self, config: PreTrainedConfig, max_length: int | None) -> int:
        """Tokens of the longest row."""
        return max_length or self.default_max_length

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
