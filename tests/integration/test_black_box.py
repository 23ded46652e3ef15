"""Trials on a real model: what the evaluator answers, keeps and survives, and a whole search."""

import contextlib
import json
import time
from dataclasses import replace
from pathlib import Path

import pytest
from torch.testing import assert_close

import prunepeft
from prunepeft import run
from prunepeft.budget import Fidelity
from prunepeft.cli import main
from prunepeft.config import load_config
from prunepeft.errors import DataError, OutOfMemoryError
from prunepeft.kinds import cost
from prunepeft.space import Placement
from prunepeft.strategies import AutoPeft, Evolution, Problem, RandomSearch, SuccessiveHalving
from prunepeft.training import TrainerEvaluator
from tests.integration.test_planted import make_world
from tests.tiny_tokenizer import save_tiny_model

HALF = Fidelity(0.5)


@pytest.fixture
def world(tmp_path: Path):
    evaluator, space, _ = make_world(0, tmp_path)
    return evaluator, space


def count_trainings(evaluator: TrainerEvaluator, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of every training from now on."""
    seen: list[int] = []
    run = evaluator.phases.run

    def counting(net, rows, *args):
        seen.append(len(rows))
        return run(net, rows, *args)

    monkeypatch.setattr(evaluator.phases, "run", counting)
    return seen


def few(space, n: int, first: int = 0) -> Placement:
    return Placement({s: s.sizes[-1] for s in space.slots[first : first + n]})


def search(world, strategy):
    evaluator, space = world
    problem = Problem(space, 6, "modules", evaluator, 96, Fidelity(), seed=1)
    return strategy.search(replace(problem, metric="accuracy", batch_size=12))


# --- one trial ----------------------------------------------------------------------------------


def test_a_trial_is_answered_from_the_journal_and_depends_on_all_it_is_given(world, monkeypatch):
    evaluator, space = world
    seen = count_trainings(evaluator, monkeypatch)
    placement = few(space, 3)
    first = evaluator.trial(placement, name="trial 1", fidelity=HALF, seed=3)
    assert set(first.metrics) == {"accuracy"}
    assert (first.steps, first.rows, first.error) == (4, 48, "")
    assert evaluator.trial(placement, name="again", fidelity=HALF, seed=3) == first
    assert seen == [48]
    others = [
        evaluator.trial(few(space, 4), name="t", fidelity=HALF, seed=3),
        evaluator.trial(placement, name="t", fidelity=Fidelity(0.25), seed=3),
        evaluator.trial(placement, name="t", fidelity=Fidelity(0.5, 2), seed=3),
        evaluator.trial(placement, name="t", fidelity=HALF, seed=4),
    ]
    assert len({t.key for t in (first, *others)}) == 5
    assert [t.steps for t in others] == [4, 2, 8, 4]
    assert seen == [48, 48, 24, 48, 48, 48]


def test_a_trial_leaves_the_base_as_it_was_and_is_pure(world, tmp_path):
    evaluator, space = world
    before = {n: t.clone() for n, t in evaluator.model.state_dict().items()}
    first = evaluator.trial(few(space, 3), name="t", fidelity=HALF, seed=3)
    evaluator.trial(few(space, 5), name="t", fidelity=HALF, seed=3)
    after = evaluator.model.state_dict()
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert_close(after[name], value, rtol=0, atol=0)
    fresh, _, _ = make_world(0, tmp_path / "other")
    fresh.trial(few(space, 4), name="t", fidelity=HALF, seed=3)
    again = fresh.trial(few(space, 3), name="t", fidelity=HALF, seed=3)
    assert (again.metrics, again.loss) == (first.metrics, first.loss)


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (OutOfMemoryError("memory ran out"), "OutOfMemoryError: memory ran out"),
        (RuntimeError("device-side assert"), "RuntimeError: device-side assert"),
    ],
)
def test_a_trial_that_fails_is_a_result_and_the_next_one_runs(world, monkeypatch, error, text):
    evaluator, space = world
    names = list(evaluator.model.state_dict())

    def fail(*args):
        evaluator.phases.pieces = 64
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(evaluator.phases, "run", fail)
        failed = evaluator.trial(few(space, 3), name="t", fidelity=HALF, seed=3)
    assert (failed.error, failed.metrics, failed.steps) == (text, {}, 4)
    assert list(evaluator.model.state_dict()) == names
    assert evaluator.phases.pieces == 1
    assert evaluator.trial(few(space, 3), name="t", fidelity=HALF, seed=3) == failed
    assert evaluator.trial(few(space, 4), name="t", fidelity=HALF, seed=3).metrics


@pytest.mark.parametrize("where", ["attach", "reusing"])
def test_a_trial_that_fails_before_its_training_is_a_result_too(world, monkeypatch, where):
    evaluator, space = world
    names = list(evaluator.model.state_dict())

    def fail(*args, **kwargs):
        raise RuntimeError("CUDA error: out of memory")

    with monkeypatch.context() as patched:
        patched.setattr(evaluator if where == "attach" else evaluator.phases, where, fail)
        failed = evaluator.trial(few(space, 3), name="t", fidelity=HALF, seed=3)
    assert "out of memory" in failed.error
    assert list(evaluator.model.state_dict()) == names
    assert evaluator.trial(few(space, 4), name="t", fidelity=HALF, seed=3).metrics


def test_seconds_of_a_trial_hold_the_states_of_frozen_layers(world, monkeypatch):
    evaluator, space = world

    @contextlib.contextmanager
    def slowly(*args):
        time.sleep(2)
        yield

    monkeypatch.setattr(evaluator.phases, "reusing", slowly)
    assert evaluator.trial(few(space, 3), name="t", fidelity=HALF, seed=3).seconds > 2


def test_a_metric_that_is_not_finite_is_a_failure(world, monkeypatch):
    evaluator, space = world
    monkeypatch.setattr(evaluator.phases, "evaluate", lambda net: {"accuracy": float("nan")})
    failed = evaluator.trial(few(space, 3), name="t", fidelity=HALF, seed=3)
    assert "accuracy became nan" in failed.error


@pytest.mark.parametrize("error", [DataError("a bad row"), OSError("disk"), KeyboardInterrupt()])
def test_errors_of_the_run_are_raised_and_leave_nothing_behind(world, monkeypatch, error):
    evaluator, space = world
    names = list(evaluator.model.state_dict())

    def fail(*args):
        raise error

    monkeypatch.setattr(evaluator.phases, "run", fail)
    with pytest.raises(type(error)):
        evaluator.trial(few(space, 3), name="t", fidelity=HALF, seed=3)
    assert list(evaluator.model.state_dict()) == names
    assert evaluator.trials.journal.keys() == []


# --- a whole search -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "strategy",
    [
        RandomSearch(n_trials=4, fidelity=0.25),
        SuccessiveHalving(n_trials=4, eta=2, fidelity=0.5),
        Evolution(n_trials=5, fidelity=0.25, population=3, sample=2),
        AutoPeft(n_trials=5, fidelity=0.25, initial=3, batch=2, surrogate="gp"),
    ],
    ids=lambda s: s.name,
)
def test_a_search_that_was_killed_replays(world, monkeypatch, strategy):
    if strategy.name == "autopeft":
        pytest.importorskip("botorch")
    seen = count_trainings(world[0], monkeypatch)
    whole = search(world, strategy)
    n = len(seen)
    assert n == whole.runs == len(whole.history["trials"])
    again = search(world, strategy)
    assert len(seen) == n
    assert again.history == whole.history
    journal = world[0].trials.journal
    last = whole.history["trials"][-1]
    for key in journal.keys():
        call = json.loads((journal.folder / f"{key}.json").read_text())["call"]
        if call["placement"] == last["placement"] and call["fidelity"] == last["fidelity"]:
            (journal.folder / f"{key}.json").unlink()
    resumed = search(world, strategy)
    assert len(seen) == n + 1
    assert resumed.placement == whole.placement
    untimed = [[{**t, "seconds": 0} for t in r.history["trials"]] for r in (resumed, whole)]
    assert untimed[0] == untimed[1]


def _flat(model: str, folder: Path, settings: dict) -> dict:
    """The settings by dotted keys."""
    sections = {k: v for k, v in settings.items() if k in ("train", "black_box")}
    flat = {f"{name}.{k}": v for name, values in sections.items() for k, v in values.items()}
    plain = {k: v for k, v in settings.items() if k not in sections}
    return {"model": model, "data": str(folder / "train.jsonl"), **plain, **flat}


def test_random_search_from_files_to_an_adapter(tmp_path: Path) -> None:
    rows = [{"text": f"w{i % 11} w{20 + i % 2} w{i % 3}", "label": "ab"[i % 2]} for i in range(60)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {
        "budget": "1200",
        "method": "random",
        "sizes": {"lora": [1, 2, 4], "serial_adapter": [2, 4]},
        "train": {"epochs": 1, "lr": 5e-3, "batch_size": 16},
        "black_box": {"n_trials": 3, "fidelity": 0.5},
        "output": str(tmp_path / "run"),
        "device": "cpu",
    }
    model = str(save_tiny_model(tmp_path / "bert", "bert", head="base"))
    planned = run.check(load_config(None, (), _flat(model, tmp_path, settings)))["search"]
    # half of 54 rows are 27: one step of 16
    assert planned == {"runs": 3, "steps": 3, "rows_per_training_row": 1.5}
    result = prunepeft.search(model, str(tmp_path / "train.jsonl"), **settings)
    assert cost(result.placement, "parameters") <= 1200
    history = result.history
    assert [t["status"] for t in history["trials"]] == ["ok"] * 3
    best = history["trials"][history["best"] - 1]
    assert best["placement"] == result.placement.digest
    assert best["number"] in history["pareto"]
    assert best["metric"] == max(t["metric"] for t in history["trials"])
    assert (result.report["search"]["runs"], result.report["search"]["steps"]) == (3, 3)
    table = (result.path / "report" / "tables" / "trials.csv").read_text().splitlines()
    assert len(table) == 4
    assert "3 placements" in (result.path / "README.md").read_text()


@pytest.mark.slow
def test_autopeft_from_the_command_line_to_another_point_of_its_front(tmp_path: Path) -> None:
    pytest.importorskip("botorch")
    rows = [{"text": f"w{i % 11} w{20 + i % 2} w{i % 3}", "label": "ab"[i % 2]} for i in range(60)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {
        "method": "autopeft",
        "kinds": "serial_adapter,parallel_adapter,prefix",
        "train": {"epochs": 1, "lr": 5e-3, "batch_size": 16},
        "black_box": {"n_trials": 5, "initial": 3, "batch": 2, "fidelity": 0.5},
        "device": "cpu",
    }
    model = str(save_tiny_model(tmp_path / "bert", "bert", head="base"))
    flat = [f"{k}={v}" for k, v in _flat(model, tmp_path, settings).items()]
    folder = tmp_path / "run"
    with pytest.raises(SystemExit) as left:
        main(["search", *flat, "budget=1200", f"output={folder}"])
    assert not left.value.code
    best = Placement.from_dict(json.loads((folder / "best" / "arch.json").read_text()))
    assert cost(best, "parameters") <= 1200
    history = json.loads((folder / "history.json").read_text())
    assert len(history["trials"]) == len(history["hypervolume"]) == 5
    assert all(0 < t["cost"] <= 1200 for t in history["trials"])
    slots = {slot.id: slot for slot in Placement.from_dict(history["space"])}
    trial = history["trials"][history["pareto"][-1] - 1]
    placement = Placement({slots[i]: size for i, size in trial["sizes"].items()})
    assert placement.digest == trial["placement"]
    (tmp_path / "cheap.json").write_text(json.dumps(placement.to_dict()))
    again = tmp_path / "again"
    flat = [f for f in flat if not f.startswith(("black_box", "method", "kinds"))]
    with pytest.raises(SystemExit) as left:
        main(["train", *flat, f"arch={tmp_path / 'cheap.json'}", f"output={again}"])
    assert not left.value.code
    kept = json.loads((again / "best" / "arch.json").read_text())
    assert Placement.from_dict(kept) == placement
