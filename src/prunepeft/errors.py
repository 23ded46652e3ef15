"""Every error a user can cause: what was received, what is allowed, what to do next."""


class PrunePeftError(Exception):
    """Base of all errors raised on purpose; the command line prints it as one paragraph.

    `exit_code` is what the command line returns for it.
    """

    exit_code = 2


class ConfigError(PrunePeftError, ValueError):
    """A setting, flag or argument has a value that is not allowed."""


class UnknownNameError(PrunePeftError, LookupError):
    """A name is not in a registry; the message lists the known ones and the closest."""


class SiteError(PrunePeftError, LookupError):
    """The model has no place that can carry the module asked for."""


class MissingExtraError(PrunePeftError, ImportError):
    """An optional dependency is needed; the message holds the install line."""


class StateError(PrunePeftError, RuntimeError):
    """A run folder or a model is not in the state the call needs."""


class DataError(PrunePeftError, ValueError):
    """A data file or data set cannot be used."""

    exit_code = 3


class CheckpointError(PrunePeftError, ValueError):
    """A saved file is damaged, hostile or does not fit the model."""

    exit_code = 3


class BudgetError(PrunePeftError, ValueError):
    """The budget cannot be met or cannot be understood."""

    exit_code = 4


class OutOfMemoryError(PrunePeftError, MemoryError):
    """Memory ran out even at the smallest batch that was tried."""

    exit_code = 5


class DiskError(PrunePeftError, OSError):
    """A write failed; the last good state is kept."""

    exit_code = 6


class LockedError(PrunePeftError, RuntimeError):
    """Another process works in this run folder."""

    exit_code = 7
