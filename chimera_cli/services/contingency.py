"""The contingency ladder of a seed: which rungs it has taken, what it is trained with since, and which comes next."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chimera_cli.config import TrainConfig
from chimera_cli.errors import ChimeraError
from chimera_cli.events import MeasureTaken
from chimera_cli.runs import EVENTS, json_line, read_json_lines, write_text
from chimera_cli.services.resume import BEGUN_CONFIG, HALVED, SIDE, Kept, halvings, kept_by

if TYPE_CHECKING:
    from chimera_cli.services.session import SeedSession
    from chimera_cli.training.contingency import LoaderWatch, Relief
    from chimera_cli.training.loop import LoopState

# A smaller image begins the seed anew. For speed alone no more than this share of the updates is given up.
_GIVEN_UP_SHARE = 0.25
# What changes the function that is trained, and therefore stands in config.yaml.
_CHANGES_FUNCTION = (SIDE,)
# How many threads read for training: no key of a config.
_THREADS = "loader_threads"


@dataclass(slots=True)
class Ladder:
    """What a seed changed by itself: `config` is what it was begun with, `taken` the rungs since, in their order.

    One that is not `active` takes none.
    """

    config: TrainConfig
    session: "SeedSession"
    active: bool
    taken: list[MeasureTaken] = field(default_factory=list)

    @property
    def settings(self) -> dict[str, Any]:
        """Return the values that the rungs taken have given to keys."""
        return {key: value for measure in self.taken for key, value in measure.settings.items()}

    @property
    def now(self) -> TrainConfig:
        """Return the config by which the seed is trained now."""
        return _with(self.config, {key: value for key, value in self.settings.items() if key != _THREADS})

    @property
    def loader_threads(self) -> int | None:
        """Return how many threads read for training, None for as many as ever."""
        return self.settings.get(_THREADS)

    def take(
        self, step: int, measure: Any, what: str, settings: Mapping[str, Any] | None = None, back_to: int | None = None
    ) -> None:
        """Take a rung after `step` updates: from now on it counts, and everybody is told."""
        event = MeasureTaken(step, measure, what, dict(settings or {}), back_to)
        self.taken.append(event)
        tell_config(self)
        self.session.tell(event)

    def smaller_image(self) -> int | None:
        """Return the next smaller side of the images; None where there is none or the image tower does not learn."""
        from chimera_cli.training.contingency import smaller_side

        image = self.now.image
        return None if image.locked else smaller_side(image.image_size)


def _with(config: TrainConfig, settings: Mapping[str, Any]) -> TrainConfig:
    from chimera_cli.slo.contingency import changed

    return TrainConfig.model_validate(changed(config.model_dump(), settings)) if settings else config


def begin_ladder(
    config: TrainConfig,
    session: "SeedSession",
    active: bool,
    kept: Kept,
    carried: Mapping[str, Any],
    leads: bool = True,
) -> Ladder:
    """Return the ladder of a seed as its checkpoint knows it, the record cut back to that by the process that `leads`.

    A seed that begins takes over what the one before it had `carried` to its end: their figures are then of one
    function, and memory runs out once. So it does where the ladder is not `active`.
    """
    path = session.directory / EVENTS
    if leads and path.exists():
        write_text(path, "".join(json_line(row) for row in read_json_lines(path)[: len(kept.measures)]))
    ladder = Ladder(config, session, active, list(kept.measures))
    tell_config(ladder)
    if carried and kept.content is None:
        words = ", ".join(f"{key} {value}" for key, value in carried.items())
        ladder.take(0, "carried over", f"begun with what the seed before it came to: {words}", carried)
    return ladder


def carried_on(result: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that a finished seed came to, for the one after it."""
    measures = result["details"].get("contingency") or ()
    return {key: value for measure in measures for key, value in (measure.get("settings") or {}).items()}


def tell_config(ladder: Ladder) -> None:
    """Let config.yaml tell the function that is trained; what the seed was begun with stays beside it."""
    import yaml

    changes = {key: value for key, value in ladder.settings.items() if key in _CHANGES_FUNCTION}
    if not changes:
        return
    for name, config in ((BEGUN_CONFIG, ladder.config), ("config.yaml", _with(ladder.config, changes))):
        write_text(ladder.session.directory / name, yaml.safe_dump(config.model_dump(), sort_keys=False))


# ---- the next rung --------------------------------------------------------------------------------------------------


def relief_of(ladder: Ladder, state: "LoopState") -> "Relief":
    """Return what is done inside a step where memory runs out; each measure is a rung of the ladder."""
    from chimera_cli.training.contingency import Relief

    def taken(what: str, settings: Mapping[str, Any]) -> None:
        ladder.take(state.done, "memory", what, settings)

    return Relief(ladder.now.micro_batch, ladder.now.checkpointing, taken)


def watch_of(ladder: Ladder) -> "LoaderWatch | None":
    """Return what watches the loader, None where no images are loaded or nothing is left to do about it."""
    from chimera_cli.training.contingency import LoaderWatch

    loads = ladder.config.stream is not None or not ladder.config.image.locked
    left = ladder.loader_threads is None or ladder.smaller_image() is not None
    return LoaderWatch() if ladder.active and loads and left else None


def wants_rung(ladder: Ladder, watch: "LoaderWatch | None", state: "LoopState", total: int) -> bool:
    """Return whether the loader is too slow and there is a rung for it: a smaller image only while little is lost."""
    if watch is None or not watch.too_slow:
        return False
    return ladder.loader_threads is None or state.done <= _GIVEN_UP_SHARE * total


def faster_loader(ladder: Ladder, watch: "LoaderWatch", identity: Mapping[str, Any]) -> Kept:
    """Return from where to go on, with more threads that read or else with smaller images."""
    from chimera_cli.runtime import cpu_cores
    from chimera_cli.training.contingency import WAIT_SHARE

    kept = kept_by(ladder.session.directory, identity, ladder.session.tell)
    why = f"training waits {100 * (watch.share or 0.0):.0f} % of its time for data (more than {100 * WAIT_SHARE:.0f} %)"
    if ladder.loader_threads is None:
        # A stream is decoded by a thread per core already, a pack read by a single one.
        threads = 2 * cpu_cores() if ladder.config.stream is not None else max(2, cpu_cores())
        ladder.take(kept.updates, "loader", f"{why}: {threads} threads read for it", {_THREADS: threads})
        return kept
    side = ladder.smaller_image()
    return kept if side is None else _begin_smaller(ladder, kept.updates, "loader", why, side)


def less_memory(ladder: Ladder, identity: Mapping[str, Any], error: BaseException) -> Kept:
    """Return from where to go on after memory ran out where no measure inside a step helped.

    Outside of the gradient that is half the micro-batch, from the last good step; else smaller images. Raises `error`
    where nothing is left.
    """
    config = ladder.now
    kept = kept_by(ladder.session.directory, identity, ladder.session.tell)
    size = min(config.micro_batch or config.batch, config.batch)
    if size > 1 and config.image.weights != "tiny":
        what = f"out of memory: micro_batch {-(-size // 2)} in place of {size}, back to update {kept.updates}"
        _cut_back(ladder.session.directory, kept.updates)
        ladder.take(kept.updates, "memory", what, {"micro_batch": -(-size // 2)}, kept.updates)
        return kept
    side = ladder.smaller_image()
    if side is None:
        raise error
    return _begin_smaller(ladder, kept.updates, "memory", "out of memory", side)


def half_the_rates(ladder: Ladder, identity: Mapping[str, Any], error: ChimeraError) -> Kept:
    """Return the last good checkpoint to go on from at half the rates, the records cut back to it.

    Raises ChimeraError where that was done often enough.
    """
    from chimera_cli.training.contingency import MOST_HALVINGS

    if halvings(ladder.taken) >= MOST_HALVINGS:
        raise ChimeraError(
            f"{error.message}, after {MOST_HALVINGS} times half the learning rate from the last good step",
            "the rates are not the reason: set precision: float32, or look for broken images or features",
        ) from error
    kept = kept_by(ladder.session.directory, identity, ladder.session.tell)
    what = f"{error.message}: back to update {kept.updates} at half the learning rates"
    _cut_back(ladder.session.directory, kept.updates)
    ladder.take(kept.updates, HALVED, what, back_to=kept.updates)
    return kept


def _begin_smaller(ladder: Ladder, step: int, measure: str, why: str, side: int) -> Kept:
    """Return the beginning: with smaller images the seed is trained anew, so that its figures are of one function.

    The checkpoints go first: a crash at any moment leaves a seed that goes on whole, or one that begins.
    """
    from chimera_cli.training.checkpoints import drop_checkpoints

    what = (
        f"{why}: images of {side} px in place of {ladder.now.image.image_size}. THE FUNCTION CHANGES: the seed begins "
        "anew, and is evaluated and recorded with them"
    )
    directory = ladder.session.directory
    drop_checkpoints(directory / "checkpoints")
    _cut_back(directory, 0)
    ladder.take(step, measure, what, {SIDE: side}, 0)
    return Kept()


def _cut_back(directory: Path, updates: int) -> None:
    """Cut the series back, before anybody is told: who then reads them finds none of the steps that are made again."""
    from chimera_cli.services.session import cut_back

    cut_back(directory, updates)


def as_rows(measures: Sequence[MeasureTaken]) -> list[dict[str, Any]]:
    """Return measures as result.json and checkpoints hold them."""
    from dataclasses import asdict

    return [asdict(measure) for measure in measures]
