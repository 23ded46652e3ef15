"""What a kind of PEFT module is: a frozen dataclass of options with pure functions of tensors.

Every kind is a residual change at one site (a linear layer; some sit on a normalisation layer): it
returns what to ADD.

    stage "input"   x  <- x + delta(x)          before the frozen layer
    stage "product" Wx <- Wx + delta(Wx)        after its weight, before its bias (ETHER, SSB)
    stage "add"     y  <- y + delta(x, y)       beside it (LoRA, DoRA, parallel adapter)
    stage "scale"   y  <- y + delta(y)          elementwise after it (IA3)
    stage "output"  y  <- y + delta(y)          after it (serial adapter)

Because each is an addition, a gate g multiplies it: g = 0 is the model without the module.

One stage is not at the layer but in the attention that the layer feeds; there g multiplies the
attention weight, before weights are made to sum to one:

    stage "attention"  K, V <- [k; K], [v; V] with k, v = delta   (prefix)
"""

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from prunepeft.errors import ConfigError, SiteError, UnknownNameError
from prunepeft.registry import Registry, unknown_name
from prunepeft.space import Placement, Site, Slot

STAGES = ("input", "product", "add", "scale", "output", "attention")
Params = Mapping[str, Tensor]


class Host(Protocol):
    """What a kind may ask of the layer it sits on."""

    training: bool

    def frozen_weight(self) -> Tensor:
        """The frozen weight, (d_out, d_in), dequantised if need be; (d_out,) at a norm."""

    def frozen_row_norm(self) -> Tensor:
        """Euclidean norm of every row of the frozen weight, (d_out,), in float32 or wider."""

    def frozen_linear(self, x: Tensor) -> Tensor:
        """What the layer makes of x without its bias: x W^T, or the norm, (..., d_out)."""

    def sublayer_input(self) -> Tensor:
        """What the sub-layer read in this forward pass, (..., D)."""


@dataclass(frozen=True)
class Kind(ABC):
    """A family of PEFT module. Its options are its fields; it holds no state.

    Class attributes:
        name: Registered name.
        roles: Default tied groups of site roles that get one slot each in every layer.
        shrink_axes: Tensor name -> axis of its rank, for kinds whose size can be cut; several
            axes, or one entry for many tensors, go with a `rank_axes` of the kind's own.
        rank_gates: Names of tensors: a rank that is zero in these is as good as cut. One tensor for
            each product over ranks, so that the gradient of a gate counts a product once.
        in_axes: Tensor name -> its axis along the layer's input features; {} if the module does not
            depend on how many there are. None if a tensor mixes them, so that none can be cut.
        out_axes: The same for the output features.
        sized: False for kinds without a size (their only size is 1).
        max_default_size: Largest size chosen where none is given.
        needs_source: True if it reads the sub-layer's input (only at `o` and `down` sites).
        reads_weight: True if `delta` depends on the frozen weight, so that another weight would
            make another module of it.
        home: What `fits` asks for, in words that follow "needs".
    """

    name: ClassVar[str]
    roles: ClassVar[tuple[tuple[str, ...], ...]]
    mergeable: ClassVar[bool] = False
    servable: ClassVar[bool] = False
    sized: ClassVar[bool] = True
    max_default_size: ClassVar[int] = 64
    needs_source: ClassVar[bool] = False
    reads_weight: ClassVar[bool] = False
    shrink_axes: ClassVar[Mapping[str, int | tuple[int, ...]]] = {}
    rank_gates: ClassVar[tuple[str, ...]] = ()
    in_axes: ClassVar[Mapping[str, int] | None] = None
    out_axes: ClassVar[Mapping[str, int] | None] = None
    home: ClassVar[str] = "a linear layer"
    formula: ClassVar[str] = ""

    @abstractmethod
    def stages(self, site: Site) -> tuple[str, ...]:
        """Where in the layer the module acts at this site: one or more of `STAGES`, in order."""

    def fits(self, site: Site) -> bool:
        """Whether a site can carry this kind: any linear layer, if not overridden."""
        return site.role != "norm" and (bool(site.source) or not self.needs_source)

    @abstractmethod
    def shapes(self, site: Site, size: int) -> dict[str, tuple[int, ...]]:
        """Tensor name -> shape of everything trainable."""

    @abstractmethod
    def init(
        self, shapes: Mapping[str, tuple[int, ...]], host: Host, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """Fresh values in float32 on the CPU."""

    @abstractmethod
    def delta(
        self,
        params: Params,
        x: Tensor,
        y: Tensor,
        scaling: float,
        host: Host,
        stage: str = "",
    ) -> Tensor:
        """What to add at a stage; at "attention" the keys and values to prepend, (2, R, d_kv).

        Args:
            params: The module's tensors.
            x: Input of the layer, (..., d_in).
            y: What the stage changes: the output so far, (..., d_out); at "input" x itself. At
                "attention", x and y are the keys and values of the tokens, (B, H_kv, S, d).
            scaling: Factor of the update, see `scaling`.
            host: The layer.
            stage: Which of `stages` is asked for; only kinds with several read it.
        """

    def neutral(self, name: str, host: Host) -> Tensor | float:
        """Value of one of the module's tensors at which it changes nothing, as far as it goes.

        Criteria judge a weight by its distance from there: without the module it would be at that.
        """
        return 0.0

    def scaling(self, max_size: int) -> float:
        """Factor of the update; set by the slot's largest size and kept when ranks are cut."""
        return 1.0

    def merged(
        self, weight: Tensor, bias: Tensor | None, params: Params, scaling: float, stage: str
    ) -> tuple[Tensor, Tensor | None]:
        """Weight (d_out, d_in) and bias (d_out,) of the one linear layer equal to layer + module.

        At a norm the weight is its scale, (d_out,), whichever way the model stores it.

        Called once for each of the kind's stages; at "product" the bias must stay as it is. Kinds
        with `mergeable = False` never reach this.
        """
        raise ConfigError(f"kind {self.name!r} is not linear in its input and cannot be merged.")

    def n_params(self, site: Site, size: int) -> int:
        """Trainable parameters at one site."""
        return sum(math.prod(shape) for shape in self.shapes(site, size).values())

    def rank_axes(self, name: str, tensor: Tensor) -> tuple[int, ...]:
        """Axes of one of the module's tensors along which its ranks lie; () if it has none."""
        axes = self.shrink_axes.get(name, ())
        return (axes,) if isinstance(axes, int) else axes

    def shrunk(self, params: Params, keep: Tensor) -> dict[str, Tensor]:
        """Tensors cut to the ranks of `keep` (indices, (size',)); others unchanged."""
        if not self.shrink_axes:
            raise ConfigError(f"kind {self.name!r} has no ranks to cut; remove it as a whole.")
        cut = dict(params)
        for name in cut:
            for axis in self.rank_axes(name, params[name]):
                cut[name] = cut[name].index_select(axis, keep.to(cut[name].device))
        return cut

    def gated(self, params: Params, gates: Tensor) -> dict[str, Tensor]:
        """Tensors with every rank multiplied by its gate, (size,); see `rank_gates`."""
        scaled = dict(params)
        for name in self.rank_gates:
            (axis,) = self.rank_axes(name, params[name])
            by_rank = params[name].movedim(axis, -1) * gates.to(params[name])
            scaled[name] = by_rank.movedim(-1, axis)
        return scaled

    def feature_axes(self, site: Site, side: str) -> Mapping[str, int] | None:
        """`in_axes` or `out_axes` at this site, for side "in" or "out"."""
        return self.in_axes if side == "in" else self.out_axes

    def cut(
        self,
        params: Params,
        site: Site,
        rows: Tensor | None,
        cols: Tensor | None,
        scaling: float,
        host: Host,
    ) -> dict[str, Tensor] | None:
        """Tensors of this module on a layer that keeps only some of its features.

        The kept outputs stay as they were for every input that is zero at the features that go.

        Args:
            params: The module's tensors.
            site: Where it sits, with the widths from before.
            rows: Output features that stay, ascending indices; None: all.
            cols: Input features that stay; None: all.
            scaling: Factor of the update.
            host: The layer from before the cut.
        Returns:
            None if the module has no such form: its tensors mix the features, see `in_axes`.
        """
        cut = dict(params)
        for side, keep in (("out", rows), ("in", cols)):
            axes = {} if keep is None else self.feature_axes(site, side)
            if axes is None:
                return None
            for name, axis in axes.items():
                cut[name] = cut[name].index_select(axis, keep.to(cut[name].device))
        return cut


KINDS: Registry[type[Kind]] = Registry("kind")


def make_kind(name: str, options: Mapping[str, Any] | tuple[tuple[str, Any], ...] = ()) -> Kind:
    """The kind with these options. Raises UnknownNameError for an unknown kind or option."""
    cls = KINDS.get(name)
    known = tuple(f.name for f in fields(cls))
    for key in dict(options):
        if key not in known:
            raise UnknownNameError(unknown_name(f"option of kind {name!r}:", key, known))
    return cls(**dict(options))


def slot_kind(slot: Slot) -> Kind:
    """The kind of a slot, with the slot's options."""
    return make_kind(slot.kind, slot.options)


def n_params(slot: Slot, size: int) -> int:
    """Trainable parameters of a slot at this size, over all its tied sites."""
    kind = slot_kind(slot)
    return sum(kind.n_params(site, size) for site in slot.sites)


def count_params(placement: Placement) -> int:
    """Trainable parameters of all modules of a placement."""
    return sum(n_params(slot, size) for slot, size in placement.sizes.items())


def cost(placement: Placement, unit: str) -> int:
    """What a placement costs in the unit of a budget (`parameters`, `modules` or `rank`)."""
    return sum(slot_cost(slot, size, unit) for slot, size in placement.sizes.items())


def slot_cost(slot: Slot, size: int, unit: str) -> int:
    """What one slot costs in the unit of a budget."""
    if unit == "modules":
        return 1
    return size if unit == "rank" else n_params(slot, size)


def seeded(seed: int, *names: str) -> torch.Generator:
    """CPU generator that depends on the seed and these names alone.

    A module's first values therefore do not depend on which other modules exist.
    """
    text = ":".join((str(seed), *names))
    digest = hashlib.sha256(text.encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8]) % 2**63)


def check_range(kind: str, option: str, value: float, low: float, high: float) -> None:
    """Raise ConfigError unless low <= value <= high."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not low <= value <= high:
        raise ConfigError(f"{kind}.{option} must be in [{low:g}, {high:g}]; got {value!r}.")


def check_whole(kind: str, option: str, value: int, low: int, high: int) -> None:
    """Raise ConfigError unless the option is a whole number with low <= value <= high."""
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise ConfigError(
            f"{kind}.{option} must be a whole number in {low}..{high}; got {value!r}."
        )


def check_one_of(kind: str, option: str, value: object, known: tuple[str, ...]) -> None:
    """Raise UnknownNameError unless the option is one of the known names."""
    if value not in known:
        raise UnknownNameError(unknown_name(f"{kind}.{option}", str(value), known))


def check_divides(kind: str, option: str, value: int, width: int, site: Site) -> None:
    """Raise SiteError unless the option divides the width of the layer."""
    if width % value:
        raise SiteError(
            f"{kind}.{option} must divide the width of the layer; got {value} for {site.path} of "
            f"width {width}. Use a divisor of it (1 always works) or other roles."
        )
