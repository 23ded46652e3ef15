"""A table of plain values, and its text, Markdown and CSV forms."""

import csv
import io
import math
import re
from dataclasses import dataclass, replace

from prunepeft.report.grid import plain

Value = str | int | float | None
MISSING = "–"
_FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r")
_MARKDOWN = re.compile(r"([\\`*_{}\[\]<>#|~$&!])")


@dataclass(frozen=True)
class Column:
    """One column.

    Attributes:
        name: Heading.
        form: How a value is shown: `text`, `int`, `plain`, `score` (4 digits),
            `significant` (3 significant digits), `ratio`, `seconds` or `bytes`.
    """

    name: str
    form: str = "text"

    @property
    def is_number(self) -> bool:
        return self.form != "text"


@dataclass(frozen=True)
class Table:
    """Rows of values under columns.

    Attributes:
        name: File stem of the CSV form.
        title: Heading for people.
        columns: One per value of a row.
        rows: The values; None where something is not known.
        note: One sentence under the table, or empty.
    """

    name: str
    title: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Value, ...], ...]
    note: str = ""

    def select(self, *names: str) -> "Table":
        """The same rows with these columns only."""
        at = [i for i, column in enumerate(self.columns) if column.name in names]
        rows = tuple(tuple(row[i] for i in at) for row in self.rows)
        return replace(self, columns=tuple(self.columns[i] for i in at), rows=rows)

    def shown(self) -> list[list[str]]:
        """The rows as display text."""
        return [
            [show(value, column.form) for column, value in zip(self.columns, row, strict=True)]
            for row in self.rows
        ]


def show(value: Value, form: str = "text") -> str:
    """Write one value for people.

    Example:
        >>> show(221184, "int"), show(0.91, "score"), show(75.2, "seconds"), show(None)
        ('221,184', '0.9100', '1 min 15 s', '–')
    """
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return MISSING if value is None else str(value)
    if form == "text" or isinstance(value, str):
        return plain(value, 200)
    if form == "int":
        return f"{value:,.0f}"
    if form in ("plain", "significant"):
        return f"{value:.3g}" if form == "significant" else f"{value:g}"
    if form == "score":
        return f"{value:.4f}" if abs(value) < 1000 else f"{value:,.1f}"
    if form == "ratio":
        return f"{value:.2f}×"
    return _show_bytes(value) if form == "bytes" else _show_seconds(value)


def to_text(table: Table) -> str:
    """Aligned plain text for a terminal."""
    heads, body = [column.name for column in table.columns], table.shown()
    widths = [max(len(row[i]) for row in [heads, *body]) for i in range(len(heads))]
    lines = [
        "  ".join(
            cell.rjust(width) if column.is_number else cell.ljust(width)
            for cell, width, column in zip(row, widths, table.columns, strict=True)
        ).rstrip()
        for row in [heads, *body]
    ]
    return "\n".join(lines)


def to_markdown(table: Table) -> str:
    """GitHub-flavoured Markdown; cells are escaped."""
    rules = ["---:" if column.is_number else "---" for column in table.columns]
    heads = [escape_markdown(column.name) for column in table.columns]
    body = [[escape_markdown(cell) for cell in row] for row in table.shown()]
    return "\n".join("| " + " | ".join(row) + " |" for row in [heads, rules, *body])


def to_csv(table: Table) -> str:
    """CSV with raw values; text that a spreadsheet would run as a formula is quoted by '."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    units = {"seconds": " (seconds)", "bytes": " (bytes)"}
    writer.writerow([_csv_cell(c.name + units.get(c.form, "")) for c in table.columns])
    writer.writerows([[_csv_cell(value) for value in row] for row in table.rows])
    return out.getvalue()


def escape_markdown(text: object) -> str:
    """Text that Markdown shows as it is: no markup, no HTML, no line breaks."""
    return _MARKDOWN.sub(r"\\\1", plain(text, 400)).replace("\\<", "&lt;").replace("\\&", "&amp;")


def _csv_cell(value: Value) -> Value:
    if value is None:
        return ""
    if isinstance(value, str):
        text = plain(value, 2000)
        return "'" + text if text.startswith(_FORMULA_STARTS) else text
    return value


def _show_seconds(value: float) -> str:
    if value < 60:
        return f"{value:.1f} s"
    minutes, seconds = divmod(round(value), 60)
    if minutes < 60:
        return f"{minutes} min {seconds} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min"


def _show_bytes(value: float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= size:
            return f"{value / size:.1f} {unit}"
    return f"{value:.0f} B"
