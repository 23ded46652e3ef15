"""A comparison on a real tiny model: equal compute, resuming, failures, finished runs, the page."""

import json
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from prunepeft import run
from prunepeft.compare import Cell, compare, compare_runs
from prunepeft.compare.cells import more_trials, other_length, run_equal
from prunepeft.compare.settings import cell_config, with_settings
from prunepeft.config import load_config
from prunepeft.errors import ConfigError, DataError, LockedError, StateError, UnknownNameError
from prunepeft.estimates import planned_steps, shrinking_steps
from prunepeft.plan import make_plan, problem_of
from prunepeft.strategies import METHODS, BlackBox
from tests.tiny_tokenizer import save_tiny_model

METHODS_COMPARED = ("prunepeft", "random", "lora-all")
SEEDS = (0, 1)
SETTINGS = {
    "budget": "1200",
    "device": "cpu",
    "sizes.lora": [1, 2, 4],
    "train.epochs": 1,
    "train.lr": 0.02,
    "search.warmup": False,
    "search.rounds": 2,
    "black_box.n_trials": 2,
    "black_box.fidelity": 0.5,
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compare")
    save_tiny_model(folder / "bert", "bert", head="base")
    rows = [{"text": f"w{i % 11} w{20 + i % 2} w{i % 3}", "label": "ab"[i % 2]} for i in range(60)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def config_of(place: Path, **more):
    data = {"model": str(place / "bert"), "data": str(place / "train.jsonl")}
    return load_config(None, (), data | SETTINGS | more)


class Counter:
    """Stands for `run.search` and counts what is not finished yet; stops or fails on demand."""

    def __init__(self, stop_after: int = 99, fail: str = "") -> None:
        self.started: list[str] = []
        self.stop_after, self.fail, self.search = stop_after, fail, run.search

    def __call__(self, config, **how):
        name = Path(config.output).name
        if self.fail and self.fail in name:
            raise DataError("a bad row")
        if not (Path(config.output) / "result.json").is_file():
            if len(self.started) == self.stop_after:
                raise KeyboardInterrupt
            self.started.append(name)
        return self.search(config, **how)


@pytest.fixture(scope="module")
def finished(place: Path):
    """A comparison that was stopped in its sixth run and then went on: folder, content, lives."""
    lives = (Counter(stop_after=5), Counter())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("prunepeft.report.write.make_pictures", lambda evidence: [])
        patch.setattr(run, "search", lives[0])
        with pytest.raises(KeyboardInterrupt):
            compare(config_of(place), METHODS_COMPARED, SEEDS, output=place / "cmp")
        assert not (place / "cmp" / "compare.json").exists()
        assert not (place / "cmp" / ".lock").exists()
        patch.setattr(run, "search", lives[1])
        found = compare(config_of(place), METHODS_COMPARED, SEEDS, output=place / "cmp")
    return place / "cmp", found, [life.started for life in lives]


def cells_of(found) -> dict[tuple[str, str, int], Cell]:
    cells = [Cell.from_dict(data) for data in found["cells"]]
    return {(c.method, c.cost, c.seed): c for c in cells}


@pytest.fixture
def copy(finished, tmp_path: Path) -> Path:
    """The finished comparison, free to be changed."""
    shutil.copytree(finished[0], tmp_path / "cmp")
    return tmp_path / "cmp"


# --- a whole comparison ---------------------------------------------------------------------------

pytestmark = pytest.mark.slow


def test_each_run_happens_once_although_the_comparison_was_killed(finished):
    _, _, (first, second) = finished
    assert first == [f"{m}-own-{s}" for s in SEEDS for m in METHODS_COMPARED][:5]
    assert second == ["lora-all-own-1"] + [
        f"{m}-equal-{s}" for s in SEEDS for m in ("random", "lora-all")
    ]


def test_equal_cost_is_equal(finished):
    cells = cells_of(finished[1])
    assert len(cells) == 12
    for seed in SEEDS:
        own = cells["prunepeft", "own", seed]
        assert own.allowance is None
        for method in METHODS_COMPARED:
            cell = cells[method, "equal", seed]
            assert cell.allowance == own.steps
            assert cell.steps <= own.steps
            assert cell.metric is not None
        same = cells["prunepeft", "equal", seed]
        assert (same.run, same.metric, same.taken_over) == (own.run, own.metric, True)
        # 54 rows are 3 steps an epoch; half of them one step a trial
        trials = cells["random", "equal", seed]
        assert (trials.search_steps, trials.train_steps) == (own.steps - 3, 3)
        assert len(trials.trace) == own.steps - 3
        lora = cells["lora-all", "equal", seed]
        assert (lora.epochs, lora.search_steps) == (own.steps // 3, 0)


def test_methods_share_splits_and_budget(finished):
    folder, found, _ = finished
    for seed in SEEDS:
        prints = set()
        for method in METHODS_COMPARED:
            result = json.loads((folder / "runs" / f"{method}-own-{seed}/result.json").read_text())
            prints.add(result["data"]["fingerprint"])
            assert result["budget"]["limit"] == 1200
        assert len(prints) == 1
    assert all(c.n_params <= 1200 for c in cells_of(found).values())


class Strict(HTMLParser):
    """Every tag that opens closes."""

    VOID = ("meta", "br", "link", "img", "hr", "path", "use")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.links += [v for k, v in attrs if k in ("src", "href") and v and v[0] != "#"]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag


def test_the_page_stands_alone(finished):
    folder, found, _ = finished
    text = (folder / "compare.html").read_text()
    page = Strict()
    page.feed(text)
    assert page.open == []
    assert page.links == []
    assert "What to take from it" in text
    assert text.count("<figure") == 4
    assert "NaN" not in text
    assert "nan" not in (folder / "compare.md").read_text().lower().split()
    written = json.loads((folder / "compare.json").read_text(), parse_constant=lambda c: 1 / 0)
    assert written == json.loads(json.dumps(found))
    assert written["schema_version"] == 1
    assert {p.name for p in (folder / "tables").iterdir()} >= {"quality-own.csv", "took-equal.csv"}


def test_a_finished_comparison_trains_nothing_even_if_it_was_moved(
    place, finished, copy, monkeypatch
):
    monkeypatch.setattr(run, "search", None)
    found = compare(config_of(place), METHODS_COMPARED, SEEDS, output=copy)
    assert found["tables"] == finished[1]["tables"]
    first, second = ((f / "compare.md").read_bytes() for f in (finished[0], copy))
    assert first == second


def test_a_run_that_fails_is_recorded_and_the_rest_goes_on(place, copy, monkeypatch):
    monkeypatch.setattr(run, "search", Counter(fail="smam-own-1"))
    methods = (*METHODS_COMPARED, "smam")
    found = compare(config_of(place), methods, SEEDS, output=copy, cost="own")
    cells = cells_of(found)
    assert cells["smam", "own", 1].error == "DataError: a bad row"
    assert cells["smam", "own", 0].metric is not None
    row = next(r for r in found["tables"]["own"]["rows"] if r["method"] == "smam")
    assert (row["failed"], row["metric"]["n"], row["difference"]["n"]) == (1, 1, 1)
    assert "smam (1)" in " ".join(found["takeaways"])


def test_finished_runs_are_compared_without_training(finished, monkeypatch, tmp_path):
    monkeypatch.setattr(run, "search", None)
    folder = finished[0]
    runs = [folder / "runs" / f"{m}-own-{s}" for m in METHODS_COMPARED for s in SEEDS]
    found = compare_runs(runs, output=tmp_path / "page")
    assert found["methods"] == list(METHODS_COMPARED)
    assert found["tables"]["own"] == finished[1]["tables"]["own"]
    assert (tmp_path / "page" / "compare.html").is_file()
    with pytest.raises(ConfigError, match="both of method random with seed 0"):
        compare_runs([*runs, folder / "runs" / "random-equal-0"])
    with pytest.raises(ConfigError, match="two methods"):
        compare_runs(runs[:2])
    with pytest.raises(StateError, match="no finished run"):
        compare_runs([folder])


def test_other_tasks_are_not_mixed(finished, copy):
    runs = [copy / "runs" / f"{m}-own-0" for m in METHODS_COMPARED]
    result = json.loads((runs[1] / "result.json").read_text())
    result["metric"]["name"] = "f1"
    from prunepeft.state import RunFolder

    RunFolder(runs[1]).finish(result)
    with pytest.raises(ConfigError, match=r"the metric of .*random-own-0 is f1"):
        compare_runs(runs)


# --- one cell -------------------------------------------------------------------------------------


def test_a_method_over_the_allowance_searches_on_fewer_rows(place, finished):
    """Reference lora-all for 3 epochs: 9 steps; prunepeft takes 2 rounds of 3 and 3 more."""
    own = cells_of(finished[1])["prunepeft", "own", 0]
    config = config_of(place)
    base = cell_config(config, "prunepeft", 0, place / "cmp")
    for steps, fidelity in ((9, None), (8, 32 / 54), (7, 32 / 54), (5, 16 / 54)):
        reference = Cell("other", "own", 0, metric=0.5, train_steps=steps)
        settings, note = other_length(base, own, reference)
        if fidelity is None:
            assert settings is None
            assert "stands" in note
        else:
            assert settings == {"search": {"fidelity": pytest.approx(fidelity)}}
    reference = Cell("other", "own", 0, metric=0.5, train_steps=4)
    settings, note = other_length(base, own, reference)
    assert settings is None
    assert "over by 2.2x" in note


def test_a_method_that_cannot_search_on_fewer_rows_says_why(place, finished):
    own = replace(cells_of(finished[1])["prunepeft", "own", 0], method="adalora", search_steps=12)
    config = config_of(place, **{"search.epochs": 4})
    base = cell_config(config, "adalora", 0, place / "cmp")
    settings, note = other_length(base, own, Cell("other", "own", 0, metric=0.5, train_steps=12))
    assert settings is None
    assert "needs 10 optimiser steps" in note


@pytest.mark.parametrize(("steps", "initial"), [(9, 5), (5, 2), (4, None)])
def test_the_random_start_of_autopeft_fits_the_trials_it_gets(place, steps, initial):
    pytest.importorskip("botorch")
    given = {"black_box.initial": 5, "black_box.n_trials": 9}
    base = cell_config(config_of(place, **given), "autopeft", 0, place / "cmp")
    settings, _ = more_trials(base, steps)
    assert settings["black_box"]["n_trials"] == steps - 3
    make_plan(with_settings(base, settings))
    assert with_settings(base, settings).black_box.initial == initial


def test_trials_get_what_the_cutting_of_the_base_leaves(place):
    bases = [
        cell_config(config_of(place, **more), "random", 0, place / "cmp")
        for more in ({}, {"base_ratio": 0.25})
    ]
    whole, cut = (more_trials(base, 20)[0]["black_box"]["max_steps"] for base in bases)
    assert whole - cut == shrinking_steps(make_plan(bases[1])) > 0


def test_autopeft_gets_trials_where_only_its_larger_sizes_are_over_the_budget(place):
    pytest.importorskip("botorch")
    given = {"sizes.lora": [1], "kinds": ["lora"], "budget": "5000"}
    base = cell_config(config_of(place, **given), "autopeft", 0, place)
    plan = make_plan(base)
    problem = problem_of(plan, None, None)
    assert problem.cost(plan.space.full()) <= plan.limit
    assert problem.cost(plan.strategy.candidates(problem).full()) > plan.limit
    assert more_trials(base, 20)[0] is not None


def test_what_was_searched_before_stays_in_the_record_of_a_longer_training(place, monkeypatch):
    trained = Cell("smam", "equal", 0, metric=0.6, peak_memory_bytes=5, train_steps=9)
    monkeypatch.setattr("prunepeft.compare.cells._run", lambda *a, **how: trained)
    own = Cell(
        "smam",
        "own",
        0,
        run=str(place / "cmp" / "runs" / "smam-own-0"),
        metric=0.5,
        epochs=1,
        search_steps=2,
        train_steps=3,
        search_seconds=4.0,
        peak_memory_bytes=7,
        trace=((2, 100.0, 0.5),),
    )
    reference = Cell("prunepeft", "own", 0, metric=0.5, train_steps=20)
    cell = run_equal(config_of(place), own, reference, place / "cmp")
    assert (cell.metric, cell.train_steps) == (0.6, 9)
    assert (cell.search_steps, cell.search_seconds) == (2, 4.0)
    assert (cell.peak_memory_bytes, cell.trace) == (7, own.trace)


def test_settings_of_the_cutting_of_the_base_reach_only_the_methods_that_are_told_of_it(place):
    config = config_of(place, **{"base_ratio": 0.25, "base.epochs": 4, "base.method": "loraprune"})
    bases = {m: cell_config(config, m, 0, place).base for m in ("prunepeft", "light-peft")}
    assert (bases["prunepeft"].epochs, bases["prunepeft"].method) == (4, "loraprune")
    assert bases["light-peft"] == type(config.base)()


def test_planned_steps_of_a_task_with_many_classes_are_the_real_ones(place, tmp_path):
    """A twentieth of the rows is 4, but 20 classes have a row each: two steps a trial."""
    data = tmp_path / "many.jsonl"
    rows = [{"text": f"w{i % 20} w{20 + i % 7}", "label": f"c{i % 20}"} for i in range(80)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = {"black_box.fidelity": 0.05, "train.batch_size": 8, "data": str(data)}
    config = cell_config(config_of(place, **given), "random", 0, tmp_path)
    assert make_plan(config).splits.n_classes == 20
    planned = run.check(config)["search"]["steps"]
    run.search(config)
    found = json.loads((Path(config.output) / "result.json").read_text())["search"]["steps"]
    assert planned == found == 2 * (20 // 8)


def test_weights_of_the_search_are_not_lost_at_equal_cost(place, finished):
    own = cells_of(finished[1])["prunepeft", "own", 0]
    reference = Cell("other", "own", 0, metric=0.5, train_steps=99)
    base = cell_config(config_of(place), "prunepeft", 0, place / "cmp")
    settings, _ = other_length(base, own, reference)
    assert settings["train"] == {"epochs": 31}
    assert settings["arch"] == f"{own.run}/best/arch.json"
    settings, _ = other_length(base, replace(own, continues=True), reference)
    assert "arch" not in settings


def test_a_search_that_is_repeated_does_not_grow_with_its_training(place, finished):
    """Rows and warm-up follow the length of the training, if nothing is said of them."""
    own = cells_of(finished[1])["prunepeft", "own", 0]
    reference = Cell("other", "own", 0, metric=0.5, train_steps=2000)
    free = {"base_ratio": 0.2, "search.warmup": True, "train.epochs": 20}
    base = cell_config(config_of(place, **free), "prunepeft", 0, place / "cmp")
    settings, _ = other_length(base, replace(own, search_steps=200), reference)
    assert settings["train"]["epochs"] > 400
    before, longer = make_plan(base), make_plan(with_settings(base, settings))
    grown = make_plan(with_settings(base, {"train": settings["train"]}))
    assert planned_steps(longer) == planned_steps(before) < planned_steps(grown)


def test_a_reference_that_failed_leaves_no_allowance(place):
    failed = Cell("prunepeft", "own", 0, error="DataError: broken")
    own = Cell("random", "own", 0, metric=0.5)
    cell = run_equal(config_of(place), own, failed, place / "cmp")
    assert cell.metric is None
    assert "the reference prunepeft failed" in cell.error


@pytest.mark.parametrize("method", METHODS.names())
def test_settings_of_other_methods_do_not_reach_a_method(place, method):
    config = config_of(place, **{"smam.rounds": 2, "black_box.eta": 2, "s3delta.beta": 2.0})
    own = cell_config(config, method, 3, place / "x")
    assert (own.method, own.seed, own.output) == (method, 3, str(place / f"x/runs/{method}-own-3"))
    assert own.smam.rounds == (2 if method == "smam" else 5)
    if issubclass(METHODS.get(method), BlackBox):
        assert own.black_box.eta == (2 if method == "asha" else 3)


# --- mistakes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"methods": ("prunepeft", "smma")}, UnknownNameError, "did you mean 'smam'"),
        ({"methods": ("prunepeft",)}, ConfigError, "give two at least"),
        ({"methods": ("random", "random")}, ConfigError, "each once"),
        ({"seeds": (0, 0)}, ConfigError, "each once"),
        ({"seeds": ()}, ConfigError, "seeds are none"),
        ({"cost": "fair"}, ConfigError, "own, equal, both"),
        ({"reference": "smam"}, ConfigError, "not among the methods"),
        ({"config": {"smam.rounds": 2}}, ConfigError, "smam.rounds is read by none"),
        (
            {"config": {"base_ratio": 0.3}},
            ConfigError,
            "lora-all is plain LoRA fitted to",
        ),
        (
            {"config": {"strategy": "s.json"}, "methods": ("random", "smam")},
            ConfigError,
            "read by none",
        ),
        ({"seeds": (0, 2**31)}, ConfigError, "whole numbers from 0 to 2147483647"),
        ({"config": {"budget": "3 modules"}}, ConfigError, "number of parameters"),
    ],
)
def test_mistakes_are_said_before_any_training(place, tmp_path, monkeypatch, change, error, text):
    monkeypatch.setattr(run, "search", None)
    call = {"methods": METHODS_COMPARED, "seeds": SEEDS} | change
    more = call.pop("config", {})
    with pytest.raises(error, match=text):
        compare(config_of(place, **more), **call, output=tmp_path / "cmp")
    assert not list(tmp_path.glob("cmp/runs/*"))


def test_a_dry_run_refuses_what_the_comparison_would(place, tmp_path):
    config = config_of(place, budget="3 modules")
    with pytest.raises(ConfigError, match="number of parameters"):
        compare(config, METHODS_COMPARED, SEEDS, output=tmp_path / "cmp", dry_run=True)


def test_a_search_by_trials_on_a_base_that_is_cut_is_repeated_without_settings_it_does_not_read(
    place,
):
    config = config_of(place, base_ratio=0.25)
    base = cell_config(config, "random", 0, place / "cmp")
    own = Cell("random", "own", 0, metric=0.5, epochs=1, search_steps=2, train_steps=3)
    settings, _ = other_length(base, own, Cell("other", "own", 0, metric=0.5, train_steps=20))
    make_plan(with_settings(base, settings))


def test_a_backend_goes_to_the_methods_with_trials(place, tmp_path):
    config = config_of(place, backend="process", workers=2)
    given = {m: cell_config(config, m, 0, tmp_path).backend for m in METHODS_COMPARED}
    assert given == {"prunepeft": "serial", "random": "process", "lora-all": "serial"}
    with pytest.raises(ConfigError, match="side by side"):
        compare(config, ("prunepeft", "lora"), (0,), output=tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_the_page_of_runs_replaces_no_comparison_but_its_own(finished, copy):
    runs = [copy / "runs" / name for name in ("prunepeft-own-0", "lora-all-own-0")]
    before = (copy / "compare.json").read_bytes()
    with pytest.raises(ConfigError, match="runs of its own"):
        compare_runs(runs, output=copy)
    assert (copy / "compare.json").read_bytes() == before
    (copy / "settings.json").unlink()
    compare_runs(runs, output=copy)  # as a page of runs alone, and nothing stays of the other cost
    assert not list(copy.glob("figures/*-equal.*")) + list(copy.glob("tables/*-equal.csv"))
    assert (copy / "figures" / "fronts-own.svg").is_file()


def test_a_folder_of_another_comparison_is_refused(place, copy, tmp_path):
    call = (METHODS_COMPARED, SEEDS)
    with pytest.raises(ConfigError, match=r"train.epochs: 1 -> 2"):
        compare(config_of(place, **{"train.epochs": 2}), *call, output=copy)
    with pytest.raises(ConfigError, match="resume is 'never'"):
        compare(config_of(place), *call, output=copy, resume="never")
    with pytest.raises(ConfigError, match="holds no comparison"):
        compare(config_of(place), *call, output=place / "bert")


def test_two_processes_do_not_share_a_folder(place, copy, monkeypatch):
    from prunepeft.state.lock import FolderLock

    other = FolderLock(copy / ".lock")
    other.acquire()
    try:
        with pytest.raises(LockedError):
            compare(config_of(place), METHODS_COMPARED, SEEDS, output=copy)
    finally:
        other.release()


def test_a_dry_run_says_what_would_run(place, finished, monkeypatch, tmp_path):
    monkeypatch.setattr(run, "search", None)
    plan = compare(config_of(place), METHODS_COMPARED, SEEDS, output=finished[0], dry_run=True)
    assert [(r["method"], r["seed"]) for r in plan["own"]][:3] == [
        ("prunepeft", 0), ("prunepeft", 1), ("random", 0),
    ]  # fmt: skip
    assert all(r["done"] for r in plan["own"])
    assert plan["equal"] == {"runs_at_most": 4, "steps_at_most": 9}
    assert {r["search_steps"] for r in plan["own"] if r["method"] == "lora-all"} == {0}
    compare(config_of(place), METHODS_COMPARED, SEEDS, output=tmp_path / "new", dry_run=True)
    assert not (tmp_path / "new").exists()
