"""Every registered criterion through the contract suite."""

import pytest

from prunepeft.criteria import CRITERIA
from prunepeft.testing.criteria import CriterionContract


@pytest.mark.parametrize("check", CriterionContract.checks())
@pytest.mark.parametrize("name", CRITERIA.names())
def test_criterion_contract(name: str, check: str) -> None:
    CriterionContract(CRITERIA.get(name)).run_one(check)


def test_suite_has_checks() -> None:
    assert len(CriterionContract.checks()) >= 8


def test_registered_under_own_name() -> None:
    assert all(criterion.name == name for name, criterion in CRITERIA)
