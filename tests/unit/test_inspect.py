"""`inspect_path` describes adapters from headers alone, and only ever fails with our errors."""

import contextlib
import json
import os
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from prunepeft.errors import CheckpointError, ConfigError, PrunePeftError
from prunepeft.report import format_inspect, inspect_path
from prunepeft.space import Placement, Site, Slot

GOLDEN = Path(__file__).parents[1] / "golden" / "report"
PREFIX = "base_model.model."


def make_placement():
    def site(layer, role, d_in=8):
        return Site(f"enc.{layer}.{role}", "encoder", layer, 3, "attention", role, d_in, 8, "x")

    return Placement(
        {
            Slot((site(0, "q"), site(0, "v")), "lora", (2, 4)): 2,
            Slot((site(2, "o"),), "serial_adapter", (4,)): 4,
        }
    )


def union_tensors():
    shapes = {
        "enc.0.q.union_lora_A": (2, 8),
        "enc.0.q.union_lora_B": (8, 2),
        "enc.0.v.union_lora_A": (2, 8),
        "enc.0.v.union_lora_B": (8, 2),
        "enc.2.o.union_serial_adapter_down": (4, 8),
        "enc.2.o.union_serial_adapter_down_bias": (4,),
        "enc.2.o.union_serial_adapter_up": (8, 4),
        "enc.2.o.union_serial_adapter_up_bias": (8,),
        "classifier.weight": (2, 8),
        "classifier.bias": (2,),
    }
    return {PREFIX + name: np.zeros(shape, np.float32) for name, shape in shapes.items()}


def lora_tensors(ranks, d=8):
    tensors = {}
    for path, rank in ranks.items():
        tensors[f"{PREFIX}{path}.lora_A.weight"] = np.zeros((rank, d), np.float32)
        tensors[f"{PREFIX}{path}.lora_B.weight"] = np.zeros((d, rank), np.float32)
    return tensors


def write_adapter(folder, config, tensors):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(config), "utf-8")
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


@pytest.fixture
def union(tmp_path):
    config = {"peft_type": "PRUNEPEFT", "base_model_name_or_path": "some/base"}
    config["placement"] = make_placement().to_dict()
    return write_adapter(tmp_path / "union", config, union_tensors())


@pytest.fixture
def lora(tmp_path):
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
    config["alpha_pattern"] = {r"^model\.layers\.1\.self_attn\.v_proj": 4}
    ranks = {"model.layers.0.self_attn.q_proj": 4, "model.layers.1.self_attn.v_proj": 2}
    return write_adapter(tmp_path / "lora", config, lora_tensors(ranks))


def verdicts(found):
    return {entry["engine"]: entry["verdict"] for entry in found["serving"]}


def test_union_adapter(union):
    found = inspect_path(union)
    assert found["type"] == "adapter"
    assert found["peft_type"] == "PRUNEPEFT"
    assert found["base_model"] == "some/base"
    assert found["kinds"] == {"lora": 1, "serial_adapter": 1}
    assert found["ranks"] == {"lora": {"2": 1}, "serial_adapter": {"4": 1}}
    assert found["trainable_params"] == 64 + 76
    assert found["head_params"] == 18
    assert found["bytes_on_disk"] == sum(os.path.getsize(union / f) for f in os.listdir(union))
    assert [layer["layer"] for layer in found["layers"]] == [0, 1, 2]
    assert found["layers"][1]["modules"] == []
    assert found["layers"][2]["modules"][0]["n_params"] == 76
    assert verdicts(found) == {
        "peft, transformers": "after import",
        "vLLM": "no",
        "SGLang": "no",
        "llama.cpp": "no",
    }
    assert json.loads(json.dumps(found)) == found


def test_plain_lora_adapter(lora):
    found = inspect_path(lora)
    assert found["kinds"] == {"lora": 2}
    assert found["trainable_params"] == 2 * 8 * 4 + 2 * 8 * 2
    assert found["head_params"] == 0
    assert found["columns"] == [["self_attn", "q_proj", "lora"], ["self_attn", "v_proj", "lora"]]
    assert verdicts(found) == {
        "peft, transformers": "works",
        "vLLM": "works with flags",
        "SGLang": "no",
        "llama.cpp": "no",
    }


def test_text_has_a_map_of_the_modules(union):
    text = format_inspect(inspect_path(union))
    assert "modules    2 (1 lora (size 2), 1 serial_adapter (size 4))" in text
    assert "trainable  140 parameters, and 18 in the head" in text
    lines = [line.split() for line in text.splitlines()]
    assert ["layer", "lora", "serial_adapter"] in lines
    assert ["encoder", "0", "2", "."] in lines
    assert ["encoder", "1", ".", "."] in lines
    assert ["encoder", "2", ".", "4"] in lines


def test_run_folder_prefers_its_adapter(tmp_path, union):
    run = tmp_path / "run"
    shutil.copytree(GOLDEN / "run", run)
    shutil.rmtree(run / "best" / "adapter")
    found = inspect_path(run)
    assert (found["type"], found["n_modules"], found["trainable_params"]) == ("run", 3, None)
    shutil.copytree(union, run / "best" / "adapter")
    found = inspect_path(run)
    assert (found["type"], found["n_modules"], found["trainable_params"]) == ("run", 2, 140)


def test_placement_file():
    found = inspect_path(GOLDEN / "run" / "best" / "arch.json")
    assert found["type"] == "placement"
    assert found["ranks"] == {"lora": {"2": 1, "4": 1}, "serial_adapter": {"4": 1}}
    assert set(verdicts(found).values()) == {"no"}
    assert "not known without weights" in format_inspect(found)


def test_nothing_to_describe(tmp_path):
    with pytest.raises(ConfigError, match="neither a run with best/"):
        inspect_path(tmp_path)
    with pytest.raises(ConfigError, match="there is nothing at"):
        inspect_path(tmp_path / "absent")


def test_pickled_weights_are_not_read(union):
    (union / "adapter_model.safetensors").rename(union / "adapter_model.bin")
    with pytest.raises(CheckpointError, match=r"adapter_model\.bin is a pickle"):
        inspect_path(union)


def test_missing_tensors_are_named(union):
    tensors = union_tensors()
    del tensors[PREFIX + "enc.0.v.union_lora_A"], tensors[PREFIX + "enc.0.v.union_lora_B"]
    save_file(tensors, union / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=r"no tensors for encoder\.0\.attention\.q\+v:lora"):
        inspect_path(union)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x00",
        b"PK\x03\x04" + b"\x00" * 100,
        struct.pack("<Q", 2**62) + b"{}",
        struct.pack("<Q", 10) + b"not json !",
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 3) + b"\xff\xfe\xfd",
    ],
)
def test_damaged_weight_files(union, data):
    (union / "adapter_model.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match="not a sound safetensors file"):
        inspect_path(union)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"r": "8"}, r"r is '8', which is not allowed"),
        ({"lora_alpha": [1]}, "lora_alpha is"),
        ({"rank_pattern": 3}, "rank_pattern is 3"),
        ({"use_dora": 1}, "use_dora is 1"),
        ({"r": True}, "r is True"),
        ({"peft_type": "IA3"}, "'IA3'; PRUNEPEFT and LORA can be inspected"),
        ({"peft_type": "PRUNEPEFT"}, "does not hold a valid placement"),
        ({"peft_type": None}, "type 'None'"),
    ],
)
def test_damaged_configs(lora, change, message):
    config = json.loads((lora / "adapter_config.json").read_text("utf-8"))
    (lora / "adapter_config.json").write_text(json.dumps(config | change), "utf-8")
    with pytest.raises(CheckpointError, match=message):
        inspect_path(lora)


@pytest.mark.parametrize(
    "tensors",
    [
        {PREFIX + "a.lora_A.weight": np.zeros((2, 8))},
        {
            PREFIX + "a.lora_A.weight": np.zeros((2, 8)),
            PREFIX + "a.lora_B.weight": np.zeros((8, 3)),
        },
        {PREFIX + "a.lora_A.weight": np.zeros(2), PREFIX + "a.lora_B.weight": np.zeros((8, 2))},
        {
            PREFIX + "a.lora_A.weight": np.zeros((0, 8)),
            PREFIX + "a.lora_B.weight": np.zeros((8, 0)),
        },
        {"other": np.zeros(3)},
    ],
)
def test_lora_tensors_that_do_not_fit(lora, tensors):
    save_file(tensors, lora / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=r"do not fit together|no LoRA tensors"):
        inspect_path(lora)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=150)
@given(data=st.data(), value=JSON)
def test_any_change_of_a_placement_is_described_or_refused(tmp_path_factory, data, value):
    placement = make_placement().to_dict()
    target = data.draw(
        st.sampled_from([placement, *placement["slots"], *placement["slots"][0]["sites"]])
    )
    target[data.draw(st.sampled_from(sorted(target)) | st.text())] = value
    path = tmp_path_factory.getbasetemp() / "arch.json"
    path.write_text(json.dumps(placement), "utf-8")
    with contextlib.suppress(PrunePeftError):
        assert isinstance(format_inspect(inspect_path(path)), str)


def test_text_is_safe_for_a_terminal(lora):
    config = json.loads((lora / "adapter_config.json").read_text("utf-8"))
    config["base_model_name_or_path"] = "\x1b[2J\x07base\r"
    (lora / "adapter_config.json").write_text(json.dumps(config), "utf-8")
    ranks = {"layers.0.\x1b[31mq": 2}
    save_file(lora_tensors(ranks), lora / "adapter_model.safetensors")
    text = format_inspect(inspect_path(lora))
    assert not set("\x1b\x07\r") & set(text)
