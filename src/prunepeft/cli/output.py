"""What commands print: rich tables on a terminal, plain aligned text elsewhere, or JSON alone."""

import contextlib
import json
import logging
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Row = Sequence[Any]


def is_main_process() -> bool:
    """Whether this process speaks for the others of a distributed run."""
    return int(os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")) or 0) == 0


@dataclass(frozen=True)
class Output:
    """Where and how a command speaks.

    Attributes:
        json_out: Print one JSON document on stdout and nothing else there.
        verbosity: -1 quiet, 0 normal, 1 more, 2 everything.
    """

    json_out: bool = False
    verbosity: int = 0

    @property
    def speaks(self) -> bool:
        """Whether text for people goes to stdout."""
        return is_main_process() and not self.json_out and self.verbosity >= 0

    @contextlib.contextmanager
    def work(self) -> Iterator[None]:
        """Set up logging; while it lasts, stray prints of libraries go to stderr."""
        _set_up_logging(self.verbosity)
        with contextlib.redirect_stdout(sys.stderr):
            yield

    def document(self, value: Any) -> bool:
        """Print `value` if JSON was asked for; return whether it was."""
        if self.json_out and is_main_process():
            print(json.dumps(value, indent=2, default=str), flush=True)
        return self.json_out

    def line(self, text: str = "") -> None:
        """Print one line of text."""
        if self.speaks:
            print(text, flush=True)

    def table(self, title: str, header: Sequence[str], rows: Sequence[Row]) -> None:
        """Print a table."""
        if not self.speaks:
            return
        cells = [[format_value(cell) for cell in row] for row in rows]
        if sys.stdout.isatty():
            _rich_table(title, header, cells)
        else:
            print(plain_table(title, header, cells), flush=True)

    def mapping(self, title: str, values: Mapping[str, Any]) -> None:
        """Print nested values: scalars as one table, groups and lists of groups as their own."""
        scalars = [(k, v) for k, v in values.items() if not _is_nested(v)]
        if scalars:
            self.table(title, ("", ""), scalars)
        for key, value in values.items():
            name = f"{title}: {key}" if title else key
            if isinstance(value, Mapping) and value:
                self.mapping(name, value)
            elif _is_nested(value):
                header = list(dict.fromkeys(k for row in value for k in row))
                self.table(name, header, [[row.get(k) for k in header] for row in value])


def plain_table(title: str, header: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    """An aligned table without frames.

    Example:
        >>> print(plain_table("t", ("name", "n"), [["lora", "12"]]))
        t
          name  n
          lora  12
    """
    rows = [list(header), *map(list, cells)] if any(header) else [list(c) for c in cells]
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))] if rows else []
    lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in rows]
    return "\n".join([*([title] if title else []), *(f"  {line}".rstrip() for line in lines)])


def format_value(value: Any) -> str:
    """A cell's text: thousands separated, floats to four digits, lists with commas.

    Example:
        >>> [format_value(v) for v in (1234567, 0.123456, None, True, ["a", 1])]
        ['1,234,567', '0.1235', '-', 'yes', 'a, 1']
    """
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:.4g}"
    if isinstance(value, list | tuple):
        return ", ".join(format_value(item) for item in value)
    return str(value)


def _is_nested(value: Any) -> bool:
    if isinstance(value, Mapping):
        return bool(value)
    is_list = isinstance(value, list | tuple) and bool(value)
    return is_list and all(isinstance(item, Mapping) for item in value)


def _rich_table(title: str, header: Sequence[str], cells: Sequence[Sequence[str]]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", show_header=any(header))
    for name in header:
        table.add_column(name, overflow="fold")
    for row in cells:
        table.add_row(*(Text(cell) for cell in row))
    Console().print(table)


def _set_up_logging(verbosity: int) -> None:
    level = {-1: logging.ERROR, 0: logging.INFO}.get(verbosity, logging.DEBUG)
    if not is_main_process():
        level = logging.ERROR
    own = logging.getLogger("prunepeft")
    own.setLevel(level)
    if not any(getattr(handler, "is_cli", False) for handler in own.handlers):
        handler = logging.StreamHandler()
        handler.is_cli = True  # type: ignore[attr-defined]
        handler.setFormatter(logging.Formatter("%(levelname).1s %(message)s"))
        own.addHandler(handler)
        own.propagate = False
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "info" if verbosity > 1 else "error")
    if verbosity < 1:
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
