"""Seeds and the order of rows: which rows are in which micro-batch of an epoch."""

import hashlib
import itertools
from collections.abc import Sequence

import torch

MEGABATCH = 50


def derive_seed(*parts: object) -> int:
    """A 31-bit seed from these parts, the same on every machine."""
    digest = hashlib.sha256(":".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:4]) >> 1


def batch_indices(lengths: Sequence[int], batch: int, pieces: int, seed: int) -> list[list[int]]:
    """Micro-batches of one epoch: shuffled, like lengths together, the last part batch dropped.

    Args:
        lengths: Tokens of each row, (n,).
        batch: Rows of one optimiser step.
        pieces: Micro-batches one step is cut into (accumulation times processes).
        seed: Order.
    Returns:
        Lists of row indices, `pieces` consecutive lists to a step. Fewer rows than a batch are
        one step.
    """
    order = torch.randperm(len(lengths), generator=torch.Generator().manual_seed(seed)).tolist()
    size = min(batch, len(order))
    span = size * MEGABATCH
    grouped: list[int] = []
    for start in range(0, len(order), span):
        grouped += sorted(order[start : start + span], key=lambda i: -lengths[i])
    steps = [grouped[i : i + size] for i in range(0, len(grouped) - size + 1, size)]
    shuffle = torch.randperm(len(steps), generator=torch.Generator().manual_seed(seed + 1)).tolist()
    cuts = [size * p // pieces for p in range(pieces + 1)]
    spans = [(a, b) for a, b in itertools.pairwise(cuts) if b > a]
    return [steps[i][a:b] for i in shuffle for a, b in spans]


def n_steps(rows: int, batch: int) -> int:
    """Optimiser steps of one epoch."""
    return max(1, rows // batch)
