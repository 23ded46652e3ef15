"""Turn the sites of a model into a search space: which kinds may go where, and how large."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from prunepeft.errors import BudgetError, ConfigError, SiteError
from prunepeft.kinds import KINDS, make_kind, n_params
from prunepeft.registry import unknown_name
from prunepeft.sites import find_sites
from prunepeft.space import ROLES, Placement, SearchSpace, Site, Slot

Roles = Sequence[Sequence[str]]

DEFAULT_SIZE = 16
MAX_DEFAULT_SIZE = 64
# Every linear layer is its own module.
LORA_ALL_ROLES: Roles = (("q",), ("k",), ("v",), ("o",), ("up",), ("gate",), ("down",))

_FUSED = {"q": "fused_qkv", "k": "fused_qkv", "v": "fused_qkv"}
_FUSED |= {"up": "fused_gate_up", "gate": "fused_gate_up"}
_OPTIONAL = frozenset({"gate"})  # many feed-forwards have none


def make_space(
    sites: Sequence[Site],
    kinds: Sequence[str] = ("lora", "serial_adapter"),
    *,
    sizes: Mapping[str, Sequence[int] | int] | None = None,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    roles: Mapping[str, Roles] | None = None,
    target_params: int | None = None,
) -> SearchSpace:
    """Make one slot per kind, layer, block and role group.

    Args:
        sites: Result of `find_sites`.
        kinds: Registered names.
        sizes: Kind -> allowed sizes, or the only one.
        options: Kind -> its options.
        roles: Kind -> groups of roles; the sites of a group in one block are tied to one module.
            A fused layer stands in for the roles it computes.
        target_params: Without `sizes`, all kinds get the largest power of two up to 64 at which the
            supernet has at most this many trainable parameters (at least 1); 16 if not given.
            Kinds with a lower `max_default_size` get that.
    Raises:
        UnknownNameError: if a kind or an option is unknown.
        ConfigError: if a setting names a kind that is not among `kinds`, a size is not allowed or
            a role is in two groups.
        SiteError: if a kind fits no site, or a role group matches none.
    """
    sizes, options, roles = sizes or {}, options or {}, roles or {}
    _check_kinds(kinds, {"sizes": sizes, "options": options, "roles": roles})
    slots = [
        slot
        for kind in kinds
        for slot in _slots(
            sites, kind, roles.get(kind), _sizes(kind, sizes.get(kind)), options.get(kind, {})
        )
    ]
    free = {k for k in kinds if k not in sizes and KINDS.get(k).sized}
    if target_params is not None and free:
        slots = _fitted(slots, free, target_params)
    return SearchSpace(tuple(slots))


def place(
    model: nn.Module, kind: str, size: int | None = None, roles: Roles | None = None, **options: Any
) -> Placement:
    """Place one kind on a model, without a search: at its usual places or at these roles.

    Args:
        model: A plain model.
        kind: Registered name.
        size: Size of every module; 16 (8 for tensor trains) if not given.
        roles: Groups of roles, as in `make_space`.
        options: Options of the kind.
    Raises:
        PrunePeftError: see `make_space`.
    Example:
        >>> net = prunepeft.attach(model, prunepeft.place(model, "ether", blocks=4))
        ... # doctest: +SKIP
    """
    return make_space(
        find_sites(model),
        (kind,),
        sizes=None if size is None else {kind: size},
        options={kind: options} if options else None,
        roles=None if roles is None else {kind: roles},
    ).full()


def paper_space(sites: Sequence[Site]) -> SearchSpace:
    """Make the search space of the PrunePEFT paper: two modules in every layer.

    LoRA of rank 32 on query and value, counted as one, and a serial adapter of width 128 after the
    feed-forward; alpha 32, dropout 0.1.

    References:
        PrunePEFT: Iterative Hybrid Pruning for PEFT of LLMs, 2025, arXiv 2506.07587.
    """
    return make_space(
        sites,
        ("lora", "serial_adapter"),
        sizes={"lora": 32, "serial_adapter": 128},
        options={"lora": {"alpha": 32.0, "dropout": 0.1}, "serial_adapter": {"dropout": 0.1}},
        roles={"lora": (("q", "v"),), "serial_adapter": (("down",),)},
    )


def make_lora_baseline(
    sites: Sequence[Site],
    limit: int,
    *,
    roles: Roles = (("q", "v"),),
    alpha: float | None = None,
    rank: int | None = None,
) -> Placement:
    """Place plain LoRA with one rank everywhere, as large as the budget allows.

    Args:
        sites: Result of `find_sites`.
        limit: Trainable parameters the placement may have.
        roles: Groups of roles; the cost does not depend on how they are grouped.
        alpha: Numerator of the scaling; 2 * rank if not given.
        rank: This rank instead of the largest that fits.
    Raises:
        BudgetError: if the rank asked for, or rank 1, does not fit.
        ConfigError: if the rank is below 1.
    """
    if rank is not None and rank < 1:
        raise ConfigError(f"rank must be at least 1; got {rank}. Leave it out for the largest.")
    per_rank = sum(n_params(slot, 1) for slot in _slots(sites, "lora", roles, (1,), {}))
    largest = limit // per_rank
    wanted = 1 if rank is None else rank
    if largest < wanted:
        raise BudgetError(
            f"LoRA of rank {wanted} at these sites needs {wanted * per_rank} trainable parameters, "
            f"the budget allows {limit}; raise the budget or pass fewer roles."
        )
    size = largest if rank is None else rank
    options = {"alpha": float(2 * size if alpha is None else alpha)}
    return Placement({slot: size for slot in _slots(sites, "lora", roles, (size,), options)})


def _check_kinds(kinds: Sequence[str], settings: Mapping[str, Mapping[str, Any]]) -> None:
    if not kinds or len(set(kinds)) != len(kinds):
        raise ConfigError(
            f"kinds must name at least one kind, each once; got {list(kinds)}. "
            f"Known: {', '.join(KINDS.names())}."
        )
    for name, setting in settings.items():
        for kind in setting:
            KINDS.get(kind)
            if kind not in kinds:
                raise ConfigError(
                    f"{name} holds settings for {kind!r}, which is not among the kinds "
                    f"{', '.join(kinds)}; add it to kinds or drop the setting."
                )


def _sizes(kind: str, given: Sequence[int] | int | None) -> tuple[int, ...]:
    if not KINDS.get(kind).sized:
        if given not in (None, 1, (1,), [1]):
            raise ConfigError(f"kind {kind!r} has no size; drop sizes.{kind} (got {given!r}).")
        return (1,)
    if given is None:
        return (min(DEFAULT_SIZE, KINDS.get(kind).max_default_size),)
    return (given,) if isinstance(given, int) else tuple(given)


def _slots(
    sites: Sequence[Site],
    kind: str,
    roles: Roles | None,
    sizes: tuple[int, ...],
    options: Mapping[str, Any],
) -> list[Slot]:
    """One slot for every block and role group that has sites in it."""
    made = make_kind(kind, options)
    groups = [tuple(group) for group in (made.roles if roles is None else roles)]
    _check_roles(groups, sites, kind)
    usable = [s for s in sites if made.fits(s)]
    if not usable:
        raise SiteError(
            f"{kind!r} needs {made.home}, and no block of this model has one; take it out of kinds."
        )
    blocks: dict[tuple[str, int, str], list[Site]] = {}
    for site in usable:
        blocks.setdefault((site.stack, site.layer, site.block), []).append(site)
    pairs = tuple(sorted(options.items()))
    slots: list[Slot] = []
    unmatched = set(groups)
    for block in blocks.values():
        for group, tied in _tied_sites(block, groups):
            unmatched.discard(group)
            if tied:
                slots.append(Slot(tied, kind, sizes, pairs))
    missing = [g for g in groups if g in unmatched and not _OPTIONAL.issuperset(g)]
    if not slots or (missing and roles is not None):
        asked = ", ".join("+".join(g) for g in missing or groups)
        raise SiteError(
            f"no site of this model has a role of the group(s) {asked} that {kind!r} can use; "
            f"roles present: {_present(usable)}. Set roles.{kind} to some of these."
        )
    return slots


def _tied_sites(
    block: Sequence[Site], groups: Sequence[tuple[str, ...]]
) -> Iterator[tuple[tuple[str, ...], tuple[Site, ...]]]:
    """Groups that match in this block, with their sites; none if a group before took them all."""
    present = {site.role for site in block}
    taken: set[str] = set()
    for group in groups:
        wanted = dict.fromkeys(r if r in present else _FUSED.get(r, r) for r in group)
        tied = [site for role in wanted for site in block if site.role == role]
        if tied:
            yield group, tuple(site for site in tied if site.path not in taken)
        taken |= {site.path for site in tied}


def _check_roles(groups: Sequence[tuple[str, ...]], sites: Sequence[Site], kind: str) -> None:
    for role, count in Counter(role for group in groups for role in group).items():
        if role not in ROLES:
            raise SiteError(
                f"roles.{kind}: {unknown_name('role', role, ROLES)} "
                f"This model has: {_present(sites)}."
            )
        if count > 1:
            raise ConfigError(f"roles.{kind} names {role!r} {count} times; keep it in one group.")


def _present(sites: Sequence[Site]) -> str:
    return ", ".join(r for r in ROLES if any(s.role == r for s in sites)) or "none"


def _fitted(slots: Sequence[Slot], free: set[str], target_params: int) -> list[Slot]:
    """The slots with the kinds in `free` at the largest common power of two within the target."""
    size, top = MAX_DEFAULT_SIZE, {kind: KINDS.get(kind).max_default_size for kind in free}
    while True:
        fitted = [
            Slot(s.sites, s.kind, (min(size, top[s.kind]),), s.options) if s.kind in free else s
            for s in slots
        ]
        if size == 1 or sum(n_params(s, s.sizes[-1]) for s in fitted) <= target_params:
            return fitted
        size //= 2
