"""Rough sizes that `check` tells before anything is loaded."""

import math
from collections.abc import Sequence

from prunepeft.config import RunConfig
from prunepeft.space import Site


def estimate_memory(config: RunConfig, sites: Sequence[Site], n_base: int, supernet: int) -> int:
    """Peak bytes of training: weights, modules with Adam (16 bytes each) and activations."""
    width = 2 if config.precision == "bf16" else 4
    layers = len({(s.stack, s.layer) for s in sites})
    hidden = max((s.d_out for s in sites if s.role in ("o", "down", "other")), default=0)
    wide = sum(s.d_out for s in sites)
    length = config.train.max_length or 128
    rows = math.ceil(config.train.batch_size / config.train.gradient_accumulation)
    per_token = (2 * wide + 8 * hidden * layers) * width
    if config.train.gradient_checkpointing:
        per_token //= max(1, layers)
    return n_base * width + supernet * 16 + rows * length * per_token


def estimate_disk(config: RunConfig, limit: int, supernet: int) -> int:
    """Bytes of the run folder: training state, kept weights, adapter and an export.

    Args:
        config: The settings.
        limit: The budget in parameters; 0 without one.
        supernet: Trainable parameters of all candidates.
    """
    kept = supernet if config.arch or not limit else min(limit, supernet)
    rounds = config.search.rounds if config.search.reinit == "keep" else 0
    return 4 * (kept * 8 + supernet * rounds) + 5_000_000
