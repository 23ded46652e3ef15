"""Which heads and neurons stay: the cut as plain data, and how it is chosen from scores."""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from prunepeft.errors import ConfigError
from prunepeft.structured.groups import Group

FORMAT_VERSION = 1
MAX_UNITS = 1_000_000
WHAT = ("heads", "neurons")
SCOPES = ("layer", "global")


@dataclass(frozen=True)
class Cut:
    """Which units of which groups stay in the base model.

    Attributes:
        keep: Group id -> units kept, ascending. A group that is not named keeps all.
        n_units: Group id -> units before the cut, for the same groups.
    """

    keep: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    n_units: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "keep", {i: tuple(units) for i, units in self.keep.items()})
        object.__setattr__(self, "n_units", dict(self.n_units))
        if self.keep.keys() != self.n_units.keys():
            odd = sorted(self.keep.keys() ^ self.n_units.keys())
            raise ConfigError(f"a cut names the same groups twice; {odd[:3]} stand only once.")
        for group_id, units in self.keep.items():
            n = self.n_units[group_id]
            if not _is_int(n) or not 1 <= n <= MAX_UNITS:
                raise ConfigError(
                    f"group {group_id} must have 1..{MAX_UNITS} units before the cut; got {n!r}."
                )
            whole = all(map(_is_int, units)) and list(units) == sorted(set(units))
            if not whole or (units and not 0 <= units[0] <= units[-1] < n):
                raise ConfigError(
                    f"units kept of group {group_id} must be ascending whole numbers in "
                    f"0..{n - 1}; got {list(units)[:8]}."
                )

    def __hash__(self) -> int:
        return hash(self.digest)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form; `from_dict` is its inverse."""
        return {
            "format_version": FORMAT_VERSION,
            "keep": {i: list(units) for i, units in self.keep.items()},
            "n_units": dict(self.n_units),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Cut":
        """Read the JSON form strictly. Raises ConfigError on anything unexpected."""
        names = {"format_version", "keep", "n_units"}
        if not isinstance(data, Mapping) or set(data) != names:
            got = sorted(map(str, data)) if isinstance(data, Mapping) else type(data).__name__
            raise ConfigError(f"a cut must be a mapping with {sorted(names)}; got {got}.")
        if data["format_version"] != FORMAT_VERSION:
            raise ConfigError(
                f"cut format {data['format_version']!r} is not supported; this version reads "
                f"format {FORMAT_VERSION}. Install a newer prunepeft."
            )
        keep, n_units = data["keep"], data["n_units"]
        if not isinstance(keep, Mapping) or not isinstance(n_units, Mapping):
            raise ConfigError("cut.keep and cut.n_units must be mappings from group ids.")
        if not all(isinstance(i, str) and isinstance(u, list) for i, u in keep.items()):
            raise ConfigError("cut.keep must map group ids to lists of units.")
        return cls({i: tuple(u) for i, u in keep.items()}, dict(n_units))

    @property
    def digest(self) -> str:
        """SHA-256 of the JSON form, first 16 hex digits."""
        text = json.dumps(self.to_dict(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def n_removed(ratio: float, n: int) -> int:
    """How many of n units go at a ratio: ratio * n rounded, halves up.

    Example:
        >>> n_removed(1 / 3, 16), n_removed(0.5, 5), n_removed(0.29, 50)
        (5, 3, 15)
    """
    return math.floor(ratio * n + 0.5 + 1e-9)  # 0.29 * 50 is just below 14.5 in floating point


def choose_units(
    groups: Sequence[Group],
    scores: Mapping[str, Tensor],
    ratios: Mapping[str, float],
    scope: Mapping[str, str] | None = None,
) -> Cut:
    """Take out the units of the lowest scores, an exact number of them.

    `n_removed(ratio, n)` units go; among equal scores the one of the lower index (of the earlier
    group) goes first. At least one head stays in every group. With scope "layer" a group of neurons
    keeps at least one too; with "global" a layer may lose all its neurons.

    Args:
        groups: The groups that may be cut; leave out those that must stay whole.
        scores: Group id -> score of every unit, (n_units,).
        ratios: "heads" and "neurons" -> share that goes, in [0, 1). A kind left out stays whole.
        scope: "heads" and "neurons" -> "layer" (the default: the same share of every group, so all
            layers stay equally wide) or "global" (one ranking over all groups).
    """
    scope = scope or {}
    for label, given in (("ratios", ratios), ("scope", scope)):
        if unknown := sorted(set(given) - set(WHAT)):
            raise ConfigError(f"{label} are given for {WHAT}; got {unknown}.")
    keep: dict[str, tuple[int, ...]] = {}
    for what, ratio in ratios.items():
        _check_range(what, ratio)
        how = scope.get(what, "layer")
        if how not in SCOPES:
            raise ConfigError(f"scope of {what} must be one of {SCOPES}; got {how!r}.")
        own = [g for g in groups if g.what == what]
        if ratio == 0 or not own:
            continue
        values = {g.id: _scores_of(g, scores) for g in own}
        kept = (
            _keep_by_layer(values, ratio)
            if how == "layer"
            else _keep_global(values, ratio, at_least=int(what == "heads"))
        )
        keep |= kept
    ordered = {g.id: keep[g.id] for g in groups if g.id in keep}
    return Cut(ordered, {g.id: g.n_units for g in groups if g.id in keep})


def check_ratio(groups: Sequence[Group], what: str, ratio: float) -> None:
    """Raise ConfigError unless this share of the heads or neurons can go.

    With grouped queries the share must take whole key-value heads with all their query heads.
    """
    if what not in WHAT:
        raise ConfigError(f"a ratio is given for one of {WHAT}; got {what!r}.")
    _check_range(what, ratio)
    if ratio == 0:
        return
    kinds = {(g.n_units, g.heads_per_unit) for g in groups if g.what == what}
    if not kinds:
        raise ConfigError(
            f"this model has no {what} that can go (it has "
            f"{', '.join(sorted({g.what for g in groups})) or 'nothing that can go'}). Leave the "
            f"ratio of {what} at 0."
        )
    for n_units, per_unit in sorted(kinds):
        n = n_units * per_unit
        gone = n_removed(ratio, n)
        units = min(max(n_removed(gone / per_unit, 1), 1), n_units - 1)
        nearest = f"The nearest that can: {units * per_unit / n:.6g} ({units * per_unit} of {n})."
        if n_units == 1:
            raise ConfigError(
                f"a layer has one unit of {what} ({per_unit} heads with their keys), and one must "
                f"stay; got ratio {ratio:g}. Leave the ratio of {what} at 0."
            )
        if gone == 0:
            raise ConfigError(
                f"a ratio of {ratio:g} takes none of the {n} {what} of a layer. {nearest}"
            )
        if gone >= n:
            raise ConfigError(f"a ratio of {ratio:g} takes all {n} {what} of a layer. {nearest}")
        if gone % per_unit:
            raise ConfigError(
                f"a ratio of {ratio:g} takes {gone} of {n} heads, but {per_unit} heads share "
                f"their keys and values and go together. {nearest}"
            )


def check_cut(groups: Sequence[Group], cut: Cut) -> None:
    """Raise ConfigError unless the cut was made for these groups."""
    sizes = {g.id: g.n_units for g in groups}
    for group_id, n in cut.n_units.items():
        if sizes.get(group_id) != n:
            raise ConfigError(
                f"the cut was made for {n} units of {group_id}; this model has "
                f"{sizes.get(group_id, 'no such group')}. Use the base model it was made on."
            )


def removed_params(groups: Sequence[Group], cut: Cut) -> int:
    """Parameters of the base model that a cut takes out."""
    return sum(
        (g.n_units - len(cut.keep[g.id])) * g.unit_params for g in groups if g.id in cut.keep
    )


def _keep_by_layer(values: Mapping[str, Tensor], ratio: float) -> dict[str, tuple[int, ...]]:
    keep = {}
    for group_id, score in values.items():
        k = min(n_removed(ratio, len(score)), len(score) - 1)
        kept = torch.sort(score, stable=True).indices[k:]
        keep[group_id] = tuple(sorted(kept.tolist()))
    return keep


def _keep_global(
    values: Mapping[str, Tensor], ratio: float, *, at_least: int
) -> dict[str, tuple[int, ...]]:
    """One ranking over all groups; the best `at_least` units of every group are out of reach."""
    safe = [_best(score, at_least) for score in values.values()]
    score, protected = torch.cat(list(values.values())), torch.cat(safe)
    k = min(n_removed(ratio, len(score)), len(score) - max(int(protected.sum()), 1))
    order = torch.sort(score, stable=True).indices
    stays = torch.ones(len(score), dtype=torch.bool)
    stays[order[~protected[order]][:k]] = False
    parts = stays.split([len(v) for v in values.values()])
    return {i: tuple(p.nonzero().flatten().tolist()) for i, p in zip(values, parts, strict=True)}


def _best(score: Tensor, n: int) -> Tensor:
    """Mask (n_units,) of the n highest scores; among equals the later ones."""
    mask = torch.zeros(len(score), dtype=torch.bool)
    mask[torch.sort(score, stable=True).indices[len(score) - n :]] = True
    return mask


def _scores_of(group: Group, scores: Mapping[str, Tensor]) -> Tensor:
    score = scores.get(group.id)
    if score is None or tuple(score.shape) != (group.n_units,) or score.isnan().any():
        got = "nothing" if score is None else f"shape {tuple(score.shape)}, or holes (NaN) in it"
        raise ConfigError(
            f"group {group.id} needs one score for each of its {group.n_units} units; got {got}."
        )
    return score.detach().cpu().double()


def _check_range(what: str, ratio: float) -> None:
    number = isinstance(ratio, int | float) and not isinstance(ratio, bool)
    if not number or not 0 <= ratio < 1:
        raise ConfigError(
            f"the ratio of {what} is the share that goes, in [0, 1); got {ratio!r}. 0.3 takes 30 %."
        )


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
