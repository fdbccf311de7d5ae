"""The one table of figures: what each is called, its unit, which way is better and how it is printed.

SLO objectives, reports, evaluation and MLflow all read names from here; a missing figure is None, never 0.
"""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

Direction = Literal["higher", "lower", "neither"]


@dataclass(frozen=True, slots=True)
class Figure:
    """One figure: `kind` decides how it is printed, `better` which end of an interval is the pessimistic one."""

    name: str
    label: str
    unit: str
    better: Direction
    kind: Literal["number", "share", "seconds", "gib", "rank", "loss"] = "number"


_TABLE = (
    Figure("prepare_images_per_s", "preparing throughput", "images/s", "higher"),
    Figure("loader_images_per_s", "loader throughput", "images/s", "higher"),
    Figure("gpu_util_mean", "GPU utilisation", "", "higher", "share"),
    Figure("loss_first", "first loss", "", "neither", "loss"),
    Figure("loss_last", "last loss", "", "lower", "loss"),
    Figure("loss_drop", "loss drop", "", "higher", "loss"),
    Figure("loss_tail_mean", "mean of the last losses", "", "lower", "loss"),
    Figure("chance_loss", "loss of a model that knows nothing", "", "neither", "loss"),
    Figure("wall_s", "wall clock", "s", "lower", "seconds"),
    Figure("pairs_per_s", "training throughput", "pairs/s", "higher"),
    Figure("features_s", "feature extraction", "s", "lower", "seconds"),
    Figure("epoch_10k_pairs_s", "10,000 pairs from cold", "s", "lower", "seconds"),
    Figure("epoch_10k_pairs_cached_s", "10,000 pairs, features cached", "s", "lower", "seconds"),
    Figure("vram_peak_gb", "peak VRAM allocated", "GiB", "lower", "gib"),
    Figure("vram_reserved_peak_gb", "peak VRAM reserved", "GiB", "lower", "gib"),
    Figure("ram_peak_gb", "peak RAM", "GiB", "lower", "gib"),
    Figure("i2t_r1", "image to text R@1", "", "higher", "share"),
    Figure("i2t_r5", "image to text R@5", "", "higher", "share"),
    Figure("i2t_r10", "image to text R@10", "", "higher", "share"),
    Figure("i2t_medr", "image to text median rank", "", "lower", "rank"),
    Figure("t2i_r1", "text to image R@1", "", "higher", "share"),
    Figure("t2i_r5", "text to image R@5", "", "higher", "share"),
    Figure("t2i_r10", "text to image R@10", "", "higher", "share"),
    Figure("t2i_medr", "text to image median rank", "", "lower", "rank"),
    Figure("rsum", "sum of the six recalls", "", "higher"),
    Figure("zero_shot_top1", "zero-shot top-1", "", "higher", "share"),
    Figure("zero_shot_top5", "zero-shot top-5", "", "higher", "share"),
    Figure("zero_shot_class_recall", "zero-shot mean recall per class", "", "higher", "share"),
)

FIGURES: Mapping[str, Figure] = MappingProxyType({figure.name: figure for figure in _TABLE})

RECALLS = ("i2t_r1", "i2t_r5", "i2t_r10", "t2i_r1", "t2i_r5", "t2i_r10")
RETRIEVAL = ("i2t_r1", "i2t_r5", "i2t_r10", "i2t_medr", "t2i_r1", "t2i_r5", "t2i_r10", "t2i_medr", "rsum")


def near_names(name: str) -> list[str]:
    """Return up to three figure names that resemble `name`, best first."""
    return difflib.get_close_matches(name, FIGURES, n=3, cutoff=0.5)


def format_value(name: str, value: float | None) -> str:
    """Return `value` as a person reads it: `41.7 %`, `2 min 03 s`, `6.12 GiB`; a missing one is `–`."""
    if value is None:
        return "–"
    figure = FIGURES.get(name)
    kind = figure.kind if figure else "number"
    if kind == "share":
        return f"{100 * value:.1f} %"
    if kind == "seconds":
        return format_seconds(value)
    return f"{_number(value, value, figure)}{_unit(figure)}"


def format_spread(name: str, mean: float | None, std: float | None, n: int) -> str:
    """Return `mean ± standard deviation (n)`; the deviation is left out where one value alone has none."""
    if mean is None:
        return "–"
    if std is None:
        return f"{format_value(name, mean)} (n={n})"
    figure = FIGURES.get(name)
    if figure is not None and figure.kind == "share":
        return f"{100 * mean:.1f} ± {100 * std:.1f} % (n={n})"
    if figure is not None and figure.kind == "seconds":
        return f"{format_value(name, mean)} ± {format_value(name, std)} (n={n})"
    return f"{_number(mean, mean, figure)} ± {_number(std, mean, figure)}{_unit(figure)} (n={n})"


def _number(value: float, scale: float, figure: Figure | None) -> str:
    """Return `value` with as many digits as a value of the size of `scale` deserves."""
    kind = figure.kind if figure else "number"
    if kind in ("gib", "loss"):
        return f"{value:.2f}"
    digits = 0 if abs(scale) >= 1000 else 1 if abs(scale) >= 10 or kind == "rank" else 3
    return f"{value:,.{digits}f}"


def _unit(figure: Figure | None) -> str:
    return f" {figure.unit}" if figure and figure.unit else ""


def format_seconds(seconds: float) -> str:
    """Return a duration as `0.42 s`, `12.3 s`, `2 min 03 s` or `1 h 05 min`."""
    if seconds < 10:
        return f"{seconds:.2f} s"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min"
