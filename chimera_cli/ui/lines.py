"""Progress as plain lines for logs, pipes and CI: one every few seconds, and everything that must not be missed."""

from collections.abc import Callable, Mapping
from dataclasses import replace

from chimera_cli.events import Event, Listener, MeasureTaken, Note, Progress, RunFinished, RunStarted, StepDone
from chimera_cli.figures import format_value
from chimera_cli.ui.dashboard import clock
from chimera_cli.ui.state import DashboardState, advance, measure_words

INTERVAL_S = 5.0


def plain_lines(
    title: str, limits: Mapping[str, float], write: Callable[[str], None], now: Callable[[], float]
) -> Listener:
    """Return a listener that hands `write` at most one line of progress every 5 seconds of the clock `now`.

    Beginnings and ends of runs and stages and all notes are written at once; warnings begin with `warning:`.
    """
    state = DashboardState(title, limits, now())
    due_at = state.began_at + INTERVAL_S

    def listen(event: Event) -> None:
        nonlocal state, due_at
        moment = now()
        before, state = state, replace(advance(state, event, moment), notes=())
        line = announcement(before, event) or (progress_line(state, event, moment) if moment >= due_at else "")
        if line:
            write(line)
            if isinstance(event, StepDone | Progress):
                due_at = moment + INTERVAL_S

    return listen


def announcement(before: DashboardState, event: Event) -> str:
    """Return the line of an event that is always told, in the light of the state before it; empty for all others."""
    match event:
        case Note():
            return f"warning: {event.message}" if event.level == "warning" else event.message
        case MeasureTaken():
            return f"warning: {measure_words(event)}"
        case RunStarted():
            return f"{event.group}: seed {event.seed} begins"
        case RunFinished():
            return f"seed {event.seed} {event.status}{_wall(event)}"
        case Progress() if 0 < event.total <= event.done:
            repeated = before.stage is not None and before.stage.name == event.stage and before.stage.complete
            return "" if repeated else f"{event.stage}: {event.done:,} {event.unit} done"
        case Progress() if before.stage is None or before.stage.name != event.stage:
            total = f" of {event.total:,}" if event.total else ""
            return f"{event.stage}: {event.done:,}{total} {event.unit}"
    return ""


def progress_line(state: DashboardState, event: Event, now: float) -> str:
    """Return where a run stands after a step or a bit of a stage; empty after any other event."""
    bar = {StepDone: state.steps, Progress: state.stage}.get(type(event))
    if bar is None:
        return ""
    parts = [f"{bar.name}: {bar.done:,}" + (f" of {bar.total:,}" if bar.total else "") + f" {bar.unit}"]
    if isinstance(event, StepDone):
        parts += [f"epoch {state.epoch + 1}"] if state.loss.last is not None else []
        parts += [
            f"{name.replace('_', ' ')} {event.metrics[name]:.4g}" for name in ("loss", "lr") if name in event.metrics
        ]
        rates = [name for name in ("pairs_per_s", "loader_images_per_s") if name in event.metrics]
        parts += [format_value(name, event.metrics[name]) for name in rates]
        rsum = state.latest.figures.get("rsum") if state.latest else None
        parts += [f"{state.latest.split} rsum {rsum:.3f}"] if state.latest and rsum is not None else []
    elif bar.per_s is not None:
        parts.append(f"{bar.per_s:,.0f} {bar.unit}/s")
    left = bar.seconds_left(now)
    return ", ".join([*parts, *([f"{clock(left)} left"] if left is not None else [])])


def _wall(event: RunFinished) -> str:
    wall = event.figures.get("wall_s")
    return "" if wall is None else f" after {format_value('wall_s', wall)}"
