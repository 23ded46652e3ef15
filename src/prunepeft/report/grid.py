"""The model as a grid: one row per layer of each stack, one column per kind of place."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from prunepeft.errors import CheckpointError
from prunepeft.report.record import Evidence
from prunepeft.space import BLOCKS, ROLES, Placement, Slot

MAX_ROWS = 512
MAX_COLUMNS = 64

Row = tuple[str, int]  # stack, layer
Column = tuple[str, str, str]  # block, roles, kind


@dataclass(frozen=True)
class Module:
    """One module that was kept, or one candidate (`n_params` unknown).

    Attributes:
        id: Slot id.
        row: Stack and layer.
        column: Block, tied roles, kind.
        size: Rank or width.
        n_params: Trainable parameters, if known.
        paths: Module paths it sits on.
    """

    id: str
    row: Row
    column: Column
    size: int
    n_params: int | None = None
    paths: tuple[str, ...] = ()

    @property
    def kind(self) -> str:
        return self.column[2]


@dataclass(frozen=True)
class Grid:
    """The layers and columns that occur, in order, and which slot is where."""

    rows: tuple[Row, ...]
    columns: tuple[Column, ...]
    where: Mapping[str, tuple[Row, Column]]

    @property
    def stacks(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(stack for stack, _ in self.rows))

    @property
    def kinds(self) -> tuple[str, ...]:
        return tuple(sorted({kind for _, _, kind in self.columns}))

    def layer_labels(self) -> list[str]:
        """Row names; with two stacks their first letter tells them apart."""
        if len(self.stacks) == 1:
            return [str(layer) for _, layer in self.rows]
        return [f"{stack[:1]}{layer}" for stack, layer in self.rows]


def split_id(slot_id: str) -> tuple[Row, Column]:
    """Row and column of a slot id.

    Raises:
        CheckpointError: if the text is not a slot id.
    Example:
        >>> split_id("encoder.3.attention.q+v:lora")
        (('encoder', 3), ('attention', 'q+v', 'lora'))
    """
    match = re.fullmatch(r"([^.:]+)\.(\d{1,9})\.([^.:]+)\.(.+):([^:]+)", slot_id, re.DOTALL)
    if match is None:
        raise CheckpointError(
            f"{plain(slot_id)!r} is not a slot id; ids look like encoder.3.attention.q+v:lora. "
            "The file was edited or damaged; run the search again."
        )
    stack, layer, block, roles, kind = match.groups()
    named = "+".join(_short_role(role, layer) for role in roles.split("+"))
    return (stack, int(layer)), (block, named, kind)


def place_of(slot: Slot) -> tuple[Row, Column]:
    """Row and column of a slot."""
    return split_id(slot.id)


def make_grid(modules: Iterable[Module], *placements: Placement | None) -> Grid:
    """The grid of all modules and all slots of these placements."""
    where = {module.id: (module.row, module.column) for module in modules}
    depth: dict[str, int] = {}
    for slot in (slot for placement in placements if placement for slot in placement):
        where[slot.id] = place_of(slot)
        depth[slot.sites[0].stack] = slot.sites[0].n_layers
    rows = {row for row, _ in where.values()}
    for stack, n_layers in depth.items():
        if n_layers <= MAX_ROWS:
            rows |= {(stack, layer) for layer in range(n_layers)}
    columns = sorted({column for _, column in where.values()}, key=_column_order)
    order = sorted(rows, key=lambda row: (row[0] != "encoder", row))
    return Grid(tuple(order[:MAX_ROWS]), tuple(columns[:MAX_COLUMNS]), where)


def modules_of(evidence: Evidence) -> tuple[Module, ...]:
    """The kept modules: those of the result, or those of the placement if the result lists none."""
    listed = evidence.result.placement.modules
    if listed:
        found = [
            Module(m.id, *split_id(m.id), size=m.size, n_params=m.n_params, paths=tuple(m.paths))
            for m in listed
        ]
    else:
        found = placed_modules(evidence.kept) if evidence.kept else []
    return tuple(sorted(found, key=_model_order))


def placed_modules(placement: Placement) -> list[Module]:
    """The modules of a placement; their parameters are not known without the kinds."""
    return [
        Module(slot.id, *place_of(slot), size=size, paths=tuple(site.path for site in slot.sites))
        for slot, size in placement.sizes.items()
    ]


def column_label(column: Column) -> str:
    """A column in one line.

    Example:
        >>> column_label(("attention", "q+v", "lora"))
        'q+v · lora'
    """
    text = f"{plain(column[1], 24)} · {plain(column[2], 18)}"
    return f"{plain(column[0], 18)} {text}" if column[0] == "cross_attention" else text


def plain(text: object, limit: int = 60) -> str:
    """Text that is safe in a terminal, a figure or a table cell: printable, one line, not long."""
    one_line = str(text)[: 4 * limit].replace("\n", " ").replace("\t", " ")
    shown = "".join(char if char.isprintable() else "?" for char in one_line)
    return shown if len(shown) <= limit else shown[: limit - 1] + "…"


def _short_role(role: str, layer: str) -> str:
    """A place named by its path: only what follows the layer number, equal in all layers."""
    parts = role.split(".")
    if layer not in parts:
        return role
    return ".".join(parts[parts.index(layer) + 1 :]) or role


def _model_order(module: Module) -> tuple[bool, Row, object]:
    return module.row[0] != "encoder", module.row, _column_order(module.column)


def _column_order(column: Column) -> tuple[int, str, list[int], str, str]:
    block, roles, kind = column
    rank = {role: index for index, role in enumerate(ROLES)}
    first = BLOCKS.index(block) if block in BLOCKS else len(BLOCKS)
    return first, block, [rank.get(role, len(ROLES)) for role in roles.split("+")], roles, kind
