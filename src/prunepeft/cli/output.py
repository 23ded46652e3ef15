"""What commands print: rich tables on a terminal, plain aligned text elsewhere, or JSON alone."""

import contextlib
import json
import logging
import os
import sys
import warnings
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
    def work(self, *, chatty: bool = False) -> Iterator[None]:
        """While it lasts, log to stderr and send stray prints of libraries there, too.

        Args:
            chatty: Show what is going on without being asked (long commands).
        """
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "info" if self.verbosity > 1 else "error")
        if self.verbosity < 1:
            os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
        with (
            _logging_to_stderr(self._level(chatty)),
            contextlib.redirect_stdout(sys.stderr),
            warnings.catch_warnings(),
        ):
            if self.verbosity < 1:  # libraries warn about themselves; ours are log records
                warnings.simplefilter("ignore")
                logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
            yield

    def _level(self, chatty: bool) -> int:
        if self.verbosity < 0 or not is_main_process():
            return logging.ERROR
        steps = (logging.WARNING, logging.INFO, logging.DEBUG)
        return steps[min(self.verbosity + chatty, 2)]

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
        >>> [format_value(v) for v in (1234567, 0.123456, None, True, ["a", 1], {"id": "q:lora"})]
        ['1,234,567', '0.1235', '-', 'yes', 'a, 1', 'q:lora']
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
    if isinstance(value, Mapping):
        named = value.get("id", value.get("name"))
        return str(named) if named else ", ".join(f"{k} {format_value(value[k])}" for k in value)
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


@contextlib.contextmanager
def _logging_to_stderr(level: int) -> Iterator[None]:
    own = logging.getLogger("prunepeft")
    before, handler = own.level, logging.StreamHandler()
    handler.setLevel(level)
    handler.setFormatter(logging.Formatter("%(levelname).1s %(message)s"))
    own.setLevel(min(level, logging.INFO))
    own.addHandler(handler)
    try:
        yield
    finally:
        own.removeHandler(handler)
        own.setLevel(before)
