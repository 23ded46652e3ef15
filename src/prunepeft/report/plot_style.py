"""How figures look and how they become bytes that are the same for the same evidence."""

import io
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

INK, MUTED, LINE, PAPER = "#1f2328", "#636c76", "#d1d9e0", "#fefefe"
_WHITE = "#ffffff"
_GAP = 0.25  # between groups of rows or columns of a map, in cells
_THEME = {INK: "var(--ink)", MUTED: "var(--muted)", LINE: "var(--line)", PAPER: "var(--paper)"}

# Okabe and Ito's palette: told apart with any common colour vision.
PALETTE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#7F7F7F", "#B8A900")
_KIND_COLOURS = {
    "lora": PALETTE[0],
    "serial_adapter": PALETTE[1],
    "parallel_adapter": PALETTE[2],
    "dora": PALETTE[5],
    "ia3": PALETTE[3],
}
_STYLE = {
    "axes.axisbelow": True,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.labelsize": 9,
    "axes.linewidth": 0.7,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "hatch.linewidth": 0.6,
    "legend.fontsize": 8.5,
    "legend.frameon": False,
    "svg.fonttype": "path",
    "svg.hashsalt": "prunepeft",
    "text.color": INK,
    "text.parse_math": False,
    "text.usetex": False,
    "xtick.color": MUTED,
    "xtick.labelcolor": INK,
    "xtick.labelsize": 8.5,
    "ytick.color": MUTED,
    "ytick.labelcolor": INK,
    "ytick.labelsize": 8.5,
}


def styled() -> AbstractContextManager[None]:
    """The context in which figures are drawn and saved; the caller's settings are untouched."""
    return matplotlib.rc_context({**matplotlib.rcParamsDefault, **_STYLE, "backend": "Agg"})


def kind_colour(kind: str, kinds: tuple[str, ...]) -> str:
    """A fixed colour for the known kinds, the next free one for others."""
    if kind in _KIND_COLOURS:
        return _KIND_COLOURS[kind]
    free = [c for c in PALETTE if c not in _KIND_COLOURS.values()]
    others = [k for k in kinds if k not in _KIND_COLOURS]
    return free[others.index(kind) % len(free)]


def tint(colour: str, strength: float) -> tuple[float, float, float]:
    """The colour mixed with white: strength 1 is the colour, 0 is white."""
    red, green, blue = (1 - strength * (1 - part) for part in to_rgb(colour))
    return red, green, blue


def text_on(colour: tuple[float, float, float]) -> str:
    """Black or white, whichever reads better on the colour (relative luminance)."""
    red, green, blue = colour
    return "#111111" if 0.299 * red + 0.587 * green + 0.114 * blue > 0.55 else "#ffffff"


def axes_at(figure: Figure, left: float, bottom: float, width: float, height: float) -> Axes:
    """Axes at a position given in inches."""
    total_width, total_height = figure.get_size_inches()
    return figure.add_axes(
        (left / total_width, bottom / total_height, width / total_width, height / total_height)
    )


def clear(axes: Axes, x: tuple[float, float], y: tuple[float, float]) -> None:
    """Axes of a map: limits, no frame, no tick marks."""
    axes.set_xlim(*x)
    axes.set_ylim(*y)
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)


def spread(groups: Sequence[object]) -> list[float]:
    """Positions 0, 1, ... with a gap wherever the group changes.

    Example:
        >>> spread(["a", "a", "b"])
        [0.0, 1.0, 2.25]
    """
    places, offset = [], 0.0
    for i, group in enumerate(groups):
        offset += _GAP if i and group != groups[i - 1] else 0.0
        places.append(i + offset)
    return places


def svg_bytes(figure: Figure) -> bytes:
    """The figure as SVG on white, without dates or random ids."""
    figure.set_facecolor(_WHITE)
    out = io.BytesIO()
    with _quiet():
        FigureCanvasSVG(figure).print_svg(out, metadata={"Date": None})
    return out.getvalue()


def png_bytes(figure: Figure, dpi: int = 150) -> bytes:
    """The figure as PNG on white."""
    figure.set_facecolor(_WHITE)
    figure.set_dpi(dpi)
    out = io.BytesIO()
    with _quiet():
        FigureCanvasAgg(figure).print_png(out, metadata={"Software": None})
    return out.getvalue()


def inline_svg(svg: bytes, name: str, label: str) -> str:
    """An SVG file as an element of a page: colours follow the page, ids are its own.

    Args:
        svg: What `svg_bytes` returned.
        name: Prefix of all ids, unique in the page; letters, digits and `_`.
        label: Text for screen readers, without markup.
    """
    text = svg.decode("utf-8")
    text = text[text.index("<svg") :].replace(f"fill: {_WHITE}", "fill: none", 1)
    text = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r'\bid="([^"]*)"', rf'id="{name}-\1"', text)
    text = re.sub(r'((?:xlink:)?href)="#([^"]*)"', rf'\1="#{name}-\2"', text)
    text = re.sub(r"url\(#([^)]*)\)", rf"url(#{name}-\1)", text)
    for colour, variable in _THEME.items():
        text = text.replace(colour, variable)
    safe = re.sub(r"[^\w ,.:;()/%-]", " ", label)
    return text.replace("<svg ", f'<svg role="img" aria-label="{safe}" ', 1).strip()


@contextmanager
def _quiet() -> Iterator[None]:
    """Names in scripts the bundled font lacks are drawn as boxes; that is no reason to warn."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        yield
