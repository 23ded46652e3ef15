"""The one dial: how much may be trainable."""

import math
import re
from dataclasses import dataclass

from prunepeft.errors import BudgetError

UNITS = ("parameters", "modules", "rank")
_FORMS = "0.5% (of the base model), 120k, 1.2M, 300000, '12 modules' or rank:64 (sum of all ranks)"
_SUFFIX = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9}


@dataclass(frozen=True)
class Budget:
    """A limit on what a placement may cost.

    Attributes:
        amount: The limit; a share in (0, 1] when `relative`.
        unit: `parameters` (trainable parameters of the modules; the task head is counted apart),
            `modules` (number of slots) or `rank` (sum of the sizes of all modules).
        relative: Whether `amount` is a share of the base model's parameters.
    """

    amount: float
    unit: str = "parameters"
    relative: bool = False

    def __post_init__(self) -> None:
        if self.unit not in UNITS:
            raise BudgetError(
                f"budget unit {self.unit!r} is unknown; use one of {', '.join(UNITS)}."
            )
        if not math.isfinite(self.amount) or self.amount <= 0:
            raise BudgetError(f"the budget must be above zero; got {self.amount}. Use {_FORMS}.")
        if self.relative and self.amount > 1:
            raise BudgetError(
                f"a budget of {self.amount:.0%} exceeds the base model; use at most 100%."
            )

    @classmethod
    def parse(cls, text: "str | int | float | Budget") -> "Budget":
        """Read a budget in any of its written forms.

        Raises:
            BudgetError: if it is not one of the forms or not above zero.
        Example:
            >>> Budget.parse("0.5%"), Budget.parse("1.2M").amount, Budget.parse("12 modules").unit
            (Budget(amount=0.005, unit='parameters', relative=True), 1200000.0, 'modules')
        """
        if isinstance(text, Budget):
            return text
        raw = str(text).strip().lower()
        if match := re.fullmatch(r"([-+.\deE]+)\s*%", raw):
            return cls(_number(match[1], raw) / 100, relative=True)
        if match := re.fullmatch(r"([-+.\d]+)\s*modules?", raw):
            return cls(_whole(match[1], raw), unit="modules")
        if match := re.fullmatch(r"rank\s*[:=]\s*([-+.\d]+)", raw):
            return cls(_whole(match[1], raw), unit="rank")
        if match := re.fullmatch(r"([-+.\d]+(?:e[-+]?\d+)?)\s*([kmb]?)", raw):
            amount = _number(match[1], raw) * _SUFFIX[match[2]]
            if 0 < amount < 1:
                raise BudgetError(
                    f"budget {text!r} is below one parameter; a share needs %: {_FORMS}."
                )
            return cls(amount)
        raise BudgetError(f"budget {text!r} cannot be read; use {_FORMS}.")

    def limit(self, n_base: int) -> int:
        """The limit as a whole number, for a base model of `n_base` parameters."""
        return math.floor(self.amount * n_base + 1e-9) if self.relative else math.floor(self.amount)

    def __str__(self) -> str:
        if self.relative:
            return f"{self.amount * 100:g}%"
        if self.unit == "modules":
            return f"{self.amount:.0f} modules"
        return f"rank:{self.amount:.0f}" if self.unit == "rank" else f"{self.amount:.0f}"


@dataclass(frozen=True)
class Fidelity:
    """Share of full training that one evaluation gets.

    Attributes:
        data: Share of the training rows, in (0, 1].
        epochs: Passes over those rows.
    """

    data: float = 1.0
    epochs: int = 1

    def __post_init__(self) -> None:
        if not 0 < self.data <= 1:
            raise BudgetError(f"fidelity must be in (0, 1]; got {self.data}.")
        if self.epochs < 1:
            raise BudgetError(f"a fidelity needs at least one epoch; got {self.epochs}.")

    def rows(self, n_train: int) -> int:
        """Rows of a training split of `n_train` that are seen, at least one.

        Example:
            >>> Fidelity(0.25).rows(10)
            2
        """
        return max(1, round(self.data * n_train))


def _number(text: str, whole: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise BudgetError(f"budget {whole!r} cannot be read; use {_FORMS}.") from None


def _whole(text: str, whole: str) -> float:
    value = _number(text, whole)
    if value != int(value):
        raise BudgetError(f"budget {whole!r} must be a whole number.")
    return value
