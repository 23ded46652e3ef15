"""What a run took from the frozen base model, as a table and as a sentence."""

from prunepeft.report.grid import plain
from prunepeft.report.record import BaseInfo
from prunepeft.report.render import Column, Table


def base_table(base: BaseInfo) -> Table:
    """Attention heads and feed-forward neurons kept in each layer."""
    columns = (
        Column("structure"),
        Column("unit"),
        Column("kept", "int"),
        Column("before", "int"),
    )
    rows = tuple(
        (group, unit, kept, before)
        for unit, found in (("head", base.heads), ("neuron", base.neurons))
        for group, (kept, before) in found.layers.items()
    )
    return Table("base", "Base model", columns, rows, base_sentence(base))


def base_sentence(base: BaseInfo | None) -> str:
    """What was taken from the base model; empty if it is whole."""
    if base is None or not base.n_params or not base.n_params_before:
        return ""
    parts = [
        f"{units.kept:,} of {units.before:,} {name}"
        for name, units in (("attention heads", base.heads), ("feed-forward neurons", base.neurons))
        if units.before
    ]
    return (
        f"The base model itself was made smaller (method {plain(base.method)}) and is in base/: "
        f"{' and '.join(parts)} are kept, {base.n_params:,} of {base.n_params_before:,} parameters."
    )
