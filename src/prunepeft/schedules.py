"""Pruning schedules: progress of the search in [0, 1] -> share of the pruning done by then."""

from prunepeft.errors import ConfigError


def linear(progress: float) -> float:
    """Return the share done when every round prunes equally much.

    f(p) = p

    Args:
        progress: Rounds done over rounds in all, in [0, 1].
    Returns:
        Share of the pruning done, in [0, 1].
    Raises:
        ConfigError: if progress is outside [0, 1].
    Example:
        >>> linear(0.25)
        0.25
    """
    return _checked(progress)


def cubic(progress: float) -> float:
    """Return the share done when early rounds prune most and late rounds refine.

    f(p) = 1 - (1 - p)^3

    Args:
        progress: Rounds done over rounds in all, in [0, 1].
    Returns:
        Share of the pruning done, in [0, 1].
    Raises:
        ConfigError: if progress is outside [0, 1].
    Example:
        >>> [cubic(p) for p in (0.0, 0.5, 1.0)]
        [0.0, 0.875, 1.0]

    References:
        To prune, or not to prune, 2017, arXiv 1710.01878, eq. 1.
    """
    return 1.0 - (1.0 - _checked(progress)) ** 3


def held_cubic(progress: float, warmup: float = 0.1, cooldown: float = 0.1) -> float:
    """Return the share done by a cubic schedule that waits at first and is done before the end.

    f(p) = 0 up to the warm-up w, 1 from 1 - c on, between them cubic((p - w) / (1 - w - c))

    Args:
        progress: Optimiser steps done over steps in all, in [0, 1].
        warmup: Share of the steps before the first pruning, w.
        cooldown: Share of the steps after the last pruning, c.
    Returns:
        Share of the pruning done, in [0, 1].
    Raises:
        ConfigError: if progress is outside [0, 1], or warm-up and cool-down leave no step.
    Example:
        >>> [held_cubic(p) for p in (0.1, 0.5, 0.9)]
        [0.0, 0.875, 1.0]

    References:
        LoRAPrune, 2024, arXiv 2305.18403.
    """
    p = _checked(progress)
    if not (0.0 <= warmup and 0.0 <= cooldown and warmup + cooldown < 1.0):
        raise ConfigError(
            f"warmup and cooldown must be shares of the steps with a sum below 1; got {warmup!r} "
            f"and {cooldown!r}. Use 0.1 and 0.1."
        )
    if p <= warmup:
        return 0.0
    return 1.0 if p >= 1.0 - cooldown else cubic((p - warmup) / (1.0 - warmup - cooldown))


def _checked(progress: float) -> float:
    is_number = isinstance(progress, int | float) and not isinstance(progress, bool)
    if not is_number or not 0.0 <= progress <= 1.0:
        raise ConfigError(
            f"progress must be a number in [0, 1]; got {progress!r}. "
            "Pass the rounds done divided by the rounds in all."
        )
    return float(progress)
