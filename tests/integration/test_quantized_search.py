"""Whole searches on bases in 8 and 4 bits, on those of a setting and on those quantised on disk."""

import json
import logging
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM

import prunepeft
from prunepeft import quantized, run
from prunepeft.candidates import make_space
from prunepeft.config import load_config
from prunepeft.errors import ConfigError, MissingExtraError
from prunepeft.estimates import describe
from prunepeft.plan import make_plan
from prunepeft.prefix.maker import StateMaker
from prunepeft.quantized import BYTES
from prunepeft.strategies import METHODS
from prunepeft.training import TrainerEvaluator
from tests.quantized_models import WORDS, save_quantized
from tests.tiny_tokenizer import save_tiny_model, tiny_tokenizer

TRAIN = {"epochs": 2, "lr": 2e-2, "batch_size": 16}
BRIEF = {"rounds": 2, "warmup": False}
KINDS = ["lora", "dora", "serial_adapter", "ssb"]
MODELS = ("bert", "llama")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    place = tmp_path_factory.mktemp("quantised")
    rows = [
        {"text": f"w{i % 11} w{(i * 5) % 17} w{20 + i % 2} w{i % 3}", "label": "ab"[i % 2]}
        for i in range(60)
    ]
    texts = [{"text": " ".join(f"w{(i + j) % 9}" for j in range(12))} for i in range(40)]
    for name, lines in (("labels", rows), ("texts", texts)):
        (place / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    save_tiny_model(place / "bert", "bert", head="base")
    save_tiny_model(place / "llama", "llama")
    data = {"bert": str(place / "labels.jsonl"), "llama": str(place / "texts.jsonl")}
    return SimpleNamespace(place=place, data=data)


def settings(world, model, **more):
    given = {"data": world.data[model.partition("-")[0]], "budget": "1200", "kinds": KINDS}
    return given | {"train": TRAIN, "search": BRIEF, "device": "cpu"} | more


def search(world, model, name, **more):
    given = settings(world, model, **more)
    data, output = given.pop("data"), str(world.place / "runs" / name)
    return prunepeft.search(str(world.place / model), data, output=output, **given)


def plan(world, model, **more):
    flat = {}
    for key, value in settings(world, model, **more).items():
        inner = isinstance(value, dict)
        flat |= {f"{key}.{k}": v for k, v in value.items()} if inner else {key: value}
    return make_plan(load_config(None, (), {"model": str(world.place / model), **flat}))


def on_disk(world, model, word):
    """Folder of a model that was saved in few bits, with its tokenizer."""
    place = world.place / f"{model}-{word}"
    if not place.is_dir():
        cls = AutoModel if model == "bert" else AutoModelForCausalLM
        save_quantized(place, cls, world.place / model, word)
        tiny_tokenizer("bert" if model == "bert" else "causal").save_pretrained(place)
    return place.name


@pytest.fixture(scope="module")
def bnb():
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    return pytest.importorskip("bitsandbytes", reason='needs pip install "prunepeft[quant]"')


# --- before weights are read ---------------------------------------------------------------


@pytest.fixture
def installed(monkeypatch):
    """As if bitsandbytes were there; nothing here opens a model."""
    monkeypatch.setattr(quantized, "find_spec", lambda name: object())


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("model", MODELS)
def test_the_plan_is_that_of_the_plain_model_and_the_memory_is_not(world, model):
    plain = plan(world, model, budget="5%")
    whole = describe(plain)["memory_bytes"]
    coded = sum(s.d_in * s.d_out for s in plain.sites if s.role != "norm")
    largest = max(s.d_in * s.d_out for s in plain.sites if s.role != "norm")
    for word, bits in (("8bit", 8), ("4bit", 4)):
        held = plan(world, model, budget="5%", quantize=word)
        assert (held.n_base, held.limit, held.sites) == (plain.n_base, plain.limit, plain.sites)
        assert held.space == plain.space
        said = describe(held)
        assert said["model"]["weights"] == f"{bits} bits (bitsandbytes)"
        saved = coded * (4 - BYTES[bits]) - 4 * largest
        assert whole - said["memory_bytes"] == pytest.approx(saved, abs=1)
    assert "weights" not in describe(plain)["model"]


def test_absence_of_the_package_is_said_before_weights_are_read(world, monkeypatch):
    monkeypatch.setattr(quantized, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"4 bits needs bitsandbytes.*prunepeft\[quant\]"):
        plan(world, "bert", quantize="4bit")


def quantised_config(world, model):
    """A model folder whose config says that it is quantised; it has no weights."""
    place = world.place / f"{model}-said"
    if not place.is_dir():
        place.mkdir()
        for file in (world.place / model).iterdir():
            if file.suffix != ".safetensors":
                (place / file.name).write_bytes(file.read_bytes())
        config = json.loads((place / "config.json").read_text())
        config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_8bit": True}
        (place / "config.json").write_text(json.dumps(config))
    return place.name


@pytest.mark.usefixtures("installed")
def test_codes_are_not_cut_over_processes(world, monkeypatch):
    monkeypatch.setattr("prunepeft.sharding.n_processes", lambda: 2)
    with pytest.raises(ConfigError, match="quantised; give the model it was made of without"):
        plan(world, "bert", quantize="4bit", shard=True)


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"quantize": "3bit"}, r"quantize got '3bit': .*'none', '8bit' or '4bit'"),
        (
            {"quantize": "4bit", "base_ratio": 0.5},
            r"quantised, .*cannot be cut.*prune-base without",
        ),
        ({"quantize": "8bit", "method": "light-peft"}, r"quantised, and its layers cannot be cut"),
        ({"quantize": "8bit", "method": "gora"}, r"gora needs gradients of the frozen weights"),
        ({"quantize": "8bit", "method": "fisher"}, r"fisher needs gradients of the frozen weights"),
    ],
)
def test_what_cannot_be_had_is_one_error(world, more, message):
    if "method" in more:
        more = {"search": {}, **more}
    with pytest.raises(ConfigError, match=message):
        plan(world, "bert", **more)


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            {"quantize": "4bit"},
            r"quantize is 4bit, but .* 8 bits \(bitsandbytes, as it is on",
        ),
        ({"base_ratio": 0.5}, "quantised, and its layers cannot be cut"),
        ({"method": "gora", "search": {}}, "gora needs gradients"),
    ],
)
def test_a_model_quantised_on_disk_is_known_by_its_config(world, more, message):
    model = quantised_config(world, "bert")
    with pytest.raises(ConfigError, match=message):
        plan(world, model, **more)
    assert describe(plan(world, model))["model"]["weights"].startswith("8 bits")


# --- searches ------------------------------------------------------------------------------


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("word", WORDS)
def test_a_search_on_codes_ends_with_an_adapter_that_learned(bnb, world, model, word):
    result = search(world, model, f"{model}-{word}", quantize=word)
    plain = search(world, model, f"{model}-none")
    report = result.report
    assert report["metric"]["reloaded"] == pytest.approx(result.metric, rel=1e-6)
    assert report["model"]["n_params"] == plain.report["model"]["n_params"]
    assert 0 < report["budget"]["realised"] <= report["budget"]["limit"] == 1200
    assert 0 < len(result.placement) < report["space"]["n_slots"]
    losses = [epoch["validation_loss"] for epoch in report["train"]["curve"]]
    assert losses[-1] < losses[0]
    if model == "llama":  # perplexity
        assert result.metric != plain.metric
        assert result.metric == pytest.approx(plain.metric, rel=0.15)
    saved = load_file(result.adapter / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}
    assert not any("quant_state" in name or "SCB" in name for name in saved)
    head = [name for name in saved if "classifier" in name or "pooler" in name]
    assert len(head) == (4 if model == "bert" else 0)


@pytest.mark.parametrize("model", MODELS)
def test_the_card_opens_the_base_as_the_run_did(bnb, world, model, monkeypatch):
    result = search(world, model, f"{model}-4bit", quantize="4bit")
    card = (result.path / "README.md").read_text()
    assert "was held in 4 bits (bitsandbytes)" in card
    code = card.partition("```python\n")[2].partition("```")[0]
    assert 'bnb_4bit_compute_dtype="float32"' in code
    monkeypatch.chdir(result.path)
    names = {}
    exec(compile(code, "README.md", "exec"), names)
    assert isinstance(names["model"], PeftModel)
    texts = [json.loads(line)["text"] for line in Path(world.data[model]).read_text().splitlines()]
    batch = names["tokenizer"](texts[:2], return_tensors="pt")
    engine = run.Engine(
        run.plan_as_trained(run.RunFolder(result.path)), run.RunFolder(result.path), is_main=False
    )
    again = PeftModel.from_pretrained(engine.model, str(result.adapter)).eval()
    with torch.no_grad():
        found, expected = names["model"](**batch).logits, again(**batch).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("model", "word"), [("bert", "4bit"), ("llama", "8bit")])
def test_a_model_quantised_on_disk_is_searched_as_it_is(bnb, world, model, word, monkeypatch):
    kinds = ["lora", "dora", "ssl"]
    result = search(world, on_disk(world, model, word), f"{model}-{word}-disk", kinds=kinds)
    report = result.report
    assert report["model"]["quantization"]["words"].endswith("as it is on disk)")
    assert report["metric"]["reloaded"] == pytest.approx(result.metric, rel=1e-6)
    losses = [epoch["validation_loss"] for epoch in report["train"]["curve"]]
    assert losses[-1] < losses[0]
    code = (result.path / "README.md").read_text().partition("```python\n")[2].partition("```")[0]
    assert ("open_quantized" in code) == (model == "bert")
    monkeypatch.chdir(result.path)
    names = {}
    exec(compile(code, "README.md", "exec"), names)
    measured = run.evaluate(result.path)["metrics"][report["metric"]["name"]]
    assert measured == pytest.approx(result.metric, rel=1e-6)
    with pytest.raises(ConfigError, match="quantised; merging would round every weight"):
        result.export("merged")


def test_only_lora_is_exported_for_peft_alone(bnb, world):
    result = search(world, "llama", "llama-lora", quantize="4bit", kinds=["lora"])
    config = json.loads((result.export("peft") / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert (result.export("merged") / "config.json").is_file()  # into the base in full precision


def test_half_precision_and_checkpointing(bnb, world):
    train = TRAIN | {"gradient_checkpointing": True, "gradient_accumulation": 2}
    result = search(world, "llama", "llama-bf16", quantize="4bit", precision="bf16", train=train)
    held = result.report["model"]["quantization"]["settings"]
    assert held["bnb_4bit_compute_dtype"] == "bfloat16"
    losses = [epoch["validation_loss"] for epoch in result.report["train"]["curve"]]
    assert losses[-1] < losses[0]


def test_frozen_blocks_of_codes_run_once_per_row(bnb, world, monkeypatch):
    """4-bit layers compute alike in training and evaluation, so nothing changes."""
    sites = [s for s in plan(world, "bert").sites if s.layer == 1]
    placement = make_space(sites, ("lora", "dora"), sizes={"lora": 2, "dora": 2}).full()
    arch = world.place / "upper.json"
    arch.write_text(json.dumps(placement.to_dict()))
    made, make = [], StateMaker.make
    monkeypatch.setattr(StateMaker, "make", lambda *args: made.append(1) or make(*args))
    adapters = []
    for limit in (1.0, 0.0):
        output = world.place / f"upper-{limit}"
        train = {f"train.{key}": value for key, value in TRAIN.items()}
        flags = {"model": str(world.place / "bert"), "data": world.data["bert"], "device": "cpu"}
        flags |= {"arch": str(arch), "output": str(output), "quantize": "4bit", **train}
        run.search(load_config(None, (), flags | {"train.prefix_cache_gb": limit}))
        adapters.append(load_file(output / "best" / "adapter" / "adapter_model.safetensors"))
        assert len(made) == 2  # of the training and of the validation rows, and only where asked
    torch.testing.assert_close(adapters[0], adapters[1], rtol=0, atol=1e-5)


def test_a_run_that_stopped_goes_on_to_the_same_bytes(bnb, world, monkeypatch):
    whole = search(world, "bert", "bert-4bit", quantize="4bit")
    train = TrainerEvaluator.train

    def stops(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(TrainerEvaluator, "train", stops)
    with pytest.raises(KeyboardInterrupt):
        search(world, "bert", "stopped", quantize="4bit")
    monkeypatch.setattr(TrainerEvaluator, "train", train)
    resumed = search(world, "bert", "stopped", quantize="4bit")
    assert resumed.placement == whole.placement
    first, second = (r.adapter / "adapter_model.safetensors" for r in (whole, resumed))
    assert first.read_bytes() == second.read_bytes()
    with pytest.raises(ConfigError, match="quantize"):
        search(world, "bert", "stopped", quantize="none")


def test_a_base_that_was_cut_is_quantised_afterwards(bnb, world):
    given = {"train": TRAIN, "device": "cpu", "base": {"method": "magnitude", "stock": False}}
    base = prunepeft.prune_base(
        str(world.place / "bert"),
        world.data["bert"],
        ratio=0.5,
        output=str(world.place / "cut"),
        **given,
    )
    result = prunepeft.search(
        str(base),
        world.data["bert"],
        budget="800",
        output=str(world.place / "on-cut"),
        train=TRAIN,
        search=BRIEF,
        device="cpu",
        quantize="8bit",
    )
    assert result.report["metric"]["reloaded"] == pytest.approx(result.metric, rel=1e-6)
    config = json.loads((result.adapter / "adapter_config.json").read_text())
    assert config["base_digest"]


# What each method needs to run at this size; those that a quantised base refuses are left out.
METHOD_SETTINGS = {
    "adalora": {"train": TRAIN | {"batch_size": 4}, "search": {"epochs": 2}},
    "eva": {"search": {}},
    "kappatune": {"search": {}},
    "lora_drop": {"search": {}},
    "s3delta": {"search": {}},
}


@pytest.mark.slow
@pytest.mark.parametrize("method", METHOD_SETTINGS)
def test_other_methods_search_on_codes(bnb, world, method):
    assert not METHODS.get(method).reads_gradients
    given = METHOD_SETTINGS[method] | {"kinds": ["lora"], "method": method, "quantize": "8bit"}
    result = search(world, "bert", f"method-{method}", **given)
    assert result.report["metric"]["reloaded"] == pytest.approx(result.metric, rel=1e-6)
    losses = [epoch["validation_loss"] for epoch in result.report["train"]["curve"]]
    assert losses[-1] < losses[0]
