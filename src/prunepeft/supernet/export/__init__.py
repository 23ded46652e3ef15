"""Saved adapters in the forms other tools read; every format is a line in `write`."""

from prunepeft.supernet.export.write import FORMATS, export_adapter, export_run

__all__ = ["FORMATS", "export_adapter", "export_run"]
