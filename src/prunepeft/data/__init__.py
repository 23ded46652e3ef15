"""Data sets: read from files, a folder or the hub, checked, split and named by role."""

from prunepeft.data.load import load_data, load_rows
from prunepeft.data.splits import Splits, fingerprint, subset

__all__ = ["Splits", "fingerprint", "load_data", "load_rows", "subset"]
