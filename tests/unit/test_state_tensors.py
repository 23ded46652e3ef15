"""Tensors: bit-exact, and nothing hostile is believed."""

import io
import json
import zipfile

import pytest
import torch
from safetensors.torch import save

from prunepeft.errors import CheckpointError, StateError
from prunepeft.state import read_tensors, read_tensors_and_metadata, write_tensors
from prunepeft.state import tensors as tensors_module


def test_tensors_of_all_types_and_shapes(tmp_path):
    base = torch.arange(12.0)
    tensors = {
        "view": base[:6].view(2, 3),
        "shared": base,
        "turned": base.view(3, 4).t(),
        "scalar": torch.tensor(3),
        "empty": torch.zeros(0, 4),
        "flag": torch.tensor([True, False]),
        "half": torch.ones(3, dtype=torch.bfloat16),
        "wide": torch.ones(2, dtype=torch.complex64),
        "grad": torch.nn.Parameter(torch.ones(2)),
    }
    path = tmp_path / "a.safetensors"
    write_tensors(path, tensors, {"format": "pt", "note": "ü"})
    loaded, metadata = read_tensors_and_metadata(path, finite=True, sealed=True)
    assert metadata == {"format": "pt", "note": "ü"}
    assert set(loaded) == set(tensors)
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor), name


def test_the_same_tensors_give_the_same_bytes(tmp_path):
    metadata = {name: name for name in "hgfedcba"}
    files = [tmp_path / "a", tmp_path / "b"]
    for file in files:
        write_tensors(file, {"y": torch.ones(2), "x": torch.zeros(3)}, metadata)
    assert files[0].read_bytes() == files[1].read_bytes()


def test_an_empty_file_of_tensors(tmp_path):
    write_tensors(tmp_path / "a", {})
    assert read_tensors(tmp_path / "a", sealed=True) == {}


def test_tensors_that_cannot_be_saved(tmp_path):
    with pytest.raises(StateError, match="meta device"):
        write_tensors(tmp_path / "a", {"x": torch.ones(1, device="meta")})
    with pytest.raises(StateError, match="only dense"):
        write_tensors(tmp_path / "a", {"x": torch.eye(2).to_sparse()})
    with pytest.raises(StateError, match="text to text"):
        write_tensors(tmp_path / "a", {}, {"x": 1})


def test_every_damage_to_a_sealed_file_is_noticed(tmp_path):
    path = tmp_path / "a.safetensors"
    write_tensors(path, {"x": torch.arange(4.0), "y": torch.ones(1)}, {"k": "v"})
    whole = path.read_bytes()
    for place in range(len(whole)):
        path.write_bytes(whole[:place])
        with pytest.raises(CheckpointError):
            read_tensors(path, sealed=True)
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        with pytest.raises(CheckpointError):
            read_tensors(path, sealed=True)


def test_a_file_of_another_tool_has_no_seal(tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(save({"x": torch.ones(2)}))
    assert torch.equal(read_tensors(path)["x"], torch.ones(2))
    with pytest.raises(CheckpointError, match="did not write it"):
        read_tensors(path, sealed=True)


def with_header(header, data=b"\0" * 8, length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(shape=(2,), offsets=(0, 8), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def zipped():
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02.")
    return buffer.getvalue()


HOSTILE = {
    "empty": (b"", "0 bytes, too few"),
    "header too long": (with_header({"a": entry()}, length=10_000), "claims 10000 bytes but only"),
    "header of 2^64": (b"\xff" * 8 + b"{}", "claims 18446744073709551615"),
    "claim above the limit": (with_header(b"{}", length=100_000_001), "claims 100000001 bytes"),
    "not UTF-8": (with_header(b'{"\xff": 1}'), "not valid JSON"),
    "not JSON": (with_header(b"hello"), "not valid JSON"),
    "deep JSON": (with_header(b"[" * 50_000), "not valid JSON"),
    "a list": (with_header([1]), "not a JSON object"),
    "one key twice": (with_header(b'{"a":1,"a":2}'), "appears twice"),
    "overlap": (
        with_header({"a": entry(), "b": entry(offsets=(4, 12))}, b"\0" * 12),
        "'b' overlaps",
    ),
    "hole": (
        with_header({"a": entry(), "b": entry(offsets=(12, 20))}, b"\0" * 20),
        "'b' leaves a hole",
    ),
    "data missing": (with_header({"a": entry()}, b"\0" * 4), "take 8 bytes but 4"),
    "data left over": (with_header({"a": entry()}, b"\0" * 12), "take 8 bytes but 12"),
    "unknown dtype": (with_header({"a": entry(dtype="PICKLE")}), "unknown dtype 'PICKLE'"),
    "dtype no text": (with_header({"a": entry(dtype=["F32"])}), "unknown dtype"),
    "wrong dtype": (with_header({"a": entry(dtype="F64")}), "does not fill its bytes"),
    "shape overflow": (with_header({"a": entry(shape=(2**62, 2**62))}), "impossible shape"),
    "overflow to zero": (
        with_header({"a": entry(shape=(2**62, 2**62, 0), offsets=(0, 0))}, b""),
        "imposs",
    ),
    "shape above int64": (with_header({"a": entry(shape=(2**64,))}), "not whole numbers"),
    "negative shape": (with_header({"a": entry(shape=(-2,))}), "not whole numbers"),
    "boolean shape": (with_header({"a": entry(shape=(True, 2))}), "not whole numbers"),
    "three offsets": (with_header({"a": entry(offsets=(0, 8, 8))}), "not whole numbers"),
    "backward offsets": (with_header({"a": entry(offsets=(8, 0))}), "does not fill"),
    "extra field": (with_header({"a": {**entry(), "code": 1}}), "is not dtype, shape"),
    "entry no object": (with_header({"a": 5}), "is not dtype, shape"),
    "metadata no text": (with_header({"__metadata__": {"a": 1}}, b""), "does not map text"),
    "zip": (zipped(), "zip archive"),
    "pickle": (b"\x80\x04\x95\x10\0\0\0\0\0\0\0.....", "is a pickle"),
    "pointer": (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_weight_files(tmp_path, case):
    data, reason = HOSTILE[case]
    path = tmp_path / "adapter_model.safetensors"
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=reason) as error:
        read_tensors(path)
    assert str(path) in str(error.value)
    assert error.value.exit_code == 3


def test_a_real_header_above_the_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(tensors_module, "MAX_HEADER", 100)
    (tmp_path / "a.safetensors").write_bytes(with_header(b" " * 101, b""))
    with pytest.raises(CheckpointError, match="takes 101 bytes, more than the 100 allowed"):
        read_tensors(tmp_path / "a.safetensors")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e5m2])
def test_values_that_are_not_finite(tmp_path, value, dtype):
    path = tmp_path / "a.safetensors"
    write_tensors(path, {"ok": torch.ones(3), "bad": torch.tensor([1.0, value]).to(dtype)})
    assert len(read_tensors(path)) == 2
    with pytest.raises(CheckpointError, match="'bad' holds NaN or infinite"):
        read_tensors(path, finite=True)


def test_pickled_weights_are_never_read(tmp_path):
    (tmp_path / "adapter_model.bin").write_bytes(zipped())
    with pytest.raises(CheckpointError, match=r"only holds pickled weights \(adapter_model.bin\)"):
        read_tensors(tmp_path / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=r"only \.safetensors is read"):
        read_tensors(tmp_path / "adapter_model.bin")
    with pytest.raises(CheckpointError, match="does not exist"):
        read_tensors(tmp_path / "no folder" / "a.safetensors")
