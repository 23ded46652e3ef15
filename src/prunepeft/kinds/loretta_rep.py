"""LoRETTA_rep: LoRA with both factors as tensor trains."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from prunepeft.errors import ConfigError
from prunepeft.kinds.base import Host, Kind, Params, check_range, check_whole
from prunepeft.kinds.bottleneck import STARTS
from prunepeft.kinds.tensor_train import (
    apply_train,
    bond_axes,
    core_shapes,
    draw_cores,
    full_matrix,
    train_of,
)
from prunepeft.space import Site


@dataclass(frozen=True)
class LorettaRep(Kind):
    """LoRA by tensor trains: y <- y + s * (dropout(x) A) B.

    A is the train of a (d_in, rank) matrix with the cores A0, A1, ..., B that of (rank, d_out). The
    size R is the rank of the trains, the length of every bond between two cores; the update has
    rank at most min(rank, R). s = alpha / rank, whatever the size.

    Attributes:
        rank: Inner rank, the width between A and B.
        alpha: Numerator of the scaling; None: twice the inner rank.
        dropout: Probability on the module's input while training.
        init_weights: `zero` starts the last core of B at zero, so that a fresh module changes
            nothing; `paper` draws it like the others, so that each matrix (p, q) starts with
            variance 1 / (p + q).
    References:
        LoRETTA, 2024, arXiv 2402.11417. Differs from released code: that always starts as `paper`,
        has lists of modes for some widths only, and runs in half precision under autocast.
    """

    name: ClassVar[str] = "loretta_rep"
    roles: ClassVar[tuple[tuple[str, ...], ...]] = (("q", "v"),)
    mergeable: ClassVar[bool] = True
    max_default_size: ClassVar[int] = 8  # the cores grow with its square
    shrink_axes: ClassVar[Mapping[str, tuple[int, ...]]] = {"A": (0, 2), "B": (0, 2)}
    formula: ClassVar[str] = "TT(d_in, rank) + TT(rank, d_out)"

    rank: int = 8
    alpha: float | None = None
    dropout: float = 0.0
    init_weights: str = "zero"

    def __post_init__(self) -> None:
        check_whole(self.name, "rank", self.rank, 1, 65_536)
        if self.alpha is not None:
            check_range(self.name, "alpha", self.alpha, 1e-6, 1e6)
        check_range(self.name, "dropout", self.dropout, 0.0, 0.99)
        if self.init_weights not in STARTS:
            raise ConfigError(
                f"{self.name}.init_weights must be one of {', '.join(STARTS)}; "
                f"got {self.init_weights!r}."
            )

    def stages(self, site: Site) -> tuple[str, ...]:
        return ("add",)

    def shapes(self, site: Site, size: int) -> dict[str, tuple[int, ...]]:
        a = core_shapes("A", site.d_in, self.rank, size)
        return a | core_shapes("B", self.rank, site.d_out, size)

    def init(
        self, shapes: Mapping[str, tuple[int, ...]], host: Host, generator: torch.Generator
    ) -> dict[str, Tensor]:
        a = draw_cores(shapes, "A", self.rank, generator)
        is_zero = self.init_weights == "zero"
        return a | draw_cores(shapes, "B", self.rank, generator, zero_last=is_zero)

    def scaling(self, max_size: int) -> float:
        return 2.0 if self.alpha is None else self.alpha / self.rank

    def rank_axes(self, name: str, tensor: Tensor) -> tuple[int, ...]:
        return bond_axes(self.shrink_axes, name, tensor)

    def delta(
        self, params: Params, x: Tensor, y: Tensor, scaling: float, host: Host, stage: str = ""
    ) -> Tensor:
        x = F.dropout(x, self.dropout, host.training)
        h = apply_train(x, train_of(params, "A"))  # (..., rank)
        return apply_train(h * scaling, train_of(params, "B"))

    def merged(
        self, weight: Tensor, bias: Tensor | None, params: Params, scaling: float, stage: str
    ) -> tuple[Tensor, Tensor | None]:
        a = full_matrix(train_of(params, "A"), weight.shape[1])
        b = full_matrix(train_of(params, "B"), self.rank)
        return weight + scaling * (a @ b).T, bias
