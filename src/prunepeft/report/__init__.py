"""Reports: figures, tables, one HTML page and a model card, from the JSON files of a run."""

from prunepeft.report.comparison_page import comparison_summary
from prunepeft.report.inspection import format_inspect, inspect_path
from prunepeft.report.tables import compact_summary
from prunepeft.report.write import write_report

__all__ = [
    "write_report",
    "compact_summary",
    "comparison_summary",
    "inspect_path",
    "format_inspect",
]
