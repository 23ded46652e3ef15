"""Small data files for tests of loading."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


def jsonl(rows: Sequence[Any]) -> str:
    """One JSON value a line."""
    return "".join(json.dumps(row) + "\n" for row in rows)


def labelled(n: int = 20, labels: Sequence[Any] = ("no", "yes")) -> list[dict[str, Any]]:
    """Rows with distinct texts and the labels in turn."""
    return [{"text": f"row {i}", "label": labels[i % len(labels)]} for i in range(n)]


CSV = "text,label\n" + "".join(f'"a, {i}",{i % 2}\n' for i in range(10))
GOOD = jsonl(labelled())


def writer(folder: Path) -> Callable[[str, str | bytes], str]:
    """A function that writes a file into a folder and returns its path."""

    def write(name: str, content: str | bytes) -> str:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    return write
