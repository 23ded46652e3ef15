"""The criterion that looks at what the loss says when whole layers are turned down."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from prunepeft.criteria.base import Criterion, Record


@dataclass(frozen=True)
class Ist(Criterion):
    """Weight with which IST would train the module's layer: sigmoid(importance of the layer).

    All modules of a layer are worth the same, so it tells depths apart; name it beside criteria
    that tell modules apart.

    References:
        IST, 2024, arXiv 2410.11772, scores of layers (here of a training in which all layers
        train). Differs from released code: see `sparse_tuning.ist`.
    """

    name: ClassVar[str] = "ist"
    needs: ClassVar[frozenset[str]] = frozenset({"suppression"})

    def saliency(self, record: Record) -> Tensor:
        return record.layer_importance
