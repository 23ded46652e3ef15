"""Rows and batches of tasks: label masks, packing, padding, and the metrics hooks."""

import logging

import numpy as np
import pytest
import torch

from prunepeft.errors import DataError
from prunepeft.tasks import TASKS, Collator
from prunepeft.tasks.base import IGNORED
from prunepeft.tasks.causal_lm import encode_chats, encode_completions, pack_texts
from tests.tiny_tokenizer import make_splits, save_tiny_model, tiny_tokenizer

CLS, LM = TASKS.get("seq-cls"), TASKS.get("causal-lm")
EOS, USER, ASSISTANT = 2, 4, 5


@pytest.fixture(scope="module")
def pair():
    return make_splits(
        "seq-cls", ("no", "so", "yes"), text=["w1 w2", "w3"], text_pair=["w4", "w5"], label=[0, 2]
    )


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Model folders by family, made when first asked for."""
    root, made = tmp_path_factory.mktemp("models"), {}

    def get(family, **options):
        key = family + "".join(f"-{value}" for value in options.values())
        if key not in made:
            made[key] = str(save_tiny_model(root / key, family, **options))
        return made[key]

    return get


# --- rows -----------------------------------------------------------------------------------


def test_pairs_are_encoded_with_types(pair):
    row = CLS.encode(pair.train, pair, tiny_tokenizer("bert"))[0]
    assert row["input_ids"] == [2, 5, 6, 3, 8, 3]
    assert row["token_type_ids"] == [0, 0, 0, 0, 1, 1]
    assert (row["labels"], row["length"]) == (0, 6)


def test_pairs_without_a_special_token_between_are_joined_by_a_line_break(pair):
    tokenizer = tiny_tokenizer("causal")
    tokenizer.pad_token = "</s>"
    encoded = CLS.encode(pair.train, pair, tokenizer)
    seen = tokenizer.decode(encoded[0]["input_ids"])
    assert seen == "w1 w2 w4"


def test_empty_texts_are_left_out_and_counted(caplog):
    splits = make_splits("seq-cls", ("a", "b"), text=["w1", ""], label=[0, 1])
    with caplog.at_level(logging.WARNING):
        rows = CLS.encode(splits.train, splits, tiny_tokenizer("causal"))
    assert rows["labels"] == [0]
    assert "1 of 2 rows are left out: the text is empty" in caplog.text
    empty = make_splits("seq-cls", ("a", "b"), text=["", ""], label=[0, 1])
    with pytest.raises(DataError, match="none of 2 rows can be used"):
        CLS.encode(empty.train, empty, tiny_tokenizer("causal"))


def test_texts_are_packed_with_the_end_token_between():
    tokenizer = tiny_tokenizer("causal")
    w1, w2, w3 = tokenizer.convert_tokens_to_ids(["w1", "w2", "w3"])
    rows = pack_texts(["w1 w2", " ", "w3", "w1"], tokenizer, 4)
    assert [ids for ids, _ in rows] == [[w1, w2, EOS, w3], [EOS, w1, EOS]]
    assert all(ids == labels for ids, labels in rows)
    assert [len(ids) for ids, _ in pack_texts(["w1 w2 w3"], tokenizer, 3)] == [3]


def test_only_the_completion_is_learnt():
    tokenizer = tiny_tokenizer("causal")
    w1, w2, w3 = tokenizer.convert_tokens_to_ids(["w1", "w2", "w3"])
    [(ids, labels)] = encode_completions([("w1 w2", "w3")], tokenizer)
    assert ids == [w1, w2, w3, EOS]
    assert labels == [IGNORED, IGNORED, w3, EOS]


def test_completions_cut_off_are_left_out(caplog):
    splits = make_splits("causal-lm", prompt=["w1 " * 8, "w1", "w2"], completion=["w2", "w3", " "])
    with caplog.at_level(logging.WARNING):
        rows = LM.encode(splits.train, splits, tiny_tokenizer("causal"), 8)
    assert rows["length"] == [3]
    assert "2 of 3 rows are left out: nothing to learn in the first 8 tokens" in caplog.text
    long = make_splits("causal-lm", prompt=["w1 " * 8], completion=["w2"])
    with pytest.raises(DataError, match="none of 1 rows can be used: nothing to learn"):
        LM.encode(long.train, long, tiny_tokenizer("causal"), 8)


def say(role, content):
    return {"role": role, "content": content}


def test_only_the_assistant_is_learnt():
    tokenizer = tiny_tokenizer("causal", chat=True)
    w1, w2, w3, w4 = tokenizer.convert_tokens_to_ids(["w1", "w2", "w3", "w4"])
    chat = [say("user", "w1"), say("assistant", "w2"), say("user", "w3"), say("assistant", "w4")]
    [(ids, labels)] = encode_chats([chat], tokenizer)
    expected = [
        (1, False),
        (USER, False),
        (w1, False),
        (EOS, False),
        (ASSISTANT, False),
        (w2, True),
        (EOS, True),
        (USER, False),
        (w3, False),
        (EOS, False),
        (ASSISTANT, False),
        (w4, True),
        (EOS, True),
    ]
    assert ids == [token for token, _ in expected]
    assert labels == [token if learnt else IGNORED for token, learnt in expected]


def test_turns_that_the_template_rewrites_are_not_learnt():
    tokenizer = tiny_tokenizer("causal", chat=True)
    # Shows only the last answer, as templates do that hide earlier reasoning.
    tokenizer.chat_template = (
        "{% for m in messages %}<|{{ m.role }}|> "
        "{{ m.content if loop.last or m.role == 'user' else 'w0' }} "
        "{% endfor %}{% if add_generation_prompt %}<|assistant|> {% endif %}"
    )
    chat = [say("user", "w1"), say("assistant", "w2"), say("user", "w3"), say("assistant", "w4")]
    [(ids, labels)] = encode_chats([chat], tokenizer)
    assert labels == [IGNORED] * (len(ids) - 1) + [ids[-1]]


def test_chats_without_a_template_or_refused_by_it():
    with pytest.raises(DataError, match="the tokenizer has no chat template"):
        encode_chats([[say("user", "w1")]], tiny_tokenizer("causal"))
    tokenizer = tiny_tokenizer("causal", chat=True)
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(DataError, match=r"row 1: .*roles must alternate"):
        encode_chats([[say("user", "w1")]], tokenizer)


def test_chats_without_an_answer_are_left_out():
    splits = make_splits("causal-lm", messages=[[say("user", "w1")]] * 2)
    with pytest.raises(DataError, match="none of 2 rows can be used"):
        LM.encode(splits.train, splits, tiny_tokenizer("causal", chat=True), 16)


# --- batches and metrics --------------------------------------------------------------------


def test_batches_are_padded_on_the_right():
    rows = [
        {"input_ids": [5, 6], "attention_mask": [1, 1], "labels": [5, 6], "length": 2},
        {"input_ids": [7], "attention_mask": [1], "labels": [7], "length": 1},
    ]
    batch = Collator(9)(rows)
    assert set(batch) == {"input_ids", "attention_mask", "labels"}
    assert batch["input_ids"].tolist() == [[5, 6], [7, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1], [1, 0]]
    assert batch["labels"].tolist() == [[5, 6], [7, IGNORED]]


def test_padding_does_not_change_a_decoder_classifier(folders, pair):
    path = folders("llama")
    model = CLS.load_model(path, pair)
    tokenizer = CLS.load_processor(path)
    splits = make_splits("seq-cls", ("a", "b", "c"), text=["w1", "w1 w2 w3 w4"], label=[0, 1])
    rows = CLS.encode(splits.train, splits, tokenizer).to_list()
    collate = CLS.collator(tokenizer)
    together = model(**collate(rows)).logits
    apart = torch.cat([model(**collate([row])).logits for row in rows])
    assert torch.allclose(together, apart, atol=1e-6)


def test_perplexity_is_that_of_the_model(folders):
    path = folders("gpt2")
    splits = make_splits("causal-lm", prompt=["w1 w2", "w5"], completion=["w3 w4", "w6"])
    model, tokenizer = LM.load_model(path, splits).eval(), LM.load_processor(path)
    batch = LM.collator(tokenizer)(LM.encode(splits.train, splits, tokenizer).to_list())
    out = model(**batch)
    sums = LM.preprocess_logits((out.logits, None), batch["labels"])
    assert sums[:, 1].tolist() == [3.0, 2.0]
    metrics = LM.compute(sums.detach().numpy(), batch["labels"].numpy())
    assert metrics["loss"] == pytest.approx(out.loss.item(), rel=1e-5)
    assert metrics["perplexity"] == pytest.approx(np.exp(out.loss.item()), rel=1e-4)


def test_classification_metrics_come_from_logits():
    logits = torch.tensor([[2.0, 1.0], [0.0, 1.0]])
    kept = CLS.preprocess_logits((logits, "hidden states"), torch.tensor([0, 0]))
    assert CLS.compute(kept.numpy(), np.array([0, 0]))["accuracy"] == 0.5
