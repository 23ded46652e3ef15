import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prunepeft.budget import UNITS, Budget, Fidelity
from prunepeft.errors import BudgetError


@pytest.mark.parametrize(
    ("text", "amount", "unit", "relative"),
    [
        ("0.5%", 0.005, "parameters", True),
        (" 1 % ", 0.01, "parameters", True),
        ("100%", 1.0, "parameters", True),
        ("1e-2%", 1e-4, "parameters", True),
        ("120k", 120_000, "parameters", False),
        ("120K", 120_000, "parameters", False),
        ("1.2M", 1_200_000, "parameters", False),
        ("2B", 2_000_000_000, "parameters", False),
        ("300000", 300_000, "parameters", False),
        (300_000, 300_000, "parameters", False),
        (3e5, 300_000, "parameters", False),
        ("3e5", 300_000, "parameters", False),
        ("12 modules", 12, "modules", False),
        ("1 module", 1, "modules", False),
        ("12modules", 12, "modules", False),
        ("rank:64", 64, "rank", False),
        ("rank = 64", 64, "rank", False),
        ("RANK:8", 8, "rank", False),
    ],
)
def test_every_written_form_is_read(text, amount, unit, relative):
    budget = Budget.parse(text)
    assert budget.amount == pytest.approx(amount)
    assert (budget.unit, budget.relative) == (unit, relative)
    assert Budget.parse(budget) is budget


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "cannot be read"),
        ("many", "cannot be read"),
        ("12 layers", "cannot be read"),
        ("%", "cannot be read"),
        ("1.2.3%", "cannot be read"),
        ("--5", "cannot be read"),
        ("1,000", "cannot be read"),
        ("nan", "cannot be read"),
        ("1 2", "cannot be read"),
        (None, "cannot be read"),
        ("0", "above zero"),
        ("0%", "above zero"),
        ("-5", "above zero"),
        ("-1%", "above zero"),
        ("0 modules", "above zero"),
        ("rank:0", "above zero"),
        ("0.005", "a share needs %"),
        (0.5, "a share needs %"),
        ("101%", "exceeds the base model"),
        ("1.5 modules", "whole number"),
        ("rank:2.5", "whole number"),
        ("rank:.", "cannot be read"),
        ("1e999", "above zero"),
        ("1e999%", "above zero"),
        (float("inf"), "cannot be read"),
    ],
)
def test_anything_else_is_refused_with_the_forms(text, message):
    with pytest.raises(BudgetError, match=message):
        Budget.parse(text)


@given(st.text(max_size=12))
def test_no_text_raises_anything_but_a_budget_error(text):
    try:
        budget = Budget.parse(text)
    except BudgetError:
        return
    assert budget.amount > 0
    assert math.isfinite(budget.amount)


@given(st.integers(1, 999_999), st.sampled_from(UNITS))
def test_whole_budgets_survive_being_written(amount, unit):
    text = {"parameters": "{}", "modules": "{} modules", "rank": "rank:{}"}[unit].format(amount)
    budget = Budget.parse(text)
    assert budget.limit(10) == amount
    assert Budget.parse(str(budget)) == budget


@pytest.mark.parametrize("text", ["0.5%", "12 modules", "rank:64", "300000"])
def test_written_forms_are_canonical(text):
    assert str(Budget.parse(text)) == text


def test_a_share_is_of_the_base_model_and_rounds_down():
    assert Budget.parse("1%").limit(22_713_216) == 227_132
    assert Budget.parse("0.1%").limit(1000) == 1
    assert Budget.parse("0.1%").limit(999) == 0
    assert Budget.parse("1.5k").limit(5) == 1500


@given(st.integers(1, 10**9), st.floats(0.001, 100))
def test_a_share_never_exceeds_itself(n_base, percent):
    limit = Budget.parse(f"{percent}%").limit(n_base)
    assert 0 <= limit <= n_base
    assert limit <= n_base * percent / 100 + 1e-6 * n_base


def test_units_are_checked():
    with pytest.raises(BudgetError, match="unit 'seconds' is unknown"):
        Budget(3, unit="seconds")
    for bad in (math.nan, math.inf, -1, 0):
        with pytest.raises(BudgetError, match="above zero"):
            Budget(bad)


def test_fidelity_is_checked():
    assert Fidelity(0.25, 2).data == 0.25
    for data in (0, -0.1, 1.01, math.nan):
        with pytest.raises(BudgetError, match=r"fidelity must be in \(0, 1\]"):
            Fidelity(data)
    with pytest.raises(BudgetError, match="at least one epoch"):
        Fidelity(1.0, 0)
