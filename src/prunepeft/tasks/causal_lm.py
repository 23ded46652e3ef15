"""Language modelling on running text, on completions after a prompt, and on chats."""

import logging
from collections.abc import Iterable
from typing import Any, ClassVar

import numpy as np
import torch
from datasets import Dataset
from jinja2 import TemplateError
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from prunepeft.data import Splits
from prunepeft.errors import ConfigError, DataError
from prunepeft.metrics import language_model_metrics
from prunepeft.tasks.base import IGNORED, has_own_class
from prunepeft.tasks.packing import PackingCollator
from prunepeft.tasks.text import TextTask

logger = logging.getLogger(__name__)

Row = tuple[list[int], list[int]]  # token ids and labels
Chat = list[dict[str, str]]


class CausalLM(TextTask):
    """The next token: of a text, of a completion after a prompt, or of the assistant in a chat."""

    name: ClassVar[str] = "causal-lm"
    peft_task_type: ClassVar[str] = "CAUSAL_LM"
    default_metric: ClassVar[str] = "perplexity"
    default_max_length: ClassVar[int] = 256

    def auto_class(self) -> Any:
        """The transformers Auto class of the model."""
        return AutoModelForCausalLM

    def check_config(self, config: PreTrainedConfig, path: str) -> None:
        """Raise ConfigError for models that do not predict the next token."""
        is_masked = config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES
        known = config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
        if config.is_encoder_decoder:
            kind = "an encoder-decoder"
        elif is_masked and not getattr(config, "is_decoder", False):
            kind = "an encoder, which reads text in both directions"
        elif known or has_own_class(config, "AutoModelForCausalLM"):
            return
        else:
            kind = "no language model"
        raise ConfigError(
            f"model {path!r} (type {config.model_type!r}) is {kind}; task causal-lm needs a "
            f"decoder "
            "such as GPT-2, LLaMA or Qwen. Choose one, or a classification task."
        )

    def config_options(self, splits: Splits) -> dict[str, Any]:
        """None: nothing depends on the data."""
        return {}

    def head_modules(self, model: PreTrainedModel) -> list[str]:
        """None: the language model's head is pretrained."""
        return []

    def encode(
        self,
        dataset: Dataset,
        splits: Splits,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int | None = None,
    ) -> Dataset:
        """Tokenise; labels are -100 where no loss is taken. See `Task.encode`."""
        columns, length = splits.columns, self._max_length(tokenizer, max_length)
        if "messages" in columns:
            rows = encode_chats(list(dataset[columns["messages"]]), tokenizer)
        elif "prompt" in columns:
            pairs = zip(dataset[columns["prompt"]], dataset[columns["completion"]], strict=True)
            rows = encode_completions(list(pairs), tokenizer)
        else:
            rows = pack_texts(list(dataset[columns["text"]]), tokenizer, length)
        kept = []
        for ids, labels in rows:
            # The first token is never predicted, so a label there teaches nothing.
            if any(label != IGNORED for label in labels[1:length]):
                kept.append((ids[:length], labels[:length]))
        self._check_left(len(rows), len(kept), f"nothing to learn in the first {length} tokens")
        return Dataset.from_dict(
            {
                "input_ids": [ids for ids, _ in kept],
                "attention_mask": [[1] * len(ids) for ids, _ in kept],
                "labels": [labels for _, labels in kept],
                "length": [len(ids) for ids, _ in kept],
            }
        )

    def packer(self, processor: PreTrainedTokenizerBase, max_length: int | None) -> PackingCollator:
        """See `Task.packer`; packs are as long as the longest row may be."""
        return PackingCollator(processor.pad_token_id, self._max_length(processor, max_length))

    def preprocess_logits(self, logits: Any, labels: Tensor) -> Tensor:
        """Sum of the negative log-likelihoods and number of tokens of each row, (B, 2) float32.

        Args:
            logits: Scores, (B, T, V), or a tuple that starts with them.
            labels: Token labels, (B, T), -100 where none counts.
        """
        scores = logits[0] if isinstance(logits, tuple | list) else logits
        targets = labels[:, 1:]
        # Row by row, because float32 copies of all scores may not fit.
        sums = [
            torch.nn.functional.cross_entropy(
                row[:-1].float(), target, ignore_index=IGNORED, reduction="sum"
            )
            for row, target in zip(scores, targets, strict=True)
        ]
        return torch.stack([torch.stack(sums), (targets != IGNORED).sum(dim=1).float()], dim=1)

    def compute(self, predictions: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        """Perplexity and loss per token over all rows."""
        return language_model_metrics(np.asarray(predictions))


def pack_texts(texts: list[str], tokenizer: PreTrainedTokenizerBase, length: int) -> list[Row]:
    """Join texts with the end token between them and cut the stream into blocks.

    Args:
        texts: Documents; empty ones are left out.
        tokenizer: Gives the end token; without one, texts are joined directly.
        length: Tokens in a block; the last block may be shorter.
    """
    texts = [text for text in texts if text.strip()]
    end = _end(tokenizer)
    stream: list[int] = []
    for ids in tokenizer(texts, verbose=False)["input_ids"] if texts else []:
        stream += ids if ids[-1:] == end else ids + end
    blocks = [stream[start : start + length] for start in range(0, len(stream), length)]
    return [(block, list(block)) for block in blocks if len(block) > 1]


def encode_completions(
    pairs: Iterable[tuple[str, str]], tokenizer: PreTrainedTokenizerBase
) -> list[Row]:
    """Tokenise prompts and completions apart, as generation will; only completions are learnt.

    Args:
        pairs: Prompt and completion; they are joined as they are, without a separator.
        tokenizer: Its start tokens go before the prompt, its end token after the completion.
    """
    end, rows = _end(tokenizer), []
    for prompt, completion in pairs:
        if not completion.strip():
            rows.append(([], []))
            continue
        ids = tokenizer(prompt, verbose=False)["input_ids"]
        ids = ids[:-1] if ids[-1:] == end else ids
        target = tokenizer(completion, add_special_tokens=False, verbose=False)["input_ids"] + end
        rows.append((ids + target, [IGNORED] * len(ids) + target))
    return rows


def encode_chats(chats: Iterable[Chat], tokenizer: PreTrainedTokenizerBase) -> list[Row]:
    """Render chats with the tokenizer's own template; only the assistant's turns are learnt.

    The span of a turn is found by rendering the chat up to it (with the prompt for an answer) and
    through it. A turn for which these are not beginnings of the whole is not learnt.

    Raises:
        DataError: if the tokenizer has no template or the template refuses a chat.
    """
    if not tokenizer.chat_template:
        raise DataError(
            "the data holds chats, but the tokenizer has no chat template; use an "
            "instruction-tuned "
            "model, or write the data as prompt and completion."
        )
    rows = []
    for number, chat in enumerate(chats, 1):
        try:
            ids = _render(chat, tokenizer, False)
        except (TemplateError, ValueError, TypeError, LookupError) as error:
            raise DataError(
                f"row {number}: the tokenizer's chat template refuses the messages ({error}); "
                "check the order and names of the roles."
            ) from error
        labels = [IGNORED] * len(ids)
        for start, stop in _find_spans(chat, ids, tokenizer):
            labels[start:stop] = ids[start:stop]
        rows.append((ids, labels))
    return rows


def _render(chat: Chat, tokenizer: PreTrainedTokenizerBase, prompt: bool) -> list[int]:
    return list(
        tokenizer.apply_chat_template(
            chat, tokenize=True, add_generation_prompt=prompt, return_dict=False
        )
    )


def _find_spans(
    chat: Chat, ids: list[int], tokenizer: PreTrainedTokenizerBase
) -> list[tuple[int, int]]:
    """Spans of the assistant's turns in the rendered chat, where they can be derived."""
    spans = []
    for turn, message in enumerate(chat):
        if message["role"] != "assistant":
            continue
        try:
            before = _render(chat[:turn], tokenizer, True)
            through = ids if turn == len(chat) - 1 else _render(chat[: turn + 1], tokenizer, False)
        except (TemplateError, ValueError, TypeError, LookupError):
            continue
        if ids[: len(before)] == before and ids[: len(through)] == through:
            spans.append((len(before), len(through)))
    return spans


def _end(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
