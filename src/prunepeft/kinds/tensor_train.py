"""Tensor trains: a (p, q) matrix held as a chain of small cores.

The modes k_1..k_D are factors of p and then of q. Core j is (R_{j-1}, k_j, R_j), with R_0 = R_D = 1
and the train's rank at every bond between. Contracted over the bonds, the cores are a tensor
(k_1, ..., k_D), which read row by row is the matrix.

References:
    Oseledets, Tensor-train decomposition, 2011. LoRETTA, 2024, arXiv 2402.11417.
"""

import math
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import count, takewhile
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")

MAX_MODE = 16


@cache
def factor_modes(n: int) -> tuple[int, ...]:
    """Factors of n up to 16, ascending: as few as possible, then as even as possible.

    A prime above 16 stays whole.

    Example:
        >>> factor_modes(768), factor_modes(64), factor_modes(11008)
        ((8, 8, 12), (8, 8), (16, 16, 43))
    """
    if n <= MAX_MODE:
        return (n,)
    large = range(MAX_MODE + 1, math.isqrt(n) + 1)
    firsts = [f for f in range(2, MAX_MODE + 1) if n % f == 0]
    firsts = firsts or [next((f for f in large if n % f == 0), n)]
    if firsts == [n]:
        return (n,)
    found = (tuple(sorted((f, *factor_modes(n // f)))) for f in firsts)
    return min(found, key=lambda modes: (len(modes), sum(modes), modes))


def core_shapes(name: str, p: int, q: int, rank: int) -> dict[str, tuple[int, ...]]:
    """Core name (`name` and a number) -> shape, for a (p, q) matrix.

    The modes of q descend, so that the trains of (p, q) and (q, p) mirror each other and cost the
    same.

    Example:
        >>> core_shapes("A", 768, 8, 5)
        {'A0': (1, 8, 5), 'A1': (5, 8, 5), 'A2': (5, 12, 5), 'A3': (5, 8, 1)}
    """
    modes = (*factor_modes(p), *reversed(factor_modes(q)))
    ranks = (1, *[rank] * (len(modes) - 1), 1)
    return {f"{name}{j}": (ranks[j], k, ranks[j + 1]) for j, k in enumerate(modes)}


def train_of(tensors: Mapping[str, T], name: str) -> list[T]:
    """The cores of a train (or their shapes), first to last, out of all tensors of a module."""
    keys = takewhile(tensors.__contains__, (f"{name}{j}" for j in count()))
    return [tensors[key] for key in keys]


def draw_cores(
    shapes: Mapping[str, tuple[int, ...]],
    name: str,
    width: int,
    generator: torch.Generator,
    *,
    zero_last: bool = False,
) -> dict[str, Tensor]:
    """Random cores whose (p, q) matrix has entries of mean 0 and variance 1 / (p + q).

    Args:
        shapes: Shapes of all tensors of the module.
        name: Name of the train.
        width: One of p and q; the other follows from the shapes.
        generator: Source of the normal numbers.
        zero_last: Whether the last core is zero, and with it the matrix.
    """
    own = train_of(shapes, name)
    other = math.prod(shape[1] for shape in own) // width
    sigma = (width + other) ** -0.5
    cores = {}
    for j, shape in enumerate(own):
        std = sigma ** (1 / len(own)) / math.sqrt(shape[-1])
        cores[f"{name}{j}"] = torch.randn(shape, generator=generator) * std
    if zero_last:
        cores[f"{name}{len(own) - 1}"].zero_()
    return cores


def apply_train(x: Tensor, cores: Sequence[Tensor]) -> Tensor:
    """x M of (..., p) with the (p, q) matrix M of a train, (..., q), without building M.

    The input goes through the cores of p down to one vector of the bond between, and from there
    through the cores of q. All in float32 or wider, under autocast too: a product of many cores
    loses too much in half precision.
    """
    p = x.shape[-1]
    dtype = torch.promote_types(cores[0].dtype, torch.float32)
    n_first = len(factor_modes(p))
    with torch.autocast(x.device.type, enabled=False):
        h = x.to(dtype).reshape(-1, 1, p)
        for core in cores[:n_first]:  # (n, R, k * rest) -> (n, R', rest)
            n, r, width = h.shape
            k = core.shape[1]
            h = torch.einsum("nrkm,rks->nsm", h.reshape(n, r, k, width // k), core.to(dtype))
        h = h.transpose(1, 2)  # (n, 1, R)
        for core in cores[n_first:]:  # (n, done, R) -> (n, done * k, R')
            h = torch.einsum("nmr,rks->nmks", h, core.to(dtype)).flatten(1, 2)
    return h.reshape(*x.shape[:-1], h.shape[1])


def full_matrix(cores: Sequence[Tensor], p: int) -> Tensor:
    """The (p, q) matrix of a train."""
    whole = cores[0]
    for core in cores[1:]:
        whole = torch.tensordot(whole, core, dims=1)
    return whole.reshape(p, -1)


def bond_axes(axes: Mapping[str, tuple[int, ...]], name: str, tensor: Tensor) -> tuple[int, ...]:
    """Axes of a tensor that are inner bonds; both ends of a train, of length 1, are none.

    Args:
        axes: Name of a train -> axes of the bonds in each of its cores.
        name: Name of the tensor.
        tensor: A core, or anything else the module trains.
    """
    bonds = axes.get(name.rstrip("0123456789"), ())
    return tuple(axis for axis in bonds if tensor.shape[axis] > 1)
