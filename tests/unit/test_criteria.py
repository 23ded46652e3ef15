"""Records, and what scoring does with odd input."""

import logging
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from prunepeft.criteria import CRITERIA, PAPER_CRITERIA, Criterion, Record, needs_of, score_units
from prunepeft.criteria.base import NEEDS, RECORDED
from prunepeft.criteria.magnitude import Threshold, ThresholdRelative
from prunepeft.errors import ConfigError, StateError, UnknownNameError
from prunepeft.testing.criteria import CriterionContract, make_record


@dataclass(frozen=True)
class Fixed(Criterion):
    """Returns its field."""

    name: ClassVar[str] = "fixed"
    needs: ClassVar[frozenset[str]] = frozenset({"outputs"})

    values: tuple[float, ...] = ()

    def saliency(self, record: Record) -> Tensor:
        return torch.tensor(self.values)


def test_paper_criteria_are_registered_in_order() -> None:
    assert CRITERIA.names()[:6] == PAPER_CRITERIA
    assert set(CRITERIA.names()[6:]) == {"snip_mean", "gradient_mean", "threshold_relative", "ist"}


def test_unknown_criterion_is_named_with_the_closest() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'gradient'"):
        CRITERIA.get("gradiant")


def test_needs_are_joined() -> None:
    assert needs_of(["zeros"]) == {"weights"}
    assert needs_of(["gradient", "activation"]) == {"gradients", "outputs"}
    assert needs_of(PAPER_CRITERIA) == RECORDED
    assert needs_of([*PAPER_CRITERIA, "ist"]) == NEEDS


def test_score_units_names_units() -> None:
    record = make_record(3)
    found = score_units(record, ["activation", "snip"])
    assert list(found) == ["activation", "snip"]
    assert found["activation"] == dict(
        zip(record.units, record.output_abs_mean.tolist(), strict=True)
    )


def test_record_without_steps_is_refused() -> None:
    with pytest.raises(StateError, match="holds 0 optimiser steps"):
        replace(make_record(2), steps=0)


def test_record_of_wrong_length_is_refused() -> None:
    with pytest.raises(
        StateError, match=r"record\.output_abs_mean describes 3 modules, there are 2"
    ):
        replace(make_record(2), output_abs_mean=torch.ones(3))


def test_record_knows_what_it_holds() -> None:
    assert make_record(2).holds == NEEDS
    assert make_record(2, needs=frozenset({"outputs"})).holds == {"outputs"}


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_not_finite_becomes_the_smallest(bad: float, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        score = Fixed((2.0, bad, 5.0)).score(make_record(3))
    assert score.tolist() == [2.0, 2.0, 5.0]
    assert "fixed is not finite for unit1" in caplog.text


def test_nothing_finite_becomes_zero() -> None:
    assert Fixed((float("nan"), float("inf"))).score(make_record(2)).tolist() == [0.0, 0.0]


def test_finite_scores_do_not_warn(caplog: pytest.LogCaptureFixture) -> None:
    Fixed((1.0, -1.0)).score(make_record(2))
    assert caplog.text == ""


def test_one_nan_gradient_costs_only_its_unit() -> None:
    record = make_record(3)
    record.grad_sum[1][0][0, 0] = float("nan")
    before = CRITERIA.get("gradient").score(make_record(3))
    after = CRITERIA.get("gradient").score(record)
    assert after[[0, 2]].tolist() == before[[0, 2]].tolist()
    assert after[1] == before[[0, 2]].min()


def test_plug_in_of_wrong_shape_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"'fixed' returned shape \(3,\); return one number per unit"
    ):
        Fixed((1.0, 2.0, 3.0)).score(make_record(2))


@pytest.mark.parametrize("make", [lambda: Threshold(0.0), lambda: ThresholdRelative(-1.0)])
def test_thresholds_must_be_positive(make: type) -> None:
    with pytest.raises(ConfigError, match="must be above zero"):
        make()


def test_relative_threshold_ignores_scale_and_zero_start_means_exact_zeros() -> None:
    record = make_record(3)
    scaled = replace(
        record,
        weights=tuple(tuple(w * 64 for w in unit) for unit in record.weights),
        init_rms=record.init_rms * 64,
    )
    relative = ThresholdRelative()
    assert relative.score(scaled).tolist() == relative.score(record).tolist()
    cold = replace(record, init_rms=torch.zeros(3))
    assert relative.score(cold).tolist() == CRITERIA.get("zeros").score(record).tolist()


@dataclass(frozen=True)
class Backwards(Fixed):
    """Wrong on purpose: the smaller the output the higher."""

    def saliency(self, record: Record) -> Tensor:
        return -record.output_abs_mean


@dataclass(frozen=True)
class InPlace(Fixed):
    """Wrong on purpose: changes the record."""

    def saliency(self, record: Record) -> Tensor:
        return record.output_abs_mean.mul_(2.0)


@dataclass(frozen=True)
class ByPosition(Fixed):
    """Wrong on purpose: depends on the order."""

    def saliency(self, record: Record) -> Tensor:
        return record.output_abs_mean * torch.arange(1, 1 + len(record.units))


@dataclass(frozen=True)
class Greedy(Fixed):
    """Wrong on purpose: reads what it did not ask for."""

    def saliency(self, record: Record) -> Tensor:
        return record.output_abs_mean + record.abs_grad_mean.sum()


@pytest.mark.parametrize(
    ("criterion", "check"),
    [
        (Backwards(), "dead_unit_is_least_worth_keeping"),
        (InPlace(), "leaves_the_record_alone"),
        (ByPosition(), "permutes_with_the_units"),
        (Greedy(), "reads_only_what_it_needs"),
    ],
)
def test_contract_catches_a_wrong_criterion(criterion: Criterion, check: str) -> None:
    with pytest.raises(AssertionError):
        CriterionContract(criterion).run_one(check)
