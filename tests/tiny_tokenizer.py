"""Word-level tokenizers of 64 tokens, and tiny model folders on disk made with them.

Known words are `w0`, `w1`, ...; everything else is the unknown token.
"""

from pathlib import Path
from typing import Any

from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from prunepeft.data import Splits
from tests.tiny_models import VOCAB, make_tiny

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message.role }}|> {{ message.content }} "
    "{{ eos_token }}{% endfor %}{% if add_generation_prompt %}<|assistant|> {% endif %}"
)
_SPECIAL = {
    "bert": ("[PAD]", "[UNK]", "[CLS]", "[SEP]"),
    "causal": ("<pad>", "<s>", "</s>", "<unk>", "<|user|>", "<|assistant|>", "<|system|>"),
}
_ROLES = {
    "bert": dict(
        zip(("pad_token", "unk_token", "cls_token", "sep_token"), _SPECIAL["bert"], strict=True)
    ),
    "causal": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
}
CAUSAL_FAMILIES = ("gpt2", "opt", "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3")


def tiny_tokenizer(kind: str = "bert", *, chat: bool = False) -> PreTrainedTokenizerFast:
    """Make a tokenizer: "bert" adds [CLS] and [SEP], "causal" adds nothing and has no pad token.

    Args:
        kind: "bert" or "causal".
        chat: Whether to give it `CHAT_TEMPLATE`.
    """
    words = [*_SPECIAL[kind]]
    words += [f"w{number}" for number in range(VOCAB - len(words))]
    ids = {word: number for number, word in enumerate(words)}
    unknown = _ROLES[kind]["unk_token"]
    inner = Tokenizer(models.WordLevel(ids, unk_token=unknown))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.add_special_tokens(list(_SPECIAL[kind]))
    if kind == "bert":
        inner.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]",
            pair="[CLS] $A [SEP] $B:1 [SEP]:1",
            special_tokens=[("[CLS]", ids["[CLS]"]), ("[SEP]", ids["[SEP]"])],
        )
    names = ["input_ids", "attention_mask", *(["token_type_ids"] if kind == "bert" else [])]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, model_input_names=names, **_ROLES[kind]
    )
    if chat:
        tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def save_tiny_model(
    folder: Path,
    family: str = "bert",
    *,
    head: str | None = None,
    chat: bool = False,
    seed: int = 0,
) -> Path:
    """Write a random two-layer model and its tokenizer; returns the folder.

    Args:
        folder: Made if it does not exist.
        family: A key of `tests.tiny_models.TINY`.
        head: A key of `tests.tiny_models.HEAD_CLASSES`; "base" for an encoder without a head.
        chat: Whether the tokenizer has a chat template.
        seed: Of the weights.
    """
    kind = "causal" if family in CAUSAL_FAMILIES else "bert"
    make_tiny(family, head, seed=seed, n_labels=2).save_pretrained(folder)
    tiny_tokenizer(kind, chat=chat).save_pretrained(folder)
    return Path(folder)


def make_splits(task: str, labels: tuple[str, ...] | None = None, **columns: list[Any]) -> Splits:
    """Splits whose columns are named as the roles."""
    rows = Dataset.from_dict(columns)
    roles = {name: name for name in columns}
    return Splits(rows, rows, None, roles, labels, task, "test", "0" * 64)
