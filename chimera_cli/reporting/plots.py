"""Plots of a report as SVG text that takes its colours from the page, so one drawing serves light, dark and print.

Matplotlib is driven through its objects, never through pyplot: no window, no global state. It draws in marker colours
which are then exchanged for CSS variables (`--ink`, `--faint`, `--series-0` ...).
"""

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from chimera_cli.figures import RECALLS
from chimera_cli.reporting.document import clean
from chimera_cli.reporting.facts import Curves, Evaluation, Facts
from chimera_cli.reporting.sections import ladder_rows

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_INK, _FAINT = "#010203", "#a0b0c0"
_SERIES = tuple(f"#f0e0d{index}" for index in range(6))
_VARIABLES = {_INK: "--ink", _FAINT: "--faint"} | {color: f"--series-{index}" for index, color in enumerate(_SERIES)}
_WIDTH_IN, _HEIGHT_IN = 4.7, 2.7
_POINTS = 400  # a curve on a page this wide shows no more


@dataclass(frozen=True, slots=True)
class Plot:
    """`section` is the key of the section it belongs to; `caption` says in words what is to be seen."""

    section: str
    caption: str
    svg: str


def draw(facts: Facts, curves: Mapping[int, Curves]) -> list[Plot]:
    """Return all plots for which there is something to draw."""
    plots = [
        _loss(curves),
        _dev(curves),
        *(_recalls(evaluation) for evaluation in facts.evaluations),
        _ladder(facts),
        _throughput(curves),
        _machine(curves),
    ]
    return [plot for plot in plots if plot is not None]


# ---- one function per plot ------------------------------------------------------------------------------------------


def _loss(curves: Mapping[int, Curves]) -> Plot | None:
    lines = {seed: _column(one.metrics, "step", "loss") for seed, one in curves.items()}
    if not any(lines.values()):
        return None
    figure, axes = _canvas("update", "batch loss")
    for index, (seed, points) in enumerate(lines.items()):
        _line(axes, points, index, f"seed {seed}")
    _legend(axes, len(lines))
    return Plot("benchmarks", "Batch loss before each update, by seed.", _svg(figure, "loss"))


def _dev(curves: Mapping[int, Curves]) -> Plot | None:
    lines = {seed: _column(one.metrics, "step", "dev/rsum") for seed, one in curves.items()}
    if not any(len(points) > 1 for points in lines.values()):
        return None
    figure, axes = _canvas("update", "dev rsum (0–6)")
    for index, (seed, points) in enumerate(lines.items()):
        if points:
            _line(axes, points, index, f"seed {seed}")
            best = max(points, key=lambda point: point[1])
            axes.plot(*best, marker="o", markersize=4, color=_SERIES[index % len(_SERIES)])
    _legend(axes, len(lines))
    caption = "Sum of the six recalls on dev while training; the dot is the checkpoint that was kept."
    return Plot("benchmarks", caption, _svg(figure, "dev"))


def _recalls(evaluation: Evaluation) -> Plot | None:
    """Return bars of the six recalls with their deviation over seeds and, dashed, what chance would reach."""
    known = [(name, summary) for name in RECALLS if (summary := evaluation.figures.get(name)) is not None]
    if not known:
        return None
    figure, axes = _canvas("", "share of queries, %")
    chance = evaluation.first.get("chance") or {}
    # A gap of half a bar between the two directions.
    places = [place + (0.5 if name.startswith("t2i") else 0.0) for place, (name, _) in enumerate(known)]
    for place, (name, summary) in zip(places, known, strict=True):
        mean, std = 100 * summary.mean, 100 * (summary.std or 0.0)
        axes.bar(place, mean, width=0.72, color=_SERIES[0 if name.startswith("i2t") else 1], alpha=0.75)
        if summary.std is not None:
            axes.errorbar(place, mean, std, color=_INK, capsize=3, linewidth=1)
        if chance.get(name) is not None:
            level = 100 * chance[name]
            axes.hlines(level, place - 0.36, place + 0.36, color=_INK, linewidth=1, linestyle=(0, (2, 1)))
        where: dict[str, Any] = {"textcoords": "offset points", "ha": "center", "fontsize": 8, "color": _INK}
        axes.annotate(f"{mean:.1f}", (place, mean + std), (0, 3), **where)
    axes.set_xticks(places, [name.replace("_r", "\nR@").replace("2", " → ") for name, _ in known])
    axes.grid(visible=False, axis="x")
    axes.margins(y=0.12)
    title = f"{evaluation.pack}, {evaluation.split}"
    caption = f"Recall on {title}: mean and standard deviation over {len(evaluation.by_seed)} seeds; dashes are chance."
    return Plot("retrieval", clean(caption), _svg(figure, f"recall-{title}"))


def _ladder(facts: Facts) -> Plot | None:
    rows = ladder_rows(facts)
    if not rows:
        return None
    figure, axes = _canvas("R@10, %", "", height_in=0.6 + 0.36 * len(rows))
    for place, (_, _, figures, ours) in enumerate(rows):
        pairs = [(name, figures.get(name)) for name in ("i2t_r10", "t2i_r10")]
        known = [100 * value for _, value in pairs if value is not None]
        axes.hlines(place, min(known), max(known), color=_FAINT, linewidth=2)
        for index, (_, value) in enumerate(pairs):
            if value is not None:
                axes.plot(100 * value, place, "D" if ours else "o", color=_SERIES[index], markersize=7 if ours else 5)
    for index, label in enumerate(("image to text", "text to image")):
        axes.plot([], [], "o", color=_SERIES[index], markersize=5, label=label)
    _legend(axes, 2)
    axes.set_yticks(range(len(rows)), [_short(name) for name, *_ in rows])
    for tick, row in zip(axes.get_yticklabels(), rows, strict=True):
        tick.set_fontweight("bold" if row[3] else "normal")
    axes.grid(visible=False, axis="y")
    axes.set_xlim(-2, 102)
    caption = "R@10 on the Flickr8k test split; diamonds are this run."
    return Plot("ladder", caption, _svg(figure, "ladder"))


def _throughput(curves: Mapping[int, Curves]) -> Plot | None:
    lines = {seed: _column(one.metrics, "elapsed_s", "pairs_per_s") for seed, one in curves.items()}
    if not any(len(points) > 1 for points in lines.values()):
        return None
    figure, axes = _canvas("seconds of training", "pairs/s")
    for index, (seed, points) in enumerate(lines.items()):
        _line(axes, points, index, f"seed {seed}")
    axes.set_ylim(bottom=0)
    _legend(axes, len(lines))
    return Plot("memory", "Training throughput over time, by seed.", _svg(figure, "throughput"))


def _machine(curves: Mapping[int, Curves]) -> Plot | None:
    """Return memory over time and utilisation above it: the GPU's where there is one, else the processor's."""
    rows = next((one.telemetry for one in curves.values() if len(one.telemetry) > 1), ())
    gpu = bool(_column(rows, "elapsed_s", "vram_used_gb"))
    memory = _column(rows, "elapsed_s", "vram_used_gb" if gpu else "ram_used_gb")
    use = [(x, 100 * y) for x, y in _column(rows, "elapsed_s", "gpu_util" if gpu else "cpu_util")]
    if len(memory) < 2:
        return None
    figure, (above, below) = _two_canvases("GPU %" if gpu else "CPU %", "VRAM GiB" if gpu else "RAM GiB")
    _line(above, use, 0, "")
    above.set_ylim(0, 105)
    _line(below, memory, 1, "")
    below.set_ylim(bottom=0)
    what = "GPU utilisation and VRAM" if gpu else "Processor utilisation and RAM"
    return Plot("memory", f"{what} over the seconds of the first seed.", _svg(figure, "machine"))


# ---- drawing --------------------------------------------------------------------------------------------------------


def _column(rows: Sequence[Mapping[str, Any]], x: str, y: str) -> list[tuple[float, float]]:
    """Return (x, y) of the rows that have both, thinned to what a plot can show; the last one is kept."""
    points = [(float(row[x]), float(row[y])) for row in rows if row.get(x) is not None and row.get(y) is not None]
    every = max(1, len(points) // _POINTS)
    thin = points[::every]
    return thin if not points or thin[-1] == points[-1] else [*thin, points[-1]]


def _line(axes: "Axes", points: Sequence[tuple[float, float]], index: int, label: str) -> None:
    xs, ys = [x for x, _ in points], [y for _, y in points]
    axes.plot(xs, ys, color=_SERIES[index % len(_SERIES)], linewidth=1.4, label=label)


def _canvas(x_label: str, y_label: str, height_in: float = _HEIGHT_IN) -> tuple["Figure", "Axes"]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH_IN, height_in), layout="constrained")
    axes = figure.subplots()
    _dress(axes, x_label, y_label)
    return figure, axes


def _two_canvases(upper: str, lower: str) -> tuple["Figure", tuple["Axes", "Axes"]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH_IN, _HEIGHT_IN), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    _dress(above, "", upper)
    _dress(below, "seconds", lower)
    return figure, (above, below)


def _dress(axes: "Axes", x_label: str, y_label: str) -> None:
    axes.set_facecolor("none")
    axes.set_xlabel(x_label, fontsize=9, color=_INK)
    axes.set_ylabel(y_label, fontsize=9, color=_INK)
    axes.tick_params(labelsize=9, color=_FAINT, labelcolor=_INK)
    axes.grid(visible=True, color=_FAINT, linewidth=0.5, alpha=0.6)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(_FAINT)


def _legend(axes: "Axes", lines: int) -> None:
    if lines > 1:
        axes.legend(frameon=False, fontsize=8, labelcolor=_INK, loc="best", ncols=3 if lines > 4 else 1)


def _short(name: str) -> str:
    """Return a rung's name for an axis: without its remark in brackets."""
    return re.sub(r"\s*\(.*\)", "", name)


def _svg(figure: "Figure", salt: str) -> str:
    """Return the figure as an SVG element that scales with the page and takes its colours from it.

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
    text = text[text.index("<svg") :].rstrip()
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'(<svg[^>]*?) (?:width|height)="[^"]*"', r"\1", text)
    text = re.sub(r'(<svg[^>]*?) (?:width|height)="[^"]*"', r"\1", text)
    for color, variable in _VARIABLES.items():
        text = text.replace(color, f"var({variable})")
    return text
