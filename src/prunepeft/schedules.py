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


def _checked(progress: float) -> float:
    is_number = isinstance(progress, int | float) and not isinstance(progress, bool)
    if not is_number or not 0.0 <= progress <= 1.0:
        raise ConfigError(
            f"progress must be a number in [0, 1]; got {progress!r}. "
            "Pass the rounds done divided by the rounds in all."
        )
    return float(progress)
