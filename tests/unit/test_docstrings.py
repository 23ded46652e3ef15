"""The built-in data set: size, balance, masking, no leak, nothing imported."""

import hashlib
import json
import os
import re
import subprocess
import sys
from collections import Counter

import pytest

from prunepeft.data import load_data
from prunepeft.docstrings import LIBRARIES, find_sentences, make_docstrings
from prunepeft.errors import DataError

slow = pytest.mark.slow


@pytest.fixture(scope="module")
def rows():
    return make_docstrings()


@slow
def test_size_and_balance(rows):
    train = Counter(row["label"] for row in rows["train"])
    validation = Counter(row["label"] for row in rows["validation"])
    assert set(train) == set(validation) == set(LIBRARIES)
    assert len(train) >= 4
    assert len(set(train.values())) == len(set(validation.values())) == 1
    assert sum(train.values()) >= 3000
    assert min(train.values()) >= 300
    assert 0.12 < sum(validation.values()) / sum(train.values()) < 0.2


@slow
def test_sentences_are_distinct_over_classes_and_splits(rows):
    texts = [
        re.sub(r"[^a-z]+", " ", row["sentence"].lower()) for part in rows.values() for row in part
    ]
    assert len(texts) == len(set(texts))


@slow
def test_names_are_masked(rows):
    names = re.compile(
        r"numpy|scipy|sklearn|scikit|matplotlib|pyplot|torch|hugging|\bnp\b|\bplt\b", re.I
    )
    assert not [row for part in rows.values() for row in part if names.search(row["sentence"])]


@slow
def test_sentences_are_prose(rows):
    for row in rows["train"]:
        sentence = row["sentence"]
        assert 6 <= len(sentence.split()) <= 40
        assert sentence[0].isupper()
        assert sentence[-1] in ".!?"
        assert not re.search(r">>>|::|[=<>{}_|]", sentence)


@slow
def test_same_rows_in_a_fresh_process_and_nothing_is_imported(rows):
    code = (
        "import hashlib, json, sys\n"
        "from prunepeft.docstrings import LIBRARIES, make_docstrings\n"
        "text = json.dumps(make_docstrings())\n"
        "assert not set(LIBRARIES) & set(sys.modules), 'a library was imported'\n"
        "sys.stdout.write(hashlib.sha256(text.encode()).hexdigest())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONHASHSEED": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.stdout == hashlib.sha256(json.dumps(rows).encode()).hexdigest()


@slow
def test_it_is_a_data_source(monkeypatch, rows):
    monkeypatch.setattr("prunepeft.data.sources.make_docstrings", lambda: rows)
    splits = load_data("docstrings")
    assert splits.task == "seq-cls"
    assert splits.labels == LIBRARIES
    assert splits.columns == {"text": "sentence", "label": "label"}
    assert len(splits.train) == len(rows["train"])


def test_a_library_that_is_not_installed():
    with pytest.raises(DataError, match="'no_such_library' is not installed"):
        make_docstrings(["no_such_library"])


@pytest.mark.parametrize(
    ("docstring", "sentences"),
    [
        (
            "Compute the mean of all numpy values here.\n\nParameters\n----------\nx : array "
            "of values to be averaged",
            ["Compute the mean of all this library values here."],
        ),
        (
            "Use np.mean or plt.plot when you are in doubt.",
            ["Use this library or this library when you are in doubt."],
        ),
        (
            "Return ``True`` if the two axes are shared.",
            ["Return True if the two axes are shared."],
        ),
        (
            "See :func:`~torch.sum` for the sum of all values.",
            ["See this library for the sum of all values."],
        ),
        ("Too short here.", []),
        (">>> this is a long example line that looks like prose.", []),
        ("Set x = 3 before you call this function at all.", []),
        (
            "The first thing is this one.  The second thing is that one.",
            ["The first thing is this one.", "The second thing is that one."],
        ),
        ("Returns:\n    The value of the thing that was asked for.", []),
    ],
)
def test_find_sentences(docstring, sentences):
    assert find_sentences(docstring) == sentences
