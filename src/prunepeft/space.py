"""Where modules may go and where they are: Site, Slot, Placement, SearchSpace. Plain data."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from prunepeft.errors import ConfigError

BLOCKS = ("attention", "cross_attention", "ffn")
ROLES = ("q", "k", "v", "fused_qkv", "o", "up", "gate", "fused_gate_up", "down", "norm", "other")
DEPTH_EDGES = (0.2, 0.5, 0.8)  # [0, 20%), [20%, 50%), [50%, 80%), [80%, 100%]
FORMAT_VERSION = 1
MAX_SLOTS = 100_000
MAX_SIZE = 65_536


@dataclass(frozen=True, order=True)
class Site:
    """A layer of the base model that can carry a module: a linear layer, or a normalisation layer.

    Attributes:
        path: Full module path in the base model, e.g. `encoder.layer.3.output.dense`.
        stack: `encoder` or `decoder`.
        layer: Index of the repeated block in its stack, from 0.
        n_layers: Number of blocks in that stack.
        block: `attention`, `cross_attention` or `ffn`.
        role: One of `ROLES`. `o` and `down` write the sub-layer's output; `norm` normalises.
        d_in: Input features of the layer.
        d_out: Output features; at `norm` the width, as d_in.
        source: On `o` and `down`, the path of a linear layer that reads the sub-layer's input
            (a parallel adapter starts there); empty elsewhere.
        has_bias: Whether the layer adds a bias.
    """

    path: str
    stack: str
    layer: int
    n_layers: int
    block: str
    role: str
    d_in: int
    d_out: int
    source: str = ""
    has_bias: bool = False

    @property
    def depth_block(self) -> int:
        """Which of the four spindle-shaped depth blocks the layer is in, 0 to 3.

        Example:
            >>> [Site("p", "encoder", i, 6, "ffn", "down", 1, 1).depth_block for i in range(6)]
            [0, 0, 1, 2, 2, 3]
        """
        depth = self.layer / self.n_layers
        return sum(depth >= edge for edge in DEPTH_EDGES)


@dataclass(frozen=True)
class Slot:
    """One candidate module: a kind at one site, or tied over several sites of a layer.

    Attributes:
        sites: Where it sits. Several sites make ONE module (as LoRA on query and value).
        kind: Registered name of the kind.
        sizes: Allowed sizes, ascending (rank, bottleneck width; `(1,)` for kinds without one).
            The largest fixes the scaling, which stays when ranks are cut.
        options: Options of the kind as sorted pairs.
    """

    sites: tuple[Site, ...]
    kind: str
    sizes: tuple[int, ...]
    options: tuple[tuple[str, Any], ...] = ()

    def __post_init__(self) -> None:
        if not self.sites:
            raise ConfigError(f"a slot of kind {self.kind!r} needs at least one site.")
        where = {(s.stack, s.layer, s.block) for s in self.sites}
        if len(where) > 1:
            raise ConfigError(f"tied sites must share stack, layer and block; got {sorted(where)}.")
        bad = [s for s in self.sizes if not _is_int(s) or not 1 <= s <= MAX_SIZE]
        if not self.sizes or bad or tuple(sorted(set(self.sizes))) != self.sizes:
            raise ConfigError(
                f"sizes of slot {self.id} must be ascending whole numbers in "
                f"1..{MAX_SIZE}; got {self.sizes}."
            )

    @property
    def id(self) -> str:
        """Readable unique name.

        Example:
            >>> site = Site("l.0.q", "encoder", 0, 2, "attention", "q", 4, 4)
            >>> Slot((site,), "lora", (8,)).id
            'encoder.0.attention.q:lora'
        """
        first = self.sites[0]
        roles = "+".join(s.role if s.role != "other" else s.path for s in self.sites)
        return f"{first.stack}.{first.layer}.{first.block}.{roles}:{self.kind}"

    @property
    def layer(self) -> int:
        return self.sites[0].layer

    @property
    def partition(self) -> str:
        """Name of the partition used by hybrid pruning: stack, depth block, kind."""
        first = self.sites[0]
        return f"{first.stack}.{first.depth_block}.{self.kind}"

    def to_dict(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "sizes": list(self.sizes),
            "options": dict(self.options),
            "sites": [asdict(s) for s in self.sites],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Slot":
        _check_keys("slot", data, ("kind", "sizes", "options", "sites"), ("size",))
        if not isinstance(data["sites"], list) or not isinstance(data["sizes"], list):
            raise ConfigError("slot.sites and slot.sizes must be lists.")
        if not isinstance(data["options"], Mapping) or not isinstance(data["kind"], str):
            raise ConfigError("slot.options must be a mapping and slot.kind a name.")
        for value in data["options"].values():
            if not isinstance(value, str | int | float | bool | None):
                raise ConfigError(f"slot.options holds {value!r}; only plain values are allowed.")
        return cls(
            sites=tuple(_site_from_dict(s) for s in data["sites"]),
            kind=data["kind"],
            sizes=tuple(data["sizes"]),
            options=tuple(sorted(data["options"].items())),
        )


@dataclass(frozen=True)
class Placement:
    """The one artefact: which slots hold a module, and of what size. Absent means size 0."""

    sizes: Mapping[Slot, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "sizes", dict(self.sizes))
        ids: set[str] = set()
        homes: set[tuple[str, str]] = set()
        for slot, size in self.sizes.items():
            if not _is_int(size) or not 1 <= size <= slot.sizes[-1]:
                raise ConfigError(
                    f"size of slot {slot.id} must be in 1..{slot.sizes[-1]}; got {size!r} "
                    "(leave the slot out for size 0)."
                )
            if slot.id in ids:
                raise ConfigError(f"slot {slot.id} occurs twice in the placement.")
            ids.add(slot.id)
            for site in slot.sites:
                if (site.path, slot.kind) in homes:
                    raise ConfigError(f"two slots put {slot.kind!r} on {site.path}; keep one.")
                homes.add((site.path, slot.kind))

    def __hash__(self) -> int:
        return hash(self.digest)

    def __len__(self) -> int:
        return len(self.sizes)

    def __iter__(self) -> Iterator[Slot]:
        return iter(self.sizes)

    def __contains__(self, slot: Slot) -> bool:
        return slot in self.sizes

    @property
    def ids(self) -> tuple[str, ...]:
        """Ids of the slots that hold a module, in order."""
        return tuple(s.id for s in self.sizes)

    @property
    def kinds(self) -> tuple[str, ...]:
        """Names of the kinds that occur, sorted."""
        return tuple(sorted({s.kind for s in self.sizes}))

    def without(self, ids: "set[str] | frozenset[str] | tuple[str, ...]") -> "Placement":
        """The placement with the slots of these ids left out."""
        gone = set(ids)
        return Placement({s: n for s, n in self.sizes.items() if s.id not in gone})

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form; `from_dict` is its inverse."""
        slots = [s.to_dict() | {"size": n} for s, n in self.sizes.items()]
        return {"format_version": FORMAT_VERSION, "slots": slots}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Placement":
        """Read the JSON form strictly. Raises ConfigError on anything unexpected."""
        if not isinstance(data, Mapping):
            raise ConfigError(f"a placement must be a mapping; got {type(data).__name__}.")
        _check_keys("placement", data, ("format_version", "slots"))
        if data["format_version"] != FORMAT_VERSION:
            raise ConfigError(
                f"placement format {data['format_version']!r} is not supported; this version reads "
                f"format {FORMAT_VERSION}. Install a newer prunepeft."
            )
        if not isinstance(data["slots"], list) or len(data["slots"]) > MAX_SLOTS:
            raise ConfigError(f"placement.slots must be a list of at most {MAX_SLOTS} slots.")
        sizes: dict[Slot, int] = {}
        for item in data["slots"]:
            if not isinstance(item, Mapping):
                raise ConfigError(f"a slot must be a mapping; got {type(item).__name__}.")
            _check_keys("slot", item, ("kind", "sizes", "options", "sites", "size"))
            slot = Slot.from_dict(item)
            if slot in sizes:
                raise ConfigError(f"slot {slot.id} occurs twice in the placement.")
            sizes[slot] = item["size"]
        return cls(sizes)

    @property
    def digest(self) -> str:
        """SHA-256 of the JSON form, first 16 hex digits."""
        text = json.dumps(self.to_dict(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class SearchSpace:
    """All candidate slots of one search."""

    slots: tuple[Slot, ...]

    def __post_init__(self) -> None:
        if not self.slots:
            raise ConfigError("a search space needs at least one slot.")
        self.full()

    def __len__(self) -> int:
        return len(self.slots)

    def __iter__(self) -> Iterator[Slot]:
        return iter(self.slots)

    def full(self) -> Placement:
        """The supernet: every slot at its largest size."""
        return Placement({s: s.sizes[-1] for s in self.slots})

    def by_id(self) -> dict[str, Slot]:
        return {s.id: s for s in self.slots}


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _site_from_dict(data: Any) -> Site:
    names = tuple(f.name for f in fields(Site))
    if not isinstance(data, Mapping):
        raise ConfigError(f"a site must be a mapping; got {type(data).__name__}.")
    _check_keys("site", data, names[:-2], names[-2:])
    site = Site(**data)
    for name in ("path", "stack", "block", "role", "source"):
        value = getattr(site, name)
        if not isinstance(value, str) or "\0" in value or ".." in value:
            raise ConfigError(f"site.{name} {value!r} is not a plain module path or name.")
    if site.block not in BLOCKS or site.role not in ROLES:
        raise ConfigError(
            f"site {site.path} has unknown block {site.block!r} or role {site.role!r}."
        )
    for name in ("layer", "n_layers", "d_in", "d_out"):
        if not _is_int(getattr(site, name)) or not 0 <= getattr(site, name) < 2**31:
            raise ConfigError(f"site.{name} must be a whole number; got {getattr(site, name)!r}.")
    if not isinstance(site.has_bias, bool):
        raise ConfigError(f"site.has_bias must be true or false; got {site.has_bias!r}.")
    if not site.layer < site.n_layers:
        raise ConfigError(
            f"site {site.path}: layer {site.layer} of {site.n_layers} does not exist."
        )
    return site


def _check_keys(
    label: str, data: Mapping[str, Any], needed: tuple[str, ...], optional: tuple[str, ...] = ()
) -> None:
    missing = [k for k in needed if k not in data]
    extra = [k for k in data if k not in needed and k not in optional]
    if missing or extra:
        raise ConfigError(f"{label}: missing keys {missing}, unknown keys {extra}.")


def depth_below(slots: Iterable[Slot]) -> dict[str, float]:
    """Slot id -> share of the layers that run before its own, in [0, 1).

    A decoder runs after the encoder, if slots of both are given.
    """
    slots = list(slots)
    n_layers = {slot.sites[0].stack: slot.sites[0].n_layers for slot in slots}
    before = {stack: n_layers.get("encoder", 0) * (stack == "decoder") for stack in n_layers}
    whole = sum(n_layers.values())
    return {s.id: (before[s.sites[0].stack] + s.layer) / whole for s in slots}
