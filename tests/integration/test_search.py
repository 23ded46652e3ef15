"""The library face from a model folder and a data file to a trained adapter that others load."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch.testing import assert_close
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

import prunepeft
from prunepeft import run
from prunepeft.config import load_config
from prunepeft.criteria import PAPER_CRITERIA
from prunepeft.errors import BudgetError, ConfigError
from prunepeft.kinds import cost
from prunepeft.result import Result, load_result
from prunepeft.training import TrainerEvaluator
from tests.tiny_tokenizer import save_tiny_model

ROOT = Path(__file__).parents[2]
FAST = {"epochs": 1, "lr": 5e-3, "batch_size": 16}
BRIEF = {"rounds": 2, "warmup": False}
RESULT_KEYS = {
    "": "schema_version prunepeft_version command created method seed task model data budget space "
    "placement head_params metric search train baselines environment",
    "task": "name metric greater_is_better n_train n_validation labels",
    "model": "name family n_params",
    "data": "source fingerprint",
    "budget": "text unit limit realised",
    "space": "n_slots n_params kinds",
    "placement": "digest n_modules n_params kinds modules",
    "metric": "name value all best_epoch reloaded",
    "search": "seconds steps rounds runs peak_memory_bytes continues",
    "train": "seconds steps epochs peak_memory_bytes curve",
    "environment": "python torch transformers peft platform processor device threads",
}
BASELINE_KEYS = "name n_params rank metric seconds steps epochs peak_memory_bytes curve"
FILES = (
    "config.yaml environment.json data.json events.jsonl metrics.jsonl result.json history.json "
    "README.md best/arch.json best/strategy.json best/adapter/adapter_config.json "
    "best/adapter/adapter_model.safetensors report/report.html state/manifest.json"
).split()


@dataclass
class World:
    """Model folders, data files and a place for runs."""

    place: Path
    bert: str
    llama: str
    labels: str
    texts: str

    def search(self, name: str, budget: str | int = "1200", **settings: Any) -> Result:
        """Classification on the tiny BERT."""
        given = {"train": FAST, "search": BRIEF, "device": "cpu"} | settings
        output = str(self.place / name)
        return prunepeft.search(self.bert, self.labels, budget=budget, output=output, **given)


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    place = tmp_path_factory.mktemp("search")
    rows = [
        {"text": f"w{i % 11} w{(i * 5) % 17} w{20 + i % 2} w{i % 3}", "label": "ab"[i % 2]}
        for i in range(60)
    ]
    (place / "labels.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    texts = [{"text": " ".join(f"w{(i + j) % 9}" for j in range(12))} for i in range(40)]
    (place / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))
    return World(
        place,
        str(save_tiny_model(place / "bert", "bert", head="base")),
        str(save_tiny_model(place / "llama", "llama")),
        str(place / "labels.jsonl"),
        str(place / "texts.jsonl"),
    )


@pytest.fixture(scope="session")
def whole(world: World) -> Result:
    """Everything on: warm-up, baseline, two epochs."""
    search = {"rounds": 2, "warmup_turns": 1, "warmup_rows": 16, "warmup_epochs": 1}
    train = FAST | {"epochs": 2}
    return world.search("whole", search=search, train=train, baseline="lora")


@pytest.fixture(scope="session")
def plain_lora(world: World) -> Result:
    """Only LoRA on the causal language model."""
    return prunepeft.search(
        world.llama,
        world.texts,
        budget="400",
        kinds=["lora"],
        train=FAST | {"max_length": 16, "lr": 2e-2, "epochs": 2},
        search=BRIEF,
        output=str(world.place / "lora"),
        device="cpu",
    )


def read(path: Path) -> Any:
    return json.loads(path.read_text())


# --- a whole run --------------------------------------------------------------------------------


def test_the_run_folder_is_complete(whole: Result) -> None:
    assert [f for f in FILES if not (whole.path / f).is_file()] == []
    report = read(whole.path / "result.json")
    assert report == whole.report
    for section, keys in RESULT_KEYS.items():
        found = report[section] if section else report
        assert found.keys() == set(keys.split()), section
    assert report["baselines"][0].keys() == set(BASELINE_KEYS.split())
    modules = report["placement"]["modules"]
    assert [m["id"] for m in modules] == list(whole.placement.ids)
    assert sum(m["n_params"] for m in modules) == report["placement"]["n_params"]
    assert not (whole.path / ".lock").exists()


def test_the_budget_is_kept_and_filled(whole: Result) -> None:
    budget = whole.report["budget"]
    assert budget["realised"] == cost(whole.placement, "parameters") <= 1200 == budget["limit"]
    full = {s["kind"]: s for s in whole.history["space"]["slots"]}
    assert set(full) == {"lora", "serial_adapter"}
    (baseline,) = whole.report["baselines"]
    assert baseline["name"] == "lora q+v"
    assert baseline["n_params"] <= 1200
    assert whole.report["head_params"] == (16 * 16 + 16) + (
        16 * 2 + 2
    )  # the pooler and the classifier


def test_the_history_is_the_evidence_of_the_search(whole: Result) -> None:
    history = whole.history
    slots = {s.id for s in whole.placement} | {i for r in history["rounds"] for i in r["removed"]}
    assert set(history["partitions"]) == slots
    assert history["warmup"]["runs"] < history["warmup"]["runs_unshared"]
    assert set(history["warmup"]["tendency"]) == set(PAPER_CRITERIA)
    assert set(history["strategy"]) == set(history["partitions"].values())
    assert [r["round"] for r in history["rounds"]] == [1, 2]
    assert history["rounds"][-1]["cost_after"] == whole.report["budget"]["realised"]
    assert whole.report["search"]["runs"] == history["warmup"]["runs"] + 2
    assert [e["epoch"] for e in whole.report["train"]["curve"]] == [1, 2]


def test_layers_judged_by_turning_them_down_take_part(world: World) -> None:
    search = BRIEF | {"criteria": ["snip", "ist"], "mode": "no_partitions"}
    train = FAST | {"batch_size": 4}  # modules that start as the identity must have moved
    found = world.search("ist-criterion", search=search, train=train)
    first = found.history["rounds"][0]["saliency"]["ist"]
    by_layer: dict[str, set[float]] = {}
    for slot_id, value in first.items():
        by_layer.setdefault(slot_id.split(".")[1], set()).add(value)
    assert all(len(values) == 1 for values in by_layer.values())
    assert len({v for values in by_layer.values() for v in values}) == len(by_layer) > 1
    again = world.search("ist-criterion-again", search=search, train=train)
    assert again.history["rounds"][0]["saliency"] == found.history["rounds"][0]["saliency"]


def test_the_adapter_gives_the_same_metric_in_plain_peft(world: World, whole: Result) -> None:
    base = AutoModelForSequenceClassification.from_pretrained(world.bert, num_labels=2)
    net = PeftModel.from_pretrained(base, whole.adapter).eval()
    tokenizer = AutoTokenizer.from_pretrained(world.bert)
    plan = run.make_plan(load_config(None, (), _flat(world, whole)))
    rows = plan.splits.validation
    batch = tokenizer(list(rows["text"]), padding=True, return_tensors="pt")
    with torch.no_grad():
        found = net(**batch).logits.argmax(-1)
    labels = torch.tensor(list(rows["label"]))
    accuracy = (found == labels).float().mean().item()
    assert accuracy == pytest.approx(whole.metric, abs=1e-4)
    assert run.evaluate(whole.path)["metrics"]["accuracy"] == pytest.approx(whole.metric, abs=1e-6)


def _flat(world: World, result: Result) -> dict[str, Any]:
    return {"model": world.bert, "data": world.labels, "budget": "1200", "output": str(result.path)}


def test_the_same_call_again_trains_nothing(world: World, whole: Result, monkeypatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("something was trained")

    monkeypatch.setattr(TrainerEvaluator, "score", fail)
    monkeypatch.setattr(TrainerEvaluator, "train", fail)
    search = {"rounds": 2, "warmup_turns": 1, "warmup_rows": 16, "warmup_epochs": 1}
    again = world.search("whole", search=search, train=FAST | {"epochs": 2}, baseline="lora")
    assert again.report == whole.report
    with pytest.raises(ConfigError, match="a run with other settings: budget"):
        world.search("whole", 900, search=search, train=FAST | {"epochs": 2}, baseline="lora")


def test_a_replayed_run_gives_the_same_bytes(world: World, whole: Result) -> None:
    search = {"rounds": 2, "warmup_turns": 1, "warmup_rows": 16, "warmup_epochs": 1}
    again = world.search("again", search=search, train=FAST | {"epochs": 2})
    for name in ("best/arch.json", "best/strategy.json", "best/adapter/adapter_model.safetensors"):
        assert (again.path / name).read_bytes() == (whole.path / name).read_bytes(), name


# --- LoRA alone is for everybody ----------------------------------------------------------------


def test_causal_language_model_learns(plain_lora: Result) -> None:
    report = plain_lora.report
    assert report["metric"]["name"] == "perplexity"
    curve = [entry["perplexity"] for entry in report["train"]["curve"]]
    assert curve[1] < curve[0]
    assert plain_lora.metric == min(curve) == report["metric"]["reloaded"]
    assert report["budget"]["realised"] <= 400
    assert plain_lora.placement.kinds == ("lora",)
    assert report["head_params"] == 0


def test_exported_lora_loads_without_this_package(world: World, plain_lora: Result) -> None:
    exported = plain_lora.export("peft")
    assert exported.is_relative_to(plain_lora.path / "exports")
    code = (
        "import json, sys, torch\n"
        "from peft import PeftModel\n"
        "from transformers import AutoModelForCausalLM\n"
        "base = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "net = PeftModel.from_pretrained(base, sys.argv[2]).eval()\n"
        "logits = net(input_ids=torch.tensor([[8, 9, 10, 11]])).logits\n"
        "assert 'prunepeft' not in sys.modules\n"
        "print(json.dumps(logits.tolist()))\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", code, world.llama, str(exported)],
        capture_output=True,
        text=True,
        cwd=world.place,
        env=environment | {"OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    base = AutoModelForCausalLM.from_pretrained(world.llama)
    plain = base(input_ids=torch.tensor([[8, 9, 10, 11]])).logits
    net = PeftModel.from_pretrained(base, plain_lora.adapter).eval()
    with torch.no_grad():
        own = net(input_ids=torch.tensor([[8, 9, 10, 11]])).logits
    assert_close(torch.tensor(json.loads(done.stdout.splitlines()[-1])), own, rtol=0, atol=1e-5)
    assert (own - plain).abs().max() > 1e-3


def test_merged_export_generates(plain_lora: Result) -> None:
    merged = AutoModelForCausalLM.from_pretrained(plain_lora.export("merged"))
    words = torch.tensor([[8, 9, 10, 11]])
    found = merged.generate(words, max_new_tokens=4, do_sample=False, pad_token_id=2)
    assert found.shape[1] > 4


# --- modes, transfer and fidelity ---------------------------------------------------------------


@pytest.mark.parametrize("mode", ["none", "random", "single:snip", "no_partitions"])
def test_modes(world: World, mode: str) -> None:
    result = world.search(f"mode-{mode.replace(':', '-')}", search=BRIEF | {"mode": mode})
    trained = {"none": 0, "random": 0}.get(mode, 2)
    assert result.report["search"]["runs"] == trained
    assert result.history["mode"] == mode
    if mode == "none":
        assert result.report["space"]["n_params"] == result.report["placement"]["n_params"] > 1200
    else:
        assert result.report["budget"]["realised"] <= 1200
    if trained:
        assert set(result.history["strategy"]) == {"all"}


@pytest.mark.parametrize(
    ("method", "score"),
    [
        ("smam", "first_order"),
        ("s3delta", "gate"),
        ("bipeft", "sensitivity"),
        ("gora", "gora"),
        ("lora_drop", "lora_drop"),
    ],
)
def test_other_methods(world: World, method: str, score: str) -> None:
    given = {"smam": {"rounds": 2}} if method == "smam" else {}
    given |= {"search": {"epochs": 2}, "kinds": ["lora", "bitfit"]}
    result = world.search(f"method-{method}", method=method, **given)
    assert 0 < result.report["budget"]["realised"] <= 1200
    assert result.report["search"]["runs"] == (2 if method == "smam" else 1)
    assert result.report["metric"]["reloaded"] == result.report["metric"]["value"]
    rounds = result.history["rounds"]
    assert all(list(r["saliency"]) == [score] for r in rounds)
    assert score in (result.path / "report" / "report.html").read_text("utf-8")


def test_a_strategy_is_carried_to_another_run(world: World, whole: Result) -> None:
    path = str(whole.path / "best" / "strategy.json")
    search = {"rounds": 2, "warmup_turns": 1, "warmup_rows": 16, "warmup_epochs": 1}
    result = world.search("carried", strategy=path, search=search, train=FAST | {"epochs": 2})
    assert result.history["warmup"] is None
    assert result.history["strategy"] == whole.history["strategy"]
    assert result.placement == whole.placement
    assert result.report["search"]["runs"] == 2


def test_an_architecture_is_carried_to_another_run(world: World, whole: Result) -> None:
    flat = {"model": world.bert, "data": world.labels, "arch": str(whole.path), "seed": 3}
    flat |= {f"train.{key}": value for key, value in FAST.items()}
    output = world.place / "arch"
    run.train(load_config(None, (), flat | {"output": str(output), "device": "cpu"}))
    result = load_result(output)
    assert result.placement == whole.placement
    assert result.report["search"]["runs"] == 0
    assert result.report["budget"]["text"] is None
    with pytest.raises(BudgetError, match="over the budget of 100"):
        run.train(load_config(None, (), flat | {"budget": "100", "output": str(output) + "-2"}))
    flat.pop("arch")
    with pytest.raises(ConfigError, match="train needs an architecture"):
        run.train(load_config(None, (), flat | {"budget": "1%"}))


def test_low_fidelity_sees_fewer_rows(world: World) -> None:
    result = world.search("low", search=BRIEF | {"fidelity": 0.3}, train=FAST | {"batch_size": 4})
    n_train = result.report["task"]["n_train"]
    assert [r["rows"] for r in result.history["rounds"]] == [round(0.3 * n_train)] * 2
    assert result.report["search"]["steps"] < result.report["train"]["steps"]


# --- budgets ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("budget", "unit", "limit"),
    [("3 modules", "modules", 3), ("rank:24", "rank", 24)],
)
def test_budget_forms(world: World, budget: str, unit: str, limit: int) -> None:
    name = budget.replace(" ", "").replace(":", "")
    result = world.search(f"budget-{name}", budget, sizes={"lora": 8, "serial_adapter": 8})
    found = result.report["budget"]
    assert (found["unit"], found["limit"]) == (unit, limit)
    assert found["realised"] == cost(result.placement, unit) == limit


def test_a_budget_above_everything_keeps_everything(world: World) -> None:
    result = world.search("ample", "120k", sizes={"lora": 2, "serial_adapter": 2})
    assert result.report["budget"]["limit"] == 120_000
    assert result.report["space"]["n_slots"] == len(result.placement)
    assert result.report["search"]["runs"] == 0


def test_a_budget_below_the_smallest_module_trains_nothing(world: World) -> None:
    with pytest.raises(BudgetError, match="the smallest module"):
        world.search("tiny", 3)
    assert not (world.place / "tiny").exists()
