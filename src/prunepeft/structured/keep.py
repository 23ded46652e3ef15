"""Which modules and which of their ranks stay: pure functions, exact counts, ties by order."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from prunepeft.errors import BudgetError, SiteError
from prunepeft.kinds import slot_kind
from prunepeft.space import Placement, Site, Slot
from prunepeft.structured.cut import Cut, n_removed
from prunepeft.structured.groups import Group

Ranks = dict[str, list[int]]  # slot id -> ranks that stay, ascending


def n_gone(n: int, ratio: float) -> int:
    """How many of `n` go at this ratio: `n_removed`, but one stays.

    Example:
        >>> [n_gone(16, 1 / 3), n_gone(144, 0.75), n_gone(1, 0.5), n_gone(0, 0.5)]
        [5, 108, 0, 0]
    """
    return max(0, min(n_removed(ratio, n), n - 1))


def keep_modules(scores: Mapping[str, float], ratio: float) -> list[str]:
    """Ids that stay when the share `ratio` with the lowest scores goes, in their order.

    Among equal scores the later ones stay. Light-PEFT's code compares with an interpolated quantile
    instead, by which all go when all are equal.

    Example:
        >>> keep_modules({"a": 0.3, "b": 0.1, "c": 0.1, "d": 0.2}, 0.5)
        ['a', 'd']
    """
    gone = set(sorted(scores, key=lambda i: scores[i])[: n_gone(len(scores), ratio)])
    return [i for i in scores if i not in gone]


def keep_ranks(scores: Mapping[str, Tensor], ratio: float, scope: str = "global") -> Ranks:
    """Ranks that stay when the share `ratio` with the lowest scores goes.

    Args:
        scores: Slot id -> scores of its ranks, (r,).
        ratio: Share that goes.
        scope: `layer`: the same share of every module, which keeps at least one rank; `global`: of
            all ranks together, so a module may lose all, and is then left out.
    """
    if scope == "layer":
        return {i: _without(_sorted({i: s}), n_gone(len(s), ratio))[i] for i, s in scores.items()}
    order = _sorted(scores)
    return _without(order, n_gone(len(order), ratio))


def fit(
    keep: Mapping[str, Sequence[int]],
    module_scores: Mapping[str, float],
    rank_scores: Mapping[str, Tensor],
    cost: Callable[[str, int], int],
    limit: int,
) -> Ranks:
    """Take out what scores lowest until the rest costs at most `limit`.

    Ranks go one by one where that makes a module cheaper, the module with its last one; then
    modules as a whole.

    Args:
        keep: Slot id -> its ranks.
        module_scores: Slot id -> score.
        rank_scores: Slot id -> scores of all its ranks; slots without ranks are not in it.
        cost: Of a slot at a size (0 at size 0).
        limit: What all may cost.
    Raises:
        BudgetError: if nothing would be left.
    """
    kept = {slot_id: list(ranks) for slot_id, ranks in keep.items()}
    total = sum(cost(i, len(ranks)) for i, ranks in kept.items())
    for slot_id, rank in _sorted({i: s for i, s in rank_scores.items() if i in kept}):
        if total <= limit:
            break
        ranks = kept[slot_id]
        saved = cost(slot_id, len(ranks)) - cost(slot_id, len(ranks) - 1)
        if rank in ranks and saved:
            ranks.remove(rank)
            total -= saved
    kept = {slot_id: ranks for slot_id, ranks in kept.items() if ranks}
    for slot_id in sorted(kept, key=lambda i: module_scores[i]):
        if total > limit:
            total -= cost(slot_id, len(kept.pop(slot_id)))
    if not kept:
        raise BudgetError(
            f"no module fits the budget of {limit:,}, not even with one rank. Raise the budget or "
            "allow smaller kinds."
        )
    return kept


def slots_after(placement: Placement, groups: Sequence[Group], cut: Cut | None) -> dict[str, Slot]:
    """Slot id -> the slot on the cut base; slots that fit it no longer are left out."""
    lost = _lost_features(groups, cut)
    after: dict[str, Slot] = {}
    for slot in placement:
        sites = tuple(_narrower(site, lost) for site in slot.sites)
        changed = replace(slot, sites=sites)
        if sites == slot.sites or _fits(changed):
            after[slot.id] = changed
    return after


def _sorted(scores: Mapping[str, Tensor]) -> list[tuple[str, int]]:
    """(slot id, rank), lowest score first, ties in order."""
    listed = [(score, i, k) for i, s in scores.items() for k, score in enumerate(s.tolist())]
    return [(i, k) for _, i, k in sorted(listed, key=lambda item: item[0])]


def _without(order: Sequence[tuple[str, int]], n: int) -> Ranks:
    kept: Ranks = {}
    for slot_id, rank in order[n:]:
        kept.setdefault(slot_id, []).append(rank)
    return {slot_id: sorted(ranks) for slot_id, ranks in kept.items()}


def _lost_features(groups: Sequence[Group], cut: Cut | None) -> dict[tuple[str, str], int]:
    """(path, side) -> features that go."""
    lost: dict[tuple[str, str], int] = {}
    for group in groups if cut is not None else ():
        n_units = group.n_units - len(cut.keep.get(group.id, range(group.n_units)))
        for part in group.parts:
            n = n_units * sum(size for _, size in part.segments)
            lost[part.path, part.side] = lost.get((part.path, part.side), 0) + n
    return lost


def _narrower(site: Site, lost: Mapping[tuple[str, str], int]) -> Site:
    d_in = site.d_in - lost.get((site.path, "in"), 0)
    return replace(site, d_in=d_in, d_out=site.d_out - lost.get((site.path, "out"), 0))


def _fits(slot: Slot) -> bool:
    kind = slot_kind(slot)
    try:
        return all(
            kind.fits(site) and min(site.d_in, site.d_out) and kind.shapes(site, slot.sizes[-1])
            for site in slot.sites
        )
    except SiteError:
        return False
