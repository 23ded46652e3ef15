"""One registry class for kinds, criteria, strategies, tasks and metrics."""

import difflib
from collections.abc import Iterator
from importlib.metadata import entry_points
from typing import Generic, TypeVar

from prunepeft.errors import ConfigError, UnknownNameError

T = TypeVar("T")


class Registry(Generic[T]):
    """Names to objects, filled by explicit `register` lines.

    A third party adds its own through an entry point group (for example `prunepeft.kinds`), which
    is read the first time a name is missed.

    Args:
        label: What an entry is called in messages.
        group: Entry point group; default: `prunepeft.<label>s`.
    """

    def __init__(self, label: str, group: str = "") -> None:
        self.label = label
        self.group = group or f"prunepeft.{label}s"
        self._items: dict[str, T] = {}
        self._entry_points_read = False

    def register(self, name: str, item: T) -> T:
        """Add `item` under `name`. Raises ConfigError if the name is taken or not lower case."""
        if name != name.lower() or not name:
            raise ConfigError(f"{self.label} name {name!r} must be lower case and not empty.")
        if name in self._items:
            raise ConfigError(f"{self.label} {name!r} is registered already; choose another name.")
        self._items[name] = item
        return item

    def get(self, name: str) -> T:
        """Return the item. Raises UnknownNameError that lists the known names and the closest."""
        if name not in self._items:
            self._read_entry_points()
        if name not in self._items:
            raise UnknownNameError(unknown_name(self.label, name, self.names()))
        return self._items[name]

    def names(self) -> tuple[str, ...]:
        """All names in the order of registration."""
        self._read_entry_points()
        return tuple(self._items)

    def __contains__(self, name: str) -> bool:
        return name in self._items

    def __iter__(self) -> Iterator[tuple[str, T]]:
        self._read_entry_points()
        return iter(self._items.items())

    def _read_entry_points(self) -> None:
        if self._entry_points_read:
            return
        self._entry_points_read = True
        for point in entry_points(group=self.group):
            if point.name not in self._items:
                self._items[point.name] = point.load()


def unknown_name(label: str, name: str, known: tuple[str, ...] | list[str]) -> str:
    """Message for a name that is not known, with the closest known one as a suggestion.

    Example:
        >>> unknown_name("kind", "lorra", ("lora", "dora"))
        "unknown kind 'lorra'; did you mean 'lora'? Known: lora, dora."
    """
    close = difflib.get_close_matches(str(name), list(known), n=1)
    hint = f"; did you mean {close[0]!r}?" if close else "."
    return f"unknown {label} {name!r}{hint} Known: {', '.join(known)}."
