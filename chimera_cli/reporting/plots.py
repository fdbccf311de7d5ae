"""The plots of a report: what each shows, against which limit, and the same in words for those who can't see it."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from chimera_cli.figures import RECALLS, format_seconds, format_value
from chimera_cli.reporting import drawing
from chimera_cli.reporting.document import clean
from chimera_cli.reporting.drawing import FAINT, INK, SOFT, Points, canvas, column, legend, line, series
from chimera_cli.reporting.facts import Curves, Evaluation, Facts
from chimera_cli.reporting.retrieval import ladder_rows
from chimera_cli.reporting.verdicts import Limit, Verdicts
from chimera_cli.statistics import Summary, summarise


@dataclass(frozen=True, slots=True)
class Plot:
    """`section` is the key of the section it belongs to; `caption` says what is to be seen, for all to read."""

    section: str
    caption: str
    svg: str


def draw(facts: Facts, curves: Mapping[int, Curves], loader: Curves, verdicts: Verdicts) -> list[Plot]:
    """Return all plots for which there is something to draw; `loader` are the curves of its benchmark."""
    plots = [
        _loss(curves),
        _dev(curves),
        *(_recalls(evaluation) for evaluation in facts.evaluations),
        *(_similarities(evaluation) for evaluation in facts.evaluations),
        _ladder(facts),
        _throughput(curves, verdicts),
        _loader_throughput(loader, verdicts),
        _loader_utilisation(loader, verdicts),
        _memory(curves, verdicts),
    ]
    return [plot for plot in plots if plot is not None]


# ---- while training -------------------------------------------------------------------------------------------------


def _loss(curves: Mapping[int, Curves]) -> Plot | None:
    lines = {seed: column(one.metrics, "step", "loss") for seed, one in curves.items()}
    lines = {seed: points for seed, points in lines.items() if len(points) > 1}
    if not lines:
        return None
    figure, axes = canvas("update", "batch loss")
    mean = _with_spread(axes, lines)
    legend(figure, axes)
    words = f"Batch loss before each update, {_of_seeds(lines)}. {_ends(mean or next(iter(lines.values())))}"
    caption = f"Batch loss before each update{_spread_words(lines)}."
    return Plot("benchmarks", caption, drawing.svg(figure, "loss", words))


def _dev(curves: Mapping[int, Curves]) -> Plot | None:
    lines = {seed: column(one.metrics, "step", "dev/rsum") for seed, one in curves.items()}
    lines = {seed: points for seed, points in lines.items() if len(points) > 1}
    if not lines:
        return None
    figure, axes = canvas("update", "rsum on dev (0–6)")
    mean = _with_spread(axes, lines)
    best = [max(points, key=lambda point: point[1]) for points in lines.values()]
    axes.plot(
        [x for x, _ in best], [y for _, y in best], "o", markersize=4.5, color=INK, label="checkpoint kept", zorder=4
    )
    legend(figure, axes)
    words = f"Sum of the six recalls on dev, {_of_seeds(lines)}. {_ends(mean or next(iter(lines.values())))}"
    caption = f"Sum of the six recalls on dev while training{_spread_words(lines)}."
    return Plot("benchmarks", caption, drawing.svg(figure, "dev", words))


def _with_spread(axes: Any, lines: Mapping[int, Points]) -> list[tuple[float, float]]:
    """Draw curves of several seeds: the mean with a band of one standard deviation, single seeds thin behind it.

    Mean and band end where the first seed ends, because a mean over other seeds would be another one. Returns the mean,
    [] for one seed alone, which is drawn as it is.
    """
    if len(lines) == 1:
        ((seed, points),) = lines.items()
        line(axes, points, series(0), f"seed {seed}", 1.8)
        return []
    by_seed = [dict(points) for points in lines.values()]
    places = drawing.thin([(x, 0.0) for x in sorted(set.intersection(*(set(one) for one in by_seed)))])
    summaries = [(x, summarise([one[x] for one in by_seed])) for x, _ in places]
    mean = [(x, one.mean) for x, one in summaries]
    line(axes, mean, series(0), f"mean of {len(lines)}", 1.8, layer=3)
    low, high = ([one.mean + sign * (one.std or 0.0) for _, one in summaries] for sign in (-1, 1))
    axes.fill_between([x for x, _ in mean], low, high, color=series(0), alpha=0.25, linewidth=0, label="± 1 std")
    for index, points in enumerate(lines.values()):
        line(axes, points, SOFT, "single seeds" if index == 0 else "", 0.6)
    return mean


def _spread_words(lines: Mapping[int, Points]) -> str:
    return "" if len(lines) == 1 else f": mean of {len(lines)} seeds with one standard deviation, single seeds thin"


def _of_seeds(lines: Mapping[int, Points]) -> str:
    return f"mean of {len(lines)} seeds" if len(lines) > 1 else f"seed {next(iter(lines))}"


def _ends(points: Points) -> str:
    """Return how a curve goes, for those who can't see it."""
    if not points:
        return "The seeds have no update in common."
    (first_x, first), (last_x, last) = points[0], points[-1]
    return f"From {first:.2f} at update {first_x:.0f} to {last:.2f} at update {last_x:.0f}."


# ---- recall ---------------------------------------------------------------------------------------------------------


def _recalls(evaluation: Evaluation) -> Plot | None:
    """Return bars of the six recalls with their error and, dashed, what chance would reach."""
    known = [(name, summary) for name in RECALLS if (summary := evaluation.figures.get(name)) is not None]
    if not known:
        return None
    figure, axes = canvas("", "share of queries, %")
    chance = evaluation.first.get("chance") or {}
    # A gap of half a bar between the two directions.
    places = [place + (0.5 if name.startswith("t2i") else 0.0) for place, (name, _) in enumerate(known)]
    for place, (name, summary) in zip(places, known, strict=True):
        _bar(axes, place, name, summary, _error(evaluation, name, summary))
    levels = [(place, 100 * chance[name]) for place, (name, _) in zip(places, known, strict=True) if chance.get(name)]
    for index, (place, level) in enumerate(levels):
        dashes: dict[str, Any] = {"color": INK, "linewidth": 1.2, "linestyle": (0, (2, 1))}
        axes.hlines(level, place - 0.36, place + 0.36, label="chance" if index == 0 else "_", **dashes)
    axes.set_xticks(places, [f"R@{name.split('_r')[1]}" for name, _ in known])
    axes.grid(visible=False, axis="x")
    axes.margins(y=0.12)
    legend(figure, axes, last="chance")
    title = f"{evaluation.pack}, {evaluation.split}"
    seeds = len(evaluation.by_seed)
    error = f"mean and standard deviation over {seeds} seeds" if seeds > 1 else "one seed, 95 % bootstrap interval"
    values = ", ".join(f"{name.replace('_r', ' R@')} {format_value(name, summary.mean)}" for name, summary in known)
    caption = f"Recall on {title}: {error}."
    return Plot("retrieval", clean(caption), drawing.svg(figure, f"recall-{title}", f"{caption} {values}."))


def _bar(axes: Any, place: float, name: str, summary: Summary, error: tuple[float, float] | None) -> None:
    """Draw one recall in percent with its error below and above."""
    mean, direction = 100 * summary.mean, 0 if name.startswith("i2t") else 1
    label = ("image → text", "text → image")[direction] if name.endswith("_r1") else "_"
    axes.bar(place, mean, width=0.72, color=series(direction), label=label)
    below, above = error or (0.0, 0.0)
    if error is not None:
        axes.errorbar(place, mean, [[below], [above]], color=INK, capsize=3, linewidth=1.2)
    where: dict[str, Any] = {"textcoords": "offset points", "ha": "center", "fontsize": drawing.TEXT_PT - 0.5}
    axes.annotate(f"{mean:.1f}", (place, mean + above), (0, 3), color=INK, **where)


def _error(evaluation: Evaluation, name: str, summary: Summary) -> tuple[float, float] | None:
    """Return how far the error reaches below and above, in percent: over seeds, or of one seed's query images."""
    if summary.std is not None:
        return 100 * summary.std, 100 * summary.std
    interval = (evaluation.first.get("intervals") or {}).get(name)
    if not interval:
        return None
    low, high = interval
    return max(0.0, 100 * (summary.mean - low)), max(0.0, 100 * (high - summary.mean))


def _similarities(evaluation: Evaluation) -> Plot | None:
    """Return the similarities of matched and unmatched pairs over all seeds, each as shares of its own kind."""
    edges, counts = _histogram(evaluation)
    if not counts:
        return None
    shares = {name: [100 * one / sum(values) for one in values] for name, values in counts.items()}
    filled = [place for place in range(len(edges) - 1) if any(values[place] for values in shares.values())]
    first, last = max(0, filled[0] - 1), min(len(edges) - 2, filled[-1] + 1)
    figure, axes = canvas("cosine similarity of image and caption", "share of pairs, %")
    for name, index in (("unmatched", 1), ("matched", 0)):
        values = shares[name][first : last + 1]
        axes.stairs(values, edges[first : last + 2], fill=True, color=series(index), alpha=0.3)
        axes.stairs(values, edges[first : last + 2], color=series(index), linewidth=1.6, label=f"{name} pairs")
    axes.set_ylim(bottom=0)
    legend(figure, axes)
    title = f"{evaluation.pack}, {evaluation.split}"
    caption = f"Similarities on {title}. {_overlap(edges, shares)}"
    return Plot("retrieval", clean(caption), drawing.svg(figure, f"similarities-{title}", caption))


def _histogram(evaluation: Evaluation) -> tuple[list[float], dict[str, list[float]]]:
    """Return the edges and the counts of both kinds summed over the seeds; no counts where no seed has any.

    Nor where the seeds were evaluated on different things.

    Seeds whose edges differ from the first one's, and histograms that don't fit their edges, are left out.
    """
    edges: list[float] = []
    sums: dict[str, list[float]] = {}
    if evaluation.mixed:
        return edges, sums
    for one in evaluation.by_seed.values():
        found = one.get("similarities") or {}
        kinds = {name: [float(count) for count in found.get(name) or ()] for name in ("matched", "unmatched")}
        own = [float(edge) for edge in found.get("edges") or ()]
        if (edges and own != edges) or any(len(own) != len(values) + 1 or not sum(values) for values in kinds.values()):
            continue
        edges = own
        for name, values in kinds.items():
            sums[name] = [a + b for a, b in zip(sums.get(name) or [0.0] * len(values), values, strict=True)]
    return edges, sums


def _overlap(edges: Sequence[float], shares: Mapping[str, Sequence[float]]) -> str:
    """Return in words how far apart the two kinds are: what unmatched pairs reach the middle of the matched ones."""
    below = 0.0
    for place, share in enumerate(shares["matched"]):
        if below + share >= 50:
            inside = (50 - below) / share
            middle = edges[place] + inside * (edges[place + 1] - edges[place])
            above = (1 - inside) * shares["unmatched"][place] + sum(shares["unmatched"][place + 1 :])
            return f"Half of the matched pairs lie above {middle:.2f}, and {above:.2g} % of the unmatched ones."
        below += share
    return ""


def _ladder(facts: Facts) -> Plot | None:
    rows = ladder_rows(facts)
    if not rows:
        return None
    figure, axes = canvas("R@10, %", "", height_in=0.9 + 0.34 * len(rows))
    for place, (_, _, figures, ours) in enumerate(rows):
        pairs = [(name, figures.get(name)) for name in ("i2t_r10", "t2i_r10")]
        known = [100 * value for _, value in pairs if value is not None]
        if known:
            axes.hlines(place, min(known), max(known), color=FAINT, linewidth=2)
        for index, (_, value) in enumerate(pairs):
            if value is not None:
                size = (7.5 if ours else 5.5) - index
                axes.plot(100 * value, place, "oD"[index], color=series(index), markersize=size)
    for index, label in enumerate(("image → text", "text → image")):
        axes.plot([], [], "oD"[index], color=series(index), markersize=5.5 - index, label=label)
    legend(figure, axes)
    axes.set_yticks(range(len(rows)), [_short(name) for name, *_ in rows])
    for tick, row in zip(axes.get_yticklabels(), rows, strict=True):
        tick.set_fontweight("bold" if row[3] else "normal")
    axes.grid(visible=False, axis="y")
    axes.set_xlim(-3, 103)
    values = "; ".join(f"{name} {format_value('i2t_r10', figures.get('i2t_r10'))}" for name, _, figures, _ in rows)
    caption = "R@10 on the Flickr8k test split; this run in bold."
    words = f"{caption} Image to text from the lowest rung up: {values}."
    return Plot("ladder", caption, drawing.svg(figure, "ladder", words))


def _short(name: str) -> str:
    """Return a rung's name for an axis: on two lines where it is long, without its remark in brackets."""
    bare = re.sub(r"\s*\(.*\)|, mean of.*", "", name)
    first, _, second = bare.partition(" with " if " with " in bare else " on " if " on " in bare else "\0")
    if not second and len(bare) > 18:
        first, _, second = bare.partition(" ")
    return f"{first}\n{'with ' if ' with ' in bare else 'on ' if ' on ' in bare else ''}{second}" if second else bare


# ---- against the limits ---------------------------------------------------------------------------------------------


def _throughput(curves: Mapping[int, Curves], verdicts: Verdicts) -> Plot | None:
    """Return training throughput; slower than the epoch law's pairs by its seconds can't meet it."""
    lines = {seed: column(one.metrics, "elapsed_s", "pairs_per_s") for seed, one in curves.items()}
    law = verdicts.limit("epoch_10k_pairs_s")
    limit = Limit("pairs_per_s", "≥", 10_000 / law.value, law.kind) if law and law.value > 0 else None
    caption = "Training throughput over time, by seed."
    if law and limit:
        caption += f" The line is 10,000 pairs in {format_seconds(law.value)}, before any feature extraction."
    return _over_time("throughput", caption, "pairs/s", lines, limit)


def _loader_throughput(loader: Curves, verdicts: Verdicts) -> Plot | None:
    lines = {0: column(loader.metrics, "elapsed_s", "loader_images_per_s")}
    limit = verdicts.limit("loader_images_per_s")
    return _over_time("loader", "Data loader: throughput over time.", "images/s", lines, limit)


def _loader_utilisation(loader: Curves, verdicts: Verdicts) -> Plot | None:
    lines = {0: column(loader.telemetry, "elapsed_s", "gpu_util", 100)}
    law = verdicts.limit("gpu_util_mean")
    caption = "GPU utilisation while the loader feeds training; the law is on its mean."
    return _over_time("utilisation", caption, "GPU utilisation, %", lines, law, 100)


def _memory(curves: Mapping[int, Curves], verdicts: Verdicts) -> Plot | None:
    """Return the card's memory over time where there is one, else the process's: what has a limit to run into."""
    vram = {seed: column(one.telemetry, "elapsed_s", "vram_used_gb") for seed, one in curves.items()}
    if any(vram.values()):
        caption = "VRAM in use on the whole card, by seed; the law is on what training allocates of it."
        limit = verdicts.limit("vram_peak_gb") or _total(curves, "vram_total_gb", "vram_peak_gb")
        return _over_time("memory", caption, "VRAM, GiB", vram, limit)
    ram = {seed: column(one.telemetry, "elapsed_s", "ram_used_gb") for seed, one in curves.items()}
    limit = verdicts.limit("ram_peak_gb") or _total(curves, "ram_total_gb", "ram_peak_gb")
    return _over_time("memory", "RAM of the process over time, by seed.", "RAM, GiB", ram, limit)


def _total(curves: Mapping[int, Curves], key: str, figure: str) -> Limit | None:
    """Return what the machine has, in place of a limit that nobody has set."""
    known = [float(row[key]) for one in curves.values() for row in one.telemetry if row.get(key) is not None]
    return Limit(figure, "has", known[0], "machine") if known else None


def _over_time(
    name: str, caption: str, y_label: str, lines: Mapping[int, Points], limit: Limit | None, scale: float = 1.0
) -> Plot | None:
    """Return curves over the seconds of a run with a labelled limit (drawn at `scale` times it); None without any."""
    drawn = {seed: points for seed, points in lines.items() if len(points) > 1}
    if not drawn:
        return None
    figure, axes = canvas("seconds", y_label)
    for index, (seed, points) in enumerate(drawn.items()):
        line(axes, points, series(index), f"seed {seed}" if len(drawn) > 1 else "", 1.4)
    values = [y for points in drawn.values() for _, y in points]
    words = f"{caption} Between {min(values):.3g} and {max(values):.3g} {y_label}"
    if limit is not None:
        drawing.limit_line(axes, scale * limit.value, limit.label)
        words += f"; {limit.label}"
    drawing.from_zero(axes, max([*values, scale * limit.value if limit else 0.0]))
    legend(figure, axes)
    return Plot("memory", caption, drawing.svg(figure, name, f"{words}."))
