"""The rows of one split, as every source gives them."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Table:
    """Rows of one split and where each came from.

    Args:
        rows: One mapping from column to value per row; all rows have the same keys.
        places: (file, "line" or "row", number) of each row, for messages.
        untyped: True if every value is a string because the format has no types (CSV, TSV).
        label_names: Class names that came with the data, by integer label.
        running: True if the rows are lines of running text, whose order means something.
    """

    rows: list[dict[str, Any]]
    places: list[tuple[str, str, int]]
    untyped: bool = False
    label_names: tuple[str, ...] | None = None
    running: bool = False

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the columns, in the order of the file."""
        return tuple(self.rows[0]) if self.rows else ()

    def where(self, index: int) -> str:
        """Place of a row as text, such as `train.csv, line 17`."""
        file, unit, number = self.places[index]
        return f"{file}, {unit} {number}"
