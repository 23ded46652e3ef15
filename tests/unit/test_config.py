import contextlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from prunepeft.config import (
    CRITERION_NAMES,
    KIND_NAMES,
    KIND_PRESETS,
    METHOD_NAMES,
    TASK_NAMES,
    RunConfig,
    config_schema,
    load_config,
    template,
)
from prunepeft.config.load import key_paths, parse_override
from prunepeft.config.yaml_text import MAX_BYTES, parse_yaml
from prunepeft.errors import BudgetError, ConfigError

BASE = {"model": "m", "data": "d", "budget": "1%"}


def load(*overrides: str, **flags: Any) -> RunConfig:
    return load_config(None, overrides, {**BASE, **flags})


def write(folder: Path, text: str | bytes) -> Path:
    path = folder / "run.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_defaults_are_those_of_the_method() -> None:
    config = load()
    assert config.kinds == ["lora", "serial_adapter"]
    assert (config.train.epochs, config.train.lr, config.train.batch_size) == (3, 5e-4, 16)
    assert (config.search.rounds, config.search.warmup_rows, config.search.mode) == (
        3,
        100,
        "hybrid",
    )
    assert tuple(config.search.criteria) == CRITERION_NAMES[:6]


def test_flags_beat_overrides_beat_file(tmp_path: Path) -> None:
    path = write(tmp_path, "seed: 1\nmodel: f\ndata: f\nbudget: 3%\ntrain: {epochs: 9, lr: 1e-3}\n")
    config = load_config(path, ["seed=2", "budget=2%", "train.epochs=4"], {"budget": "1%"})
    assert (config.model, config.seed, config.budget) == ("f", 2, "1%")
    assert (config.train.epochs, config.train.lr) == (4, 1e-3)


def test_a_flag_that_was_not_given_changes_nothing(tmp_path: Path) -> None:
    path = write(tmp_path, "model: f\ndata: f\nbudget: 3%\n")
    assert load_config(path, (), {"model": None, "budget": None}).budget == "3%"


@pytest.mark.parametrize("text", ["1e-4", "1E-4", ".0001", "0.0001", "+1e-04"])
def test_every_way_to_write_a_number_is_a_number(tmp_path: Path, text: str) -> None:
    path = write(tmp_path, f"model: m\ndata: d\nbudget: 1%\ntrain:\n  lr: {text}\n")
    assert load_config(path).train.lr == 1e-4
    assert load(f"train.lr={text}").train.lr == 1e-4


@pytest.mark.parametrize("text", ["no", "off", "yes", "007", "1e5", "0x1F", "1_000", "12:30:45"])
def test_text_fields_keep_what_was_written(tmp_path: Path, text: str) -> None:
    path = write(tmp_path, f"model: m\ndata: {text}\nbudget: 1%\n")
    assert load_config(path).data == text


@pytest.mark.parametrize(
    ("text", "value"), [("no", False), ("on", True), ("false", False), ("True", True)]
)
def test_switches_understand_yes_and_no(text: str, value: bool) -> None:
    assert load(f"search.warmup={text}").search.warmup is value


def test_null_clears_an_optional_setting(tmp_path: Path) -> None:
    path = write(tmp_path, "train: {max_length: null, max_rows: }\noutput: 'null'\n")
    config = load_config(path, (), BASE)
    assert (config.train.max_length, config.train.max_rows, config.output) == (None, None, "null")
    assert load("train.max_length=null").train.max_length is None
    assert load("train.max_length=~").train.max_length is None


def test_lists_and_maps_of_the_command_line() -> None:
    config = load(
        "kinds=lora, dora",
        "sizes.lora=4,8",
        "sizes.dora=[2, 4]",
        "roles.lora=q+v,up",
        "options.lora={alpha: 16, rslora: true, note: no}",
        "train.lr_by_kind.lora=2e-4",
        "columns.text=my column",
        "search.criteria=snip",
        "search.mode=single:snip",
    )
    assert config.kinds == ["lora", "dora"]
    assert config.sizes == {"lora": [4, 8], "dora": [2, 4]}
    assert config.roles == {"lora": [["q", "v"], ["up"]]}
    assert config.options == {"lora": {"alpha": 16, "rslora": True, "note": "no"}}
    assert config.train.lr_by_kind == {"lora": 2e-4}
    assert config.columns == {"text": "my column"}
    assert config.search.criteria == ["snip"]


def test_resolved_settings_round_trip_through_a_file(tmp_path: Path) -> None:
    config = load("sizes.lora=4,8", "roles.lora=q+v", "options.lora.alpha=16", "train.lr=1e-4")
    path = write(tmp_path, yaml.safe_dump(config.to_dict()))
    assert load_config(path) == config


def test_consent_to_run_foreign_code_is_never_written() -> None:
    config = load(trust_remote_code=True)
    assert config.trust_remote_code
    assert "trust_remote_code" not in config.to_dict()
    assert "trust_remote_code" not in json.dumps(config_schema())


def test_an_architecture_needs_no_budget() -> None:
    config = load_config(None, ["arch=a.json"], {"model": "m", "data": "d"})
    assert config.budget is None


WRONG_VALUES = [
    ("train.epoch=3", r"unknown key 'train.epoch'; did you mean 'train.epochs'"),
    ("epochs=3", r"did you mean 'train.epochs'"),
    ("serach.rounds=3", r"unknown key 'serach'; did you mean 'search'"),
    ("zzz=1", r"unknown key 'zzz'. Known: model, data"),
    ("train.zzz=1", r"Known in train: epochs, lr"),
    ("quantization=4bit", r"unknown key 'quantization'"),
    ("seed=-1", r"seed got '-1'.*greater than or equal to 0"),
    ("seed=2147483648", r"seed got.*less than or equal to 2147483647"),
    ("seed=1.5", r"seed got '1.5'.*whole number"),
    ("train.batch_size=0", r"train.batch_size got '0'.*greater than or equal to 1"),
    ("train.lr=0", r"train.lr got '0'.*greater than 0"),
    ("train.lr=-1e-4", r"train.lr got '-1e-4'.*greater than 0"),
    ("train.lr=inf", r"train.lr got 'inf'.*finite"),
    ("train.lr=fast", r"train.lr got 'fast'.*a number"),
    ("train.epochs=0", r"train.epochs got '0'"),
    ("train.epochs=true", r"train.epochs got 'true'.*whole number"),
    ("train.warmup_ratio=1", r"train.warmup_ratio got '1'.*less than 1"),
    ("train.lr_schedule=step", r"'linear', 'cosine' or 'constant'"),
    ("train=3", r"train got '3'.*group"),
    ("train.lr.kind=3", r"train.lr got"),
    ("search.fidelity=0", r"search.fidelity got '0'.*greater than 0"),
    ("search.fidelity=1.01", r"search.fidelity got '1.01'.*less than or equal to 1"),
    ("search.rounds=0", r"search.rounds"),
    ("search.warmup=maybe", r"true or false"),
    ("search.reinit=none", r"'reset', 'keep' or 'init'"),
    ("search.criteria=snipp", r"search.criteria: unknown criterion 'snipp'; did you mean 'snip'"),
    ("search.criteria=[]", r"search.criteria got"),
    ("search.mode=single:foo", r"search.mode.*unknown criterion 'foo'"),
    ("search.mode=hybird", r"unknown mode 'hybird'; did you mean 'hybrid'"),
    ("kinds=lorra", r"kinds: unknown kind 'lorra'; did you mean 'lora'"),
    ("kinds=", r"kinds got null"),
    ("kinds=lora,lora", r"lora is given twice"),
    ("method=prunpeft", r"method: unknown method 'prunpeft'; did you mean 'prunepeft'"),
    ("task=seqcls", r"task: unknown task 'seqcls'; did you mean 'seq-cls'"),
    ("sizes.lora=0", r"sizes.lora got '0'"),
    ("sizes.dora=4", r"sizes names dora, which is not among kinds"),
    ("options.lora=3", r"options.lora got '3'"),
    ("columns=text", r"columns got 'text'.*group"),
    ("validation_fraction=0", r"validation_fraction got '0'.*greater than 0"),
    ("validation_fraction=1", r"validation_fraction got '1'.*less than 1"),
    ("device=gpu", r"'auto', 'cpu' or 'cuda'"),
    ("precision=fp16", r"'auto', 'fp32' or 'bf16'"),
    ("baseline=full", r"'none', 'lora' or 'lora-all'"),
    ("trust_remote_code=true", r"--trust-remote-code"),
    ("model=null", r"model got null.*text"),
    ("=3", r"key=value"),
    ("sizes.lora=[4", r"not valid YAML"),
]


@pytest.mark.parametrize(("override", "message"), WRONG_VALUES)
def test_a_wrong_setting_is_one_sentence(override: str, message: str) -> None:
    key = override.partition("=")[0]
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(None, [override], {k: v for k, v in BASE.items() if k != key})
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("text", ["0", "-1", "0%", "101%", "nan", "inf", "lots", "1.5 modules"])
def test_a_wrong_budget_is_a_budget_error(text: str) -> None:
    with pytest.raises(BudgetError, match="budget"):
        load(budget=text)


def test_missing_settings_are_named_together() -> None:
    with pytest.raises(ConfigError, match=r"model is missing.*data is missing"):
        load_config(None, ["budget=1%"])
    with pytest.raises(ConfigError, match="budget is missing"):
        load_config(None, ["model=m", "data=d"])


WRONG_FILES = [
    ("a: &x 1\nb: *x\n", r"line 1: anchors"),
    ("a: &a [x, x]\nb: &b [*a, *a]\nc: &c [*b, *b]\n", r"anchors"),
    ("data: !!python/object/apply:os.system ['true']\n", r"line 1: the tag"),
    ("data: !include other.yaml\n", r"the tag '!include'"),
    ("seed: 1\nseed: 2\n", r"line 2: the key 'seed' is given twice"),
    ("train: {lr: 1, lr: 2}\n", r"'lr' is given twice"),
    ("seed: [1\n", r"line \d+, column \d+: not valid YAML"),
    ("- a\n- b\n", r"holds a list"),
    ("just text\n", r"holds a single value"),
    ("? [a, b]\n: 1\n", r"key must be text"),
    ("a: " + "[" * 50 + "]" * 50, r"too deep"),
    ("seed: 1\n---\nseed: 2\n", r"not valid YAML"),
    (b"\xff\xfes\x00e\x00", r"not UTF-8"),
    (b"seed: \x00\n", r"not valid YAML"),
    ("trust_remote_code: true\n", r"--trust-remote-code on the command line"),
    ("x: " + "y" * MAX_BYTES, r"at most 1,000,000"),
]


@pytest.mark.parametrize(("text", "message"), WRONG_FILES)
def test_a_wrong_file_is_refused(tmp_path: Path, text: str | bytes, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(write(tmp_path, text), (), BASE)
    assert "run.yaml" in str(caught.value)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"there is no file .*prunepeft init"):
        load_config(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="is a folder"):
        load_config(tmp_path)


def test_an_empty_file_and_a_byte_order_mark_are_fine(tmp_path: Path) -> None:
    assert load_config(write(tmp_path, ""), (), BASE).seed == 0
    assert load_config(write(tmp_path, b"\xef\xbb\xbfseed: 5\n"), (), BASE).seed == 5


@pytest.mark.parametrize("task", TASK_NAMES)
def test_templates_load_and_show_every_setting(tmp_path: Path, task: str) -> None:
    text = template(task)
    assert load_config(write(tmp_path, text)).task == task
    body = text.partition("\n\n")[2]
    entries = re.findall(r"^( *)(?:# )?(\w+):(.*?)(?:  +# .*)?$", body, re.MULTILINE)
    everything = "\n".join(f"{indent}{key}:{value}" for indent, key, value in entries)
    shown = load_config(write(tmp_path, everything))
    assert set(key_paths()) <= set(_paths(shown.to_dict()))
    assert [key for _, key, _ in entries] == [key.rpartition(".")[2] for key in key_paths()]


def _paths(values: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in values.items():
        yield prefix + key
        if isinstance(value, dict):
            yield from _paths(value, f"{prefix}{key}.")


def test_presets_stand_for_their_kinds() -> None:
    flags = {"model": "m", "data": "d", "budget": "1%"}
    assert load_config(None, ["kinds=mam,ia3"], flags).kinds == [
        "prefix",
        "parallel_adapter",
        "ia3",
    ]
    with pytest.raises(ConfigError, match="lora"):
        load_config(None, ["kinds=unipelt,lora"], flags)  # twice
    assert {k for kinds in KIND_PRESETS.values() for k in kinds} <= set(KIND_NAMES)


def test_names_known_here_are_those_of_the_registries() -> None:
    from prunepeft.criteria import CRITERIA
    from prunepeft.kinds import KINDS

    assert KINDS.names() == KIND_NAMES
    assert CRITERIA.names() == CRITERION_NAMES
    strategies = pytest.importorskip("prunepeft.strategies")
    tasks = pytest.importorskip("prunepeft.tasks")
    assert strategies.METHODS.names() == METHOD_NAMES
    assert tasks.TASKS.names() == TASK_NAMES


def test_schema_describes_every_setting() -> None:
    schema = config_schema()
    assert schema["required"] == ["model", "data"]
    assert schema["additionalProperties"] is False
    assert all("description" in field or "$ref" in field for field in schema["properties"].values())


@given(st.text(max_size=60))
@settings(max_examples=150, deadline=None)
def test_any_text_parses_or_is_refused_by_us(text: str) -> None:
    for parse in (lambda: parse_yaml(text, "text"), lambda: parse_override(text)):
        with contextlib.suppress(ConfigError):
            parse()


@given(
    st.sampled_from([*key_paths(), "train.x", "y"]),
    st.one_of(st.text(max_size=20), st.integers().map(str), st.floats().map(str)),
)
@settings(max_examples=200, deadline=None)
def test_any_override_gives_a_config_or_our_error(key: str, value: str) -> None:
    with contextlib.suppress(ConfigError, BudgetError):
        assert isinstance(load_config(None, [f"{key}={value}"], BASE), RunConfig)


def test_every_section_can_be_given_as_a_mapping_in_python() -> None:
    from prunepeft.library import _config

    fixed = {"model": "m", "data": "d", "budget": "1%", "sizes": {"lora": [4]}}
    config = _config(**fixed, ist={"enabled": True, "layers": 0.5}, bipeft={"window": 2})
    assert (config.ist.layers, config.bipeft.window, config.sizes) == (0.5, 2, {"lora": [4]})
