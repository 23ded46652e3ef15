"""Numbers worked by hand."""

import math

import pytest
import torch

from prunepeft.criteria import CRITERIA, Record
from prunepeft.criteria.combine import hybrid_probability

# Two modules. "low" is what each criterion should find worth less, except where noted.
#   a: w = [1, -2], [0, 0]     g = [0.5, 0.5], [2, -1]
#   b: w = [3, 0, 1e-7]        g = [-1, 4, 100]
RECORD = Record(
    units=("a", "b"),
    weights=(
        (torch.tensor([1.0, -2.0]), torch.tensor([[0.0, 0.0]])),
        (torch.tensor([3, 0, 1e-7]),),
    ),
    grad_sum=(
        (torch.tensor([0.5, 0.5]), torch.tensor([[2.0, -1.0]])),
        (torch.tensor([-1.0, 4, 100]),),
    ),
    abs_grad_mean=torch.tensor([1.5, 40.0]),
    abs_weight_grad_mean=torch.tensor([0.5, 0.25]),
    output_abs_mean=torch.tensor([0.2, 0.7]),
    init_rms=torch.tensor([15.0, 1.0]),
    # The layers 0 and 3 of the worked update of IST: scores 0.1434 and -0.1434.
    layer_importance=torch.sigmoid(torch.tensor([-0.1434, 0.1434], dtype=torch.float64)),
    steps=2,
)


@pytest.mark.parametrize(
    ("name", "a", "b"),
    [
        ("minimum_weight", (1 + 4) / 4, 9 / 3),
        ("zeros", 1 - 2 / 4, 1 - 1 / 3),
        ("threshold", 1 - 2 / 4, 1 - 2 / 3),
        ("threshold_relative", 1 - 3 / 4, 1 - 2 / 3),  # t = 1.5 and 0.1
        ("activation", 0.2, 0.7),
        ("snip", (0.5 + 1.0) / 4, (3.0 + 1e-5) / 3),
        ("gradient", 4.0 / 4, 105.0 / 3),
        ("snip_mean", 0.5, 0.25),
        ("gradient_mean", 1.5, 40.0),
        ("ist", 1 / (1 + math.exp(0.1434)), 1 / (1 + math.exp(-0.1434))),
    ],
)
def test_criterion_on_two_modules(name: str, a: float, b: float) -> None:
    assert CRITERIA.get(name).score(RECORD).tolist() == pytest.approx([a, b], rel=1e-6)


def test_every_criterion_has_worked_numbers() -> None:
    marks = test_criterion_on_two_modules.pytestmark
    assert {row[0] for row in marks[0].args[1]} == set(CRITERIA.names())


@pytest.mark.parametrize(
    ("name", "poor", "rich"),
    [
        ("minimum_weight", [0.1, 0.1], [1.0, 1.0]),
        ("zeros", [0.0, 0.0], [0.0, 1.0]),
        ("threshold", [1e-7, 1e-7], [1e-7, 1.0]),
        ("threshold_relative", [0.01, 0.01], [0.01, 1.0]),
        ("snip", [0.1, 0.1], [1.0, 1.0]),
    ],
)
def test_higher_is_worth_keeping(name: str, poor: list[float], rich: list[float]) -> None:
    ones = ((torch.ones(2),), (torch.ones(2),))
    weights = ((torch.tensor(poor),), (torch.tensor(rich),))
    record = Record(("p", "r"), weights, ones, init_rms=torch.ones(2), steps=1)
    low, high = CRITERIA.get(name).score(record).tolist()
    assert low < high


def test_hybrid_worked_example() -> None:
    # Saliency 0, 1, 2 gives v = 1, 0.5, 0.
    saliency = {"snip": {"a": 0.0, "b": 1.0, "c": 2.0}}
    found = hybrid_probability(saliency, dict.fromkeys("abc", "p"), {"p": ["snip"]})
    assert [found[unit] for unit in "abc"] == pytest.approx([0.3974, 0.3215, 0.2811], abs=5e-5)


def test_hybrid_of_two_criteria() -> None:
    # v_1 = (1, 0), v_2 = (0, 1); softmax(1, 0) = (0.731059, 0.268941);
    # weights sigmoid(3), sigmoid(2): both scores are 0.731059 * 0.952574 + 0.268941 * 0.880797.
    saliency = {"snip": {"a": 0.0, "b": 9.0}, "zeros": {"a": 1.0, "b": 0.0}}
    found = hybrid_probability(saliency, {"a": "p", "b": "p"}, {"p": ["snip", "zeros"]})
    assert found == {"a": 0.5, "b": 0.5}


def test_paper_exact_on_two_modules() -> None:
    # v = 1 - s / (2 + 1e-5) = (0.500002, 0.000005); softmax (0.622459, 0.377541);
    # weights 5 sigmoid(3), 5 sigmoid(2) = (4.762871, 4.403985); scores (2.964693, 1.662686).
    saliency = {"snip": {"a": 1.0, "b": 2.0}}
    found = hybrid_probability(saliency, {"a": "p", "b": "p"}, {"p": ["snip"]}, paper_exact=True)
    gap = 2.964693 - 1.662686
    assert found["a"] == pytest.approx(1 / (1 + math.exp(-gap)), abs=1e-5)
    assert sum(found.values()) == pytest.approx(1.0)
