"""The command line from outside: exit codes, messages, what goes to stdout, and speed of start."""

import errno
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from prunepeft.cli import main
from prunepeft.cli.exits import classify
from prunepeft.cli.output import Output, plain_table
from prunepeft.config import load_config
from prunepeft.errors import BudgetError, LockedError
from prunepeft.interrupts import Interrupted
from tests.tiny_models import VOCAB, make_tiny
from tests.tiny_tokenizer import save_tiny_model

ROWS = "".join(
    json.dumps({"text": f"w{i % 40} w{i % 7}", "label": "ab"[i % 2]}) + "\n" for i in range(40)
)


class Call:
    """Runs the command line in this process."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def __call__(self, *args: Any) -> tuple[int, str, str]:
        self._capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            main([str(arg) for arg in args])
        out, err = self._capsys.readouterr()
        return int(left.value.code or 0), out, err


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Call:
    return Call(capsys)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("models") / "tiny"
    make_tiny("bert", "seq-cls", n_labels=2).save_pretrained(folder)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *(f"w{i}" for i in range(VOCAB - 4))]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]"
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "train.jsonl"
    path.write_text(ROWS)
    return path


def fake_run(monkeypatch: pytest.MonkeyPatch, **functions: Callable[..., Any]) -> None:
    """Replace `prunepeft.run`, so that the command line is tested alone."""
    import prunepeft

    module = ModuleType("prunepeft.run")
    module.output_of = lambda config: Path(config.output or "runs/x")
    for name, function in functions.items():
        setattr(module, name, function)
    monkeypatch.setitem(sys.modules, "prunepeft.run", module)
    monkeypatch.setattr(prunepeft, "run", module, raising=False)


RESULT = {
    "method": "prunepeft",
    "metric": {"name": "accuracy", "value": 0.91},
    "budget": {"text": "1%", "limit": 1000, "realised": 990, "unit": "parameters"},
    "placement": {"n_params": 990, "n_modules": 3},
    "train": {"seconds": 1.5, "steps": 10},
    "search": {"seconds": 0.5, "steps": 4, "runs": 3},
    "baselines": [
        {
            "name": "lora q+v",
            "metric": {"value": 0.9},
            "n_params": 980,
            "seconds": 61.0,
            "steps": 10,
        }
    ],
}


# ---- start -------------------------------------------------------------------------------------


def test_help_is_quick_and_imports_nothing_heavy() -> None:
    code = (
        "import sys, contextlib, io\n"
        "from prunepeft.cli import main\n"
        "with contextlib.suppress(SystemExit): main(['--help'])\n"
        "heavy = {'torch', 'transformers', 'peft', 'datasets', 'matplotlib', 'scipy', 'pydantic'}\n"
        "print(sorted(heavy & set(sys.modules)))\n"
    )
    environment = {**os.environ, "PYTHONPATH": "src"}
    times = []
    for _ in range(3):
        began = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            env=environment,
            check=True,
        )
        times.append(time.perf_counter() - began)
        assert done.stdout.rstrip().endswith("[]")
    assert min(times) < 1.0


def test_module_can_be_run_by_torchrun() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "prunepeft", "--version"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": "src"},
        check=True,
    )
    assert done.stdout.startswith("prunepeft 0.")


def test_every_command_explains_itself(call: Call) -> None:
    code, out, _ = call("--help")
    assert code == 0
    names = "init check search compare train eval export inspect report ls env schema".split()
    for name in names:
        assert f" {name} " in out
        code, text, _ = call(name, "--help")
        assert code == 0
        assert "--json" in text
        assert "Example" in text


# ---- commands without a model ------------------------------------------------------------------


def test_init_writes_a_file_that_loads(call: Call, tmp_path: Path) -> None:
    code, out, err = call("init", "--task", "causal-lm")
    path = tmp_path / "run.yaml"
    path.write_text(out)
    assert (code, err) == (0, "")
    assert load_config(path).task == "causal-lm"


def test_schema_is_json(call: Call) -> None:
    code, out, _ = call("schema")
    assert code == 0
    assert json.loads(out)["properties"]["budget"]


@pytest.mark.parametrize(
    ("what", "name"),
    [
        ("kinds", "lora"),
        ("criteria", "snip"),
        ("methods", "prunepeft"),
        ("metrics", "accuracy"),
        ("tasks", "seq-cls"),
    ],
)
def test_ls_lists_the_registries(call: Call, what: str, name: str) -> None:
    code, out, _ = call("ls", what)
    assert code == 0
    assert f"  {name} " in out
    code, out, _ = call("ls", what, "--json")
    assert name in [row["name"] for row in json.loads(out)]


def test_ls_kinds_counts_for_a_model(call: Call, tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "model", head="base")
    code, out, _ = call("ls", "kinds", "--model", str(folder), "--json")
    assert code == 0
    rows = {row["name"]: row for row in json.loads(out)}
    assert rows["lora"]["parameters, R=8"] == 2 * 8 * (4 * (16 + 16) + 2 * (16 + 32))
    assert rows["ssl"]["parameters, R=8"] == 2 * 3 * 16
    assert rows["lora"]["shrinkable"] is True
    assert rows["ssl"]["shrinkable"] is False
    code, _, err = call("ls", "metrics", "--model", str(folder))
    assert code == 2
    assert "--model goes with `ls kinds`, not with `ls metrics`" in err


def test_env_names_versions(call: Call) -> None:
    code, out, _ = call("env", "--json")
    found = json.loads(out)
    assert code == 0
    assert {"torch", "peft", "transformers"} <= set(found["packages"])
    assert found["threads"] >= 1


# ---- the way settings reach the library ----------------------------------------------------------


def test_search_gets_settings_and_switches(
    call: Call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen: dict[str, Any] = {}

    def search(config: Any, **switches: Any) -> dict[str, Any]:
        print("a library prints this")
        seen.update(config=config, **switches)
        return RESULT

    fake_run(monkeypatch, search=search)
    path = tmp_path / "run.yaml"
    path.write_text("model: m\ndata: d\nbudget: 9%\nseed: 4\n")
    code, out, err = call(
        "search", path, "train.lr=1e-4", "--budget", "1%", "--kinds", "lora", "--resume", "never",
        "--overwrite", "--offline", "--trust-remote-code", "--json",
    )  # fmt: skip
    config = seen["config"]
    assert code == 0
    assert json.loads(out) == RESULT
    assert "a library prints this" in err
    assert (config.budget, config.kinds, config.seed, config.train.lr) == ("1%", ["lora"], 4, 1e-4)
    assert config.offline
    assert config.trust_remote_code
    assert (seen["resume"], seen["overwrite"], seen["dry_run"]) == ("never", True, False)
    assert seen["progress"] is not None


def test_search_prints_a_table_and_where_to_look(
    call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_run(monkeypatch, search=lambda config, **_: RESULT)
    code, out, _ = call("search", "model=m", "data=d", "budget=1%", "output=runs/x")
    assert code == 0
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert any(line.startswith("this run (prunepeft) 0.9100 990 ") for line in lines)
    assert any(line.startswith("lora q+v 0.9000 980 ") for line in lines)
    assert any(
        line.startswith("Budget 1% = 1,000 trainable parameters: 990 used") for line in lines
    )
    assert "runs/x/report/report.html" in out


def test_compare_gets_settings_methods_and_seeds(
    call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    import prunepeft.compare as job

    seen: dict[str, Any] = {}

    def compare(config: Any, methods: Any, seeds: Any, **how: Any) -> dict[str, Any]:
        print("a library prints this")
        seen.update(how, config=config, methods=methods, seeds=seeds)
        return {"tables": {}}

    monkeypatch.setattr(job, "compare", compare)
    arguments = (
        *COMPARE, "light_peft.l1=1", "--methods", "random, light-peft", "--seeds", "3,1",
        "--cost", "own", "--output", "runs/c", "--offline", "--resume", "never",
    )  # fmt: skip
    code, out, err = call(*arguments, "--json")
    assert (code, json.loads(out)) == (0, {"tables": {}})
    assert "a library prints this" in err
    assert (seen["methods"], seen["seeds"]) == (["random", "light-peft"], [3, 1])
    assert (seen["cost"], seen["output"], seen["resume"]) == ("own", Path("runs/c"), "never")
    assert (seen["reference"], seen["overwrite"], seen["dry_run"]) == (None, False, False)
    assert seen["config"].light_peft.l1 == 1
    assert seen["config"].offline
    code, out, _ = call(*arguments, "--dry-run")
    assert code == 0
    assert seen["dry_run"]
    assert "Nothing was trained" in out


def test_an_interrupted_comparison_says_how_to_go_on(
    call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    import prunepeft.compare as job

    def compare(*_: Any, **__: Any) -> None:
        raise Interrupted(15)

    monkeypatch.setattr(job, "compare", compare)
    code, _, err = call(*COMPARE, "--methods", "random,smam")
    assert code == 143
    assert "run the same command again" in err


def test_other_ranks_are_silent(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_run(monkeypatch, search=lambda config, **_: RESULT)
    monkeypatch.setenv("RANK", "1")
    assert call("search", "model=m", "data=d", "budget=1%") == (0, "", "")
    assert call("search", "model=m", "data=d", "budget=1%", "--json") == (0, "", "")


def test_dry_run_prints_the_plan(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = {"model": {"family": "bert", "n_params": 1234}, "disk_bytes": 5_000_000, "rows": [{}]}

    def search(config: Any, *, dry_run: bool, **_: Any) -> dict[str, Any]:
        assert dry_run
        return plan

    fake_run(monkeypatch, search=search, check=lambda config: plan)
    code, out, _ = call("search", "model=m", "data=d", "budget=1%", "--dry-run")
    assert code == 0
    assert "family    bert" in out
    assert "disk_bytes  5 MB" in out
    assert call("check", "model=m", "data=d", "budget=1%") == (code, out, "")


# ---- failures ----------------------------------------------------------------------------------

FAILURES: list[tuple[BaseException, int, str]] = [
    (BudgetError("the budget is too small."), 4, "error: the budget is too small."),
    (LockedError("locked by 17."), 7, "error: locked by 17."),
    (KeyboardInterrupt(), 130, "state saved; run the same command again"),
    (Interrupted(15), 143, "state saved; run the same command again"),
    (MemoryError(), 5, "train.gradient_accumulation"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 5, "train.max_length"),
    (OSError(errno.ENOSPC, "No space left on device", "runs/a"), 6, "last good state is kept"),
    (PermissionError(errno.EACCES, "Permission denied", "runs/a"), 2, "runs/a"),
    (ZeroDivisionError("x"), 1, "internal error: ZeroDivisionError: x. Run the same command"),
]


@pytest.mark.parametrize(("error", "code", "message"), FAILURES)
def test_failures_become_exit_codes(
    call: Call, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, message: str
) -> None:
    def search(config: Any, **_: Any) -> None:
        raise error

    fake_run(monkeypatch, search=search)
    got, out, err = call("search", "model=m", "data=d", "budget=1%", "--json")
    assert (got, json.loads(out)["exit_code"]) == (code, code)
    assert message in err
    assert err.count("\n") == 1
    assert "Traceback" not in err


def test_debug_shows_the_traceback(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_run(monkeypatch, search=lambda config, **_: 1 / 0)
    code, _, err = call("search", "model=m", "data=d", "budget=1%", "--debug")
    assert code == 1
    assert "Traceback" in err


def test_out_of_memory_of_the_accelerator_is_recognised() -> None:
    import torch

    code, _ = classify("search", torch.cuda.OutOfMemoryError("CUDA out of memory. Tried 2 GiB"))
    assert code == 5


COMPARE = ("compare", "model=m", "data=d", "budget=1%")
USAGE: list[tuple[list[str], str]] = [
    (["serch"], "Did you mean 'search'"),
    (["search", "--bugdet", "1%"], "--budget"),
    (["search", "--resume", "sometimes"], "'auto', 'never'"),
    (["ls", "kind"], "'kinds', 'criteria'"),
    (["ls"], "Missing argument"),
    (["export", "x", "--format", "onnx"], "'peft', 'serve'"),
    (["init", "--task", "seqcls"], "did you mean 'seq-cls'"),
    (["export", "nowhere"], "there is no run folder nowhere"),
    (["report", "."], "is not a run folder"),
    (["eval", "nowhere"], "there is no run folder nowhere"),
    (["inspect", "nowhere"], "there is nothing at nowhere"),
    (["train", "model=m", "data=d", "budget=1%"], "arch=.*arch.json"),
    (["search", "none.yaml"], "there is no file none.yaml"),
    (["search", "a.yaml", "b.yaml"], "2 configuration files"),
    (["search", "budget=1%"], "model is missing; give --model"),
    (["search", "--model", "m", "--data", "d"], "budget is missing"),
    (["search", "--model", "", "--data", "d", "--budget", "1%"], "model got ''"),
    ([*COMPARE], "methods are missing; give two at least"),
    ([*COMPARE, "--methods", "random"], "give two at least, each once"),
    ([*COMPARE, "--methods", "random,smma"], "did you mean 'smam'"),
    ([*COMPARE, "--methods", "rndom,smam"], "did you mean 'random'"),
    ([*COMPARE, "--methods", "random,smam", "--seeds", "0,0"], "each once"),
    ([*COMPARE, "--methods", "random,smam", "--seeds", "0,x"], "seeds are '0,x'; give whole"),
    ([*COMPARE, "--methods", "random,smam", "--cost", "fair"], "own, equal, both"),
    ([*COMPARE, "--methods", "random,smam", "--reference", "asha"], "not among the methods"),
    ([*COMPARE, "--methods", "random,smam", "light_peft.l1=1"], "light_peft"),
    ([*COMPARE, "--methods", "random,smam", "arch=a.json"], "leave arch out"),
    (["compare", "tests", "--seeds", "1"], "--seeds says nothing here"),
    (["compare", "tests", "--dry-run"], "--dry-run says nothing here"),
    (["compare", "tests", "--cost", "equal"], "--cost says nothing here"),
    (["compare", "tests", "model=m"], "model=m says nothing here"),
    (["compare", "tests"], "holds no finished run"),
    (["compare", "nowhere", "--methods", "random,smam"], "there is no file nowhere"),
]
SETTINGS: list[tuple[str, int, str]] = [
    ("--budget 0", 4, "above zero"),
    ("--budget -5%", 4, "above zero"),
    ("--budget nan", 4, "cannot be read"),
    ("--budget 101%", 4, "exceeds the base model"),
    ("--budget 0.5", 4, "below one parameter"),
    ("--budget rank:x", 4, "cannot be read"),
    ("--kinds lorra", 2, "did you mean 'lora'"),
    ("--kinds lora,", 0, ""),
    ("--method prunepetf", 2, "did you mean 'prunepeft'"),
    ("--task seqcls", 2, "did you mean 'seq-cls'"),
    ("--seed -1", 2, "seed got '-1'"),
    ("--seed 4294967296", 2, "seed got '4294967296'"),
    ("--seed one", 2, "seed got 'one'.*whole number"),
    ("--device tpu", 2, "'auto', 'cpu' or 'cuda'"),
    ("--precision int4", 2, "'auto', 'fp32' or 'bf16'"),
    ("--quantize int4", 2, "'none', '8bit' or '4bit'"),
    ("--baseline all", 2, "'none', 'lora' or 'lora-all'"),
    ("--prefix-cache-gb -1", 2, "greater than or equal to 0"),
    ("--prefix-cache-gb many", 2, "prefix_cache_gb got 'many'"),
    ("--prefix-cache-gb 0.5", 0, ""),
    ("load_in_4bit=true", 2, "unknown key 'load_in_4bit'"),
    ("train.batchsize=8", 2, "did you mean 'train.batch_size'"),
    ("train.batch_size=0", 2, "greater than or equal to 1"),
    ("train.lr=0", 2, "greater than 0"),
    ("train.lr=inf", 2, "finite"),
    ("train.epochs=-1", 2, "train.epochs got '-1'"),
    ("train.max_rows=1", 2, "greater than or equal to 2"),
    ("search.criteria=snap", 2, "did you mean 'snip'"),
    ("search.mode=single:snap", 2, "did you mean 'snip'"),
    ("search.fidelity=2", 2, "less than or equal to 1"),
    ("trust_remote_code=true", 2, "--trust-remote-code"),
]


@pytest.mark.parametrize(("args", "message"), USAGE)
def test_wrong_usage(call: Call, args: list[str], message: str) -> None:
    code, out, err = call(*args)
    assert (code, out) == (2, "")
    check_paragraph(err, message)


@pytest.mark.parametrize(("flag", "code", "message"), SETTINGS)
def test_wrong_settings_stop_before_anything_is_loaded(
    call: Call, monkeypatch: pytest.MonkeyPatch, flag: str, code: int, message: str
) -> None:
    loaded: list[str] = []
    fake_run(monkeypatch, check=lambda config: loaded.append("check") or {})
    given = {"--model": "m", "--data": "d", "--budget": "1%"}
    name, _, value = flag.partition(" ")
    given |= {name: value} if value else {}
    args = [part for pair in given.items() for part in pair] + ([] if value else [name])
    got, _, err = call("check", *args)
    assert got == code
    assert bool(loaded) == (code == 0)
    if code:
        check_paragraph(err, message)


def check_paragraph(err: str, message: str) -> None:
    import re

    assert re.search(message, err), err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert "Traceback" not in err


# ---- real data and models ------------------------------------------------------------------------

DATA: list[tuple[str, str | bytes | None, str]] = [
    ("missing.jsonl", None, "no such file"),
    ("empty.jsonl", "", "is empty"),
    ("blank.csv", "text,label\n", "no rows"),
    ("broken.jsonl", ROWS[:120] + "\n{broken\n", r"line \d+"),
    ("notdict.jsonl", "[1, 2]\n[3, 4]\n", "JSON object"),
    ("ragged.csv", "text,label\na,b\nc,d,e,f\n", "line 3"),
    ("delimiter.csv", "text;label\na;b\nc;d\n", "delimiter"),
    ("latin.csv", b"text,label\ncaf\xe9,a\nx,b\n", "UTF-8"),
    ("binary.parquet", b"PAR1 not really", "binary.parquet"),
    ("nested.jsonl", ROWS.replace('"w1 w1"', '{"a": 1}'), "line 2.*text is needed"),
    ("nolabel.jsonl", '{"text": "a", "label": null}\n' * 9, "label"),
    ("oneclass.jsonl", '{"text": "a", "label": "x"}\n' * 9, "all 9 rows have the label"),
    ("nocolumn.jsonl", '{"foo": "a", "bar": "x"}\n' * 9, "no column"),
    ("ending.docx", "x", "ending"),
    ("tiny.jsonl", '{"text": "a", "label": "x"}\n{"text": "b", "label": "y"}\n', "too few"),
]


@pytest.mark.parametrize(("name", "content", "message"), DATA)
def test_wrong_data_exits_3(
    call: Call, model: Path, tmp_path: Path, name: str, content: str | bytes | None, message: str
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    began = time.perf_counter()
    code, _, err = call(
        "check", "--model", model, "--data", path, "--budget", "5%", "--task", "seq-cls",
        "--output", tmp_path / "run",
    )  # fmt: skip
    assert (code, time.perf_counter() - began < 10) == (3, True), err
    check_paragraph(err, message)
    assert name.partition(".")[0] in err
    assert not (tmp_path / "run").exists()


def _no_model(folder: Path, model: Path) -> Path:
    return folder / "absent"


def _no_config(folder: Path, model: Path) -> Path:
    return folder


def _no_blocks(folder: Path, model: Path) -> Path:
    return _changed_config(folder, model, num_hidden_layers=0)


def _foreign_code(folder: Path, model: Path) -> Path:
    (folder / "evil.py").write_text(f"open({str(folder / 'canary')!r}, 'w')\n")
    auto_map = {"AutoConfig": "evil.Evil", "AutoModelForSequenceClassification": "evil.Evil"}
    return _changed_config(folder, model, model_type="evil", auto_map=auto_map)


def _changed_config(folder: Path, model: Path, **changes: Any) -> Path:
    for file in model.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    settings = json.loads((model / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | changes))
    return folder


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (_no_model, "absent"),
        (_no_config, "config.json"),
        (_no_blocks, "block|layer|linear"),
        (_foreign_code, "trust-remote-code"),
    ],
)
def test_wrong_models_are_explained(
    call: Call,
    model: Path,
    data: Path,
    tmp_path: Path,
    make: Callable[[Path, Path], Path],
    message: str,
) -> None:
    wrong = make(tmp_path, model)
    code, _, err = call("check", "--model", wrong, "--data", data, "--budget", "5%", "--offline")
    assert code in (2, 3), err
    check_paragraph(err, message)
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (["--budget", "1"], 4, "smallest"),
        (["--budget", "5%", "--metric", "accurcy"], 2, "did you mean 'accuracy'"),
        (["--budget", "5%", "arch=absent.json"], 2, "absent.json"),
        (["--budget", "5%", "columns.text=body"], 3, "column 'body'"),
        (["--budget", "5%", "roles.lora=quary"], 2, "quary"),
        (["--budget", "5%", "options.lora.alhpa=3"], 2, "alhpa"),
    ],
)
def test_settings_that_do_not_fit_model_or_data(
    call: Call, model: Path, data: Path, flags: list[str], code: int, message: str
) -> None:
    got, _, err = call("check", "--model", model, "--data", data, *flags)
    assert got == code, err
    check_paragraph(err, message)


def test_an_absent_gpu_is_said(call: Call, model: Path, data: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    code, _, err = call(
        "check", "--model", model, "--data", data, "--budget", "5%", "--device", "cuda"
    )
    assert code == 2
    check_paragraph(err, "device=cuda")


def test_an_output_that_holds_something_else_is_kept(
    call: Call, model: Path, data: Path, tmp_path: Path
) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    code, _, err = call(
        "check", "--model", model, "--data", data, "--budget", "5%", "--output", tmp_path
    )
    assert code == 2
    check_paragraph(err, "empty|overwrite|another")
    assert os.listdir(tmp_path) == ["mine.txt"]


def test_an_output_below_a_file_is_refused(call: Call, model: Path, data: Path) -> None:
    code, _, err = call(
        "check", "--model", model, "--data", data, "--budget", "5%", "--output", data / "run"
    )
    assert code in (2, 6)
    check_paragraph(err, "train.jsonl")


def test_check_answers_what_would_run(call: Call, model: Path, data: Path, tmp_path: Path) -> None:
    code, out, err = call(
        "check", "--model", model, "--data", data, "--budget", "5%", "--output", tmp_path / "run",
        "--json",
    )  # fmt: skip
    plan = json.loads(out)
    assert code == 0, err
    assert plan["budget"]["limit"] > 0
    assert plan["data"]["train"] + plan["data"]["validation"] == 40
    assert not (tmp_path / "run").exists()


# ---- printing ------------------------------------------------------------------------------------


def test_plain_tables_do_not_cut_anything() -> None:
    text = plain_table("t", ("name", "value"), [["x" * 150, "1"], ["y", "22"]])
    assert text.splitlines()[2] == "  " + "x" * 150 + "  1"


def test_nested_values_are_printed_once(capsys: pytest.CaptureFixture[str]) -> None:
    Output().mapping("", {"a": 1, "b": {"c": None}, "d": [{"e": 1}, {"e": 2, "f": True}], "g": []})
    out = capsys.readouterr().out
    assert out == "  a  1\n  g\nb\n  c  -\nd\n  e  f\n  1  -\n  2  yes\n"
