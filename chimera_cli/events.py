"""What a run announces while it works.

A listener is any callable that takes an event. Listeners observe (dashboard, plain lines, metrics.jsonl, MLflow);
they never steer: one that fails is taken off the list, the others are told, and the run goes on.
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True, slots=True)
class RunStarted:
    """One seed of a group begins in `directory`; `total_steps` is 0 when unknown."""

    group: str
    kind: str
    seed: int
    directory: str
    total_steps: int = 0
    parameters: Mapping[str, Any] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Progress:
    """A stage without a loss (packing, feature extraction, evaluation) has `done` of `total` units (0: unknown)."""

    stage: str
    done: int
    total: int
    unit: str = "images"


@dataclass(frozen=True, slots=True)
class StepDone:
    """One optimiser step; `metrics` maps names such as `loss` or `lr` to numbers of the moment before the update."""

    step: int
    epoch: int
    metrics: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Evaluated:
    """Figures of a split at a step, by the names of `figures.FIGURES`."""

    step: int
    split: str
    figures: Mapping[str, float | None]


@dataclass(frozen=True, slots=True)
class TelemetrySampled:
    """One machine snapshot as plain numbers: `gpu_util` (0-1), `vram_used_gb`, `cpu_util`, `ram_used_gb` ..."""

    elapsed_s: float
    values: Mapping[str, float | None]


@dataclass(frozen=True, slots=True)
class Saved:
    """A file worth keeping was written: a checkpoint, a result, an evaluation."""

    path: str
    label: str
    step: int | None = None


@dataclass(frozen=True, slots=True)
class Note:
    """A sentence for the person at the terminal."""

    message: str
    level: Literal["info", "warning"] = "info"


@dataclass(frozen=True, slots=True)
class MeasureTaken:
    """A rung of the contingency ladder: what training changed by itself after `step` updates, and the reason.

    `settings` are the config keys that have another value from then on, such as `micro_batch`, and `loader_threads`.
    `back_to` is the number of updates at which it goes on, where that is not `step`.
    """

    step: int
    measure: Literal["memory", "loader", "half the learning rates", "carried over"]
    what: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    back_to: int | None = None


@dataclass(frozen=True, slots=True)
class RunFinished:
    """One seed is over; `figures` may hold nulls where a figure could not be measured."""

    seed: int
    status: Literal["finished", "failed", "interrupted"]
    figures: Mapping[str, float | None] = field(default_factory=dict)


Event = RunStarted | Progress | StepDone | Evaluated | TelemetrySampled | Saved | Note | MeasureTaken | RunFinished
Listener = Callable[[Event], None]


def ignore(_event: Event) -> None:
    """Listen to nothing: the default of functions that announce what they do."""


def broadcast(listeners: Sequence[Listener]) -> Listener:
    """Return one listener that tells all `listeners` in order and outlives the failure of any of them.

    Training and the telemetry sampler announce from different threads: one event is told to the end before the next.
    """
    active = list(listeners)
    lock = threading.RLock()

    def tell(event: Event) -> None:
        with lock:
            for listener in tuple(active):
                _tell_one(listener, event)

    def _tell_one(listener: Listener, event: Event) -> None:
        if listener not in active:
            return
        try:
            listener(event)
        except Exception as error:  # noqa: BLE001 - a broken dashboard must not cost anybody a training run
            active.remove(listener)
            name = getattr(listener, "__qualname__", type(listener).__name__)
            tell(Note(f"{name} failed and was switched off: {type(error).__name__}: {error}", "warning"))

    return tell
