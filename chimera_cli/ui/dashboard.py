"""The dashboard of a running command: a pure picture of a state, readable from 40 columns up, in colour and without."""

import math
from collections.abc import Sequence

from rich import box
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.panel import Panel
from rich.style import Style
from rich.table import Table
from rich.text import Text

from chimera_cli.events import Evaluated, Note
from chimera_cli.ui.state import Bar, DashboardState
from chimera_cli.ui.text import plain

MAX_WIDTH = 104
_WIDE = 84
_NARROW = 56
_BLOCKS = "▁▂▃▄▅▆▇█"
# `100.0` and a space.
_CELL = 6
# What the line below the bars shows of a step, in this order: metric -> what stands before it, and how it is written.
_PACE = {
    "lr": ("lr ", "{:.1e}"),
    "logit_scale": ("scale ", "{:.1f}"),
    "grad_norm": ("gradient ", "{:.2f}"),
    "pairs_per_s": ("", "{:,.0f} pairs/s"),
    "loader_images_per_s": ("", "{:,.0f} images/s"),
}

_TITLE = Style(bold=True, dim=False)
_DIM = Style(dim=True)
_VALUE = Style()
_BAR = Style(color="cyan")
_GOOD = Style(color="green")
_WATCH = Style(color="yellow")
_BAD = Style(color="red", bold=True)

Row = tuple[str, Text, Text]


def render(state: DashboardState, now: float, width: int = 100, compact: bool = False) -> RenderableType:
    """Return the picture of `state` at `now` for a terminal of `width` columns; `compact` leaves out blank lines."""
    sides = 2 if width >= _NARROW else 1
    inner = min(width, MAX_WIDTH) - 2 - 2 * sides
    sections: list[list[RenderableType]] = [
        [_header(state, now, inner)],
        _progress(state, now, inner),
        _recalls(state, inner),
        _meters(_machine_rows(state, inner), inner),
        _notes(state.notes),
    ]
    lines: list[RenderableType] = []
    for section in filter(None, sections):
        if lines and not compact:
            lines.append(Text(""))
        lines.extend(section)
    title = Text.from_markup(plain(state.title, max(inner - 2, 1)), style=_TITLE)
    padding = (0, sides) if compact else (1, sides)
    return Panel(
        Group(*lines), title=title, title_align="left", box=box.ROUNDED, border_style="dim", padding=padding,
        width=inner + 2 + 2 * sides,
    )  # fmt: skip


# ---- pieces ---------------------------------------------------------------------------------------------------------


def sparkline(values: Sequence[float], width: int) -> str:
    """Return `values` as at most `width` block characters, the mean of neighbours where there are more values.

    The lowest is ▁ and the highest █; a stretch without any finite value is a space.
    """
    bins = _bins(values, width)
    finite = [value for value in bins if value is not None]
    if not finite:
        return " " * len(bins)
    low, high = min(finite), max(finite)
    scale = (len(_BLOCKS) - 1) / (high - low) if high > low else 0.0
    return "".join(" " if value is None else _BLOCKS[round((value - low) * scale)] for value in bins)


def meter(share: float | None, width: int, style: Style = _BAR, limit: float | None = None) -> Text:
    """Return a bar filled to `share` (0-1; None: empty), with a tick where `limit` lies on the same scale."""
    filled = 0 if share is None else round(max(0.0, min(share, 1.0)) * width)
    text = Text("━" * filled, style=style)
    text.append("─" * (width - filled), style=_DIM)
    if limit is not None and 0 < limit < 1 and width > 4:
        at = min(round(limit * width), width - 1)
        return Text.assemble(text[:at], ("┃", _VALUE), text[at + 1 :])
    return text


def clock(seconds: float) -> str:
    """Return whole seconds as `1:43` or `1:02:03`, which changes its width less than words do."""
    minutes, rest = divmod(max(int(seconds), 0), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _bins(values: Sequence[float], width: int) -> list[float | None]:
    """Return the means of at most `width` equal stretches of `values`, None where a stretch has no finite value."""
    count = min(len(values), max(width, 0))
    means: list[float | None] = []
    for index in range(count):
        stretch = values[index * len(values) // count : (index + 1) * len(values) // count]
        finite = [value for value in stretch if math.isfinite(value)]
        means.append(sum(finite) / len(finite) if finite else None)
    return means


def _meters(rows: Sequence[Row], inner: int) -> list[RenderableType]:
    """Return rows of label, bar and reading as one grid; bars give way to readings where there is little room."""
    if not rows:
        return []
    grid = Table.grid(padding=(0, 2))
    grid.add_column(width=_label_width(inner), no_wrap=True, style=_DIM)
    if _bar_width(inner):
        grid.add_column(width=_bar_width(inner), no_wrap=True)
    grid.add_column(no_wrap=True, overflow="ellipsis")
    for label, bar, reading in rows:
        name = Text.from_markup(plain(label), overflow="ellipsis")
        grid.add_row(*([name, bar, reading] if _bar_width(inner) else [name, reading]))
    return [grid]


def _label_width(inner: int) -> int:
    return 22 if inner >= _WIDE - 6 else 16 if inner >= _NARROW - 6 else 10


def _bar_width(inner: int) -> int:
    """Return the columns of a bar: what label and reading leave of the line, none where that is next to nothing."""
    reading = 34 if inner >= _WIDE - 6 else 22
    left = inner - _label_width(inner) - reading - 4
    return left if left >= 6 else 0


# ---- sections -------------------------------------------------------------------------------------------------------


def _header(state: DashboardState, now: float, inner: int) -> RenderableType:
    """Return group and seed to the left, elapsed time (against its limit) to the right."""
    left = Text(no_wrap=True, overflow="ellipsis")
    if state.seed is not None:
        left.append(f"seed {state.seed}")
    if state.group:
        left.append("  " if left else "").append(Text.from_markup(plain(state.group), style=_DIM))
    for over in state.finished if inner >= _WIDE - 6 else ():
        rsum = over.figures.get("rsum")
        detail = over.status if rsum is None else f"rsum {rsum:.2f}"
        left.append(f"  seed {over.seed}: {detail}", style=_DIM)
    limit = state.limits.get("wall_s")
    elapsed = now - state.began_at
    right = Text(clock(elapsed), style=_WATCH if limit is not None and elapsed > limit else _VALUE)
    if limit is not None:
        right.append(f" (≤ {clock(limit)})", style=_DIM)
    grid = Table.grid(expand=True, padding=(0, 1))
    grid.add_column(ratio=1, no_wrap=True, overflow="ellipsis")
    grid.add_column(justify="right", no_wrap=True)
    grid.add_row(left, right)
    return grid


def _progress(state: DashboardState, now: float, inner: int) -> list[RenderableType]:
    """Return the bars of training and of the present stage, the loss, and below them the pace."""
    width, wide = _bar_width(inner), inner >= _WIDE - 6
    over = bool(state.finished) and state.finished[-1].seed == state.seed
    rows: list[Row] = []
    for bar in filter(None, (state.steps if state.total_steps else None, state.stage)):
        style = _GOOD if bar.complete else _BAR
        rows.append((bar.name, meter(bar.share, width, style), _bar_reading(bar, now, wide, over)))
    if state.loss.last is not None:
        points = (*state.loss.points, *state.loss.rest[-1:])
        rows.append(("loss", Text(sparkline(points, width), style=_BAR), _loss_reading(state)))
    pace = _pace(state)
    return [*_meters(rows, inner), *([Padding(pace, (0, 0, 0, _label_width(inner) + 2))] if pace else [])]


def _bar_reading(bar: Bar, now: float, wide: bool, over: bool) -> Text:
    """Return `1,240 of 2,400  52 %  1:43 left`, or how long a stage took that is over."""
    text = Text(no_wrap=True, overflow="ellipsis")
    if bar.complete or over or bar.share is None:
        text.append(
            f"{bar.done:,} {bar.unit}" if bar.complete or bar.share is None else f"{bar.done:,} of {bar.total:,}"
        )
        return text.append(f"  in {clock(bar.seconds)}" if bar.complete or over else "", style=_DIM)
    if wide:
        text.append(f"{bar.done:,} of {bar.total:,}  ")
    text.append(f"{100 * bar.share:.0f} %")
    if wide and bar.per_s is not None:
        text.append(f"  {bar.per_s:,.{0 if bar.per_s >= 10 else 1}f} {bar.unit}/s")
    left = bar.seconds_left(now)
    return text.append("" if left is None else f"  {clock(left)} left", style=_DIM)


def _loss_reading(state: DashboardState) -> Text:
    first, last = state.loss.first, state.loss.last
    if first is None or last is None:
        return Text("–")
    text = Text(f"{last:.3f}", style=_VALUE if math.isfinite(last) else _BAD)
    return text.append(f"  from {first:.3f}", style=_DIM)


def _pace(state: DashboardState) -> Text:
    """Return epoch, rates and throughput of the newest step in one line, cut where it doesn't fit."""
    text = Text(no_wrap=True, overflow="ellipsis")
    parts = [Text.assemble(("epoch ", _DIM), str(state.epoch + 1))] if state.loss.last is not None else []
    for name, (label, form) in _PACE.items():
        value = state.metrics.get(name)
        if value is not None:
            parts.append(Text.assemble((label, _DIM), form.format(value), *_against(state.limits.get(name), "≥")))
    if state.measures:
        parts.append(Text(f"contingency {len(state.measures)}", style=_WATCH))
    return text.append_text(Text("  ").join(parts))


def _recalls(state: DashboardState, inner: int) -> list[RenderableType]:
    """Return recalls in percent, both directions side by side: of the newest evaluation and of the best so far."""
    if state.latest is None:
        return []
    ranks = (1, 5, 10) if inner >= _NARROW - 6 else (1, 10)
    label = _label_width(inner) + 2 if inner >= 64 else 6
    block = _CELL * len(ranks)
    heads = "".join(f"R@{k}".rjust(_CELL) for k in ranks)
    lines = [
        Text(state.latest.split.ljust(label) + "image → text".rjust(block) + "  " + "text → image".rjust(block)),
        Text(" " * label + heads + "  " + heads + "rsum".rjust(_CELL + 2)),
    ]
    for line in lines:
        line.stylize(_DIM)
    lines.append(_recall_line("now", state.latest, ranks, label))
    if state.best is not None:
        lines.append(_recall_line("best", state.best, ranks, label).append(f"  step {state.best.step:,}", style=_DIM))
    for line in lines:
        line.no_wrap, line.overflow = True, "crop"
    return list(lines)


def _recall_line(name: str, event: Evaluated, ranks: Sequence[int], label: int) -> Text:
    text = Text.assemble((name.ljust(label), _DIM))
    style = _GOOD if name == "best" else _VALUE
    for direction in ("i2t", "t2i"):
        for k in ranks:
            share = event.figures.get(f"{direction}_r{k}")
            text.append(("–" if share is None else f"{100 * share:.1f}").rjust(_CELL), style=style)
        text.append("  " if direction == "i2t" else "")
    rsum = event.figures.get("rsum")
    return text.append(("–" if rsum is None else f"{rsum:.3f}").rjust(_CELL + 2), style=style)


def _machine_rows(state: DashboardState, inner: int) -> list[Row]:
    """Return GPU and VRAM against their limits; where no card gives readings, CPU and RAM."""
    values, width, wide = state.machine, _bar_width(inner), inner >= _WIDE - 6
    if values.get("gpu_util") is None and values.get("vram_used_gb") is None:
        cpu = _share_row("CPU", values.get("cpu_util"), None, width)
        ram = _memory_row("RAM", values.get("ram_used_gb"), values.get("ram_total_gb"), None, width)
        return [row for row in (cpu, ram) if row]
    gpu = _share_row("GPU", values.get("gpu_util"), state.limits.get("gpu_util_mean"), width)
    if gpu and wide:
        for name, unit in (("gpu_temperature_c", "°C"), ("gpu_power_w", "W")):
            value = values.get(name)
            gpu[2].append("" if value is None else f"  {value:.0f} {unit}", style=_DIM)
    used, total = values.get("vram_used_gb"), values.get("vram_total_gb")
    vram = _memory_row("VRAM", used, total, state.limits.get("vram_peak_gb"), width)
    return [row for row in (gpu, vram) if row]


def _share_row(label: str, share: float | None, at_least: float | None, width: int) -> Row | None:
    if share is None:
        return None
    style = _WATCH if at_least is not None and share < at_least else _BAR
    reading = Text.assemble((f"{100 * share:.0f} %", _VALUE if style is _BAR else style))
    reading.append_text(Text.assemble(*_against(None if at_least is None else 100 * at_least, "≥")))
    return label, meter(share, width, style, at_least), reading


def _memory_row(label: str, used: float | None, total: float | None, at_most: float | None, width: int) -> Row | None:
    if used is None:
        return None
    style = _WATCH if at_most is not None and used > at_most else _BAR
    of = "" if not total else f" of {total:.1f}"
    reading = Text.assemble((f"{used:.1f}{of} GiB", _VALUE if style is _BAR else style))
    reading.append_text(Text.assemble(*_against(at_most, "≤")))
    scale = None if at_most is None or not total else at_most / total
    return label, meter(used / total if total else None, width, style, scale), reading


def _against(limit: float | None, comparison: str) -> list[tuple[str, Style]]:
    return [] if limit is None else [(f" ({comparison} {limit:g})", _DIM)]


def _notes(notes: Sequence[Note]) -> list[RenderableType]:
    """Return the notes below each other; a warning takes the lines it needs, anything else is cut to one."""
    grid = Table.grid(padding=(0, 1))
    grid.add_column(no_wrap=True)
    grid.add_column()
    for note in notes:
        warning = note.level == "warning"
        text = Text.from_markup(plain(note.message, 300), style=_WATCH if warning else _DIM)
        text.no_wrap, text.overflow = not warning, "fold" if warning else "ellipsis"
        grid.add_row(Text("!", style=_WATCH) if warning else Text("·", style=_DIM), text)
    return [grid] if notes else []
