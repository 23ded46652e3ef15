"""Every way that data can be wrong gives a DataError with the place and what to do."""

import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prunepeft.data import load_data
from prunepeft.data.formats import parse_bytes
from prunepeft.errors import ConfigError, DataError, UnknownNameError
from tests.data_files import CSV, GOOD, jsonl, labelled, writer


@pytest.fixture
def write(tmp_path):
    return writer(tmp_path)


WRONG = {
    "empty file": ("d.jsonl", "", "is empty"),
    "only blanks": ("d.csv", " \n\n", "is empty"),
    "header only": ("d.csv", "text,label\n", "has no rows"),
    "empty list": ("d.json", "[]", "has no rows"),
    "unknown ending": ("d.xlsx", "x", r"ending '.xlsx' is not one .*jsonl"),
    "broken line": ("d.jsonl", GOOD + '{"text": "a", \n' + GOOD, r"line 21: not valid JSON"),
    "row no object": ("d.jsonl", GOOD + "[1, 2]\n", r"line 21: a row must be a JSON object .*list"),
    "item no object": ("d.json", '[{"text": "a"}, 3]', r"row 2: a row must be a JSON object"),
    "broken json": ("d.json", '[{"text": "a"},', "not valid JSON"),
    "deep json": ("d.jsonl", "[" * 100_000, "line 1: not valid JSON"),
    "bytes": ("d.jsonl", GOOD.encode() + b'{"text": "\xff"}\n', r"line 21: not valid UTF-8"),
    "ragged short": ("d.csv", "text,label\na,1\nb\n", r"line 3: 1 fields, but the header has 2"),
    "ragged long": ("d.csv", "text,label\na,1\nb,c,0\n", r"line 3: 3 fields, .*quotation marks"),
    "ragged after quotes": ("d.csv", 'text,label\n"a\nb",1\nc\n', r"line 4: 1 fields"),
    "open quote": ("d.csv", 'text,label\n"a,1\nb,0\n', r"line \d: broken quoting"),
    "semicolons": (
        "d.csv",
        "text;label\na;1\nb, c;0\n",
        r"line 1: .*semicolons .*delimiter " "looks wrong",
    ),
    "tabs": ("d.csv", "text\tlabel\na\t1\n", r"tabs .*name it .tsv"),
    "commas": ("d.tsv", "text,label\na,1\n", r"commas .*delimiter looks wrong"),
    "doubled column": ("d.csv", "text,text\na,1\n", "'text' appears more than once"),
    "no parquet": ("d.parquet", "hello", "not a readable parquet file"),
    "no columns known": ("d.csv", "foo,bar\na,1\n", r"\(columns: foo, bar\)"),
    "no text column": (
        "d.csv",
        "foo,label\na,1\n",
        r"no column for the text .*columns: foo, " "label",
    ),
    "multiple choice": (
        "d.jsonl",
        jsonl([{"question": "a", "choices": ["b"], "label": 0}]),
        "looks like multiple choice",
    ),
    "label per token": (
        "d.jsonl",
        jsonl([{"text": "a", "label": [1, 2]}] * 4),
        "line 1: the label .* is a list",
    ),
    "label null": (
        "d.jsonl",
        GOOD + '{"text": "a", "label": null}\n',
        r"line 21: the label " ".* is absent",
    ),
    "label missing": ("d.jsonl", GOOD + '{"text": "a"}\n', r"line 21: the label .* is absent"),
    "label blank": ("d.csv", "text,label\na,1\nb,\n", r"line 3: the label .* is absent"),
    "one class": (
        "d.jsonl",
        jsonl(labelled(9, ("x",))),
        r"all \d rows have the label " "'x'.*two classes",
    ),
    "negative": ("d.jsonl", jsonl(labelled(9, (0, -1))), r"line 2: label -1 .*out of range"),
    "mixed labels": ("d.jsonl", jsonl(labelled(9, (0, "a"))), "mix text and numbers"),
    "free text label": (
        "d.jsonl",
        jsonl([{"text": "a", "label": f"x{i}"} for i in range(30)]),
        "looks like free text or an identifier",
    ),
    "infinite": (
        "d.jsonl",
        '{"text": "a", "label": 0.5}\n{"text": "b", "label": Infinity}\n',
        r"line 2: .*finite",
    ),
    "not a number": (
        "d.jsonl",
        '{"text": "a", "label": NaN}\n{"text": "b", "label": 0.1}\n',
        r"line 1: .*finite",
    ),
    "too large": ("d.csv", "text,label\na,0.5\nb,1e999\n", r"line 3: .*finite"),
    "constant": ("d.jsonl", jsonl([{"text": "a", "label": 0.5}] * 9), "all labels .* are 0.5"),
    "text number": (
        "d.jsonl",
        GOOD + '{"text": 3, "label": "no"}\n',
        r"line 21, column " "'text': text is needed, .*int",
    ),
    "text null": ("d.jsonl", GOOD + '{"label": "no"}\n', r"line 21, column 'text': .*no value"),
    "text nested": (
        "d.jsonl",
        GOOD + '{"text": ["a"], "label": "no"}\n',
        r"line 21.*a list \(nested",
    ),
    "half a pair": (
        "d.jsonl",
        GOOD + '{"text": "\\ud800", "label": "no"}\n',
        r"line 21.*surrogate",
    ),
    "all empty": (
        "d.jsonl",
        jsonl([{"text": " ", "label": i % 2} for i in range(9)]),
        "every text .* is empty",
    ),
    "too few": ("d.jsonl", jsonl(labelled(3)), "3 rows are too few to split off 2"),
    "chat no list": (
        "d.jsonl",
        jsonl([{"messages": "hi"}] * 5),
        r"line 1.*must be a list of " "messages",
    ),
    "chat empty": ("d.jsonl", jsonl([{"messages": []}] * 5), r"line 1.*must be a list of messages"),
    "chat no role": (
        "d.jsonl",
        jsonl([{"messages": [{"content": "a"}]}] * 5),
        "a message has no role",
    ),
    "chat no content": ("d.jsonl", jsonl([{"messages": [{"role": "user"}]}] * 5), "no value"),
    "chat of strings": ("d.jsonl", jsonl([{"messages": ["hi"]}] * 5), "must be an object"),
}


@pytest.mark.parametrize(("name", "content", "message"), WRONG.values(), ids=WRONG)
def test_wrong_files(write, name, content, message):
    with pytest.raises(DataError, match=f"(?s){message}"):
        load_data(write(name, content))


def test_parquet_with_nested_text(tmp_path):
    rows = [{"text": {"en": "a"}, "label": i % 2} for i in range(8)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "d.parquet")
    with pytest.raises(DataError, match=r"row 1, column 'text': .*a dict \(nested columns"):
        load_data(str(tmp_path / "d.parquet"))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("trian.jsonl", r"no such file or folder\. Did you mean 'train.jsonl'\?"),
        ("nowhere/train.jsonl", r"The folder .*nowhere does not exist either"),
        ("*.csv", "no file matches"),
        ("train.jsonl/deeper.jsonl", "no such file"),
        ("x" * 5000 + ".jsonl", "cannot be looked up|no such file"),
    ],
)
def test_sources_that_are_not_there(write, tmp_path, source, message):
    write("train.jsonl", GOOD)
    with pytest.raises(DataError, match=message):
        load_data(str(tmp_path / source))


@pytest.mark.parametrize("source", ["", "  ", "a\0b", "docstring"])
def test_sources_that_mean_nothing(source):
    with pytest.raises(DataError, match="Allowed are a file"):
        load_data(source)


def test_a_misspelt_built_in_suggests():
    with pytest.raises(DataError, match="Did you mean 'docstrings'"):
        load_data("docstring")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"README.md": "x"}, r"folder without a train split \(found: README.md\)"),
        ({"valid.jsonl": GOOD}, "without a train split"),
        ({"train.jsonl": GOOD, "train.csv": CSV}, "several files could be the train split"),
        (
            {"train.jsonl": GOOD, "valid.jsonl": GOOD, "dev.jsonl": GOOD},
            "several files .* validation",
        ),
        ({"train-1.jsonl": GOOD, "train-2.jsonl": '{"a": 1}\n'}, "must have the same columns"),
        (
            {"train.jsonl": GOOD, "dev.jsonl": '{"text": "a"}\n'},
            "validation split has no column 'label'",
        ),
        ({"train.jsonl": GOOD, "dev.jsonl": jsonl(labelled(1))}, "validation split has 1 row"),
        (
            {"train.jsonl": GOOD, "dev.jsonl": jsonl(labelled(4, ("yes", "maybe")))},
            "line 2: label 'maybe'",
        ),
        ({"train.jsonl": GOOD, "dev.jsonl": ""}, "dev.jsonl is empty"),
    ],
)
def test_wrong_folders(write, tmp_path, files, message):
    for name, content in files.items():
        write(f"s/{name}", content)
    with pytest.raises(DataError, match=message):
        load_data(str(tmp_path / "s"))


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may read everything")
def test_no_permission(write):
    path = write("d.jsonl", GOOD)
    os.chmod(path, 0)
    with pytest.raises(DataError, match="no permission"):
        load_data(path)


def test_no_permission_for_the_superuser_too(write, monkeypatch):
    def refuse(self):
        raise PermissionError(13, "Permission denied")

    path = write("d.jsonl", GOOD)
    monkeypatch.setattr("pathlib.Path.read_bytes", refuse)
    with pytest.raises(DataError, match="no permission"):
        load_data(path)


def test_a_pipe_does_not_hang(tmp_path):
    os.mkfifo(tmp_path / "d.jsonl")
    with pytest.raises(DataError, match="not an ordinary file"):
        load_data(str(tmp_path / "d.jsonl"))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"columns": {"text": "txt"}},
            DataError,
            "unknown column 'txt'; did you mean 'text'.*label",
        ),
        ({"columns": {"txt": "text"}}, ConfigError, "unknown role 'txt'; did you mean 'text'"),
        (
            {"columns": {"text": "text", "label": "text"}},
            ConfigError,
            "two roles name the same column",
        ),
        (
            {"columns": {"prompt": "text"}, "task": "seq-cls"},
            ConfigError,
            "does not use the role 'prompt'",
        ),
        ({"task": "seq-clas"}, UnknownNameError, "did you mean 'seq-cls'"),
        ({"task": "regression"}, DataError, "line 1: regression needs a finite number .*'no'"),
        ({"seed": -1}, ConfigError, "seed is -1"),
        ({"seed": 2**32}, ConfigError, "seed is 4294967296"),
        ({"validation_fraction": 0.0}, ConfigError, "validation_fraction is 0.0"),
        ({"validation_fraction": 1.0}, ConfigError, "validation_fraction is 1.0"),
        ({"validation_fraction": float("nan")}, ConfigError, "validation_fraction is nan"),
        ({"validation_fraction": 0.99}, DataError, "too few to split off"),
        ({"max_rows": 1}, ConfigError, "max_rows is 1"),
    ],
)
def test_wrong_arguments(write, options, error, message):
    with pytest.raises(error, match=message):
        load_data(write("d.jsonl", GOOD), **options)


KINDS = st.sampled_from([".jsonl", ".json", ".csv", ".tsv", ".txt", ".parquet", ".npz"])


@given(st.one_of(st.binary(max_size=200), st.text(max_size=200).map(str.encode)), KINDS)
def test_any_bytes_parse_or_raise_a_data_error(data, kind):
    try:
        table = parse_bytes(data, kind, "file")
    except DataError:
        return
    else:
        assert len(table.rows) == len(table.places)
        assert all(tuple(row) == table.columns for row in table.rows)


VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=5),
    st.lists(st.integers(), max_size=2),
)
ROWS = st.lists(
    st.fixed_dictionaries({"text": VALUES, "label": VALUES}, optional={"prompt": VALUES}),
    min_size=1,
    max_size=12,
)


@given(ROWS)
def test_any_json_rows_load_or_raise_a_data_error(tmp_path_factory, rows):
    path = tmp_path_factory.getbasetemp() / "fuzz.jsonl"
    path.write_text(jsonl(rows))
    try:
        splits = load_data(str(path))
    except DataError:
        return
    else:
        assert len(splits.train) + len(splits.validation) == len(rows)
