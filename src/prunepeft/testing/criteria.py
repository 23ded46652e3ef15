"""Checks that every criterion must pass; the author of a new criterion runs them too."""

import copy
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor
from torch.testing import assert_close

from prunepeft.criteria.base import NEEDS, Criterion, Record
from prunepeft.errors import StateError


def make_record(n_units: int = 5, *, seed: int = 0, needs: frozenset[str] = NEEDS) -> Record:
    """Random record of units of different sizes, two tensors each, with a few exact zeros.

    Example:
        >>> record = make_record(2)
        >>> record.units, [tuple(w.shape) for w in record.weights[0]]
        (('unit0', 'unit1'), [(2, 3), (4, 2)])
    """
    draw = torch.Generator().manual_seed(seed)

    def tensors() -> tuple[tuple[Tensor, ...], ...]:
        shapes = [((2 + i, 3), (4, 2 + i)) for i in range(n_units)]
        return tuple(tuple(torch.randn(s, generator=draw) for s in pair) for pair in shapes)

    weights, grads = tensors(), tensors()
    for i, unit in enumerate(weights):
        unit[1].view(-1)[: i + 1] = 0.0
    gradient_means, sensitivity_means, outputs, rms, importance = (
        torch.rand(n_units, generator=draw, dtype=torch.float64) + 0.1 for _ in range(5)
    )
    found = {}
    if "weights" in needs:
        found |= {"weights": weights, "init_rms": rms}
    if "gradients" in needs:
        found |= {"grad_sum": grads, "abs_grad_mean": gradient_means}
        found |= {"abs_weight_grad_mean": sensitivity_means}
    if "outputs" in needs:
        found |= {"output_abs_mean": outputs}
    if "suppression" in needs:
        found |= {"layer_importance": importance}
    return Record(units=tuple(f"unit{i}" for i in range(n_units)), steps=3, **found)


@dataclass(frozen=True)
class CriterionContract:
    """Checks of one criterion on random records.

    Each check raises AssertionError where the criterion fails. `run()` does all of them;
    `checks()` names them for a parametrised test.

    Attributes:
        criterion: The criterion with its hyper-parameters.
        n_units: Units in a record.
    Example:
        >>> from prunepeft.criteria import CRITERIA
        >>> CriterionContract(CRITERIA.get("snip")).run()
    """

    criterion: Criterion
    n_units: int = 5

    @classmethod
    def checks(cls) -> tuple[str, ...]:
        """Names of all checks, in the order of the file."""
        return tuple(n.removeprefix("check_") for n in vars(cls) if n.startswith("check_"))

    def run(self) -> None:
        """Run every check."""
        for name in self.checks():
            self.run_one(name)

    def run_one(self, name: str) -> None:
        """Run one check by its name."""
        getattr(self, f"check_{name}")()

    def check_declares_itself(self) -> None:
        name, needs = self.criterion.name, self.criterion.needs
        assert name == name.lower(), f"name {name!r} must be lower case"
        assert name != "", "the name must not be empty"
        assert needs <= NEEDS, f"{name} needs {set(needs)}, not a subset of {set(NEEDS)}"

    def check_shape_and_type(self) -> None:
        score = self.criterion.score(make_record(self.n_units))
        assert score.shape == (self.n_units,), f"shape {tuple(score.shape)}"
        assert score.dtype == torch.float64, f"type {score.dtype}"
        assert score.device.type == "cpu", f"device {score.device}"

    def check_finite(self) -> None:
        record = make_record(self.n_units)
        for bad in (float("nan"), float("inf"), 0.0):
            score = self.criterion.score(_filled(record, 1, bad))
            assert torch.isfinite(score).all(), f"{bad} in the record gives {score.tolist()}"

    def check_permutes_with_the_units(self) -> None:
        record = make_record(self.n_units)
        order = torch.randperm(self.n_units, generator=torch.Generator().manual_seed(1)).tolist()
        expected = self.criterion.score(record)[order]
        assert_close(self.criterion.score(_permuted(record, order)), expected, rtol=0, atol=0)

    def check_leaves_the_record_alone(self) -> None:
        record = make_record(self.n_units)
        before = copy.deepcopy(vars(record))
        self.criterion.score(record).fill_(-1.0)
        units = before.pop("units")
        assert record.units == units
        assert_close(
            {k: v for k, v in vars(record).items() if k != "units"}, before, rtol=0, atol=0
        )

    def check_reads_only_what_it_needs(self) -> None:
        full = make_record(self.n_units)
        bare = _kept(full, self.criterion.needs)
        assert_close(self.criterion.score(bare), self.criterion.score(full), rtol=0, atol=0)

    def check_refuses_a_record_without_its_needs(self) -> None:
        for need in self.criterion.needs:
            message = ""
            try:
                self.criterion.score(_kept(make_record(self.n_units), NEEDS - {need}))
            except StateError as error:
                message = str(error)
            assert need in message, (
                f"a record without {need} must be refused, naming it: {message!r}"
            )

    def check_dead_unit_is_least_worth_keeping(self) -> None:
        record = make_record(self.n_units)
        score = self.criterion.score(replace(_filled(record, 1, 0.0), init_rms=record.init_rms))
        assert score[1] == score.min(), f"unit 1 is all zero, the scores are {score.tolist()}"
        assert score[1] < score.max(), "an all-zero unit scores as high as any other"


def _arrays(record: Record) -> dict[str, object]:
    names = [f.name for f in fields(record) if f.name not in ("units", "steps")]
    return {name: getattr(record, name) for name in names}


def _filled(record: Record, index: int, value: float) -> Record:
    """The record with everything known of one unit set to `value`."""
    changes = copy.deepcopy(_arrays(record))
    for entries in changes.values():
        for tensor in entries[index] if isinstance(entries, tuple) else (entries[index],):
            tensor.fill_(value)
    return replace(record, **changes)


def _permuted(record: Record, order: list[int]) -> Record:
    changes = {
        name: tuple(entries[i] for i in order) if isinstance(entries, tuple) else entries[order]
        for name, entries in _arrays(record).items()
    }
    return replace(record, units=tuple(record.units[i] for i in order), **changes)


def _kept(record: Record, needs: frozenset[str]) -> Record:
    bare = make_record(len(record.units), needs=needs)
    return replace(record, **_arrays(bare))
