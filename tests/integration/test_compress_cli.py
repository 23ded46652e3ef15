"""Adapters compressed, shipped, restored, merged and tuned from the command line."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import (
    IA3Config,
    LoHaConfig,
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
)

from prunepeft.candidates import make_space
from prunepeft.cli import main
from prunepeft.compression import Settings, compress_adapter, read_compressed
from prunepeft.compression.adapter import Prepared
from prunepeft.compression.folder import COMPRESSED_FILE, read_adapter_folder
from prunepeft.compression.vectors import to_dense
from prunepeft.errors import CheckpointError, ConfigError
from prunepeft.sites import find_sites
from prunepeft.state import RunFolder, read_json, read_tensors, write_tensors
from prunepeft.supernet import attach
from tests.disk_faults import failing_call, leftovers
from tests.tiny_models import TINY, tiny_inputs
from tests.tiny_tokenizer import save_tiny_model

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PLAIN = {
    "lora": LoraConfig(
        r=4, target_modules=["query", "value"], task_type="SEQ_CLS", modules_to_save=["classifier"]
    ),
    "dora": LoraConfig(r=4, target_modules=["query"], use_dora=True),
    "ia3": IA3Config(
        target_modules=["value", "output.dense"], feedforward_modules=["output.dense"]
    ),
}


def trained(net: PeftModel, step: float = 0.05, seed: int = 0) -> PeftModel:
    """Values as after a training: everything has moved by about `step`."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.requires_grad:
                parameter.add_(step * torch.randn(parameter.shape, generator=generator))
    return net.eval()


def plain(folder: Path, name: str = "lora", step: float = 0.05, seed: int = 0) -> Path:
    torch.manual_seed(0)
    trained(get_peft_model(TINY["bert"](), PLAIN[name]), step, seed).save_pretrained(folder)
    return folder


def ours(folder: Path, step: float = 0.05, seed: int = 0, init_seed: int = 0) -> Path:
    model = TINY["bert"]()
    kinds = ("lora", "dora", "ia3", "serial_adapter")
    space = make_space(find_sites(model), kinds, sizes=dict.fromkeys(("lora", "dora"), 4))
    net = attach(model, space.full(), seed=init_seed, modules_to_save=["classifier"])
    trained(net, step, seed).save_pretrained(folder)
    return folder


def starts_of(report: dict[str, Any]) -> list[str]:
    return [entry.start for entry in read_compressed(report["path"]).entries]


def logits(adapter: Path) -> torch.Tensor:
    model = TINY["bert"]()
    net = PeftModel.from_pretrained(model, str(adapter)).eval()
    with torch.no_grad():
        return net(**tiny_inputs("bert", model)).logits


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Any:
    def run(*args: Any) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            main([str(arg) for arg in args])
        out, err = capsys.readouterr()
        return int(left.value.code or 0), out, err

    return run


def through(call: Any, adapter: Path, place: Path, *flags: Any) -> tuple[dict[str, Any], Path]:
    """Compress and decompress; the report and the restored folder."""
    code, out, err = call("compress", adapter, "--output", place / "small", "--json", *flags)
    assert code == 0, err
    code, _, err = call("decompress", place / "small", "--output", place / "back")
    assert code == 0, err
    return json.loads(out), place / "back"


# ---- there and back ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", PLAIN)
def test_plain_adapter_comes_back(name: str, call: Any, tmp_path: Path) -> None:
    adapter = plain(tmp_path / "adapter", name)
    report, back = through(call, adapter, tmp_path, "--density", 0.3)
    before, after = (read_tensors(f / WEIGHTS) for f in (adapter, back))
    made = read_compressed(tmp_path / "small")
    places = made.places()
    assert before.keys() == after.keys()
    for key, tensor in after.items():
        assert tensor.shape == before[key].shape
        if key in places:
            vector, begin, end = places[key]
            change = torch.from_numpy(to_dense(vector)[begin:end]).reshape(tensor.shape)
            assert torch.equal(tensor, change + float("ia3" in key))
        else:
            assert torch.equal(tensor, before[key])
    assert report["n_kept"] == sum(round(0.3 * v.size) for v in made.vectors)
    assert (back / CONFIG).read_bytes() == (adapter / CONFIG).read_bytes()
    # The folder loads in plain peft, and computes what the dense form of the vectors computes.
    dense = PeftModel.from_pretrained(TINY["bert"](), str(adapter)).eval()
    state = {
        name.replace(".default", "").replace("modules_to_save.", "").removesuffix(".weight"): value
        for name, value in dense.state_dict().items()
    }
    for key, value in made.restore().items():
        state[key.removesuffix(".weight")].copy_(value)
    with torch.no_grad():
        wanted = dense(**tiny_inputs("bert", dense.base_model.model)).logits
    assert torch.equal(logits(back), wanted)


def test_what_stays_dense(tmp_path: Path) -> None:
    """Heads, and DoRA's magnitude, whose start depends on the base model."""
    for name, part in (("lora", "classifier"), ("dora", "magnitude")):
        compress_adapter(plain(tmp_path / name, name), tmp_path / f"{name}-small")
        dense = read_compressed(tmp_path / f"{name}-small").dense
        assert dense
        assert all(part in key for key in dense)
    settings = Settings(heads=True)
    compress_adapter(tmp_path / "lora", tmp_path / "heads", settings)
    made = read_compressed(tmp_path / "heads")
    assert not made.dense
    assert len(made.vectors) == 4  # A, B, and each tensor of the head for itself


def test_own_adapter_counts_from_its_seed(call: Any, tmp_path: Path) -> None:
    adapter = ours(tmp_path / "adapter", init_seed=7)
    report, back = through(call, adapter, tmp_path, "--density", 1.0, "--alpha", 1)
    assert report["scope"] == "global"
    made = read_compressed(tmp_path / "small")
    assert {entry.start for entry in made.entries} == {"init"}
    assert made.vectors[0].scale == pytest.approx(0.05, rel=0.1)  # sigma of the steps alone
    assert {k.rpartition("_")[2] for k in made.dense if "classifier" not in k} == {"magnitude"}
    before, after = (read_tensors(f / WEIGHTS) for f in (adapter, back))
    assert all((before[k] - after[k]).abs().max() < 0.3 for k in before)
    wanted = made.restore()
    assert all(torch.equal(after[k], wanted[k]) for k in wanted)
    assert logits(back).shape == logits(adapter).shape


def test_a_module_that_did_not_start_at_its_seed_counts_from_zero(tmp_path: Path) -> None:
    adapter = ours(tmp_path / "adapter")
    tensors = read_tensors(adapter / WEIGHTS)
    names = [key for key in tensors if key.endswith("lora_A")]
    tensors |= {key: 0.01 * torch.randn_like(tensors[key]) for key in names}
    write_tensors(adapter / WEIGHTS, tensors, {"format": "pt"})
    compress_adapter(adapter, tmp_path / "small")
    starts = {e.name: e.start for e in read_compressed(tmp_path / "small").entries}
    assert {starts[key] for key in names} == {"zeros"}


def test_merged_equals_unmerged(call: Any, tmp_path: Path) -> None:
    _, back = through(call, plain(tmp_path / "adapter"), tmp_path, "--density", 0.5)
    net = PeftModel.from_pretrained(TINY["bert"](), str(back)).eval()
    with torch.no_grad():
        inputs = tiny_inputs("bert", net.base_model.model)
        apart, merged = net(**inputs).logits, net.merge_and_unload()(**inputs).logits
    assert torch.allclose(apart, merged, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_its_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    adapter = plain(tmp_path / "adapter")
    tensors = {k: t.to(dtype) for k, t in read_tensors(adapter / WEIGHTS).items()}
    write_tensors(adapter / WEIGHTS, tensors, {"format": "pt"})
    compress_adapter(adapter, tmp_path / "small")
    restored = read_compressed(tmp_path / "small").restore()
    assert {t.dtype for t in restored.values()} == {dtype}
    assert all(t.dtype == dtype for t in read_compressed(tmp_path / "small").dense.values())


def test_codecs_hold_the_same(tmp_path: Path) -> None:
    adapter = plain(tmp_path / "adapter")
    found = []
    for codec in ("golomb", "bitmask"):
        compress_adapter(adapter, tmp_path / codec, codec=codec)
        found.append(read_compressed(tmp_path / codec).restore())
    assert all(torch.equal(found[0][key], found[1][key]) for key in found[0])


def test_ones_compress_to_nothing_and_come_back(tmp_path: Path) -> None:
    get_peft_model(TINY["bert"](), PLAIN["ia3"]).save_pretrained(tmp_path / "fresh")
    report = compress_adapter(tmp_path / "fresh", tmp_path / "small")
    assert report["n_kept"] == 0
    assert all((t == 1).all() for t in read_compressed(tmp_path / "small").restore().values())


def test_alpha_zero_is_the_start(tmp_path: Path) -> None:
    compress_adapter(ours(tmp_path / "a"), tmp_path / "small", Settings(alpha=0.0))
    made = read_compressed(tmp_path / "small")
    restored, starts = made.restore(), made.starts()
    assert all(torch.equal(restored[key], starts[key]) for key in starts)


def test_a_snapshot_is_asked_for_and_known_again(call: Any, tmp_path: Path) -> None:
    config = LoHaConfig(r=2, target_modules=["query"])
    net = get_peft_model(TINY["bert"](), config)
    net.save_pretrained(tmp_path / "before")
    trained(net).save_pretrained(tmp_path / "after")
    code, _, err = call("compress", tmp_path / "after", "--output", tmp_path / "small")
    assert code == 2
    assert "--start" in err
    flags = ("--start", tmp_path / "before")
    assert call("compress", tmp_path / "after", "--output", tmp_path / "small", *flags)[0] == 0
    code, _, err = call("decompress", tmp_path / "small", "--output", tmp_path / "back")
    assert code == 3
    assert "snapshot" in err
    wrong = ("--start", tmp_path / "after")
    assert call("decompress", tmp_path / "small", "--output", tmp_path / "back", *wrong)[0] == 3
    assert call("decompress", tmp_path / "small", "--output", tmp_path / "back", *flags)[0] == 0
    assert logits(tmp_path / "back").isfinite().all()


# ---- the guard on A and B ----------------------------------------------------------------------


def test_a_shared_threshold_that_leaves_nothing_of_b_is_refused(call: Any, tmp_path: Path) -> None:
    adapter = plain(tmp_path / "adapter", step=0.001)
    place = tmp_path / "small"
    code, _, err = call(
        "compress", adapter, "--output", place, "--density", 0.2, "--scope", "global"
    )
    assert code == 2
    assert "--scope role" in err
    assert not place.exists()
    for scope in ("auto", "role", "tensor"):
        code, out, _ = call("compress", adapter, "--output", place, "--scope", scope, "--json")
        assert code == 0
        assert json.loads(out)["notes"] == []
    assert all(t.any() for t in read_compressed(place).restore().values())


def test_some_modules_lost_is_a_warning(tmp_path: Path) -> None:
    adapter = plain(tmp_path / "adapter")
    tensors = read_tensors(adapter / WEIGHTS)
    key = next(key for key in tensors if "lora_B" in key)
    tensors[key] *= 1e-4
    write_tensors(adapter / WEIGHTS, tensors, {"format": "pt"})
    report = compress_adapter(adapter, tmp_path / "small")
    assert "1 of 4 modules" in report["notes"][0]
    assert not compress_adapter(adapter, tmp_path / "small", Settings(scope="tensor"))["notes"]


def test_a_run_module_without_its_b_is_seen(tmp_path: Path) -> None:
    adapter = ours(tmp_path / "adapter", step=0.01)
    assert set(starts_of(compress_adapter(adapter, tmp_path / "small"))) == {"init"}
    with pytest.raises(ConfigError, match="change nothing"):
        compress_adapter(adapter, tmp_path / "none", Settings(density=1e-5))
    assert not (tmp_path / "none").exists()


# ---- merge -------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [plain, ours])
@pytest.mark.parametrize("method", ["ties", "sum", "average"])
def test_merge_is_the_dense_merge(make: Any, method: str, call: Any, tmp_path: Path) -> None:
    adapters = [make(tmp_path / f"a{seed}", seed=seed) for seed in (1, 2, 3)]
    for adapter in adapters:
        compress_adapter(adapter, tmp_path / f"{adapter.name}-small", Settings(start="auto"))
    small = [tmp_path / f"{a.name}-small" for a in adapters]
    place = tmp_path / "merged"
    code, _, err = call("merge", *small, "--method", method, "--output", place)
    assert code == 0, err
    merged = read_tensors(place / WEIGHTS)
    made = [read_compressed(folder) for folder in small]
    starts, values = made[0].starts(), [m.restore() for m in made]
    for key, start in starts.items():
        taus = torch.stack([v[key] - start for v in values])
        if method != "ties":
            change = taus.sum(0) / (3 if method == "average" else 1)
            assert torch.allclose(merged[key], start + change, atol=1e-6)
    heads = [key for key in merged if "classifier" in key]
    for key in heads:
        assert torch.allclose(merged[key], torch.stack([v[key] for v in values]).mean(0))
    assert logits(place).isfinite().all()


def test_merge_of_one_with_itself_and_weights(call: Any, tmp_path: Path) -> None:
    a, b = plain(tmp_path / "a", seed=1), plain(tmp_path / "b", seed=2)
    before = read_tensors(a / WEIGHTS), read_tensors(b / WEIGHTS)
    flags = ("--method", "average", "--weights", "3,1", "--output", tmp_path / "m")
    assert call("merge", a, b, *flags)[0] == 0
    merged = read_tensors(tmp_path / "m" / WEIGHTS)
    for key, value in merged.items():
        assert torch.allclose(value, 0.75 * before[0][key] + 0.25 * before[1][key], atol=1e-6)
    assert call("merge", a, a, "--trim", 1, "--output", tmp_path / "same")[0] == 0
    same = read_tensors(tmp_path / "same" / WEIGHTS)
    assert all(torch.allclose(same[key], before[0][key]) for key in same)


def test_heads_survive_weights_that_cancel(call: Any, tmp_path: Path) -> None:
    a, b = plain(tmp_path / "a", seed=1), plain(tmp_path / "b", seed=2)
    flags = ("--method", "sum", "--weights=0.3,-0.1,-0.2", "--output", tmp_path / "m")
    assert call("merge", a, b, b, *flags)[0] == 0
    before, merged = read_tensors(a / WEIGHTS), read_tensors(tmp_path / "m" / WEIGHTS)
    assert all(torch.equal(merged[k], before[k]) for k in merged if "classifier" in k)


def test_merge_refuses_what_does_not_fit(call: Any, tmp_path: Path) -> None:
    a, other, half = plain(tmp_path / "a"), plain(tmp_path / "b", "ia3"), plain(tmp_path / "c")
    halves = {k: v.half() for k, v in read_tensors(half / WEIGHTS).items()}
    write_tensors(half / WEIGHTS, halves, {"format": "pt"})
    place = tmp_path / "m"
    wrong = [
        ((a, other), "type"),
        ((a,), "two or more"),
        ((a, a, "--weights", "1"), "weights"),
        ((a, a, "--weights", "1,x"), "weights"),
        ((a, a, "--weights", "1,-1"), "positive"),
        ((a, a, "--trim", "0"), "trim"),
        ((a, a, "--trim", "0.3", "--method", "sum"), "sum trims nothing"),
        ((a, a, "--scale", "nan"), "scale"),
        ((half, half, "--scale", "1e9"), "too large for torch.float16"),
    ]
    for arguments, words in wrong:
        code, _, err = call("merge", *arguments, "--output", place)
        assert code == 2
        assert words in err
    seeds = [ours(tmp_path / f"s{seed}", init_seed=seed) for seed in (0, 1)]
    for adapter in seeds:
        compress_adapter(adapter, tmp_path / f"{adapter.name}-small")
    small = [tmp_path / f"{a.name}-small" for a in seeds]
    for some in (small, (small[0], seeds[1])):
        code, _, err = call("merge", *some, "--output", place)
        assert code == 2
        assert "starting values" in err
    assert call("merge", *seeds, "--output", place)[0] == 0  # dense ones have no such start
    assert not leftovers(tmp_path)


# ---- files that are not to be trusted -----------------------------------------------------------


@pytest.fixture
def small(tmp_path: Path) -> Path:
    compress_adapter(plain(tmp_path / "adapter"), tmp_path / "small")
    (tmp_path / "small" / "manifest.json").unlink()  # as if only the two files were shipped
    return tmp_path / "small"


def rewrite(folder: Path, change: Any) -> None:
    """Change the header of a compressed file and seal it again, as an attacker would."""
    from prunepeft.state import read_tensors_and_metadata

    tensors, metadata = read_tensors_and_metadata(folder / COMPRESSED_FILE)
    header = json.loads(metadata["prunepeft_compressed"])
    change(header, tensors)
    write_tensors(folder / COMPRESSED_FILE, tensors, {"prunepeft_compressed": json.dumps(header)})


HOSTILE = {
    "version": lambda h, t: h.update(version=2),
    "no settings": lambda h, t: h.update(settings={}),
    "density": lambda h, t: h["settings"].update(density=7.0),
    "huge": lambda h, t: (
        h["groups"][0].__setitem__(1, 2**45),
        h["tensors"][0].__setitem__(2, [2**45 - h["groups"][0][1]]),
    ),
    "huge and consistent": lambda h, t: (
        h.update(groups=[["golomb", 2**45, 0, 0, 1.0]]),
        h.update(tensors=[["x", "float32", [2**45], 0, "zeros"]]),
    ),
    "negative": lambda h, t: h["groups"][0].__setitem__(1, -1),
    "scale": lambda h, t: h["groups"][0].__setitem__(4, 1e308),
    "codec": lambda h, t: h["groups"][0].__setitem__(0, "pickle"),
    "group": lambda h, t: h["tensors"][0].__setitem__(3, 9),
    "dtype": lambda h, t: h["tensors"][0].__setitem__(1, "object"),
    "start": lambda h, t: h["tensors"][0].__setitem__(4, "elsewhere"),
    "twice": lambda h, t: h["tensors"].append(h["tensors"][0]),
    "too many": lambda h, t: h["groups"][0].__setitem__(2, 10),
    "no code": lambda h, t: t.pop("payload.0"),
    "short code": lambda h, t: t.update({"payload.0": t["payload.0"][:-1].clone()}),
    "stranger": lambda h, t: t.update({"other": torch.zeros(1)}),
    "list": lambda h, t: h.update(tensors=[[]]),
}


@pytest.mark.parametrize("change", HOSTILE.values(), ids=HOSTILE)
def test_hostile_headers(change: Any, small: Path) -> None:
    rewrite(small, change)
    with pytest.raises(CheckpointError):
        read_compressed(small)


def test_every_kind_of_damage_is_found(small: Path) -> None:
    data = (small / COMPRESSED_FILE).read_bytes()
    steps = range(0, len(data), max(1, len(data) // 60))
    versions = [data[:place] for place in steps]
    versions += [data[:p] + bytes([data[p] ^ 1]) + data[p + 1 :] for p in steps]
    for version in versions:
        (small / COMPRESSED_FILE).write_bytes(version)
        with pytest.raises(CheckpointError):
            read_compressed(small)


def test_a_pickle_is_never_read(tmp_path: Path, small: Path) -> None:
    (small / COMPRESSED_FILE).unlink()
    torch.save({}, small / "adapter_model.bin")
    with pytest.raises(CheckpointError, match="pickle"):
        read_compressed(small)


def test_nothing_is_left_of_a_write_that_fails(tmp_path: Path) -> None:
    adapter = plain(tmp_path / "adapter")
    with failing_call(0) as made:
        compress_adapter(adapter, tmp_path / "whole")
    for number in range(1, len(made) + 1, 3):
        with failing_call(number), pytest.raises(Exception, match=r"space|No such|write"):
            compress_adapter(adapter, tmp_path / "small")
        assert not leftovers(tmp_path)


def test_the_wrong_folder_is_named_for_what_it_is(call: Any, tmp_path: Path) -> None:
    adapter, small = plain(tmp_path / "a"), tmp_path / "small"
    compress_adapter(adapter, small)
    (tmp_path / "file").write_text("")
    wrong = [
        (("compress", small, "--output", tmp_path / "x"), "prunepeft decompress"),
        (("decompress", adapter, "--output", tmp_path / "x"), "ordinary adapter already"),
        (("compress", tmp_path / "no", "--output", tmp_path / "x"), "no adapter folder"),
        (("compress", adapter, "--output", tmp_path / "file" / "x"), "choose another path"),
    ]
    for arguments, words in wrong:
        code, _, err = call(*arguments)
        assert code
        assert words in err
        assert "internal" not in err


def test_a_pruned_base_is_told_from_an_unfinished_run(
    call: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RunFolder, "is_run", True)
    for done, words in ((True, "makes no adapter"), (False, "goes on where it stopped")):
        monkeypatch.setattr(RunFolder, "done", done)
        code, _, err = call("compress", tmp_path, "--output", tmp_path / "x")
        assert code == 2
        assert words in err


def test_output_is_not_overwritten(call: Any, tmp_path: Path) -> None:
    adapter = plain(tmp_path / "adapter")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("x")
    for place in (tmp_path / "full", adapter, adapter / "inner", tmp_path):
        code, _, err = call("compress", adapter, "--output", place)
        assert code == 2
        assert "choose" in err
    assert (tmp_path / "full" / "mine.txt").read_text() == "x"
    for _ in range(2):  # a result of its own is replaced
        assert call("compress", adapter, "--output", tmp_path / "small")[0] == 0


# ---- runs and tuning ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    save_tiny_model(folder / "model", head="base")
    rows = [{"text": f"w{i % 40} w{i % 7}", "label": "ab"[i % 2]} for i in range(40)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ["--model", folder / "model", "--data", folder / "train.jsonl", "--quiet"]
    arguments += ["--budget", "4 modules", "--kinds", "lora", "--output", folder / "run"]
    arguments += ["train.epochs=1", "search.warmup=false", "search.rounds=1"]
    with pytest.raises(SystemExit) as left:
        main(["search", *map(str, arguments)])
    assert not left.value.code
    return folder


def test_a_run_is_tuned_and_shipped(tiny_run: Path, call: Any, tmp_path: Path) -> None:
    run = tiny_run / "run"
    report, back = through(call, run, tmp_path, "--tune", "validation", "--density", 0.1)
    tuning = report["tuning"]
    assert [c["density"] for c in tuning["tried"]] == [0.1] * 9
    assert tuning["best"] == max(c["value"] for c in tuning["tried"])
    assert report["alpha"] == next(
        c["alpha"] for c in tuning["tried"] if c["value"] == tuning["best"]
    )
    assert tuning["before"] == pytest.approx(read_json(run / "result.json")["metric"]["value"])
    assert read_json(tmp_path / "small" / "compression.json") == report
    assert {p.name for p in back.iterdir()} == {
        WEIGHTS,
        CONFIG,
        "manifest.json",
        "compression.json",
    }
    assert {e.start for e in read_compressed(tmp_path / "small").entries} == {"init"}


def test_an_adapter_from_elsewhere_is_tuned(tiny_run: Path, call: Any, tmp_path: Path) -> None:
    adapter = tiny_run / "run" / "best" / "adapter"
    flags = ("--tune", tiny_run / "train.jsonl", "--alpha", "1", "--output", tmp_path / "small")
    code, _, err = call("compress", adapter, *flags)
    assert code == 2
    assert "--model" in err
    flags += ("--model", tiny_run / "model", "--task", "seq-cls", "--json")
    code, out, err = call("compress", adapter, *flags)
    assert code == 0, err
    assert json.loads(out)["tuning"]["rows"] == 40
    assert len(json.loads(out)["tuning"]["tried"]) == 5


def test_flags_that_do_not_go_together(tiny_run: Path, call: Any, tmp_path: Path) -> None:
    run = tiny_run / "run"
    wrong = [
        (("--model", "m"), "--tune"),
        (("--tune", "validation", "--density", 0.1, "--alpha", 1), "nothing to tune"),
        (("--tune", "validation", "--model", "m"), "is a run"),
        (("--density", 10), "share in"),
        (("--start", "nowhere"), "nowhere"),
    ]
    for flags, words in wrong:
        code, _, err = call("compress", run, "--output", tmp_path / "small", *flags)
        assert code in (2, 3)
        assert words in err
    assert not (tmp_path / "small").exists()


def test_tuning_measures_what_is_shipped(tmp_path: Path) -> None:
    """A candidate on the model is the adapter that a folder would hold."""
    source = read_adapter_folder(ours(tmp_path / "a"))
    made = Prepared(source.tensors, source.config, Settings()).compress(0.3, 2.0)
    net = PeftModel.from_pretrained(TINY["bert"](), str(source.path))
    from peft import set_peft_model_state_dict

    set_peft_model_state_dict(net, made.restore())
    held = get_peft_model_state_dict(net)
    wanted = made.restore()
    assert held.keys() == wanted.keys()
    assert all(torch.equal(held[key], wanted[key]) for key in wanted)


def test_unknown_scope_is_named() -> None:
    with pytest.raises(ConfigError, match="auto, global, role, tensor"):
        Prepared({}, {"peft_type": "LORA"}, Settings(scope="layer"))


def test_reports_hold_real_sizes(tmp_path: Path) -> None:
    settings = Settings(density=1, alpha=2)  # whole numbers do, too
    report = compress_adapter(plain(tmp_path / "adapter"), tmp_path / "small", settings)
    assert read_compressed(tmp_path / "small").settings.density == 1.0
    assert report["bytes"] == (tmp_path / "small" / COMPRESSED_FILE).stat().st_size
    assert report["bytes_before"] == (tmp_path / "adapter" / WEIGHTS).stat().st_size
    assert report["times_smaller"] == report["bytes_before"] / report["bytes"]
    assert np.isfinite(report["bits_per_param"])
