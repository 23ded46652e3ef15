"""Contract suites: reusable checks for the author of a kind or a criterion."""

from prunepeft.testing.criteria import CriterionContract, make_record
from prunepeft.testing.cutting import CutContract
from prunepeft.testing.kinds import KindContract

__all__ = ["CriterionContract", "CutContract", "KindContract", "make_record"]
