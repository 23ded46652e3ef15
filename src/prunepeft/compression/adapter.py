"""Adapters in memory: their tensors as compressed task vectors, and back."""

import logging
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from prunepeft.compression.compeft import compress
from prunepeft.compression.starts import (
    choose_starts,
    fingerprint,
    is_head,
    same_fingerprint,
    start_values,
)
from prunepeft.compression.vectors import TernaryVector
from prunepeft.errors import CheckpointError, ConfigError

logger = logging.getLogger(__name__)

SCOPES = ("global", "role", "tensor")
_FACTOR = re.compile(r"_(A|B)(\.weight)?$")  # a module is zero when either of its factors is


@dataclass(frozen=True)
class Settings:
    """How to compress.

    Attributes:
        density: Share of the entries that are kept.
        alpha: Factor of the scale.
        method: `compeft` or `stc`.
        scope: Which tensors share a threshold and a scale: `global` all (the paper), `role` those
            of one name in all layers, `tensor` none. `auto`: global, or role if a tensor has
            its random first values in the task vector, which would use up the whole budget.
        start: What a task vector counts from, see `starts.choose_starts`.
        heads: Compress modules that are trained in full as well, each for itself from zero.
    """

    density: float = 0.2
    alpha: float = 1.0
    method: str = "compeft"
    scope: str = "auto"
    start: str = "auto"
    heads: bool = False


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies.

    Attributes:
        name: Its name in the adapter's file.
        shape, dtype: Of the tensor.
        group: Index of the vector it is in; tensors lie there in the order of entries.
        start: How it started, one of `starts.STARTS`.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    group: int
    start: str

    @property
    def size(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True, eq=False)
class CompressedAdapter:
    """An adapter as task vectors.

    Attributes:
        config: `adapter_config.json`.
        settings: How it was compressed; `scope` and `start` as resolved.
        vectors: One per group.
        entries: The compressed tensors, sorted by name.
        dense: Tensors that are kept as they are.
        start_check: Sum and norm of the starting values that a seed or snapshot gives; None if
            there are none.
    """

    config: Mapping[str, Any]
    settings: Settings
    vectors: tuple[TernaryVector, ...]
    entries: tuple[Entry, ...]
    dense: Mapping[str, Tensor] = field(repr=False)
    start_check: list[float] | None = None

    @property
    def n_params(self) -> int:
        """Entries of all vectors."""
        return sum(vector.size for vector in self.vectors)

    @property
    def n_kept(self) -> int:
        return sum(vector.n_kept for vector in self.vectors)

    def places(self) -> dict[str, tuple[TernaryVector, int, int]]:
        """Tensor name -> (vector, begin, end)."""
        ends = [0] * len(self.vectors)
        found = {}
        for entry in self.entries:
            begin = ends[entry.group]
            ends[entry.group] = begin + entry.size
            found[entry.name] = (self.vectors[entry.group], begin, begin + entry.size)
        return found

    def starts(self, snapshot: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Starting values of the compressed tensors; CheckpointError if they are not the same."""
        values = start_values(
            {e.name: e.start for e in self.entries},
            {e.name: e.shape for e in self.entries},
            self.config,
            snapshot,
        )
        stored = {e.name: values[e.name] for e in self.entries if e.start in ("init", "snapshot")}
        if stored and (
            self.start_check is None or not same_fingerprint(self.start_check, fingerprint(stored))
        ):
            raise CheckpointError(
                "the starting values differ from those the adapter was compressed with; give the "
                "same snapshot (--start FOLDER), or the version of prunepeft that compressed it."
            )
        return values

    def restore(self, snapshot: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """All tensors of the adapter: start + scale * sign, in the dtypes they had."""
        starts, places = self.starts(snapshot), self.places()
        tensors = dict(self.dense)
        for entry in self.entries:
            vector, begin, end = places[entry.name]
            change = torch.from_numpy(vector.block(begin, end)).reshape(entry.shape)
            tensors[entry.name] = (starts[entry.name] + change).to(entry.dtype)
        return dict(sorted(tensors.items()))


def compress_tensors(
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any],
    settings: Settings,
    snapshot: Mapping[str, Tensor] | None = None,
) -> CompressedAdapter:
    """Compress the tensors of an adapter.

    Raises:
        ConfigError: if no starting values are known, or every module of the result is zero.
    """
    return Prepared(tensors, config, settings, snapshot).compress(settings.density, settings.alpha)


class Prepared:
    """Task vectors of an adapter, ready to be compressed at several densities and alphas."""

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        config: Mapping[str, Any],
        settings: Settings,
        snapshot: Mapping[str, Tensor] | None = None,
    ) -> None:
        if settings.scope not in ("auto", *SCOPES):
            raise ConfigError(
                f"scope must be one of auto, {', '.join(SCOPES)}; got {settings.scope!r}."
            )
        self._tensors, self._config = tensors, config
        modules = {n: t for n, t in tensors.items() if not is_head(n, config)}
        starts = choose_starts(modules, config, settings.start, snapshot)
        heads = {n for n, t in tensors.items() if is_head(n, config) and t.is_floating_point()}
        starts |= dict.fromkeys(heads if settings.heads else (), "zeros")
        scope = settings.scope if settings.scope != "auto" else _auto_scope(starts)
        self._settings = replace(settings, scope=scope)
        names = sorted(starts)
        keys = [f"head:{n}" if n in heads else _group_key(n, scope) for n in names]
        order = list(dict.fromkeys(keys))
        self._entries = tuple(
            Entry(n, tuple(tensors[n].shape), tensors[n].dtype, order.index(k), starts[n])
            for n, k in zip(names, keys, strict=True)
        )
        values = start_values(starts, {n: tuple(tensors[n].shape) for n in names}, config, snapshot)
        stored = {n: values[n] for n in names if starts[n] in ("init", "snapshot")}
        self._start_check = fingerprint(stored) if stored else None
        self._taus = [
            np.concatenate(
                [
                    (tensors[e.name].float() - values[e.name]).flatten().numpy()
                    for e in self._entries
                    if e.group == group
                ]
            )
            for group in range(len(order))
        ]

    def compress(self, density: float, alpha: float) -> CompressedAdapter:
        """The adapter at one density and alpha."""
        settings = replace(self._settings, density=float(density), alpha=float(alpha))
        vectors = tuple(compress(tau, density, alpha, settings.method) for tau in self._taus)
        names = {entry.name for entry in self._entries}
        dense = {n: t for n, t in self._tensors.items() if n not in names}
        return CompressedAdapter(
            self._config, settings, vectors, self._entries, dense, self._start_check
        )


def zeroed(
    compressed: CompressedAdapter,
    tensors: Mapping[str, Tensor],
    snapshot: Mapping[str, Tensor] | None = None,
) -> tuple[list[str], int]:
    """Modules that compression made zero: all of one of the factors A and B is zero, as B at first.

    Returns:
        Names of these modules, and the number of modules with factors that did something before.
    """
    restored = compressed.restore(snapshot)
    dead: dict[str, bool] = {}
    for entry in compressed.entries:
        if not _FACTOR.search(entry.name):
            continue
        module = _FACTOR.sub("", entry.name)
        was_zero = not tensors[entry.name].any()
        dead.setdefault(module, False)
        dead[module] |= not restored[entry.name].any() and not was_zero
    return [module for module, lost in dead.items() if lost], len(dead)


def check_not_zeroed(
    compressed: CompressedAdapter,
    tensors: Mapping[str, Tensor],
    snapshot: Mapping[str, Tensor] | None = None,
) -> list[str]:
    """Warn about modules that compression made zero, and return the warning in a list.

    Raises:
        ConfigError: if that is every module.
    """
    if compressed.settings.alpha == 0:
        return []
    lost, n_modules = zeroed(compressed, tensors, snapshot)
    if not lost:
        return []
    scope = compressed.settings.scope
    advice = "use a larger density" + (", or --scope role" if scope == "global" else "")
    if len(lost) == n_modules:
        raise ConfigError(
            f"at density {compressed.settings.density:g} and scope {scope} nothing of A or of B is "
            f"kept in any of the {n_modules} modules, so the adapter would change nothing; "
            f"{advice}."
        )
    text = (
        f"{len(lost)} of {n_modules} modules change nothing any more, since nothing of their A or "
        f"B is kept (first: {lost[0]}); {advice}."
    )
    logger.warning("%s", text)
    return [text]


def _auto_scope(starts: Mapping[str, str]) -> str:
    random_start = any(s == "zeros" and _FACTOR.search(n) for n, s in starts.items() if _is_a(n))
    return "role" if random_start else "global"


def _is_a(name: str) -> bool:
    match = _FACTOR.search(name)
    return match is not None and match[1] == "A"


def _group_key(name: str, scope: str) -> str:
    if scope == "global":
        return "all"
    return name if scope == "tensor" else name.removesuffix(".weight").rpartition(".")[2]
