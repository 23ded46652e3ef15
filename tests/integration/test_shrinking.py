"""A smaller base: `prune-base`, `base_ratio` and Light-PEFT, from files to files."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AlbertConfig,
    AlbertModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
)

import prunepeft
from prunepeft import run
from prunepeft.base_plan import plan_groups
from prunepeft.config import BASE_METHOD_NAMES, load_config
from prunepeft.config.yaml_text import read_yaml
from prunepeft.errors import ConfigError, SiteError, StateError
from prunepeft.structured.groups import find_groups
from tests.tiny_tokenizer import save_tiny_model

FAST = {"epochs": 1, "lr": 5e-3, "batch_size": 8}
BRIEF = {"rounds": 1, "warmup": False}


@dataclass
class World:
    """Model folders, data files and a place for runs."""

    place: Path
    bert: str
    llama: str
    labels: str
    texts: str


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    place = tmp_path_factory.mktemp("shrinking")
    rows = [{"text": f"w{i % 11} w{20 + i % 2} w{i % 3}", "label": "ab"[i % 2]} for i in range(48)]
    (place / "labels.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    texts = [{"text": " ".join(f"w{(i + j) % 9}" for j in range(12))} for i in range(48)]
    (place / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))
    return World(
        place,
        str(save_tiny_model(place / "bert", "bert", head="base")),
        str(save_tiny_model(place / "llama", "llama")),
        str(place / "labels.jsonl"),
        str(place / "texts.jsonl"),
    )


def prune_texts(world: World, name: str, ratio: float = 0.5, **base: Any) -> Path:
    """The tiny LLaMA, cut for the texts."""
    return prunepeft.prune_base(
        world.llama,
        world.texts,
        ratio=ratio,
        base={"epochs": 2, "every": 2} | base,
        train=FAST | {"max_length": 16},
        output=str(world.place / name),
        device="cpu",
    )


@pytest.mark.parametrize("method", BASE_METHOD_NAMES)
def test_every_method_leaves_a_model_that_stock_transformers_opens(world, method):
    folder = prune_texts(world, f"texts-{method}", method=method)
    record = json.loads((folder.parent / "result.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(folder)
    whole = AutoModelForCausalLM.from_pretrained(world.llama)
    assert record["base"]["n_params"] == model.num_parameters() < whole.num_parameters()
    assert model.config.intermediate_size == whole.config.intermediate_size // 2
    assert 2 * model.config.num_key_value_heads == whole.config.num_key_value_heads
    assert record["metric"]["name"] == "perplexity"
    assert record["metric"]["value"] > 1
    with torch.no_grad():
        assert torch.isfinite(model(torch.arange(6)[None]).logits).all()


def test_light_peft_leaves_kept_weights_alone_and_loraprune_merges(world):
    whole = AutoModelForCausalLM.from_pretrained(world.llama)
    rows = {tuple(r.tolist()) for r in whole.model.layers[0].mlp.up_proj.weight}
    for method, same in (("light-peft", True), ("loraprune", False)):
        folder = prune_texts(world, f"texts-{method}", method=method)
        model = AutoModelForCausalLM.from_pretrained(folder)
        kept = {tuple(r.tolist()) for r in model.model.layers[0].mlp.up_proj.weight}
        assert (kept <= rows) is same


def test_a_finished_or_killed_prune_base_repeats_nothing(world, monkeypatch):
    folder = prune_texts(world, "again", method="loraprune")
    before = (folder / "model.safetensors").read_bytes()
    monkeypatch.setattr("prunepeft.training.evaluator.train_briefly", None)
    assert prune_texts(world, "again", method="loraprune") == folder
    (folder.parent / "result.json").unlink()
    assert prune_texts(world, "again", method="loraprune") == folder
    assert (folder / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize("method", ["light-peft", "loraprune"])
def test_one_search_gives_placement_and_smaller_base(world, method):
    result = prunepeft.search(
        world.bert,
        world.labels,
        budget="900",
        base_ratio=0.5,
        base={"epochs": 2, "every": 2, "method": method},
        train=FAST,
        search=BRIEF,
        baseline="lora",
        output=str(world.place / f"both-{method}"),
        device="cpu",
    )
    report = result.report
    base = AutoModelForSequenceClassification.from_pretrained(result.path / "base")
    whole = AutoModelForSequenceClassification.from_pretrained(world.bert)
    assert base.config.intermediate_size == whole.config.intermediate_size // 2
    assert base.config.num_attention_heads == whole.config.num_attention_heads
    assert report["base"]["n_params"] < report["base"]["n_params_before"]
    assert report["base"]["neurons"]["kept"] * 2 == report["base"]["neurons"]["before"]
    assert report["budget"]["realised"] <= 900
    adapter = json.loads((result.adapter / "adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == str(result.path / "base")
    again = run.evaluate(result.path)
    assert again["metrics"][report["metric"]["name"]] == pytest.approx(result.metric)
    text = (result.path / "README.md").read_text()
    assert str(result.path / "base") in text or '"base"' in text


def test_light_peft_cuts_heads_of_a_bert_if_stock_tools_need_not_open_it(world):
    result = prunepeft.search(
        world.bert,
        world.labels,
        budget="900",
        method="light-peft",
        base_ratio=0.5,
        base={"stock": False},
        kinds=["lora"],
        train=FAST,
        output=str(world.place / "early"),
        device="cpu",
    )
    heads = result.report["base"]["heads"]
    assert 2 * heads["kept"] == heads["before"]
    groups = find_groups(prunepeft.load_base(result.path / "base"))
    assert sum(g.n_units for g in groups if g.what == "heads") == heads["kept"]
    assert result.report["budget"]["realised"] <= 900
    again = run.evaluate(result.path)
    assert again["metrics"][result.report["metric"]["name"]] == pytest.approx(result.metric)


def test_a_pruned_base_is_a_model_like_any_other(world):
    folder = prune_texts(world, "texts-light-peft", method="light-peft")
    result = prunepeft.search(
        str(folder),
        world.texts,
        budget="400",
        kinds=["lora"],
        train=FAST | {"max_length": 16},
        search=BRIEF,
        output=str(world.place / "on-small"),
        device="cpu",
    )
    assert result.report["model"]["name"] == str(folder)
    assert result.report["budget"]["realised"] <= 400


@pytest.mark.slow
def test_a_pruned_base_opens_where_prunepeft_is_not_installed(world):
    folder = prune_texts(world, "texts-loraprune", method="loraprune")
    code = (
        "import sys; sys.modules['prunepeft'] = None; sys.modules['peft'] = None\n"
        "import torch; from transformers import AutoModelForCausalLM\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(folder)!r})\n"
        "print(model.generate(torch.arange(4)[None], max_new_tokens=4, do_sample=False).shape)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ, check=False
    )
    assert "torch.Size([1, 8])" in done.stdout, done.stderr


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"ratio": 0}, "ratio"),
        ({"ratio": 1.0}, "base_ratio"),
        ({"ratio": -0.1}, "base_ratio"),
        ({"ratio": 0.01}, "nearest"),
        ({"ratio": 0.5, "base": {"method": "loraprun"}}, "loraprune"),
        ({"ratio": 0.5, "base": {"scope": "global"}}, "base.stock=false"),
        ({"ratio": 0.5, "ist": "on"}, "ist=on says nothing"),
    ],
)
def test_wrong_settings_end_in_one_error_and_no_folder(world, settings, words):
    output = world.place / "wrong"
    with pytest.raises(ConfigError, match=words):
        prunepeft.prune_base(
            world.llama, world.texts, output=str(output), train=FAST, device="cpu", **settings
        )
    assert not output.exists()


def test_a_quantised_base_is_refused_before_weights_are_read(world):
    folder = world.place / "quantised"
    shutil.copytree(world.llama, folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="quantised"):
        prunepeft.prune_base(str(folder), world.texts, ratio=0.5, device="cpu")


def test_a_model_without_known_structures_is_refused(world):
    folder = world.place / "albert"
    sizes = {"vocab_size": 64, "hidden_size": 16, "num_attention_heads": 2, "embedding_size": 8}
    albert = AlbertConfig(**sizes, num_hidden_layers=2, num_hidden_groups=2, intermediate_size=24)
    AlbertModel(albert).save_pretrained(folder)
    for file in Path(world.bert).glob("*token*"):
        shutil.copy(file, folder)
    with pytest.raises(SiteError, match="heads or feed-forward neurons that are known"):
        prunepeft.prune_base(str(folder), world.labels, ratio=0.5, device="cpu")


def test_a_share_that_breaks_grouped_heads_names_the_nearest(world):
    with pytest.raises(ConfigError, match=r"nearest that can: 0\.5"):
        prunepeft.prune_base(world.llama, world.texts, ratio=0.3, device="cpu")


def test_an_architecture_and_a_cut_do_not_go_together():
    with pytest.raises(ConfigError, match=r"arch\.json fits the base model"):
        load_config(None, ("arch=a.json", "base_ratio=0.5"), {"model": "m", "data": "d"})


def test_what_a_method_does_not_read_is_refused():
    flags = {"model": "m", "data": "d", "budget": "1%"}
    with pytest.raises(ConfigError, match=r"base\.epochs says nothing"):
        load_config(None, ("method=light-peft", "base.epochs=7"), flags)
    with pytest.raises(ConfigError, match="method=light-peft alone"):
        load_config(None, ("light_peft.l1=0.1", "base_ratio=0.5"), flags)


def test_heads_asked_for_are_not_kept_in_silence(world):
    settings = {"method": "light-peft", "light_peft": {"head_ratio": 0.5}, "device": "cpu"}
    with pytest.raises(ConfigError, match=r"base\.stock=false"):
        prunepeft.search(world.bert, world.labels, budget="900", **settings)


def test_a_share_that_a_stock_config_cannot_say_names_some_that_it_can(tmp_path):
    sizes = {"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 8}
    config = LlamaConfig(**sizes, intermediate_size=96, num_hidden_layers=2, vocab_size=64)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    flags = {"model": "m", "data": "d", "base_ratio": 0.375}
    with pytest.raises(ConfigError, match=r"it can say 0\.5, 0\.75"):
        plan_groups(load_config(None, (), flags), model, cuts_base=False)
    groups = plan_groups(load_config(None, (), flags | {"base_ratio": 0.5}), model, cuts_base=False)
    assert {g.what for g in groups} == {"heads", "neurons"}
    loose = flags | {"base.stock": False}
    assert plan_groups(load_config(None, (), loose), model, cuts_base=False) == groups


def test_a_run_does_not_eat_its_own_model(world):
    folder = prune_texts(world, "eaten", method="random")
    with pytest.raises(ConfigError, match="lies in the run folder"):
        prunepeft.search(
            str(folder), world.texts, budget="400", output=str(folder.parent), device="cpu"
        )
    assert (folder / "config.json").is_file()
    with pytest.raises(StateError, match="no adapter"):
        run.evaluate(folder.parent)


def test_a_prune_base_run_is_not_taken_for_a_search(world):
    prune_texts(world, "job", method="random")
    config = read_yaml(world.place / "job" / "config.yaml") | {"budget": "400"}
    with pytest.raises(ConfigError):
        run.search(load_config(None, (), config))


def test_the_tokenizer_and_the_trained_head_go_with_the_base(world):
    folder = prunepeft.prune_base(
        world.bert,
        world.labels,
        ratio=0.5,
        base={"epochs": 3},
        train=FAST,
        output=str(world.place / "head"),
        device="cpu",
    )
    ours = AutoTokenizer.from_pretrained(folder)
    theirs = AutoTokenizer.from_pretrained(world.bert)
    assert (ours.padding_side, ours.model_max_length) == (
        theirs.padding_side,
        theirs.model_max_length,
    )
    fresh = run.make_plan(
        load_config(None, (), {"model": str(folder), "data": world.labels} | {"budget": "900"})
    )
    assert (
        fresh.n_base
        < run.make_plan(
            load_config(None, (), {"model": world.bert, "data": world.labels, "budget": "900"})
        ).n_base
    )


def test_a_dry_run_says_what_it_would_take(world):
    config = load_config(
        None, (), {"model": world.llama, "data": world.texts, "base_ratio": 0.5, "device": "cpu"}
    )
    found = run.prune_base(config, dry_run=True)
    assert found["base"] == {"heads": "2 of 4", "neurons": "16 of 32", "steps": 2}
    assert not found.keys() & {"search", "train", "candidates"}
