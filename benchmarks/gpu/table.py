"""The tables of a GPU machine for docs/benchmarks.md."""

from pathlib import Path

from benchmarks.tables import read, section, table

HERE = Path(__file__).parent


def gpu_tables(here: Path = HERE) -> list[str]:
    """The section, empty without results of a GPU."""
    found = [read(file) for file in sorted((here / "results").glob("large-*-cuda.json"))]
    if not found:
        return []
    lines: list[str] = []
    for shape in sorted({r["shape"] for r in found}):
        cells = {r["net"]: r for r in found if r["shape"] == shape and "error" not in r}
        base = cells.get("peft")
        rows = [
            (
                net,
                f"{1000 * r['seconds']:.0f} ms",
                f"{r['seconds'] / base['seconds']:.2f}" if base else "-",
                f"{r['peak'] / 2**30:.1f} GiB",
                f"{r['peak'] / base['peak']:.2f}" if base else "-",
                f"{r['trainable']:,}",
            )
            for net, r in cells.items()
        ]
        first = next(r for r in found if r["shape"] == shape)
        lines += [f"### {shape}, {first['rows']} x {first['tokens']}, {first['device']}", ""]
        lines += table(("net", "step", "of peft", "peak", "of peft", "trainable"), rows)
    return [*section(here / "about.md", rank=found[0]["rank"]), *lines]
