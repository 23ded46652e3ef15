"""Seeds and the order of rows: which rows are in which micro-batch of an epoch."""

import hashlib
import itertools
from collections.abc import Sequence

import torch

MEGABATCH = 50
MAX_WASTE = 0.05  # of the tokens of a batch of an evaluation
PASS_COST = 64  # tokens; what a forward pass costs beside those that go through it


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


def judged_batches(lengths: Sequence[int], most: int, processes: int = 1) -> list[list[int]]:
    """Batches of an evaluation: all rows by length, a new batch where padding would be too much.

    Args:
        lengths: Tokens of each row, (n,).
        most: Rows of a batch at most.
        processes: How many share the work. Several get `most` rows each, in the order given.
    Returns:
        Lists of row indices; for one process at most 5% of the tokens of each is padding, or 64
        where that is more.
    Example:
        >>> judged_batches([90, 3, 3, 90, 90], 2)
        [[1, 2], [0, 3], [4]]
    """
    if processes > 1:
        return [list(range(len(lengths))[i : i + most]) for i in range(0, len(lengths), most)]
    batches: list[list[int]] = []
    real = 0
    for row in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        n = len(batches[-1]) + 1 if batches else most + 1
        tokens = n * lengths[row]
        padding = tokens - real - lengths[row]
        if n > most or padding > max(MAX_WASTE * tokens, PASS_COST):
            batches.append([])
            real = 0
        batches[-1].append(row)
        real += lengths[row]
    return batches


def n_steps(rows: int, batch: int) -> int:
    """Optimiser steps of one epoch."""
    return max(1, rows // batch)
