"""The documentation is true: tables are generated, links resolve, code runs, nothing is missing.

After a change of the configuration: python -m tests.unit.test_docs
"""

import json
import re
import runpy
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel
from pydantic.fields import FieldInfo

import prunepeft
from prunepeft.budget import UNITS
from prunepeft.cli.app import COMMANDS
from prunepeft.config import RunConfig
from prunepeft.config.load import key_paths
from prunepeft.config.methods import AllocateSettings, BlackBoxSettings
from prunepeft.criteria import CRITERIA
from prunepeft.kinds import KINDS
from prunepeft.space import Placement
from prunepeft.sparse_tuning import IstSettings
from prunepeft.strategies import METHODS, Allocator, AutoPeft, Bipeft, LightPeft, S3Delta, SMam
from prunepeft.strategies.bayesian import NEEDS
from prunepeft.strategies.history import Trial
from prunepeft.strategies.hybrid_pruning import MODES, REINIT
from prunepeft.structured import find_groups
from prunepeft.structured.base_criteria import BASE_CRITERIA
from prunepeft.structured.lora_prune import GradualPruner
from prunepeft.supernet.export.write import FORMATS
from tests.tiny_models import TINY, tiny_inputs
from tests.tiny_tokenizer import save_tiny_model

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
CONFIGURATION = DOCS / "configuration.md"
BEGIN, END = "<!-- generated: begin -->\n", "<!-- generated: end -->\n"
ALLOCATORS = [name for name, method in METHODS if issubclass(method, Allocator)]
PAGES = sorted(DOCS.rglob("*.md"))
_TYPES = {"string": "text", "integer": "whole number", "number": "number", "boolean": "switch"}
_TYPES |= {"array": "list", "object": "mapping"}
_LIMITS = {
    "ge": ">=", "minimum": ">=", "gt": ">", "exclusiveMinimum": ">",
    "le": "<=", "maximum": "<=", "lt": "<", "exclusiveMaximum": "<",
}  # fmt: skip


def render_configuration() -> str:
    """Tables of every key, made from the model of the configuration."""
    sections = [("Run", "", RunConfig)]
    sections += [(n, f"{n}.", f.annotation) for n, f in _groups(RunConfig).items()]
    return "\n".join(_section(*section) for section in sections)


def _section(title: str, prefix: str, model: type[BaseModel]) -> str:
    properties = model.model_json_schema()["properties"]
    lines = [f"## {title}", "", "| key | default | value | meaning |", "|---|---|---|---|"]
    for name, field in model.model_fields.items():
        if name not in _groups(model):
            cells = (_default(field), _value(properties[name]), field.description or "")
            lines.append(f"| `{prefix}{name}` | " + " | ".join(_cell(c) for c in cells) + " |")
    return "\n".join([*lines, ""])


def _groups(model: type[BaseModel]) -> dict[str, FieldInfo]:
    return {
        name: field
        for name, field in model.model_fields.items()
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
    }


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if isinstance(value, list):
        return ", ".join(value)
    return value if isinstance(value, str) else json.dumps(value)


def _value(schema: dict[str, Any]) -> str:
    if "anyOf" in schema:
        kept = [_value(s) for s in schema["anyOf"] if s != {"type": "null"}]
        return f"{', '.join(kept)} or null"
    if "enum" in schema:
        return ", ".join(schema["enum"])
    limits = list(dict.fromkeys(f"{s} {schema[k]:.10g}" for k, s in _LIMITS.items() if k in schema))
    if any(limit.startswith("> ") for limit in limits):
        limits = [limit for limit in limits if not limit.startswith(">=")]
    return " ".join([_TYPES[schema["type"]], ", ".join(limits)]).strip()


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


def _with_tables(text: str) -> str:
    head, _, rest = text.partition(BEGIN)
    return head + BEGIN + render_configuration() + END + rest.partition(END)[2]


def anchors_of(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings}


def links_of(page: Path) -> list[str]:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    found = re.findall(r"\]\(([^)\s]+)\)", text)
    return [link for link in found if not link.startswith(("https://", "mailto:"))]


def names_missing(page: str, names: Any) -> list[str]:
    text = (DOCS / page).read_text(encoding="utf-8")
    return [name for name in names if not re.search(rf"(?<!\w){re.escape(name)}(?!\w)", text)]


# ---- tables, links, names ----------------------------------------------------------------------


def test_configuration_tables_are_up_to_date() -> None:
    text = CONFIGURATION.read_text(encoding="utf-8")
    assert text == _with_tables(text), (
        "docs/configuration.md is out of date; run `python -m tests.unit.test_docs`"
    )


def test_tables_hold_every_key_default_and_limit() -> None:
    table = render_configuration()
    groups = set(_groups(RunConfig))
    keys = {key for key in key_paths() if key not in groups} | {"trust_remote_code"}
    assert set(re.findall(r"^\| `([\w.]+)`", table, re.MULTILINE)) == keys
    assert "| `train.lr` | 0.0005 | number > 0 |" in table
    assert "| `base.fidelity` | 1.0 | number > 0, &lt;= 1 |" in table
    assert "| `search.fidelity` | null | number > 0, &lt;= 1 or null |" in table
    assert "| `search.reinit` | reset | reset, keep, init |" in table
    assert "| `model` | required | text |" in table
    assert all(len(row.split("|")) == 6 for row in table.splitlines() if row.startswith("| `"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_resolve(page: Path) -> None:
    for link in links_of(page):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.is_file(), f"{page.name} links to {link}, which does not exist"
        assert not anchor or anchor in anchors_of(target), f"{page.name}: no heading for {link}"


def test_every_page_and_example_is_linked_from_the_index() -> None:
    linked = {(DOCS / link).resolve() for link in links_of(DOCS / "index.md")}
    wanted = {*PAGES, *(ROOT / "examples").iterdir()} - {DOCS / "index.md"}
    assert not {path.name for path in wanted if path.is_file() and path not in linked}


@pytest.mark.parametrize(
    ("page", "names"),
    [
        ("library.md", prunepeft.__all__),
        ("kinds.md", KINDS.names()),
        ("criteria.md", CRITERIA.names()),
        ("cli.md", [c.__name__.rpartition(".")[2].replace("_", "-") for c in COMMANDS]),
        ("cli.md", UNITS),
        ("export.md", FORMATS.names()),
        ("methods/prunepeft.md", (*MODES, *REINIT, "paper_exact", "per_round")),
        ("methods/light-peft.md", [f.name for f in fields(LightPeft) if f.name != "l1"]),
        ("methods/black-box.md", [*BlackBoxSettings.model_fields, *Trial.__dataclass_fields__]),
        ("methods/autopeft.md", [*(f.name for f in fields(AutoPeft)), *NEEDS]),
        ("methods/s-mam.md", [f.name for f in fields(SMam)]),
        ("methods/s3delta.md", [f.name for f in fields(S3Delta)]),
        ("methods/bipeft.md", [f.name for f in fields(Bipeft)]),
        ("methods/allocators.md", [*AllocateSettings.model_fields, *ALLOCATORS]),
        ("methods/ist.md", [f.name for f in fields(IstSettings)]),
        ("methods/loraprune.md", BASE_CRITERIA.names()),
        ("methods/loraprune.md", list(GradualPruner(find_groups(TINY["bert"]())).config)[1:]),
    ],
    ids=(
        "api kinds criteria commands budget_units formats method light_peft black_box autopeft "
        "smam s3delta bipeft allocators ist base_criteria loraprune"
    ).split(),
)
def test_page_names_everything(page: str, names: Any) -> None:
    assert not names_missing(page, names)


@pytest.mark.parametrize("name", KINDS.names())
def test_kind_card_is_true(name: str) -> None:
    kind = KINDS.get(name)
    text = (DOCS / "kinds.md").read_text(encoding="utf-8")
    table = [r.strip("|").split("|") for r in text.splitlines() if r.startswith("| ")]
    rows = {row[0].strip(): [cell.strip() for cell in row[1:]] for row in table}
    formula, roles, size, *flags = rows[f"`{name}`"]
    assert formula == kind.formula
    assert roles == ", ".join("+".join(group) for group in kind.roles)
    assert (size != "none") == kind.sized
    truth = (bool(kind.shrink_axes), kind.mergeable, kind.servable)
    assert flags == ["yes" if flag else "no" for flag in truth]
    card = text.partition(f"\n## {name}\n")[2].partition("\n## ")[0]
    assert "arXiv" in card
    assert name == "parallel_adapter" or not names_missing_in(card, kind)


def names_missing_in(card: str, kind: type) -> list[str]:
    return [option for option in (f.name for f in fields(kind)) if f"`{option}`" not in card]


# ---- code --------------------------------------------------------------------------------------


@pytest.fixture
def own_registries(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a page or an example registers is gone after the test."""
    for registry in (KINDS, CRITERIA):
        monkeypatch.setattr(registry, "_items", dict(registry._items))


@pytest.mark.parametrize(
    "page", [p for p in PAGES if "```python test" in p.read_text()], ids=lambda page: page.stem
)
@pytest.mark.usefixtures("own_registries")
def test_code_of_pages_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = TINY["bert"]()
    names = {"model": model, "inputs": tiny_inputs("bert", model), "__name__": page.stem}
    text = page.read_text(encoding="utf-8")
    for code in re.findall(r"^```python test\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        exec(compile(code, str(page), "exec"), names)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("examples")
    save_tiny_model(folder / "model", head="base")
    rows = [{"text": f"w{i % 40} w{i % 7}", "label": i % 2} for i in range(24)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def run_example(name: str, *arguments: Any, **settings: Any) -> Any:
    module = runpy.run_path(str(ROOT / "examples" / f"{name}.py"), run_name=name)
    return module["main"](*map(str, arguments), **settings)


def test_example_search_and_load(tiny: Path) -> None:
    places = (tiny / "model", tiny / "train.jsonl", tiny / "run")
    quick = {"train": {"epochs": 1}, "search": {"warmup": False, "rounds": 1}}
    net = run_example("search_and_load", *places, "5 modules", **quick)
    assert len(prunepeft.placement_of(net)) == 5
    assert not net.training


def test_example_prune_callback(tiny: Path) -> None:
    kept = run_example(
        "prune_callback", tiny / "model", tiny / "train.jsonl", tiny / "out", "3 modules"
    )
    saved = json.loads((tiny / "out" / "adapter_config.json").read_text())
    assert Placement.from_dict(saved["placement"]) == kept
    assert len(kept) == 3


@pytest.mark.usefixtures("own_registries")
def test_example_custom_criterion(tiny: Path) -> None:
    scores = run_example("custom_criterion", tiny / "model")
    assert len(scores) == 12
    assert min(scores.values()) > 0  # every module has moved away from adding nothing


if __name__ == "__main__":
    CONFIGURATION.write_text(_with_tables(CONFIGURATION.read_text()), encoding="utf-8")
