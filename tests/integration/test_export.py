"""Every export format: what was written computes what the adapter computes."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from prunepeft.candidates import make_space
from prunepeft.errors import CheckpointError, ConfigError, StateError, UnknownNameError
from prunepeft.sites import find_sites
from prunepeft.space import Placement
from prunepeft.state import read_json, verify_folder, write_json
from prunepeft.supernet import attach
from prunepeft.supernet.export import export_adapter, export_run
from prunepeft.supernet.export.engines import Facts, serving_table
from prunepeft.supernet.export.serve import target_names
from tests.tiny_models import TINY, tiny_inputs

TASKS = {"bert": "SEQ_CLS", "llama": "CAUSAL_LM", "gpt2": "CAUSAL_LM"}
AUTO = {"SEQ_CLS": AutoModelForSequenceClassification, "CAUSAL_LM": AutoModelForCausalLM}
ALL = ("q", "k", "v", "fused_qkv", "o", "up", "gate", "down")
ENGINES = ("peft", "transformers", "vllm", "sglang", "tgi", "llama.cpp", "tensorrt-llm")


def full(name, kinds=("lora",), sizes=None, options=None, roles=None):
    """The supernet of a tiny model; LoRA on every layer by default."""
    roles = roles if roles is not None else ({"lora": _roles(name)} if "lora" in kinds else {})
    sites = find_sites(TINY[name]())
    return make_space(sites, kinds, sizes=sizes, options=options, roles=roles).full()


def _roles(name):
    present = {s.role for s in find_sites(TINY[name]())}
    return tuple((role,) for role in ALL if role in present)


def mixed(placement):
    """Other rank in every slot; the scaling stays that of the largest."""
    return Placement({s: 1 + i % n for i, (s, n) in enumerate(placement.sizes.items())})


def only(placement, wanted):
    return Placement({s: n for s, n in placement.sizes.items() if wanted(s)})


def make_adapter(folder, name, placement, *, save_base=True):
    """Save a union adapter with random values, and its logits on fixed inputs."""
    base = TINY[name]()
    if save_base:
        base.save_pretrained(folder / "base")
        base.name_or_path = base.config._name_or_path = str(folder / "base")
    task_type = TASKS.get(name, "SEQ_CLS")
    head = ["classifier"] if task_type == "SEQ_CLS" else None
    net = attach(base, placement, modules_to_save=head, task_type=task_type).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.requires_grad:
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
        logits = net(**tiny_inputs(name, base)).logits
    net.save_pretrained(folder / "adapter")
    return folder / "adapter", logits


def logits_of(folder, name, base=None):
    net = PeftModel.from_pretrained(base if base is not None else TINY[name](), folder).eval()
    with torch.no_grad():
        return net(**tiny_inputs(name, net)).logits


def error(a, b):
    return float((a - b).abs().max())


LORA_CASES = {
    "all": lambda p: mixed(p),
    "no layer 0": lambda p: only(mixed(p), lambda s: s.layer == 1),
    "no attention": lambda p: only(mixed(p), lambda s: s.sites[0].block == "ffn"),
    "one module": lambda p: only(mixed(p), lambda s: s.id == list(p.ids)[-1]),
    "query only": lambda p: only(mixed(p), lambda s: s.sites[0].role in ("q", "fused_qkv")),
}


@pytest.fixture(scope="module", params=[(n, c) for n in TASKS for c in LORA_CASES], ids=str)
def lora(request, tmp_path_factory):
    name, case = request.param
    placement = LORA_CASES[case](full(name, sizes={"lora": 4}, options={"lora": {"alpha": 12.0}}))
    folder = tmp_path_factory.mktemp("lora")
    return (name, folder, *make_adapter(folder, name, placement), placement)


# --- lora: peft, serve, merged --------------------------------------------------------------


def test_lora_exports_compute_the_same(lora):
    name, folder, adapter, logits, placement = lora
    plain = export_adapter(adapter, folder / "peft", "peft")
    n_layers = sum(len(s.sites) for s in placement)
    assert plain["notes"][0] == f"{n_layers} of {n_layers} modules applied"
    assert plain["n_modules"] == len(placement)
    assert "serving.json" in plain["files"]
    verify_folder(folder / "peft")
    config = read_json(folder / "peft" / "adapter_config.json")
    assert (config["peft_type"], config["use_rslora"]) == ("LORA", False)
    assert error(logits_of(folder / "peft", name), logits) < 1e-6

    export_adapter(adapter, folder / "serve", "serve", dtype="float32")
    base = TINY[name]()
    if name == "bert":
        base.load_state_dict(
            load_file(folder / "serve" / "head" / "head.safetensors"), strict=False
        )
    assert error(logits_of(folder / "serve", name, base), logits) < 1e-5

    report = export_adapter(adapter, folder / "merged", "merged")
    merged = AUTO[TASKS[name]].from_pretrained(folder / "merged").eval()
    with torch.no_grad():
        assert error(merged(**tiny_inputs(name, merged)).logits, logits) < 1e-4
    assert report["max_difference"] < 1e-4


def test_serve_has_one_form(lora):
    name, folder, adapter, _, placement = lora
    export_adapter(adapter, folder / "uniform", "serve")
    config = read_json(folder / "uniform" / "adapter_config.json")
    assert config["r"] == config["lora_alpha"]
    assert config["r"] == (1 if max(placement.sizes.values()) == 1 else 8)
    assert not config["rank_pattern"]
    assert not config["alpha_pattern"]
    assert not config["modules_to_save"]
    tensors = load_file(folder / "uniform" / "adapter_model.safetensors")
    assert {t.dtype for t in tensors.values()} == {torch.bfloat16}
    paths = {k.removeprefix("base_model.model.").partition(".lora_")[0] for k in tensors}
    assert len(tensors) == 2 * len(paths)
    groups = ({"q", "k", "v"}, {"gate", "up"})
    kept = {(s.block, s.role) for slot in placement for s in slot.sites}
    for block, role in list(kept):
        kept |= {(block, r) for group in groups if role in group for r in group}
    expected = {s.path for s in find_sites(TINY[name]()) if (s.block, s.role) in kept}
    assert paths == expected
    targets = config["target_modules"]
    matched = {
        n
        for n, _ in TINY[name]().named_modules()
        if any(f".{n}".endswith(f".{t}") for t in targets)
    }
    assert matched == expected
    if name == "llama":
        assert not any("." in t for t in targets)


def applied(engine, folder):
    """The update every engine adds, (d_out, d_in) per layer, from the files alone."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    a = {k[: -len(".lora_A.weight")]: v for k, v in tensors.items() if k.endswith("lora_A.weight")}
    b = {k[: -len(".lora_B.weight")]: v for k, v in tensors.items() if k.endswith("lora_B.weight")}
    r, alpha = config["r"], config["lora_alpha"]

    def scale(key):
        own = a[key].shape[0]
        name = f"^{key.removeprefix('base_model.model.')}".replace(".", r"\.")
        if engine == "peft":
            assert config["rank_pattern"].get(name, r) == own
            return config["alpha_pattern"].get(name, alpha) / own
        if engine == "sglang":
            assert own == r, "buffer shape does not match"
            parent = key.rpartition(".")[0]
            together = [k for k in ("q_proj", "k_proj", "v_proj") if f"{parent}.{k}" in a]
            assert len(together) in (0, 3), "part of a fused layer"
        return alpha / own if engine == "llama.cpp" else alpha / r

    out = {key: scale(key) * b[key] @ a[key] for key in a}
    if engine == "tgi":  # a type that one layer lacks is dropped
        layers = {k.split(".layers.")[1].split(".")[0] for k in out if ".layers." in k} | {"0", "1"}
        swap = lambda k, i: k.replace(".0.", f".{i}.").replace(".1.", f".{i}.")  # noqa: E731
        out = {k: v for k, v in out.items() if all(swap(k, i) in out for i in layers)}
    return out


def agrees(engine, folder, truth):
    try:
        update = applied(engine, folder)
    except AssertionError:
        return False
    zero = torch.zeros(())
    return all(error(update.get(k, zero), truth.get(k, zero)) < 1e-5 for k in {*update, *truth})


@pytest.mark.parametrize("engine", ["peft", "vllm", "sglang", "tgi", "llama.cpp"])
def test_scale_rules_agree_on_serve_and_with_the_table(lora, engine):
    name, folder, adapter, _, _ = lora
    for format, dtype in (("peft", None), ("serve", "float32")):
        if not (folder / f"{format}-rules").exists():
            export_adapter(adapter, folder / f"{format}-rules", format, dtype=dtype)
    truth = applied("peft", folder / "peft-rules")
    assert agrees(engine, folder / "serve-rules", truth)
    table = read_json(folder / "peft-rules" / "serving.json")
    assert tuple(table) == ENGINES
    if name != "bert":  # refused there for its head
        status = table[engine]["status"]
        assert (status != "no") == agrees(engine, folder / "peft-rules", truth)
        assert read_json(folder / "serve-rules" / "serving.json")[engine]["status"] != "no"
        assert bool(table[engine]["command"]) == (status != "no")
    elif engine != "peft":
        assert "head" in table[engine]["reason"] or "generation" in table[engine]["reason"]


def test_uniform_adapter_is_served_as_it_is(tmp_path):
    placement = full("llama", sizes={"lora": 8})
    adapter, _ = make_adapter(tmp_path, "llama", placement)
    export_adapter(adapter, tmp_path / "peft", "peft")
    config = read_json(tmp_path / "peft" / "adapter_config.json")
    assert (config["r"], config["lora_alpha"]) == (8, 16)
    assert not config["rank_pattern"]
    table = read_json(tmp_path / "peft" / "serving.json")
    assert all(row["status"] != "no" for row in table.values())
    assert "--max-lora-rank 8" in table["vllm"]["command"]


def test_rslora_and_several_scalings_become_alphas(tmp_path):
    sites = find_sites(TINY["llama"]())
    a = make_space(
        sites,
        ("lora",),
        sizes={"lora": 4},
        options={"lora": {"alpha": 6.0, "rslora": True}},
        roles={"lora": (("q",), ("k",), ("v",))},
    ).full()
    b = make_space(sites, ("lora",), sizes={"lora": 3}, roles={"lora": (("down",),)}).full()
    placement = mixed(Placement({**a.sizes, **b.sizes}))
    adapter, logits = make_adapter(tmp_path, "llama", placement)
    for format, dtype in (("peft", None), ("serve", "float32"), ("merged", None)):
        export_adapter(adapter, tmp_path / format, format, dtype=dtype)
    scale = float(logits.abs().max())
    assert error(logits_of(tmp_path / "peft", "llama"), logits) < 1e-6 * scale
    assert error(logits_of(tmp_path / "serve", "llama"), logits) < 1e-5
    assert read_json(tmp_path / "peft" / "adapter_config.json")["use_rslora"] is False


# --- other kinds ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize(("kind", "peft_type"), [("dora", "LORA"), ("ia3", "IA3")])
def test_other_kinds_peft_knows(tmp_path, name, kind, peft_type):
    roles = {kind: (("fused_qkv",), ("down",))} if name == "gpt2" else {}
    placement = full(name, (kind,), sizes={} if kind == "ia3" else {kind: 3}, roles=roles)
    placement = placement if kind == "ia3" else mixed(placement)
    adapter, logits = make_adapter(tmp_path, name, placement)
    export_adapter(adapter, tmp_path / "peft", "peft")
    assert read_json(tmp_path / "peft" / "adapter_config.json")["peft_type"] == peft_type
    assert error(logits_of(tmp_path / "peft", name), logits) < 2e-6
    table = read_json(tmp_path / "peft" / "serving.json")
    assert table["peft"]["status"] == "works"
    assert table["vllm"]["status"] == "no"
    assert export_adapter(adapter, tmp_path / "merged", "merged")["max_difference"] < 1e-4
    with pytest.raises(ConfigError, match=rf"this adapter has {kind}; .*merged"):
        export_adapter(adapter, tmp_path / "serve", "serve")


MIXES = {"llama": ("lora", "ia3", "dora", "lnfit"), "bert": ("lora", "bitfit", "lnfit")}


@pytest.mark.parametrize("name", MIXES)
def test_mergeable_mix_merges_and_stays_a_union(tmp_path, name):
    sizes = {kind: 2 for kind in MIXES[name] if kind in ("lora", "dora")}
    placement = full(name, MIXES[name], sizes=sizes, roles={})
    adapter, logits = make_adapter(tmp_path, name, placement)
    export_adapter(adapter, tmp_path / "merged", "merged")
    merged = AUTO[TASKS[name]].from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        assert error(merged(**tiny_inputs(name, merged)).logits, logits) < 1e-4
    export_adapter(adapter, tmp_path / "peft", "peft")
    assert error(logits_of(tmp_path / "peft", name), logits) == 0


@pytest.mark.parametrize("name", ["roberta", "distilbert"])
def test_heads_of_several_layers(tmp_path, name):
    """peft wraps all of RoBERTa's head, and DistilBERT's pre_classifier with its classifier."""
    adapter, logits = make_adapter(tmp_path, name, full(name, sizes={"lora": 2}))
    export_adapter(adapter, tmp_path / "peft", "peft")
    assert error(logits_of(tmp_path / "peft", name), logits) < 1e-6
    export_adapter(adapter, tmp_path / "merged", "merged")
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        assert error(merged(**tiny_inputs(name, merged)).logits, logits) < 1e-4


# --- a process without prunepeft ------------------------------------------------------------

FRESH = """
import json, sys, warnings
warnings.simplefilter("ignore")
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
work = sys.argv[1]
worst = {}
def base(auto, name):
    return auto.from_pretrained(f"{work}/{name}/base").eval()
def check(name, net):
    want = torch.load(f"{work}/{name}/expected.pt", weights_only=True)
    with torch.no_grad():
        got = net(**want["inputs"]).logits
    worst[name] = max(worst.get(name, 0), float((got - want["logits"]).abs().max()))
for name, auto in (("bert", AutoModelForSequenceClassification), ("llama", AutoModelForCausalLM)):
    net = PeftModel.from_pretrained(base(auto, name), f"{work}/{name}/peft").eval()
    check(name, net)
    net.save_pretrained(f"{work}/{name}/again")
    check(name, PeftModel.from_pretrained(base(auto, name), f"{work}/{name}/again").eval())
    native = base(auto, name)
    native.load_adapter(f"{work}/{name}/peft")
    check(name, native.eval())
    check(name, auto.from_pretrained(f"{work}/{name}/peft").eval())
assert "prunepeft" not in sys.modules
import prunepeft
union = base(AutoModelForSequenceClassification, "union")
check("union", PeftModel.from_pretrained(union, f"{work}/union/peft").eval())
print(json.dumps(worst))
"""


@pytest.mark.slow
def test_plain_peft_loads_in_a_fresh_process(tmp_path):
    lora = {"sizes": {"lora": 4}, "options": {"lora": {"alpha": 12.0, "dropout": 0.1}}}
    cases = {
        "bert": ("bert", mixed(full("bert", **lora))),
        "llama": ("llama", mixed(full("llama", **lora))),
        "union": ("bert", full("bert", ("lora", "serial_adapter", "parallel_adapter"))),
    }
    for case, (name, placement) in cases.items():
        (tmp_path / case).mkdir()
        adapter, logits = make_adapter(tmp_path / case, name, placement)
        export_adapter(adapter, tmp_path / case / "peft", "peft")
        inputs = tiny_inputs(name, TINY[name]())
        torch.save({"inputs": inputs, "logits": logits}, tmp_path / case / "expected.pt")
    src = Path(__file__).parents[2] / "src"
    done = subprocess.run(
        [sys.executable, "-c", FRESH, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(src), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert max(json.loads(done.stdout.splitlines()[-1]).values()) < 1e-6
    table = read_json(tmp_path / "union" / "peft" / "serving.json")
    assert table["peft"]["status"] == "works with flags"
    with pytest.raises(ConfigError, match="parallel_adapter, serial_adapter, which no linear"):
        export_adapter(tmp_path / "union" / "adapter", tmp_path / "m", "merged")
    assert not (tmp_path / "m").exists()


# --- snippets -------------------------------------------------------------------------------


def test_snippets_reproduce_the_placement(tmp_path):
    adapter, _ = make_adapter(tmp_path, "llama", mixed(full("llama", sizes={"lora": 4})))
    export_adapter(adapter, tmp_path / "peft", "peft")
    config = read_json(tmp_path / "peft" / "adapter_config.json")
    export_adapter(adapter, tmp_path / "axolotl", "axolotl")
    data = yaml.safe_load((tmp_path / "axolotl" / "axolotl.yaml").read_text())
    assert data["lora_target_modules"] == config["target_modules"]
    assert data["lora_rank_pattern"] == config["rank_pattern"]
    assert data["lora_alpha_pattern"] == config["alpha_pattern"]
    export_adapter(adapter, tmp_path / "trl", "trl")
    made = run_file(tmp_path / "trl" / "trl_config.py")["peft_config"]
    assert (made.r, made.lora_alpha) == (config["r"], config["lora_alpha"])
    assert made.rank_pattern == config["rank_pattern"]
    assert sorted(made.target_modules) == config["target_modules"]


def run_file(path):
    scope = {}
    exec(compile(path.read_text(), str(path), "exec"), scope)
    return scope


def test_snippets_of_a_union_use_its_config(tmp_path, monkeypatch):
    placement = full("bert", ("lora", "serial_adapter"))
    adapter, _ = make_adapter(tmp_path, "bert", placement)
    export_adapter(adapter, tmp_path / "axolotl", "axolotl")
    assert "UnionConfig" in (tmp_path / "axolotl" / "README.md").read_text()
    export_adapter(adapter, tmp_path / "trl", "trl")
    monkeypatch.chdir(tmp_path / "trl")
    made = run_file(tmp_path / "trl" / "trl_config.py")["peft_config"]
    assert made.get_placement() == placement


# --- without the base model, with another one -------------------------------------------------


def test_without_the_base_model(tmp_path):
    placement = only(full("llama", sizes={"lora": 4}), lambda s: s.layer == 1)
    adapter, logits = make_adapter(tmp_path, "llama", placement, save_base=False)
    report = export_adapter(adapter, tmp_path / "serve", "serve", dtype="float32")
    assert "not checked" in report["notes"][0]
    assert error(logits_of(tmp_path / "serve", "llama"), logits) < 1e-5
    tensors = load_file(tmp_path / "serve" / "adapter_model.safetensors")
    assert len(tensors) == 2 * 2 * 7
    with pytest.raises(ConfigError, match="pass base="):
        export_adapter(adapter, tmp_path / "merged", "merged")
    given = export_adapter(adapter, tmp_path / "merged", "merged", base=TINY["llama"]())
    assert given["max_difference"] < 1e-4
    with pytest.raises(CheckpointError, match="0 of 7 modules fit"):
        export_adapter(adapter, tmp_path / "peft", "peft", base=TINY["gpt2"]())
    assert not (tmp_path / "peft").exists()


def test_query_only_needs_the_base_model(tmp_path):
    placement = full("llama", sizes={"lora": 4}, roles={"lora": (("q",),)})
    adapter, _ = make_adapter(tmp_path, "llama", placement, save_base=False)
    with pytest.raises(ConfigError, match="needs the shapes of all layers"):
        export_adapter(adapter, tmp_path / "serve", "serve")
    base = TINY["llama"]()
    before = {k: v.clone() for k, v in base.state_dict().items()}
    export_adapter(adapter, tmp_path / "serve", "serve", base=base)
    export_adapter(adapter, tmp_path / "merged", "merged", base=base)
    assert all(torch.equal(v, before[k]) for k, v in base.state_dict().items())
    assert len(load_file(tmp_path / "serve" / "adapter_model.safetensors")) == 2 * 2 * 3


def test_quantised_base_is_refused(tmp_path):
    adapter, _ = make_adapter(tmp_path, "llama", full("llama", sizes={"lora": 4}))
    file = tmp_path / "base" / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    file.write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="quantised"):
        export_adapter(adapter, tmp_path / "merged", "merged")


# --- a run ----------------------------------------------------------------------------------


def test_export_of_a_run(tmp_path):
    run = tmp_path / "run"
    with pytest.raises(StateError, match="not finished"):
        export_run(run, "peft")
    adapter, _ = make_adapter(tmp_path, "bert", full("bert", sizes={"lora": 4}))
    (run / "best").mkdir(parents=True)
    adapter.rename(run / "best" / "adapter")
    write_json(run / "result.json", {"task": {"labels": ["bad", "fair", "good"]}})
    report = export_run(run, "peft")
    assert report["path"] == str(run / "exports" / "peft")
    on_disk = sum((run / "exports" / "peft" / f).stat().st_size for f in report["files"])
    assert report["bytes"] == on_disk
    assert set(report) == {"format", "path", "files", "n_modules", "bytes", "notes"}
    export_run(run, "merged", tmp_path / "merged")
    assert read_json(tmp_path / "merged" / "config.json")["id2label"]["2"] == "good"
    export_run(run, "peft")
    with pytest.raises(UnknownNameError, match="did you mean 'serve'"):
        export_run(run, "serv")


def test_merged_takes_the_tokenizer_along_and_keeps_half_precision(tmp_path):
    adapter, _ = make_adapter(tmp_path, "llama", full("llama", sizes={"lora": 4}))
    TINY["llama"]().to(torch.bfloat16).save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "tokenizer.json").write_text("{}")
    report = export_adapter(adapter, tmp_path / "merged", "merged")
    assert "tokenizer.json" in report["files"]
    weights = load_file(tmp_path / "merged" / "model.safetensors")
    assert {t.dtype for t in weights.values()} == {torch.bfloat16}


# --- bad input ------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path):
    return make_adapter(tmp_path, "bert", full("bert", sizes={"lora": 2}))[0]


def edit_config(adapter, **fields):
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def edit_tensors(adapter, change):
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def first(tensors, end):
    return sorted(k for k in tensors if k.endswith(end))[0]


CHANGES = {
    "zero": (
        lambda t: t.update({k: v * 0 for k, v in t.items() if k.endswith("_B")}),
        "was ever trained",
    ),
    "nan": (lambda t: t.update({first(t, "_B"): t[first(t, "_B")] * torch.nan}), "NaN or inf"),
    "missing": (lambda t: t.pop(first(t, "_A")), "is missing"),
    "extra": (lambda t: t.update({"base_model.model.x.weight": torch.ones(2)}), "no module of it"),
    "shape": (lambda t: t.update({first(t, "_A"): torch.ones(3, 16)}), "should be"),
    "empty": (lambda t: t.update({first(t, "_B"): torch.ones(16, 0)}), "should be"),
    "dtype": (lambda t: t.update({first(t, "_A"): torch.ones(2, 16, dtype=torch.int)}), "int32"),
    "head": (
        lambda t: t.update({first(t, "classifier.weight"): torch.ones(5, 16)}),
        "as many labels",
    ),
}


@pytest.mark.parametrize("case", CHANGES)
def test_bad_tensors_are_refused(saved, tmp_path, case):
    change, message = CHANGES[case]
    edit_tensors(saved, change)
    with pytest.raises(CheckpointError, match=message):
        export_adapter(saved, tmp_path / "out", "peft", base=TINY["bert"]())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("fields", "kind", "message"),
    [
        ({"peft_type": "LORA"}, CheckpointError, "peft_type 'LORA'"),
        ({"placement": None}, CheckpointError, "bad placement"),
        ({"placement": {"format_version": 1, "slots": []}}, ConfigError, "holds no module"),
        ({"task_type": "os.system"}, CheckpointError, "is unknown"),
        ({"modules_to_save": ["../x"]}, CheckpointError, "not a name"),
        ({"modules_to_save": "classifier"}, CheckpointError, "list of names"),
        ({"base_model_name_or_path": ["x"]}, CheckpointError, "plain text"),
        ({"base_model_name_or_path": "a\nb"}, CheckpointError, "plain text"),
    ],
)
def test_bad_config_is_refused(saved, tmp_path, fields, kind, message):
    edit_config(saved, **fields)
    with pytest.raises(kind, match=message):
        export_adapter(saved, tmp_path / "out", "peft")


def test_hostile_fields_do_not_get_through(saved, tmp_path):
    edit_config(
        saved,
        auto_mapping={"base_model_class": "system", "parent_library": "os"},
        megatron_core="os",
        base_model_name_or_path='x"""; import os #',
    )
    export_adapter(saved, tmp_path / "peft", "peft")
    config = read_json(tmp_path / "peft" / "adapter_config.json")
    assert config["auto_mapping"] is None
    assert config["megatron_core"] == "megatron.core"
    export_adapter(saved, tmp_path / "trl", "trl")
    assert "os" not in run_file(tmp_path / "trl" / "trl_config.py")


def test_output_is_never_destroyed(saved, tmp_path):
    for output in (saved, saved.parent, saved / "x"):
        with pytest.raises(ConfigError, match="overlaps"):
            export_adapter(saved, output, "peft")
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("text")
    with pytest.raises(ConfigError, match="holds no earlier export"):
        export_adapter(saved, mine, "peft")
    assert (mine / "thesis.txt").read_text() == "text"
    with pytest.raises(ConfigError, match="is a file"):
        export_adapter(saved, mine / "thesis.txt", "peft")
    with pytest.raises(ConfigError, match="dtype 'float8'"):
        export_adapter(saved, tmp_path / "out", "serve", dtype="float8")


# --- pure parts -----------------------------------------------------------------------------


def test_target_names_take_the_shortest_safe_end():
    names = ["m.0.attn.out", "m.1.attn.out", "m.0.ffn.out", "m.1.ffn.out", "out_head"]
    assert target_names(names[:2], names) == ["attn.out"]
    assert target_names(names[:4], names) == ["out"]
    assert target_names(names[:1], names) == ["0.attn.out"]


FACTS = Facts(
    form="lora",
    r=8,
    alpha=16,
    ranks=(8, 4),
    scalings=(2.0, 2.0),
    targets=("q_proj", "a b"),
    every_layer=True,
    whole_groups=True,
    has_head=False,
    generates=True,
    base="my model; rm -rf",
    path="out",
)


def test_serving_table_follows_the_rules_of_each_engine():
    statuses = {k: v["status"] for k, v in serving_table(FACTS).items()}
    flags = "works with flags"
    assert statuses == {
        "peft": "works",
        "transformers": "works",
        "vllm": flags,  # one scale, ranks may differ
        "sglang": "no",  # ranks differ
        "tgi": flags,
        "llama.cpp": "no",  # 16 / 4 is not 2
        "tensorrt-llm": "no",
    }
    by_rank = serving_table(replace(FACTS, scalings=(2.0, 4.0)))
    assert by_rank["llama.cpp"]["status"] == flags
    assert by_rank["vllm"]["status"] == "no"
    assert serving_table(replace(FACTS, every_layer=False))["tgi"]["status"] == "no"
    assert serving_table(replace(FACTS, r=600, alpha=1200))["vllm"]["status"] == "no"
    assert serving_table(replace(FACTS, has_head=True))["vllm"]["status"] == "no"
    assert "'my model; rm -rf'" in serving_table(FACTS)["vllm"]["command"]
    uniform = serving_table(replace(FACTS, ranks=(8, 8)))
    assert "q_proj 'a b'" in uniform["sglang"]["command"]
    partial = serving_table(replace(FACTS, ranks=(8, 8), whole_groups=False))
    assert partial["sglang"]["status"] == "no"


def test_rank_above_the_engines_limit_is_refused(tmp_path):
    placement = full("llama", sizes={"lora": 600}, roles={"lora": (("q",),)})
    adapter, _ = make_adapter(tmp_path, "llama", placement)
    with pytest.raises(ConfigError, match="rank 600 is above"):
        export_adapter(adapter, tmp_path / "serve", "serve")
