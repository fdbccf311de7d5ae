"""What a dashboard shows, as one frozen value, and how each event changes it; nothing here draws or reads a clock."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from chimera_cli.events import (
    Evaluated,
    Event,
    MeasureTaken,
    Note,
    Progress,
    RunFinished,
    RunStarted,
    Saved,
    StepDone,
    TelemetrySampled,
)

NOTES_SHOWN = 3
# Enough for a sparkline on any screen; when it is full, neighbours are averaged and the stride doubles.
_LOSSES_KEPT = 512


@dataclass(frozen=True, slots=True)
class LossCurve:
    """A loss over any number of steps in at most 512 points, each the mean of `stride` steps; `rest` awaits its own."""

    points: tuple[float, ...] = ()
    stride: int = 1
    rest: tuple[float, ...] = ()
    first: float | None = None
    last: float | None = None

    def add(self, loss: float) -> "LossCurve":
        """Return the curve with one more step."""
        rest = (*self.rest, loss)
        first = loss if self.first is None else self.first
        if len(rest) < self.stride:
            return LossCurve(self.points, self.stride, rest, first, loss)
        points = (*self.points, sum(rest) / len(rest))
        if len(points) < _LOSSES_KEPT:
            return LossCurve(points, self.stride, (), first, loss)
        pairs = zip(points[::2], points[1::2], strict=True)
        return LossCurve(tuple((a + b) / 2 for a, b in pairs), 2 * self.stride, (), first, loss)


@dataclass(frozen=True, slots=True)
class Bar:
    """Progress of one stage: `done` of `total` (0: unknown) `unit`s; times are seconds on the caller's clock.

    `began_with` was done when the clock began: a resumed run's earlier steps say nothing about its speed.
    """

    name: str
    done: int
    total: int
    unit: str
    began_at: float
    began_with: int
    changed_at: float

    @property
    def complete(self) -> bool:
        return 0 < self.total <= self.done

    @property
    def share(self) -> float | None:
        """Return how much is done, 0-1; None where the total is unknown."""
        return min(self.done / self.total, 1.0) if self.total > 0 else None

    @property
    def seconds(self) -> float:
        """Return how long the stage has taken up to its last change."""
        return self.changed_at - self.began_at

    @property
    def per_s(self) -> float | None:
        """Return the units done in a second so far; None where that can't be said yet."""
        gained = self.done - self.began_with
        return gained / self.seconds if gained > 0 and self.seconds > 0 else None

    def advanced(self, done: int, total: int, now: float) -> "Bar":
        """Return the bar after its stage has come to `done` at `now`."""
        return replace(self, done=done, total=total, changed_at=now)

    def seconds_left(self, now: float) -> float | None:
        """Return the seconds that the rest takes at the speed so far; None where that can't be said yet."""
        gained, spent = self.done - self.began_with, self.changed_at - self.began_at
        if self.total <= 0 or gained <= 0 or spent <= 0:
            return None
        left = (self.total - self.done) * spent / gained - (now - self.changed_at)
        return max(left, 0.0)


@dataclass(frozen=True, slots=True)
class FinishedSeed:
    """A seed of this display that is over."""

    seed: int
    status: str
    figures: Mapping[str, float | None]


@dataclass(frozen=True, slots=True)
class DashboardState:
    """All that is on the screen. `limits` are SLO limits by figure name; `machine` the newest telemetry by name."""

    title: str
    limits: Mapping[str, float]
    began_at: float
    group: str = ""
    seed: int | None = None
    total_steps: int = 0
    steps: Bar | None = None
    stage: Bar | None = None
    epoch: int = 0
    loss: LossCurve = LossCurve()
    metrics: Mapping[str, float] = field(default_factory=dict)
    latest: Evaluated | None = None
    best: Evaluated | None = None
    machine: Mapping[str, float | None] = field(default_factory=dict)
    notes: tuple[Note, ...] = ()
    hidden_warnings: tuple[Note, ...] = ()
    finished: tuple[FinishedSeed, ...] = ()
    measures: tuple[MeasureTaken, ...] = ()


def advance(state: DashboardState, event: Event, now: float) -> DashboardState:
    """Return the state after `event`, which arrived at `now` (seconds on the same clock as `began_at`)."""
    match event:
        case RunStarted():
            return _started(state, event)
        case Progress():
            return replace(state, stage=_stage(state.stage, event, now))
        case StepDone():
            return _stepped(state, event, now)
        case Evaluated():
            return replace(state, latest=event, best=event if _better(event, state.best) else state.best)
        case TelemetrySampled():
            return replace(state, machine=event.values)
        case Note():
            return _noted(state, event)
        case MeasureTaken():
            measured = replace(state, measures=(*state.measures, event))
            return _noted(_back(measured, event, now), Note(measure_words(event), "warning"))
        case RunFinished():
            over = FinishedSeed(event.seed, event.status, event.figures)
            return replace(state, finished=(*state.finished, over))
        case Saved():
            return state


def _started(state: DashboardState, event: RunStarted) -> DashboardState:
    """Return the state of a new seed: what belonged to the seed before is gone, machine and notes stay."""
    return replace(
        state,
        group=event.group,
        seed=event.seed,
        total_steps=event.total_steps,
        steps=None,
        stage=None,
        epoch=0,
        loss=LossCurve(),
        metrics={},
        latest=None,
        best=None,
        measures=(),
    )


def measure_words(event: MeasureTaken) -> str:
    """Return a contingency measure as the sentence that a person is told."""
    return f"contingency at update {event.step:,}: {event.what}"


def _back(state: DashboardState, event: MeasureTaken, now: float) -> DashboardState:
    """Return the state with the progress taken back to where training goes on, where that is not where it stood."""
    if event.back_to is None or state.steps is None:
        return state
    done = min(event.back_to, state.steps.done)
    bar = Bar(state.steps.name, done, state.total_steps, state.steps.unit, now, done, now)
    if done == 0:
        return replace(state, steps=bar, loss=LossCurve(), latest=None, best=None)
    return replace(state, steps=bar)


def _stage(bar: Bar | None, event: Progress, now: float) -> Bar:
    if bar is None or bar.name != event.stage or event.done < bar.done:
        return Bar(event.stage, event.done, event.total, event.unit, now, event.done, now)
    return bar.advanced(event.done, event.total, now)


def _stepped(state: DashboardState, event: StepDone, now: float) -> DashboardState:
    # Steps are counted from 0 and announced when they are over.
    steps, done = state.steps, event.step + 1
    if steps is None:
        steps = Bar("training", done, state.total_steps, "steps", now, done, now)
    loss = event.metrics.get("loss")
    return replace(
        state,
        steps=steps.advanced(done, state.total_steps, now),
        epoch=event.epoch,
        metrics=event.metrics,
        loss=state.loss if loss is None else state.loss.add(loss),
    )


def _noted(state: DashboardState, event: Note) -> DashboardState:
    """Return the state with one more note; a warning that scrolls out of sight is kept to be printed at the end."""
    notes = (*state.notes, event)
    gone = tuple(note for note in notes[:-NOTES_SHOWN] if note.level == "warning")
    return replace(state, notes=notes[-NOTES_SHOWN:], hidden_warnings=(*state.hidden_warnings, *gone))


def _better(event: Evaluated, best: Evaluated | None) -> bool:
    """Return whether `event` beats `best` by `rsum`, by which the best checkpoint is chosen too."""
    new = event.figures.get("rsum")
    old = best.figures.get("rsum") if best else None
    return new is not None and (old is None or new > old)
