"""What every format is asked with, and what it hands back."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from prunepeft.supernet.export.base_model import Base
from prunepeft.supernet.export.source import SavedAdapter


@dataclass(frozen=True)
class Request:
    """One export.

    Attributes:
        adapter: What to export.
        base: What is known of its base model.
        skeleton: The base model with or without weights; None if it was not found.
        output: Where the folder will be.
        dtype: Name of the dtype to save in; None for the format's own.
    """

    adapter: SavedAdapter
    base: Base
    skeleton: nn.Module | None
    output: Path
    dtype: str | None = None


@dataclass
class Written:
    """What a format wrote: remarks for the user, and further fields of the report."""

    notes: list[str] = field(default_factory=list)
    extra: Mapping[str, Any] = field(default_factory=dict)
