"""The journal: a damaged entry costs work, never a wrong value."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from prunepeft.errors import DiskError, StateError
from prunepeft.state import Journal, call_key, read_json
from prunepeft.state.files import canonical_json
from tests.disk_faults import calls_in, damaged_versions, failing_call

CALL = {"op": "score", "seed": 0, "slots": ["a", "b"]}


def test_journal_round_trip(tmp_path):
    journal = Journal(tmp_path / "trials")
    key = call_key(CALL)
    assert journal.get(key) is None
    assert journal.keys() == []
    result = journal.put(key, CALL, {"value": 0.1, "pair": (1, 2)})
    assert result == {"value": 0.1, "pair": [1, 2]} == journal.get(key)
    assert journal.get_tensors(key) is None
    assert Journal(tmp_path / "trials").keys() == [key]
    assert set(read_json(tmp_path / "trials" / f"{key}.json")) == {
        "key",
        "call",
        "result",
        "sha256",
    }


def test_journal_with_tensors(tmp_path):
    journal = Journal(tmp_path)
    journal.put("k", CALL, {"v": 1}, tensors={"x": torch.arange(3)})
    assert torch.equal(journal.get_tensors("k")["x"], torch.arange(3))
    (tmp_path / "k.safetensors").unlink()
    assert journal.get("k") is None
    assert journal.get_tensors("k") is None


@pytest.mark.parametrize("suffix", ["json", "safetensors"])
def test_a_damaged_entry_counts_as_absent(tmp_path, suffix, caplog):
    journal = Journal(tmp_path)
    journal.put("k", CALL, {"value": 0.25}, tensors={"x": torch.ones(2)})
    file = tmp_path / f"k.{suffix}"
    whole = file.read_bytes()
    for data in damaged_versions(whole):
        file.write_bytes(data)
        caplog.clear()
        assert journal.get("k") is None
        assert "computed again" in caplog.text
    file.write_bytes(whole)
    assert journal.get("k") == {"value": 0.25}


def test_an_entry_under_another_name_counts_as_absent(tmp_path):
    journal = Journal(tmp_path)
    journal.put("a", CALL, {"v": 1})
    (tmp_path / "a.json").rename(tmp_path / "b.json")
    assert journal.get("b") is None


def test_a_refused_write_keeps_the_old_entry(tmp_path):
    journal = Journal(tmp_path)

    def put(value):
        return journal.put("k", CALL, {"v": value})

    put(1)
    for number in range(1, calls_in(lambda: put(1))):
        with failing_call(number), pytest.raises(DiskError):
            put(2)
        assert journal.get("k") == {"v": 1}


@pytest.mark.parametrize("key", ["", "../x", "a/b", ".hidden", "a\0", "x" * 101, "é"])
def test_a_key_is_a_plain_name(tmp_path, key):
    with pytest.raises(StateError, match="not a plain name"):
        Journal(tmp_path).put(key, {}, {})


def test_a_result_with_nan_is_refused(tmp_path):
    with pytest.raises(StateError, match=r"result\.loss is nan"):
        Journal(tmp_path).put("k", {}, {"loss": float("nan")})
    assert Journal(tmp_path).get("k") is None


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text(), json_values, max_size=4))
def test_call_key_ignores_the_order_and_survives_json(call):
    turned = dict(reversed(list(call.items())))
    assert call_key(call) == call_key(turned) == call_key(json.loads(canonical_json(call)))
    assert len(call_key(call)) == 20
    assert call_key(call) != call_key({**call, "one more key": 1})


def test_call_key_refuses_nan():
    with pytest.raises(StateError, match="seed is nan"):
        call_key({"seed": float("nan")})
