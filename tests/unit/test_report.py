"""A report tells exactly what the run recorded, safely, and the same every time."""

import ast
import json
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml

from prunepeft.errors import CheckpointError, StateError
from prunepeft.report import compact_summary, write_report
from prunepeft.report.card import fenced, make_card
from prunepeft.report.grid import modules_of
from prunepeft.report.plots import make_pictures
from prunepeft.report.record import read_evidence
from prunepeft.report.render import to_csv
from prunepeft.report.tables import kept_table

GOLDEN = Path(__file__).parents[1] / "golden" / "report"
FIGURES = {
    "kept_modules",
    "learning_curves",
    "cost",
    "rounds",
    "removals_by_layer",
    "partitions",
    "warmup_removals",
    "saliency_first_round",
    "saliency_last_round",
}
HOSTILE = "<script>alert(1)</script>$\\frac{x}|`**&\x1b[31m\x00\u202e = \"'"


class Page(HTMLParser):
    """What a browser would fetch, run or address in a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.links, self.ids, self.words = Counter(), [], Counter(), []
        self.handlers = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags[tag] += 1
        for name, value in attrs:
            if name in ("href", "xlink:href", "src", "srcset", "action", "data"):
                self.links.append(value)
            if name == "id":
                self.ids[value] += 1
            if name.startswith("on"):
                self.handlers.append(name)

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


@pytest.fixture
def run(tmp_path):
    shutil.copytree(GOLDEN / "run", tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report") / "run"
    shutil.copytree(GOLDEN / "run", folder)
    assert write_report(folder) == folder / "report" / "report.html"
    return folder


def edit(run, name, change):
    """Apply `change` to a JSON file of the run."""
    data = json.loads((run / name).read_text("utf-8"))
    change(data)
    (run / name).write_text(json.dumps(data), "utf-8")


def test_card_and_tables_are_as_worked_by_hand(written):
    assert (written / "README.md").read_text("utf-8") == (GOLDEN / "card.md").read_text("utf-8")
    for name in ("cost.csv", "dropped_modules.csv"):
        found = (written / "report" / "tables" / name).read_text("utf-8")
        assert found == (GOLDEN / name).read_text("utf-8")


def test_summary_of_the_command_line():
    result = json.loads((GOLDEN / "run" / "result.json").read_text("utf-8"))
    assert compact_summary(result, "runs/a") + "\n" == (GOLDEN / "summary.txt").read_text("utf-8")
    assert "report.html" not in compact_summary(result)


def test_every_figure_is_there_in_both_forms_and_in_the_page(written):
    figures = written / "report" / "figures"
    assert {p.name for p in figures.iterdir()} == {
        f"{n}.{e}" for n in FIGURES for e in ("png", "svg")
    }
    page = Page((written / "report" / "report.html").read_text("utf-8"))
    assert page.tags["svg"] == len(FIGURES)
    assert set(page.ids) >= FIGURES
    for path in figures.glob("*.png"):
        assert path.read_bytes().startswith(b"\x89PNG")


def test_page_needs_nothing_else(written):
    text = (written / "report" / "report.html").read_text("utf-8")
    page = Page(text)
    assert all(link.startswith("#") for link in page.links)
    assert {link[1:] for link in page.links} <= set(page.ids)
    assert max(page.ids.values()) == 1
    assert not page.handlers
    assert not {"script", "iframe", "object", "embed", "link", "img"} & set(page.tags)
    assert "@import" not in text
    assert "prefers-color-scheme: dark" in text
    assert "@media print" in text


def test_page_says_what_the_run_recorded(written):
    text = Page((written / "report" / "report.html").read_text("utf-8")).text
    assert "accuracy 0.9000 is better than lora q+v (0.8500, difference +0.0500; one seed)." in text
    assert "of 8 candidates" in text
    assert (
        "took 1 training runs; without sharing runs between criteria it would have taken 2" in text
    )
    assert "encoder.0.attention.q+v:lora" in text


def test_same_files_give_the_same_bytes(written, run):
    write_report(run)
    files = sorted(p.relative_to(run) for p in run.rglob("*") if p.is_file())
    assert len(files) > 25
    for name in files:
        assert (run / name).read_bytes() == (written / name).read_bytes(), name


def test_writing_again_leaves_no_temporary_file(written):
    before = {p.relative_to(written) for p in written.rglob("*")}
    write_report(written)
    assert {p.relative_to(written) for p in written.rglob("*")} == before


def test_reports_never_import_torch(run):
    code = (
        "import sys; from prunepeft.report import write_report, inspect_path, format_inspect;"
        f"write_report({str(run)!r}); inspect_path({str(run / 'best' / 'arch.json')!r});"
        "print({'torch', 'transformers', 'peft'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_callers_matplotlib_settings_are_untouched(run):
    import matplotlib

    before = dict(matplotlib.rcParams)
    make_pictures(read_evidence(run))
    assert dict(matplotlib.rcParams) == before


def hostile_result(data):
    data["model"]["name"] = data["data"]["source"] = data["method"] = HOSTILE
    data["command"] = f"prunepeft ```\n{HOSTILE}"
    data["task"]["labels"] = [HOSTILE, HOSTILE]
    data["task"]["metric"] = data["metric"]["name"] = HOSTILE
    data["metric"]["all"] = {HOSTILE: 0.9}
    data["budget"]["text"] = data["prunepeft_version"] = data["created"] = HOSTILE
    data["baselines"][0]["name"] = "=cmd()" + HOSTILE
    data["environment"] = {HOSTILE: HOSTILE, "nested": {HOSTILE: [HOSTILE]}}
    data["placement"]["modules"][0]["paths"] = [HOSTILE]
    for point in data["train"]["curve"]:
        point[HOSTILE] = 0.5


def hostile_history(data):
    for entry in data["rounds"]:
        entry["saliency"][HOSTILE] = entry["saliency"].pop("snip")
    data["strategy"]["encoder.0.lora"] = [HOSTILE]
    data["strategy"][HOSTILE] = [HOSTILE]
    data["warmup"]["turns"][0]["criterion"] = HOSTILE
    data["warmup"]["tendency"][HOSTILE] = {HOSTILE: 3}
    slot = f"encoder.1.ffn.{HOSTILE}:{HOSTILE}".replace(":$", "$")
    data["rounds"][0]["removed"].append(slot)
    data["rounds"][0]["saliency"]["zeros"][slot] = 1.0


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    run = tmp_path_factory.mktemp("hostile") / "run"
    shutil.copytree(GOLDEN / "run", run)
    edit(run, "result.json", hostile_result)
    edit(run, "history.json", hostile_history)
    (run / "config.yaml").write_text(f"model: {HOSTILE}\n</pre><script>x</script>", "utf-8")
    (run / "data.json").write_text(json.dumps({"rows": HOSTILE, HOSTILE: [HOSTILE]}), "utf-8")
    write_report(run)
    return run


def test_hostile_text_stays_text_in_the_page(hostile):
    text = (hostile / "report" / "report.html").read_text("utf-8")
    page = Page(text)
    assert page.tags["script"] == 0
    assert not page.handlers
    assert all(link.startswith("#") for link in page.links)
    assert "<script>alert(1)</script>" in page.text
    for path in (hostile / "report" / "figures").glob("*.svg"):
        tree = ElementTree.parse(path)
        assert not [e for e in tree.iter() if e.tag.endswith("script")]


def test_hostile_text_stays_text_in_the_card(hostile):
    card = (hostile / "README.md").read_text("utf-8")
    assert "\x1b" not in card
    assert "\u202e" not in card
    _, header, body = card.split("---\n", 2)
    front = yaml.safe_load(header)
    assert front["base_model"] == HOSTILE
    assert front["prunepeft"]["method"] == HOSTILE
    outside = re.sub(r"^(`{3,})\w*\n.*?^\1$|`[^`\n]*`", "", body, flags=re.DOTALL | re.MULTILINE)
    assert "<script" not in outside
    code = re.search(r"^```python\n(.*?)^```$", body, flags=re.DOTALL | re.MULTILINE)[1]
    assert HOSTILE in [n.value for n in ast.walk(ast.parse(code)) if isinstance(n, ast.Constant)]


def test_hostile_text_stays_text_in_tables_and_terminal(hostile):
    rows = (hostile / "report" / "tables" / "cost.csv").read_text("utf-8")
    assert "\n'=cmd()" in rows or "\n\"'=cmd()" in rows
    result = json.loads((hostile / "result.json").read_text("utf-8"))
    shown = compact_summary(result)
    assert not set("\x1b\x00\u202e") & set(shown)


def test_a_code_block_cannot_be_closed_from_inside():
    assert fenced("a\n````\nb", "bash") == "`````bash\na\n````\nb\n`````"


@pytest.mark.parametrize(
    ("change", "words", "figures"),
    [
        (lambda h: h.update(warmup=None), "There was no warm-up in this run.", {"warmup_removals"}),
        (
            lambda h: h.update(warmup=None, strategy={}, rounds=[], space=None, partitions={}),
            "There were no pruning rounds",
            FIGURES - {"kept_modules", "learning_curves", "cost"},
        ),
        (
            lambda h: h["rounds"][1].update(saliency={}),
            "Saliency by criterion, first round",
            {"saliency_last_round"},
        ),
        (lambda h: h.update(strategy={}), "Criteria were not assigned", {"partitions"}),
    ],
    ids=["no warm-up", "no search", "no saliency in the last round", "no partitions"],
)
def test_missing_evidence_is_said_in_words(run, change, words, figures):
    edit(run, "history.json", change)
    text = Page(write_report(run).read_text("utf-8")).text
    assert words in text
    there = {p.stem for p in (run / "report" / "figures").glob("*.png")}
    assert there == FIGURES - figures


def test_a_run_without_a_search_still_has_a_report(run):
    (run / "history.json").unlink()
    (run / "data.json").unlink()
    (run / "config.yaml").unlink()
    shutil.rmtree(run / "best")
    edit(run, "result.json", lambda r: r.update(method="none", baselines=[], budget={"text": None}))
    text = Page(write_report(run).read_text("utf-8")).text
    assert "No baseline was trained" in text
    assert "There were no pruning rounds" in text
    card = (run / "README.md").read_text("utf-8")
    assert "No budget was recorded." in card
    assert "placed without a pruning search (method none)" in card
    assert "nothing is claimed" in card


def test_an_almost_empty_result_still_has_a_report(run):
    (run / "result.json").write_text("{}", "utf-8")
    (run / "history.json").unlink()
    (run / "best" / "arch.json").unlink()
    text = Page(write_report(run).read_text("utf-8")).text
    assert "No list of kept modules was recorded." in text
    assert "No learning curve was recorded." in text


def test_kept_modules_come_from_the_placement_if_the_result_lists_none(run):
    edit(run, "result.json", lambda r: r["placement"].pop("modules"))
    rows = to_csv(kept_table(modules_of(read_evidence(run)))).splitlines()
    assert len(rows) == 4
    assert rows[1].startswith("encoder.1.attention.q+v:lora,encoder,1,attention q+v,lora,4,,")


def test_plain_lora_adapter_needs_no_import(run):
    edit(run, "best/adapter/adapter_config.json", lambda c: c.update(peft_type="LORA"))
    card = make_card(read_evidence(run))
    assert "import prunepeft" not in card
    assert "peft alone opens it" in card


@pytest.mark.parametrize(
    ("task", "labels", "line"),
    [
        (
            "regression",
            None,
            'AutoModelForSequenceClassification.from_pretrained("base/tiny", num_labels=1)',
        ),
        ("causal-lm", None, 'AutoModelForCausalLM.from_pretrained("base/tiny")'),
        ("seq-cls", ["a", "b", "c"], 'from_pretrained("base/tiny", num_labels=3)'),
    ],
)
def test_loading_code_fits_the_task(run, task, labels, line):
    edit(run, "result.json", lambda r: r["task"].update(name=task, labels=labels))
    assert line in make_card(read_evidence(run))


QUANTISED = {"words": "4 bits (bitsandbytes)", "settings": {"load_in_4bit": True}, "head": []}


@pytest.mark.parametrize(
    ("held", "lines"),
    [
        (
            QUANTISED | {"settings": {"load_in_4bit": True, "llm_int8_skip_modules": ["a", "b"]}},
            [
                "from transformers import AutoModelForSequenceClassification, AutoTokenizer, "
                "BitsAndBytesConfig",
                '    llm_int8_skip_modules=["a", "b"],',
                'from_pretrained("base/tiny", quantization_config=quantization, num_labels=2)',
                "was held in 4 bits (bitsandbytes)",
            ],
        ),
        (
            QUANTISED | {"settings": {}, "head": ["score"]},
            [
                "from prunepeft.tasks import open_quantized  # and makes peft know this adapter",
                'base = open_quantized(AutoModelForSequenceClassification, "base/tiny", '
                '["score"], num_labels=2)',
            ],
        ),
        (QUANTISED | {"settings": {}}, ['from_pretrained("base/tiny", num_labels=2)']),
        (
            QUANTISED | {"settings": {"a=1);evil(": True, "b": '")\nevil('}},
            ["    b='"],
        ),
    ],
    ids=["stock", "head", "no-head", "hostile"],
)
def test_loading_code_opens_a_quantised_base(run, held, lines):
    edit(run, "result.json", lambda r: r["model"].update(quantization=held))
    edit(run, "result.json", lambda r: r["task"].update(name="seq-cls", labels=["a", "b"]))
    card = make_card(read_evidence(run))
    for line in lines:
        assert line in card
    code = card.partition("```python\n")[2].partition("```")[0]
    called = {ast.unparse(c.func) for c in ast.walk(ast.parse(code)) if isinstance(c, ast.Call)}
    assert not any("evil" in name for name in called)


def test_no_result_yet(tmp_path):
    with pytest.raises(StateError, match=r"holds no result\.json.*resumes and finishes"):
        write_report(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("result.json", "{", r"result\.json is not valid JSON"),
        (
            "result.json",
            "[1]",
            r"result\.json: the top level: .*run the command that wrote it again",
        ),
        ("result.json", '{"metric": {"value": "high"}}', r"metric\.value: .* valid number"),
        ("result.json", '{"placement": {"modules": [{"id": "x"}]}}', r"modules\.0\.kind"),
        ("history.json", '{"rounds": 3}', r"history\.json: rounds"),
        (
            "history.json",
            '{"space": {"slots": []}}',
            r"history\.json does not hold a valid placement",
        ),
        ("history.json", '{"rounds": [{"round": 1, "removed": ["nonsense"]}]}', "is not a slot id"),
        ("best/arch.json", '{"format_version": 9, "slots": []}', r"arch\.json.*Install a newer"),
    ],
)
def test_damaged_files_are_named(run, name, content, message):
    (run / name).write_text(content, "utf-8")
    with pytest.raises(CheckpointError, match=message):
        write_report(run)
    assert not (run / "report").exists()


def test_evidence_ignores_unknown_keys(run):
    edit(run, "result.json", lambda r: r.update(later={"added": 1}))
    assert read_evidence(run).result.seed == 7
