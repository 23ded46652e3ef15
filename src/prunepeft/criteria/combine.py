"""From saliencies to a probability of removal, with several criteria per partition."""

import math
from collections.abc import Mapping, Sequence

from prunepeft.errors import ConfigError, UnknownNameError
from prunepeft.kinds.base import make_kind
from prunepeft.registry import unknown_name
from prunepeft.space import Site

# Criteria by depth block 0..3, for modules beside a layer and for modules in series with it.
FALLBACK_STRATEGY: Mapping[str, tuple[tuple[str, ...], ...]] = {
    "parallel": (("activation", "threshold"), ("threshold",), ("zeros",), ("gradient",)),
    "serial": (
        ("activation", "minimum_weight", "snip", "zeros"),
        ("snip", "minimum_weight"),
        ("minimum_weight", "snip"),
        ("snip",),
    ),
}
_TYPICAL_SITE = Site("ffn.down", "encoder", 0, 1, "ffn", "down", 1, 1, source="ffn.up")
_ORDER = 1e-10  # orders units whose rank weight has vanished; far below any other difference


def hybrid_probability(
    saliency: Mapping[str, Mapping[str, float]],
    partitions: Mapping[str, str],
    strategy: Mapping[str, Sequence[str]],
    *,
    scales: Mapping[str, str] | None = None,
    paper_exact: bool = False,
) -> dict[str, float]:
    """Return the probability that each unit is the one to remove; it sums to 1 over all units.

    A unit's partition says which criteria judge it. Every criterion c gives every unit m a value
    v_c(m), 1 = first to prune, and a rank r_c(m), 0 = first to prune, among all N units:

        score(m) = mean over c of softmax(v_c)(m) * sigmoid(3 - r_c(m)) + 1e-10 v_c(m)
        probability(m) = softmax(score)(m)

    v is one minus the share of the largest saliency on the unit's scale, so units that are all of
    like worth are all kept; ties share their mean rank. The last term only orders units so far down
    the ranking that their weight has vanished. Judging all units on one ranking lets a partition
    lose all its units or none; a softmax inside each would take the same share from each.

    Args:
        saliency: Criterion -> unit -> saliency, finite, higher = more worth keeping.
        partitions: Unit -> partition, in module order.
        strategy: Partition -> names of its criteria. Other partitions may be present.
        scales: Unit -> name of the scale its saliencies are measured on (its kind: weights of
            LoRA and of adapters differ in size by nature); default: one scale for all.
        paper_exact: Follow the publication: a softmax inside each partition, v = 1 - saliency /
            (max + 1e-5), ranks without ties, weight 5 / (1 + exp(rank - 3)), sum over the criteria.
    Returns:
        Unit -> probability of removal, larger = removed earlier.
    Raises:
        ConfigError: if a partition has no criterion, or a unit has no finite saliency.
    References:
        PrunePEFT, 2025, arXiv 2506.07587, hybrid pruning (Bayesian model averaging). Differs
        from released code: there the softmax rewards large values also for criteria that prune
        the smallest; here every criterion has one orientation, with `paper_exact` too.
    Example:
        >>> scores = {"snip": {"a": 0.0, "b": 1.0}}
        >>> found = hybrid_probability(scores, {"a": "x", "b": "x"}, {"x": ["snip"]})
        >>> found["a"] > found["b"]
        True
    """
    if paper_exact:
        return _per_partition(saliency, partitions, strategy)
    units = list(partitions)
    scales = scales or dict.fromkeys(units, "")
    users = {p: _criteria_of(p, strategy) for p in dict.fromkeys(partitions.values())}
    judged = {}
    for name in dict.fromkeys(c for used in users.values() for c in used):
        values = _relative(_saliencies(name, units, saliency), [scales[u] for u in units])
        shares, ranks = _softmax(values), _ranks(values)
        judged[name] = {
            u: share * _sigmoid(3 - rank) + _ORDER * value
            for u, value, share, rank in zip(units, values, shares, ranks, strict=True)
        }
    scores = []
    for unit in units:
        used = users[partitions[unit]]
        scores.append(math.fsum(judged[c][unit] for c in used) / len(used))
    return dict(zip(units, _softmax(scores), strict=True))


def worth(
    saliency: Mapping[str, Mapping[str, float]],
    partitions: Mapping[str, str],
    strategy: Mapping[str, Sequence[str]],
    scales: Mapping[str, str] | None = None,
) -> dict[str, float]:
    """What each unit is worth in [0, 1]: its share of the largest saliency on its scale.

    The mean over the criteria of its partition. Arguments as in `hybrid_probability`.

    Example:
        >>> worth({"snip": {"a": 1.0, "b": 4.0}}, {"a": "x", "b": "x"}, {"x": ["snip"]})
        {'a': 0.25, 'b': 1.0}
    """
    units = list(partitions)
    scales = scales or dict.fromkeys(units, "")
    names = dict.fromkeys(c for p in partitions.values() for c in _criteria_of(p, strategy))
    shares = {}
    for name in names:
        values = _relative(_saliencies(name, units, saliency), [scales[u] for u in units])
        shares[name] = {u: 1 - v for u, v in zip(units, values, strict=True)}
    used = {u: _criteria_of(p, strategy) for u, p in partitions.items()}
    return {u: math.fsum(shares[c][u] for c in used[u]) / len(used[u]) for u in units}


def _per_partition(
    saliency: Mapping[str, Mapping[str, float]],
    partitions: Mapping[str, str],
    strategy: Mapping[str, Sequence[str]],
) -> dict[str, float]:
    """Probabilities as published: they sum to 1 in each partition."""
    result: dict[str, float] = dict.fromkeys(partitions, 0.0)
    for partition, units in _members(partitions).items():
        scores = [0.0] * len(units)
        for name in _criteria_of(partition, strategy):
            values, weights = _prepare_paper(_saliencies(name, units, saliency))
            shares = _softmax(values)
            scores = [s + p * w for s, p, w in zip(scores, shares, weights, strict=True)]
        for unit, share in zip(units, _softmax(scores), strict=True):
            result[unit] = share
    return result


def tendency(
    removed: Mapping[str, Sequence[str]], partitions: Mapping[str, str]
) -> dict[str, dict[str, int]]:
    """Count how many units each criterion removed in each partition (warm-up step 3).

    Args:
        removed: Criterion -> ids of the units it removed.
        partitions: Unit -> partition, for every unit of the supernet.
    Returns:
        Criterion -> partition -> count, with zeros.
    Raises:
        ConfigError: if a removed unit is in no partition.
    """
    counts = {name: dict.fromkeys(partitions.values(), 0) for name in removed}
    for name, units in removed.items():
        for unit in units:
            if unit not in partitions:
                raise ConfigError(
                    f"{name!r} removed {unit}, which is in no partition; add it to them."
                )
            counts[name][partitions[unit]] += 1
    return counts


def assign_criteria(counts: Mapping[str, Mapping[str, int]]) -> dict[str, list[str]]:
    """Choose the criteria of every partition from the tendencies (warm-up step 4).

    A partition gets the criteria with the largest count in it, all of them on a tie (so all
    where nothing was removed). Then each criterion also goes to the partitions where its own
    count is largest, so that every criterion that removed anything is used.

    Args:
        counts: Criterion -> partition -> units removed; a missing partition counts 0.
    Returns:
        Partition -> criteria, in the order of `counts`.
    Raises:
        ConfigError: if there are no criteria.
    References:
        PrunePEFT, 2025, arXiv 2506.07587, warm-up. Differs from released code: none known.
    Example:
        >>> assign_criteria({"snip": {"x": 3, "y": 1}, "zeros": {"x": 2, "y": 0}})
        {'x': ['snip', 'zeros'], 'y': ['snip']}
    """
    if not counts:
        raise ConfigError("no criteria were counted; run the warm-up with at least one criterion.")
    peaks = {name: max(count.values(), default=0) for name, count in counts.items()}
    result: dict[str, list[str]] = {}
    for partition in dict.fromkeys(p for count in counts.values() for p in count):
        here = {name: count.get(partition, 0) for name, count in counts.items()}
        best = max(here.values())
        result[partition] = [
            name for name, n in here.items() if n == best or (n > 0 and n == peaks[name])
        ]
    return result


def fallback_strategy(partitions: Mapping[str, str]) -> dict[str, list[str]]:
    """Return the authors' fixed criteria for partitions named `stack.depth.kind`.

    Kinds that act beside a layer (LoRA, DoRA, parallel adapter) use the row of the paper's PA,
    all others that of its SA.

    Args:
        partitions: Unit -> partition.
    Returns:
        Partition -> criteria.
    Raises:
        ConfigError: if a partition has another form of name.
    References:
        PrunePEFT, 2025, arXiv 2506.07587, tuned for RoBERTa-large on GLUE. Differs from
        released code: none; other kinds and stacks are mapped to its two rows.
    Example:
        >>> fallback_strategy({"encoder.5.attention.q:lora": "encoder.3.lora"})
        {'encoder.3.lora': ['gradient']}
    """
    result = {}
    for partition in dict.fromkeys(partitions.values()):
        _, _, rest = partition.partition(".")
        depth, _, kind = rest.partition(".")
        if depth not in {"0", "1", "2", "3"} or not kind:
            raise ConfigError(
                f"partition {partition!r} is not of the form stack.depth.kind with depth 0 to 3; "
                "give a strategy for it or run the warm-up."
            )
        row = "parallel" if "add" in make_kind(kind).stages(_TYPICAL_SITE) else "serial"
        result[partition] = list(FALLBACK_STRATEGY[row][int(depth)])
    return result


def _members(partitions: Mapping[str, str]) -> dict[str, list[str]]:
    members: dict[str, list[str]] = {}
    for unit, partition in partitions.items():
        members.setdefault(partition, []).append(unit)
    return members


def _criteria_of(partition: str, strategy: Mapping[str, Sequence[str]]) -> Sequence[str]:
    names = strategy.get(partition, ())
    if not names or isinstance(names, str):
        raise ConfigError(
            f"partition {partition!r} has criteria {names!r}; give it a list of at least one "
            f"(the strategy covers {', '.join(strategy) or 'no partition'})."
        )
    return names


def _saliencies(
    name: str, units: Sequence[str], saliency: Mapping[str, Mapping[str, float]]
) -> list[float]:
    if name not in saliency:
        raise UnknownNameError(unknown_name("scored criterion", name, list(saliency)))
    values = [saliency[name].get(unit, math.nan) for unit in units]
    if bad := [unit for unit, value in zip(units, values, strict=True) if not math.isfinite(value)]:
        raise ConfigError(
            f"criterion {name!r} has no finite saliency for {bad[0]}; "
            "give every unit a finite number."
        )
    return values


def _relative(saliency: list[float], scales: list[str]) -> list[float]:
    """Values in [0, 1]: 1 for no saliency at all, 0 for the most salient unit of its scale."""
    low = {g: 0.0 for g in scales}
    high = {g: 0.0 for g in scales}
    for value, scale in zip(saliency, scales, strict=True):
        low[scale] = min(low[scale], value)
        high[scale] = max(high[scale], value)
    return [
        1 - (s - low[g]) / (high[g] - low[g]) if high[g] > low[g] else 1.0
        for s, g in zip(saliency, scales, strict=True)
    ]


def _ranks(values: list[float]) -> list[float]:
    """Rank from the largest value down, 0 first; ties share their mean rank."""
    order = sorted(values, reverse=True)
    first = {v: i for i, v in reversed(list(enumerate(order)))}
    count: dict[float, int] = {}
    for v in values:
        count[v] = count.get(v, 0) + 1
    return [first[v] + (count[v] - 1) / 2 for v in values]


def _prepare_paper(saliency: list[float]) -> tuple[list[float], list[float]]:
    """The same as published: values relative to the maximum, ranks in module order on ties."""
    top = max(abs(s) for s in saliency) + 1e-5
    order = sorted(range(len(saliency)), key=saliency.__getitem__)
    weights = [0.0] * len(saliency)
    for rank, index in enumerate(order):
        weights[index] = 5 * _sigmoid(3 - rank)
    return [1 - s / top for s in saliency], weights


def _softmax(values: list[float]) -> list[float]:
    top = max(values)
    powers = [math.exp(v - top) for v in values]
    total = math.fsum(powers)
    return [p / total for p in powers]


def _sigmoid(x: float) -> float:
    # exp of a large negative x would overflow: a rank may be in the thousands.
    return math.exp(x) / (1 + math.exp(x)) if x < 0 else 1 / (1 + math.exp(-x))
