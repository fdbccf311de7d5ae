"""How the plots of a report are drawn: as SVG text that takes its colours from the page, for light, dark and print.

Matplotlib is driven through its objects, never through pyplot: no window, no global state. It draws in marker colours
which are then exchanged for CSS variables (`--ink`, `--faint`, `--series-0` ...).
"""

import io
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any
from xml.sax.saxutils import quoteattr

from chimera_cli.reporting.document import clean

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, SOFT, FAINT, LIMIT = "#010203", "#506070", "#a0b0c0", "#d00d0d"
SERIES = tuple(f"#f0e0d{index}" for index in range(6))
VARIABLES = {INK: "--ink", SOFT: "--soft", FAINT: "--faint", LIMIT: "--limit"} | {
    color: f"--series-{index}" for index, color in enumerate(SERIES)
}
# A phone shows a figure 320 CSS pixels wide: at this width 9.5 points are 10.5 pixels there, 14 beside another plot.
WIDTH_IN, HEIGHT_IN = 4.2, 2.7
TEXT_PT = 9.5
_POINTS = 400  # a curve on a page this wide shows no more

Points = Sequence[tuple[float, float]]


def series(index: int) -> str:
    """Return the colour of a series; they repeat after six."""
    return SERIES[index % len(SERIES)]


def column(rows: Sequence[Mapping[str, Any]], x: str, y: str, scale: float = 1.0) -> list[tuple[float, float]]:
    """Return (x, scale * y) of the rows that have both."""
    return [(float(row[x]), scale * float(row[y])) for row in rows if row.get(x) is not None and row.get(y) is not None]


def thin(points: Points) -> list[tuple[float, float]]:
    """Return what a plot can show of the points; the last one is kept."""
    every = max(1, len(points) // _POINTS)
    kept = list(points[::every])
    return kept if not kept or kept[-1] == points[-1] else [*kept, points[-1]]


def canvas(x_label: str, y_label: str, height_in: float = HEIGHT_IN) -> tuple["Figure", "Axes"]:
    """Return an empty figure with one pair of axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH_IN, height_in), layout="constrained")
    axes = figure.subplots()
    axes.set_facecolor("none")
    axes.set_xlabel(x_label, fontsize=TEXT_PT, color=INK)
    axes.set_ylabel(y_label, fontsize=TEXT_PT, color=INK)
    axes.tick_params(labelsize=TEXT_PT, color=FAINT, labelcolor=INK)
    axes.grid(visible=True, color=FAINT, linewidth=0.5)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(FAINT)
    return figure, axes


def line(axes: "Axes", points: Points, color: str, label: str = "", width: float = 1.5, layer: int = 2) -> None:
    """Draw a curve, over those of lower layers; one without a label stays out of the legend."""
    shown = thin(points)
    xs, ys = [x for x, _ in shown], [y for _, y in shown]
    axes.plot(xs, ys, color=color, linewidth=width, label=label or "_", zorder=layer)


def limit_line(axes: "Axes", level: float, label: str) -> None:
    """Draw a limit across the axes and make room for it; the legend names it."""
    axes.axhline(level, color=LIMIT, linewidth=1.4, linestyle=(0, (4, 2)), label=label)


def from_zero(axes: "Axes", highest: float) -> None:
    """Let the vertical axis begin at 0 and leave a little air above the highest thing drawn."""
    axes.set_ylim(0, 1.08 * highest if highest > 0 else 1)


def legend(figure: "Figure", axes: "Axes", last: str = "") -> None:
    """Name the labelled things above the axes, where they hide no data; the one called `last` comes last."""
    named = sorted(zip(*axes.get_legend_handles_labels(), strict=True), key=lambda pair: bool(pair[1] == last))
    if not named:
        return
    longest = max(len(label) for _, label in named)
    columns = min(len(named), 3 if longest <= 20 else 2)
    # Matplotlib fills column by column; people read line by line.
    named = [named[place] for first in range(columns) for place in range(first, len(named), columns)]
    handles, labels = [handle for handle, _ in named], [label for _, label in named]
    figure.legend(
        handles, labels, loc="outside upper left", ncols=columns, frameon=False, fontsize=TEXT_PT - 0.5, labelcolor=INK,
        handlelength=1.6, columnspacing=1.2, borderpad=0.1, labelspacing=0.3,
    )  # fmt: skip


def svg(figure: "Figure", salt: str, words: str) -> str:
    """Return the figure as an SVG element that scales with the page, takes its colours from it and says `words`.

    The same drawing gives the same bytes: no date, and ids derived from `salt`, which also keeps two plots of one page
    from sharing ids.
    """
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    buffer = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": salt}):
        figure.set_facecolor("none")
        FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    head, body = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL).split(">", 1)
    head = re.sub(r' (?:width|height)="[^"]*"', "", head)
    # Groups are numbered alike in every figure; on one page such ids would be there many times.
    body = re.sub(r'<g id="[^"]*"', "<g", body).rstrip()
    for color, variable in VARIABLES.items():
        body = body.replace(color, f"var({variable})")
    return f'{head} role="img" aria-label={quoteattr(clean(words))}>{body}'
