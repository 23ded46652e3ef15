"""The table and the picture of scaling for docs/benchmarks.md."""

from pathlib import Path
from typing import Any

import yaml

from benchmarks.tables import read, section, table

HERE = Path(__file__).parent
FIGURE = HERE.parent.parent / "docs" / "figures" / "scaling.svg"


def scaling_tables(here: Path = HERE) -> list[str]:
    """The section, empty without results; draws the picture too."""
    suite = yaml.safe_load((here / "suite.yaml").read_text("utf-8"))
    found = {file.stem: read(file)["result"] for file in sorted((here / "results").glob("*.json"))}
    if not found:
        return []
    rows = []
    for name, r in found.items():
        sizes = list(r["points"])
        rows.append(
            (
                name.replace("-", ", "),
                f"{sizes[0]} to {sizes[-1]}",
                f"{r['points'][sizes[0]]['seconds']:.3f}",
                f"{r['points'][sizes[-1]]['seconds']:.3f}",
                f"{r['slope']:.2f}",
                f"{r['line']['r2']:.3f}",
            )
        )
    draw(found, FIGURE)
    heads = ("axis", "sizes", "seconds, first", "seconds, last", "slope", "R²")
    words = suite["base"] | {"repeats": suite["repeats"]}
    return [*section(here / "about.md", **words), *table(heads, rows)]


def draw(found: dict[str, dict[str, Any]], file: Path) -> None:
    """One line per axis and family, in panels by axis."""
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams["svg.hashsalt"] = "scaling"
    import matplotlib.pyplot as plt

    axes = list(dict.fromkeys(name.partition("-")[2] for name in found))
    figure, panels = plt.subplots(2, -(-len(axes) // 2), figsize=(9, 5.5), squeeze=False)
    for panel, axis in zip(panels.flat, axes, strict=False):
        for name in (n for n in found if n.partition("-")[2] == axis):
            r = found[name]
            x = [int(size) for size in r["points"]]
            y = [point["seconds"] for point in r["points"].values()]
            panel.plot(x, y, "o-", label=f"{name.partition('-')[0]}, slope {r['slope']:.2f}")
        panel.set(xscale="log", yscale="log", xlabel=axis, ylabel="seconds")
        panel.legend(fontsize=7)
    for panel in list(panels.flat)[len(axes) :]:
        panel.set_visible(False)
    figure.tight_layout()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, metadata={"Date": None})
    plt.close(figure)
