"""Tables: values as people read them, and what is safe in each form."""

import csv
import io

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prunepeft.report.grid import plain
from prunepeft.report.record import Result
from prunepeft.report.render import (
    Column,
    Table,
    escape_markdown,
    show,
    to_csv,
    to_markdown,
    to_text,
)
from prunepeft.report.tables import compare, cost_table

VALUES = st.one_of(st.none(), st.integers(), st.floats(), st.text())
FORMS = ("text", "int", "plain", "score", "significant", "ratio", "seconds", "bytes")


@given(st.lists(st.tuples(VALUES, VALUES)), st.sampled_from(FORMS))
def test_tables_hold_any_value(rows, form):
    numbers = [(a, None if isinstance(b, str) else b) for a, b in rows]
    table = Table("t", "T", (Column("a"), Column("b", form)), tuple(numbers))
    assert len(to_text(table).splitlines()) == len(rows) + 1
    markdown = to_markdown(table).split("\n")
    assert len(markdown) == len(rows) + 2
    read = list(csv.reader(io.StringIO(to_csv(table))))
    assert all(len(line) == 2 for line in read)
    assert len(read) == len(rows) + 1


@given(st.text())
def test_escaped_markdown_holds_no_markup(text):
    escaped = escape_markdown(text)
    assert "<" not in escaped
    assert "\n" not in escaped
    assert plain(text).isprintable()


@pytest.mark.parametrize(
    ("value", "form", "shown"),
    [
        (0.000123456, "significant", "0.000123"),
        (3, "plain", "3"),
        (12345.678, "score", "12,345.7"),
        (3661, "seconds", "1 h 1 min"),
        (59.97, "seconds", "60.0 s"),
        (999, "bytes", "999 B"),
        (2.5e9, "bytes", "2.5 GB"),
        (float("nan"), "int", "nan"),
        (1.5, "ratio", "1.50×"),
    ],
)
def test_values_as_people_read_them(value, form, shown):
    assert show(value, form) == shown


def test_formulas_are_quoted_in_csv_but_numbers_stay_numbers():
    table = Table(
        "t", "T", (Column("a"), Column("time", "seconds")), (("=1+1", -2.5), ("@x", None))
    )
    assert to_csv(table) == "a,time (seconds)\n'=1+1,-2.5\n'@x,\n"


def test_a_lower_metric_can_be_the_better_one():
    result = {
        "task": {"metric": "perplexity", "greater_is_better": False},
        "metric": {"name": "perplexity", "value": 12.0},
        "baselines": [
            {"name": "a", "metric": {"value": 14.0}},
            {"name": "b", "metric": {"value": 13.0}},
            {"name": "failed", "metric": {"value": None}},
        ],
    }
    found = Result.model_validate(result)
    expected = "perplexity 12.0000 is better than b (13.0000, difference -1.0000; one seed)."
    assert compare(found) == expected
    assert "lower is better" in cost_table(found).note


@pytest.mark.parametrize(("value", "words"), [(0.8, "equal to"), (0.79, "worse than")])
def test_no_gain_is_said_plainly(value, words):
    baseline = {"name": "b", "metric": {"value": 0.8}}
    result = Result.model_validate(
        {"metric": {"name": "f1", "value": value}, "baselines": [baseline]}
    )
    assert words in compare(result)
