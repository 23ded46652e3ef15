"""Prefix tuning: trained keys and values that every token of a self-attention can attend to."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from prunepeft.kinds.base import Host, Kind, Params, check_range
from prunepeft.space import Site


@dataclass(frozen=True)
class Prefix(Kind):
    """R trained tokens before those of the input: K <- [k; K], V <- [v; V] in one self-attention.

    keys k and values v are (R, d_kv), d_kv the width of the layer's keys over all key heads; a unit
    is one token. They get no position and are seen by all tokens. A fresh module is no identity:
    its tokens take attention away from the others.

    Attributes:
        init_std: Standard deviation of the first keys and values. The default is the one with which
            BERT and GPT-2 start their weights; scores and values are then near 0. From zeros all
            tokens would get the same gradient and stay equal.
    References:
        Prefix-tuning, 2021, arXiv 2101.00190, section 4. Differs from it: the vectors are trained
        themselves, without the network that makes them there while training (section 4.3). That
        network ties all tokens together, so that none could be cut or counted on its own.
    """

    name: ClassVar[str] = "prefix"
    roles: ClassVar[tuple[tuple[str, ...], ...]] = (("v",),)
    shrink_axes: ClassVar[Mapping[str, int]] = {"keys": 0, "values": 0}
    in_axes: ClassVar[Mapping[str, int]] = {}
    out_axes: ClassVar[Mapping[str, int]] = {"keys": 1, "values": 1}
    home: ClassVar[str] = "a self-attention with a value layer, or with a fused one of equal heads"
    formula: ClassVar[str] = "2 R d_kv"

    init_std: float = 0.02

    def __post_init__(self) -> None:
        check_range(self.name, "init_std", self.init_std, 1e-6, 10.0)

    def stages(self, site: Site) -> tuple[str, ...]:
        return ("attention",)

    def fits(self, site: Site) -> bool:
        # With grouped queries a fused layer does not tell the width of its keys. One that lost
        # heads is narrower.
        is_equal = site.d_out % 3 == 0 and site.d_out <= 3 * site.d_in
        is_whole = site.role == "v" or (site.role == "fused_qkv" and is_equal)
        return site.block == "attention" and is_whole

    def shapes(self, site: Site, size: int) -> dict[str, tuple[int, ...]]:
        width = site.d_out // 3 if site.role == "fused_qkv" else site.d_out
        return {"keys": (size, width), "values": (size, width)}

    def cut(
        self,
        params: Params,
        site: Site,
        rows: Tensor | None,
        cols: Tensor | None,
        scaling: float,
        host: Host,
    ) -> dict[str, Tensor] | None:
        """Cut tensors; of a fused layer (queries, keys, values) the last third says which heads."""
        if rows is not None and site.role == "fused_qkv":
            start = 2 * site.d_out // 3
            rows = rows[rows >= start] - start
        return super().cut(params, site, rows, cols, scaling, host)

    def init(
        self, shapes: Mapping[str, tuple[int, ...]], host: Host, generator: torch.Generator
    ) -> dict[str, Tensor]:
        return {
            name: torch.empty(shape).normal_(0, self.init_std, generator=generator)
            for name, shape in shapes.items()
        }

    def delta(
        self, params: Params, x: Tensor, y: Tensor, scaling: float, host: Host, stage: str = ""
    ) -> Tensor:
        return torch.stack([params["keys"], params["values"]])
