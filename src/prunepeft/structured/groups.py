"""Find the structures of a base model that can be taken out: heads and feed-forward neurons."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from prunepeft.errors import SiteError
from prunepeft.families import FAMILIES
from prunepeft.sites import find_sites
from prunepeft.space import Site

# Families whose attention stays right when whole heads go. It takes more than known names: no norm
# over all heads together (olmo2), no keys shared with positions (deberta), no head count that is
# read from the config while the model runs (phi3).
HEAD_FAMILIES = tuple(
    "bert roberta xlm-roberta camembert electra distilbert gpt2 opt bart mbart llama mistral qwen2 "
    "qwen3 gemma gemma2 gemma3_text t5 mt5 vit deit".split()
)
_TIED_FAMILIES = ("t5", "mt5")  # layers of a stack share one relative position bias
_HEAD_DIM = ("head_dim", "attention_head_size", "key_value_proj_dim")  # as attentions call it
BIAS_TABLE = "relative_attention_bias"

Modules = Mapping[str, nn.Module]


@dataclass(frozen=True)
class Part:
    """Features of one layer that the units of a group own.

    Attributes:
        path: Module path in the base model: a linear layer, or T5's table of position biases.
        side: "out" for output features (rows of the weight, bias), "in" for input features
            (columns of the weight).
        segments: (start, size) of every run of units: unit u owns start + u * size up to
            start + (u + 1) * size - 1. A query layer has one run; a fused one has three (qkv) or
            two (gate and up).
    """

    path: str
    side: str
    segments: tuple[tuple[int, int], ...]

    def features(self, units: Sequence[int] | Tensor) -> Tensor:
        """Features that belong to these units, ascending, (n,) of int64.

        Example:
            >>> Part("attn.c_attn", "out", ((0, 2), (4, 2), (8, 2))).features([1]).tolist()
            [2, 3, 6, 7, 10, 11]
        """
        units = torch.as_tensor(units, dtype=torch.long).cpu().unique()
        runs = [
            (start + units[:, None] * size + torch.arange(size)).flatten()
            for start, size in self.segments
        ]
        return torch.cat(runs)


@dataclass(frozen=True)
class Group:
    """A row of like structures of the base model, of which some may go.

    Attributes:
        id: "encoder.3.attention", "decoder.0.ffn"; "encoder.*.attention" if tied over all layers.
        what: "heads" or "neurons".
        stack: "encoder" or "decoder".
        layer: Layer in the stack; of the first one if tied.
        block: "attention", "cross_attention" or "ffn".
        n_units: Units in the group. With grouped queries a unit is one key-value head and all its
            query heads.
        heads_per_unit: Query heads in a unit; 1 in plain attention and for neurons.
        unit_params: Parameters of the base model that one unit holds.
        parts: Which features of which layers the units own; those of side "in" belong to the
            layers that write the sub-layer's output.
    """

    id: str
    what: str
    stack: str
    layer: int
    block: str
    n_units: int
    heads_per_unit: int
    unit_params: int
    parts: tuple[Part, ...]


def find_groups(model: nn.Module) -> tuple[Group, ...]:
    """Find every group of heads and of neurons, in the order of the model.

    Heads are found in the families of `HEAD_FAMILIES`, neurons in every family whose feed-forward
    layers `FAMILIES` names. Heads of T5's self-attention are tied over the layers of a stack, which
    share a position bias per head. No weight is read, so a model on the meta device will do.

    Raises:
        SiteError: if the model has no such structure, or carries adapters already.
    """
    modules = dict(model.named_modules())
    by_block: dict[tuple[str, int, str], list[Site]] = {}
    for site in find_sites(model):
        by_block.setdefault((site.stack, site.layer, site.block), []).append(site)
    found = [_group(modules, sites) for sites in by_block.values()]
    groups = tuple(_tied(g for g in found if g is not None))
    if not groups:
        kind = getattr(getattr(model, "config", None), "model_type", "") or "none"
        raise SiteError(
            f"{type(model).__name__} (model type {kind!r}) has no attention heads or feed-forward "
            f"neurons that are known to come apart. Heads: {', '.join(HEAD_FAMILIES)}. Neurons: "
            f"{', '.join(FAMILIES)}. Use one of these, or a method that leaves the base whole."
        )
    return groups


def _group(modules: Modules, sites: Sequence[Site]) -> Group | None:
    """The group of one sub-layer; None if it has none that is known."""
    family = _family(modules, sites[0].path)
    own: dict[str, Site] = {}
    for site in sites:
        if site.role in ("norm", "other"):
            continue
        if site.role in own or not _is_known(family, site):
            return None
        own[site.role] = site
    if sites[0].block == "ffn":
        return _neurons(own)
    return _heads(modules, family, own) if family in HEAD_FAMILIES else None


def _neurons(own: Mapping[str, Site]) -> Group | None:
    down = own.get("down")
    fused = own.get("fused_gate_up")
    readers = [fused] if fused else [own[r] for r in ("up", "gate") if r in own]
    if down is None or not readers:
        return None
    n = down.d_in
    if not n:  # cut before, and nothing is left
        return None
    segments = ((0, 1), (n, 1)) if fused else ((0, 1),)
    if any(s.d_out != n * len(segments) for s in readers):
        return None
    parts = [(s, "out", segments) for s in readers] + [(down, "in", ((0, 1),))]
    return _make_group("neurons", n, 1, parts)


def _heads(modules: Modules, family: str, own: Mapping[str, Site]) -> Group | None:
    o, fused = own.get("o"), own.get("fused_qkv")
    first = fused or own.get("q")
    if o is None or first is None or (not fused and not {"k", "v"} <= own.keys()):
        return None
    path = first.path.rpartition(".")[0]
    attention = modules[path]
    d = next((getattr(attention, a) for a in _HEAD_DIM if hasattr(attention, a)), 0)
    if not d or o.d_in % d:
        return None
    n_heads = o.d_in // d
    if fused:
        n_units, width = n_heads, o.d_in
        runs = tuple((i * width, d) for i in range(3))
        fits = fused.d_out == 3 * width
        parts = [(fused, "out", runs)]
    else:
        n_units = max(own["k"].d_out // d, 1)
        widths = (o.d_in, n_units * d, n_units * d)
        fits = tuple(own[r].d_out for r in "qkv") == widths and n_heads % n_units == 0
        sizes = {"q": n_heads // n_units * d, "k": d, "v": d}
        parts = [(own[role], "out", ((0, size),)) for role, size in sizes.items()]
    if not fits:
        return None
    per_unit = n_heads // n_units
    group = _make_group("heads", n_units, per_unit, [*parts, (o, "in", ((0, per_unit * d),))])
    if family not in _TIED_FAMILIES or group.block != "attention":
        return group
    return _with_bias_table(group, path, modules)


def _make_group(
    what: str,
    n_units: int,
    heads_per_unit: int,
    parts: Sequence[tuple[Site, str, tuple[tuple[int, int], ...]]],
) -> Group:
    count = 0
    for site, side, segments in parts:
        per_feature = site.d_out if side == "in" else site.d_in + site.has_bias
        count += per_feature * sum(size for _, size in segments)
    site = parts[0][0]
    return Group(
        id=f"{site.stack}.{site.layer}.{site.block}",
        what=what,
        stack=site.stack,
        layer=site.layer,
        block=site.block,
        n_units=n_units,
        heads_per_unit=heads_per_unit,
        unit_params=count,
        parts=tuple(Part(s.path, side, segments) for s, side, segments in parts),
    )


def _with_bias_table(group: Group, attention: str, modules: Modules) -> Group:
    """T5's self-attention: marked as tied, and with a column of the position biases per head."""
    group = replace(group, id=f"{group.stack}.*.{group.block}")
    path = f"{attention}.{BIAS_TABLE}"
    if path not in modules:
        return group
    return replace(
        group,
        parts=(*group.parts, Part(path, "out", ((0, 1),))),
        unit_params=group.unit_params + modules[path].num_embeddings,
    )


def _tied(groups: Iterable[Group]) -> Iterator[Group]:
    """Groups of the same id become one."""
    by_id: dict[str, Group] = {}
    for group in groups:
        first = by_id.get(group.id)
        by_id[group.id] = (
            group
            if first is None
            else replace(
                first,
                unit_params=first.unit_params + group.unit_params,
                parts=first.parts + group.parts,
            )
        )
    return iter(by_id.values())


def _family(modules: Modules, path: str) -> str:
    """Model type of the closest enclosing module that has a config."""
    while path:
        path = path.rpartition(".")[0]
        family = getattr(getattr(modules[path], "config", None), "model_type", "")
        if family:
            return str(family)
    return ""


def _is_known(family: str, site: Site) -> bool:
    """Whether the role of a site is that of its family, and not a guess from its name."""
    return any(
        site.path.endswith(f".{name}") and known == (site.block, site.role)
        for stack in FAMILIES.get(family, ())
        for name, known in stack.names.items()
    )
