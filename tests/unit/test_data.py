"""Loading data: which columns and tasks are recognised, formats, folders, and the seeded parts."""

import json
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prunepeft.data import load_data, load_rows, subset
from prunepeft.data.splits import stratified_order
from prunepeft.errors import ConfigError, DataError
from tests.data_files import CSV, GOOD, jsonl, labelled, writer


@pytest.fixture
def write(tmp_path):
    return writer(tmp_path)


# --- what is recognised ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "task", "columns"),
    [
        ({"sentence": "a", "label": 1}, "seq-cls", {"text": "sentence", "label": "label"}),
        ({"Text": "a", "Label": "x"}, "seq-cls", {"text": "Text", "label": "Label"}),
        ({"text": "a", "label": True}, "seq-cls", {"text": "text", "label": "label"}),
        (
            {
                "sentence1": "a",
                "sentence2": "b",
                "label": 1,
                "relatedness": 2.5,
                "pair_id": 7,
                "idx": 0,
            },
            "seq-cls",
            {"text": "sentence1", "text_pair": "sentence2", "label": "label"},
        ),
        (
            {"premise": "a", "hypothesis": "b", "target": 0.5},
            "regression",
            {"text": "premise", "text_pair": "hypothesis", "label": "target"},
        ),
        ({"question": "a", "class": 1}, "seq-cls", {"text": "question", "label": "class"}),
        (
            {"prompt": "a", "completion": "b"},
            "causal-lm",
            {"prompt": "prompt", "completion": "completion"},
        ),
        (
            {"instruction": "a", "output": "b"},
            "causal-lm",
            {"prompt": "instruction", "completion": "output"},
        ),
        (
            {"question": "a", "answer": "b"},
            "causal-lm",
            {"prompt": "question", "completion": "answer"},
        ),
        ({"messages": [{"role": "user", "content": "a"}]}, "causal-lm", {"messages": "messages"}),
        ({"text": "a", "idx": 3}, "causal-lm", {"text": "text"}),
    ],
)
def test_columns_and_task_are_found(write, row, task, columns):
    rows = [dict(row) for _ in range(10)]
    for name in {"label", "Label", "target", "class"} & set(row):
        other = {"1": 0, "True": False, "x": "y", "0.5": 1.5}[str(row[name])]
        rows[::2] = [{**row, name: other} for _ in range(5)]
    splits = load_data(write("d.jsonl", jsonl(rows)))
    assert (splits.task, splits.columns) == (task, columns)
    assert set(splits.train.column_names) == set(columns.values())


def test_a_task_can_be_named(write):
    path = write("d.jsonl", jsonl([{"text": f"t{i}", "label": i % 3} for i in range(12)]))
    assert load_data(path, task="regression").train["label"][0] == 0.0
    assert load_data(path, task="causal-lm").columns == {"text": "text"}


def test_columns_can_be_named(write):
    rows = [{"a": f"t{i}", "b": i % 2, "label": "ignored"} for i in range(12)]
    splits = load_data(write("d.jsonl", jsonl(rows)), columns={"text": "a", "label": "b"})
    assert splits.columns == {"text": "a", "label": "b"}
    assert splits.labels == ("0", "1")


def test_relatedness_can_be_asked_for(write):
    rows = [{"sentence": f"t{i}", "label": i % 2, "relatedness": i / 4} for i in range(12)]
    splits = load_data(write("d.jsonl", jsonl(rows)), columns={"label": "relatedness"})
    assert splits.task == "regression"
    assert splits.labels is None
    assert splits.columns["label"] == "relatedness"


def test_instruction_with_input_joins_them(write):
    rows = [
        {"instruction": "Add", "input": "1 2" if i % 2 else "", "output": "3"} for i in range(8)
    ]
    folder = write("s/train.jsonl", jsonl(rows)).rsplit("/", 1)[0]
    write("s/valid.jsonl", jsonl(rows))
    train = load_data(folder).train
    assert list(train["instruction"][:2]) == ["Add", "Add\n\n1 2"]
    assert train.column_names == ["instruction", "output"]


def test_chats_in_the_other_form_are_translated(write):
    chat = {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}]}
    splits = load_data(write("d.jsonl", jsonl([chat] * 6)))
    assert splits.train["conversations"][0] == [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "yo"},
    ]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("d.csv", CSV),
        ("d.csv", b"\xef\xbb\xbf" + CSV.encode()),
        ("d.csv", CSV.encode("utf-16")),
        ("d.csv", CSV.replace("\n", "\r\n")),
        ("d.tsv", "text\tlabel\n" + "".join(f"a, {i}\t{i % 2}\n" for i in range(10))),
        ("d.jsonl", jsonl([{"text": f"a, {i}", "label": i % 2} for i in range(10)])),
        ("d.json", json.dumps([{"text": f"a, {i}", "label": i % 2} for i in range(10)])),
        ("d.json", jsonl([{"text": f"a, {i}", "label": i % 2} for i in range(10)])),
    ],
)
def test_formats_give_the_same_rows(write, name, content):
    splits = load_data(write(name, content))
    assert {*splits.train["text"], *splits.validation["text"]} == {f"a, {i}" for i in range(10)}
    assert splits.labels == ("0", "1")
    assert splits.fingerprint == load_data(write("x/other.csv", CSV)).fingerprint


def test_parquet(tmp_path):
    pq.write_table(pa.Table.from_pylist(labelled()), tmp_path / "d.parquet")
    assert load_data(str(tmp_path / "d.parquet")).labels == ("no", "yes")


def test_tsv_with_bare_quotation_marks(write):
    text = 'text\tlabel\n"open\t1\nso "called"\t0\n' + "more\t1\nless\t0\n" * 4
    splits = load_data(write("d.tsv", text))
    assert '"open' in {*splits.train["text"], *splits.validation["text"]}


def test_text_lines_in_order(write):
    splits = load_data(write("d.txt", "\n".join(f"line {i}\n" for i in range(20))))
    assert list(splits.train["text"]) == [f"line {i}" for i in range(18)]
    assert list(splits.validation["text"]) == ["line 18", "line 19"]


def test_labels_sort_as_numbers(write):
    rows = [{"text": f"t{i}", "label": [10, 9, 2][i % 3]} for i in range(12)]
    splits = load_data(write("d.jsonl", jsonl(rows)))
    assert splits.labels == ("2", "9", "10")
    names = {row["text"]: splits.labels[row["label"]] for row in splits.train}
    assert all(name == str([10, 9, 2][int(text[1:]) % 3]) for text, name in names.items())


@pytest.mark.parametrize("name", ["validation", "valid", "dev", "eval", "val-00000-of-00001"])
def test_a_folder_of_splits(write, name):
    folder = write("s/train.jsonl", jsonl(labelled())).rsplit("/", 1)[0]
    write(f"s/{name}.csv", "text,label\na,yes\nb,no\n")
    write("s/test.jsonl", jsonl(labelled(4)))
    write("s/README.md", "about")
    splits = load_data(folder)
    assert [len(part) for part in (splits.train, splits.validation, splits.test)] == [20, 2, 4]


def test_a_glob_of_shards(write, tmp_path):
    write("part-1.jsonl", jsonl(labelled(6)))
    write("part-2.jsonl", jsonl(labelled(6, ("yes", "no"))))
    splits = load_data(str(tmp_path / "part-*.jsonl"))
    assert len(splits.train) + len(splits.validation) == 12


def test_a_test_split_without_labels_is_left_out(write):
    folder = write("s/train.jsonl", jsonl(labelled())).rsplit("/", 1)[0]
    write("s/test.jsonl", jsonl([{"text": "a", "label": -1}] * 3))
    splits = load_data(folder)
    assert splits.test is None
    assert any("test split has no labels" in note for note in splits.notes)


def test_shared_rows_are_counted(write):
    folder = write("s/train.jsonl", jsonl(labelled())).rsplit("/", 1)[0]
    write("s/dev.jsonl", jsonl([*labelled(3), {"text": "new", "label": "no"}]))
    assert "3 validation rows have the same text as a train row" in load_data(folder).notes


def test_rows_of_other_data_get_the_same_labels(write):
    like = load_data(write("d.csv", "text,label\n" + "a,yes\nb,no\n" * 6))
    rows = load_rows(write("e.jsonl", jsonl([{"text": "q", "label": "yes"}])), like=like)
    assert rows.to_list() == [{"text": "q", "label": 1}]
    with pytest.raises(DataError, match=r"'maybe'.*none of the classes to train on \(no, yes\)"):
        load_rows(write("f.jsonl", jsonl([{"text": "q", "label": "maybe"}])), like=like)


def test_an_unknown_hub_data_set_offline():
    with pytest.raises(DataError, match=r"'nobody/nothing:x' could not be loaded .*local\s+cache"):
        load_data("nobody/nothing:x", offline=True)


# --- seeded parts ---------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_split(write):
    path = write("d.jsonl", jsonl(labelled(100)))
    one, two, other = (load_data(path, seed=seed) for seed in (1, 1, 2))
    assert one.fingerprint == two.fingerprint != other.fingerprint
    assert one.train.to_list() == two.train.to_list() != other.train.to_list()
    assert Counter(one.validation["label"]) == {0: 5, 1: 5}


def test_the_split_keeps_rare_classes_in_train(write):
    rows = [*labelled(50, ("a",)), {"text": "rare", "label": "b"}]
    splits = load_data(write("d.jsonl", jsonl(rows)))
    assert Counter(splits.train["label"])[1] == 1


def test_max_rows_keeps_class_shares(write):
    rows = [{"text": f"t{i}", "label": "abbb"[i % 4]} for i in range(200)]
    splits = load_data(write("d.jsonl", jsonl(rows)), max_rows=40)
    assert Counter(splits.train["label"]) == {0: 10, 1: 30}
    assert len(splits.validation) == 20
    assert load_data(write("e.jsonl", jsonl(rows)), max_rows=500).train.num_rows == 180


def test_the_fingerprint_is_of_the_content(write):
    one = load_data(write("a.jsonl", GOOD))
    renamed = load_data(
        write(
            "b.csv",
            "review,class\n" + "".join(f"row {i},{['no', 'yes'][i % 2]}\n" for i in range(20)),
        )
    )
    changed = load_data(write("c.jsonl", GOOD.replace("row 7", "row seven")))
    assert one.fingerprint == renamed.fingerprint != changed.fingerprint


@given(st.lists(st.integers(0, 4), min_size=1, max_size=60), st.integers(0, 5), st.integers(1, 60))
def test_every_beginning_of_the_order_is_stratified(labels, seed, n):
    order = stratified_order(labels, seed)
    assert sorted(order) == list(range(len(labels)))
    classes = Counter(labels)
    n = min(max(n, len(classes)), len(labels))
    part = Counter(labels[row] for row in order[:n])
    assert set(part) == set(classes)
    assert all(abs(part[c] - n * classes[c] / len(labels)) <= len(classes) for c in classes)


@pytest.fixture(scope="module")
def dataset():
    from datasets import Dataset

    return Dataset.from_dict({"x": list(range(40)), "labels": [0] * 30 + [1] * 9 + [2]})


@pytest.mark.parametrize(
    ("size", "n"), [(0.5, 20), (10, 10), (1.0, 40), (99, 40), (1, 3), (0.01, 3)]
)
def test_subset_sizes(dataset, size, n):
    part = subset(dataset, size, 0, "labels")
    assert len(part) == n
    assert set(part["labels"]) == {0, 1, 2}
    assert list(part["x"]) == sorted(part["x"])


def test_subsets_are_nested_and_seeded(dataset):
    small, large = (set(subset(dataset, n, 3, "labels")["x"]) for n in (8, 20))
    assert small < large
    assert large != set(subset(dataset, 20, 4, "labels")["x"])
    assert len(subset(dataset, 7, 0)) == 7


@pytest.mark.parametrize("size", [0, -1, 0.0, 1.5, True, float("nan")])
def test_subset_of_a_size_that_is_none(dataset, size):
    with pytest.raises(ConfigError, match="size of a part"):
        subset(dataset, size, 0)


def test_subset_by_a_column_that_is_not_there(dataset):
    with pytest.raises(
        ConfigError, match="no column 'label' to stratify by; columns are x, labels"
    ):
        subset(dataset, 5, 0, "label")
