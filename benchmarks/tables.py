"""What the tables of docs/benchmarks.md are made of."""

import json
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any


def read(file: Path) -> dict[str, Any]:
    """Content of a result file."""
    return json.loads(file.read_text("utf-8"))


def result(file: Path) -> dict[str, Any] | None:
    """The result in a file of the harness; None if there is no such file."""
    return read(file)["result"] if file.is_file() else None


def table(heads: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    """Lines of a table, with an empty one behind it."""
    return [
        f"| {' | '.join(heads)} |",
        "|" + "---|" * len(heads),
        *(f"| {' | '.join(map(str, row))} |" for row in rows),
        "",
    ]


def section(about: Path, **words: Any) -> list[str]:
    """The text above the tables of a suite, its braces filled."""
    text = about.read_text("utf-8").rstrip()
    return ["", text.format(**words) if words else text, ""]


def spread(values: Sequence[float], digits: int = 4) -> str:
    """Mean and standard deviation."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.{digits}f} ± {deviation:.{digits}f}"


def gap(values: dict[int, float], base: dict[int, float]) -> str:
    """Difference to another method, paired by seed."""
    gaps = [values[seed] - base[seed] for seed in sorted(values.keys() & base.keys())]
    if not gaps:
        return "-"
    deviation = statistics.stdev(gaps) if len(gaps) > 1 else 0.0
    return f"{statistics.mean(gaps):+.4f} ± {deviation:.4f}"


def quartiles(values: Sequence[float]) -> str:
    """The first and the third of three."""
    return f"{values[0]:.3f} to {values[2]:.3f}"
