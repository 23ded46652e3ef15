"""Where the trials of a search run: one after the other, in processes, or on Ray."""

from prunepeft.backends.base import Backend, Serial
from prunepeft.backends.choose import check_backend, make_backend

__all__ = ["Backend", "Serial", "check_backend", "make_backend"]
