"""`chimera bench train --against open_clip`: the same towers on the same pairs, by the peer's training and by ours."""

import math
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal

from chimera_cli.config import TrainConfig, validate
from chimera_cli.errors import ChimeraError, UsageError
from chimera_cli.events import Listener, Note, ignore
from chimera_cli.services.inputs import Workbench
from chimera_cli.services.learning import (
    epoch_updates,
    fresh_architecture,
    fresh_model,
    new_learner,
    open_bench,
    run_loop,
)
from chimera_cli.services.peer_process import PeerFailedError, PeerLap, RunningPeer, running_peer
from chimera_cli.services.peer_training import PeerTraining
from chimera_cli.services.time_to_target import (
    TARGET_FIGURE,
    Sprint,
    empty_cache,
    recipe_pairs,
    refuse_unfit,
    run_to_target,
)

if TYPE_CHECKING:
    from chimera_cli.services.session import SeedSession

PEERS = ("open_clip",)
# Full fine-tuning is timed in so many turns of both.
ROUNDS = 5
# Laps that a projection is taken from: before, between and after our two runs.
_PROJECTED_LAPS = 3
# Before the first timed update: workers start, memory is taken, kernels are chosen.
_WARM_UP = 1


@dataclass(frozen=True, slots=True)
class TrainRace:
    """What is measured against the peer.

    `target` of a locked recipe, to which the peer may take `give_up` times our cold time; with `peer_updates` it is
    timed for so many updates instead and its time projected. `updates` of `batch` pairs of full fine-tuning.
    `peer_lr` is the one learning rate that the peer has for all that learns.
    """

    against: str
    parts: Literal["both", "locked", "full"]
    seed: int
    target: float
    give_up: float
    peer_updates: int | None
    updates: int
    batch: int
    peer_lr: float
    peer_workers: int


def bench_train(
    home: Path, config: TrainConfig, race: TrainRace, label: str, command: str, listener: Listener = ignore
) -> dict[str, Any]:
    """Return times and rates of our training beside the peer's, on the same machine in one run.

    Writes a group of kind `bench-train`. A peer that fails is reported as failed beside our own figures. Raises
    UsageError for a peer that is unknown or not installed and for a recipe that can't be compared.
    """
    from chimera_cli.services.peers import need_peers, parse_peers
    from chimera_cli.services.provenance import group_facts
    from chimera_cli.services.session import group_session, seed_session, stoppable

    if parse_peers(race.against) != PEERS:
        raise UsageError(f"--against {race.against}: only open_clip trains", "--against open_clip")
    need_peers(PEERS)
    _refuse_incomparable(config, race)
    config = _same_model(config, listener)
    whole = full_recipe(config, race.batch)
    bench = open_bench(home, config.data, config.device, config.precision, listener)
    for part, recipe in (("full", config), ("locked", whole)):
        if race.parts != part:
            refuse_unfit(recipe, bench)
    settings = {"recipe": config.model_dump()} | asdict(race)
    facts = group_facts(command, bench.pack, settings, bench.device)
    with (
        stoppable(),
        group_session(home, "bench-train", label, [race.seed], facts) as group,
        seed_session(group, race.seed, settings, bench.device, [listener], 0) as session,
    ):
        return {"group": group.name} | _measured(bench, config, whole, race, session, listener)


def _same_model(config: TrainConfig, listener: Listener) -> TrainConfig:
    """Return the recipe without what the peer has none of: features beside a tower's last, more heads, more positives.

    The peer takes captions of one image for each other's negatives and mixes nothing, so that neither is done.
    """
    values = config.model_dump()
    for section, key, without, why in (
        ("heads", "queries", 0, "both have the same heads, and the peer pools by means"),
        ("image", "stages", 0, "both have the same towers, and the peer knows no stages"),
        ("text", "hidden_states", [], "both have the same towers, and the peer pools the last"),
        ("heads", "members", 1, "both have the same heads, and the peer knows no ensembles"),
    ):
        if values[section][key] != without:
            listener(Note(f"{section}.{key}: {without} in this race: {why}"))
            values[section][key] = without
    if config.mixup:
        listener(Note("mixup: 0 in this race: both have the same pairs, and the peer mixes none"))
        values["mixup"] = 0.0
    if (captions := config.captions_per_image) > 1:
        batch = max(2, config.batch // captions)
        listener(Note(f"captions_per_image: 1, batch: {batch} in this race: the peer takes them for negatives"))
        values |= {"captions_per_image": 1, "batch": batch}
    return validate(TrainConfig, values, "the race")


def _refuse_incomparable(config: TrainConfig, race: TrainRace) -> None:
    if race.parts != "full" and not config.image.locked:
        raise UsageError("the way to a recall is compared with a locked image tower", "--parts full, or another recipe")
    if race.parts != "full" and config.image.learn_blocks:
        raise UsageError("the peer locks an image tower as a whole", "--set image.learn_blocks=0")
    if config.loss.kind != "infonce":
        raise UsageError("the peer is trained with its softmax loss alone", "--set loss.kind=infonce")


def _measured(
    bench: Workbench,
    config: TrainConfig,
    whole: TrainConfig,
    race: TrainRace,
    session: "SeedSession",
    listener: Listener,
) -> dict[str, Any]:
    from chimera_cli.services.session import memory_figures

    started_at = time.perf_counter()
    details: dict[str, Any] = asdict(race) | {"locked": None, "full": None, "device": bench.device.type}
    with TemporaryDirectory(prefix="chimera-peer-files-") as folder:
        files = _peer_files(bench, Path(folder), session.tell)
        if race.parts != "full":
            task = _task(bench, config, race, files, config.epochs * _updates(bench, config))
            details["locked"] = race_to_target(bench, config, race, task, session.tell, listener)
        if race.parts != "locked":
            task = _task(bench, whole, race, files, race.updates + _WARM_UP)
            details["full"] = race_of_updates(bench, whole, race, task, session.tell)
    figures = memory_figures(bench.device) | _compared(details) | {"wall_s": time.perf_counter() - started_at}
    return session.finish(figures, details)


def _compared(details: Mapping[str, Any]) -> dict[str, float | None]:
    """Return times, rates and ratios by name; how a ratio is to be read says the `basis` of the details."""
    figures: dict[str, float | None] = {}
    if locked := details["locked"]:
        for kind in ("cold", "cached"):
            run = locked[kind]
            figures |= {
                f"{kind}_s": run["wall_s"] if run["reached"] else None,
                f"ratio_{kind}": locked[f"ratio_{kind}"],
            }
        figures |= {"peer_s": locked["peer_s"], "peer_pairs_per_s": locked["peer"]["pairs_per_s"]}
    if full := details["full"]:
        figures |= {"full_pairs_per_s": full["ours_pairs_per_s"], "full_peer_pairs_per_s": full["peer_pairs_per_s"]}
        figures |= {"ratio_full": full["ratio"]}
    return figures


def full_recipe(config: TrainConfig, batch: int) -> TrainConfig:
    """Return the recipe with both towers learning whole, without what needs cached features, at another batch."""
    values = config.model_dump()
    values["image"] |= {"locked": False, "learn_blocks": 0, "stages": 0}
    values["text"] |= {"learn_layers": None, "hidden_states": []}
    values["heads"]["queries"] = 0
    values["augmentation"]["views"] = 1
    values |= {"feature_noise": 0.0, "mixup": 0.0, "captions_per_image": 1, "batch": batch, "micro_batch": None}
    return validate(TrainConfig, values, "full fine-tuning")


def _updates(bench: Workbench, config: TrainConfig) -> int:
    """Return the updates of an epoch."""
    return epoch_updates(bench.pack, config.batch, config.captions_per_image)


# ---- files of the peer ----------------------------------------------------------------------------------------------


def _peer_files(bench: Workbench, folder: Path, tell: Listener) -> dict[str, Any]:
    """Write the images of train and dev as JPEG files and the table of train's captions; return their names."""
    from chimera_cli.services.peer_files import write_photos

    pack = bench.pack
    paths = {}
    try:
        for split in ("train", "dev"):
            (folder / split).mkdir()
            indices = pack.split_indices(split).tolist()
            paths[split] = write_photos(pack.images, indices, folder / split, False, tell).paths
        train = pack.captions("train")
        _write_table(folder / "train.csv", [paths["train"][owner] for owner in train.image_positions], train.texts)
    except OSError as error:
        raise ChimeraError(
            f"{folder} can't be written: {error.strerror or error}", "set TMPDIR to a folder with some free space"
        ) from error
    dev = pack.captions("dev")
    return {
        "train_csv": str(folder / "train.csv"),
        "owners": tuple(map(int, train.image_positions)),
        "dev_images": tuple(map(str, paths["dev"])),
        "dev_captions": tuple(dev.texts),
        "dev_owners": tuple(map(int, dev.image_positions)),
    }


def _write_table(path: Path, images: list[Path], captions: Any) -> None:
    import csv

    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, delimiter="\t")
        writer.writerow(("filepath", "title"))
        writer.writerows(zip(images, captions, strict=True))


def _task(bench: Workbench, config: TrainConfig, race: TrainRace, files: Mapping[str, Any], total: int) -> PeerTraining:
    """Return what the peer is asked for: towers, weights, batch, order and schedule are those of the recipe."""
    return PeerTraining(
        **files,
        image_weights=config.image.weights,
        image_size=config.image.image_size,
        image_locked=config.image.locked,
        text_weights=config.text.weights,
        learn_layers=config.text.learn_layers,
        max_tokens=config.text.max_tokens,
        head=config.heads.kind,
        dim=config.heads.dim,
        temperature=config.loss.temperature,
        batch=config.batch,
        total=total,
        lr=race.peer_lr,
        weight_decay=config.optimiser.weight_decay,
        warmup_share=config.optimiser.warmup_share,
        clip_norm=config.optimiser.clip_norm,
        seed=race.seed,
        device=bench.device.type,
        precision=bench.precision,
        workers=race.peer_workers,
    )


# ---- the way to a recall --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class PeerRun:
    """How far the peer came: its laps, and whether it `reached` the target, was `stopped`, or `failed` and why."""

    laps: tuple[PeerLap, ...] = ()
    reached: bool = False
    stopped: bool = False
    failed: str | None = None
    settings: Mapping[str, Any] | None = None

    @property
    def seconds(self) -> float:
        """Return the seconds of its updates; building the model, its first update and evaluations are not in it."""
        return math.fsum(lap.seconds for lap in self.laps)

    @property
    def pairs_per_s(self) -> float | None:
        """Return its rate over all laps, None where it made none."""
        return sum(lap.pairs for lap in self.laps) / self.seconds if self.laps else None


def race_to_target(
    bench: Workbench, config: TrainConfig, race: TrainRace, task: PeerTraining, tell: Listener, silent: Listener
) -> dict[str, Any]:
    """Return our cold and cached runs to the target and the peer's, its laps before, between and after ours.

    The peer stands still while ours run. `silent` hears our second run, whose steps are those of the first again.
    """
    lap_updates = _updates(bench, config)
    if race.peer_updates is not None:
        lap_updates = math.ceil(race.peer_updates / _PROJECTED_LAPS)
    limit = task.total if race.peer_updates is None else _PROJECTED_LAPS * lap_updates
    with running_peer(task, tell) as peer, empty_cache(bench) as fresh:
        rival = _Rival(peer, race, lap_updates, limit, tell)
        run = rival.go_on(PeerRun(settings=peer.settings, failed=peer.failed), _WARM_UP, warm_up=True)
        run = rival.go_on(run, lap_updates)
        cold = run_to_target(fresh, config, race.seed, race.target, tell)
        tell(Note(f"cold: {_told(cold, race.target)}"))
        run = rival.go_on(run, lap_updates, cold)
        cached = run_to_target(fresh, config, race.seed, race.target, silent)
        tell(Note(f"cached: {_told(cached, race.target)}"))
        while not rival.is_done(run, cold):
            run = rival.go_on(run, lap_updates, cold)
    return summary(cold, cached, run, race) | {"batch": config.batch, "image_size": config.image.image_size}


def _told(run: Sprint, target: float) -> str:
    recall = f"t2i R@10 {run.figures.get(TARGET_FIGURE) or 0:.3f}"
    return f"{run.wall_s:.1f} s to {recall}" if run.reached else f"{target:g} was missed, {recall} at best"


@dataclass(frozen=True, slots=True)
class _Rival:
    """The peer as it is driven: `lap_updates` at a time, `limit` updates at most."""

    peer: RunningPeer
    race: TrainRace
    lap_updates: int
    limit: int
    tell: Listener

    def go_on(self, run: PeerRun, updates: int, ours: Sprint | None = None, warm_up: bool = False) -> PeerRun:
        """Return the run after one more lap; the laps of a warm-up are made, not counted."""
        if self.is_done(run, ours):
            return run
        projected = self.race.peer_updates is not None
        patience = None if ours is None or projected else self.race.give_up * ours.wall_s - run.seconds
        try:
            lap = self.peer.lap(updates, evaluate=not (projected or warm_up), limit_s=patience)
        except PeerFailedError as error:
            self.tell(Note(f"{self.race.against} failed: {error}", "warning"))
            return replace(run, failed=str(error))
        if warm_up:
            return run
        found = (lap.figures or {}).get(TARGET_FIGURE) or 0.0
        reached = not lap.stopped and lap.figures is not None and found >= self.race.target
        return replace(run, laps=(*run.laps, lap), reached=reached, stopped=lap.stopped)

    def is_done(self, run: PeerRun, ours: Sprint | None) -> bool:
        """Whether the peer has nothing more to show: it is there, failed, out of updates, or far behind ours."""
        made = sum(lap.updates for lap in run.laps)
        if run.failed or run.reached or run.stopped or made >= self.limit:
            return True
        if ours is None or self.race.peer_updates is not None:
            return False
        return not ours.reached or run.seconds >= self.race.give_up * ours.wall_s


def summary(cold: Sprint, cached: Sprint, run: PeerRun, race: TrainRace) -> dict[str, Any]:
    """Return both runs of ours, the peer's, and by how much ours are shorter.

    `basis` says what the ratios are: `measured` where both reached the target; `at least` where the peer was stopped
    or out of epochs before; `projected` where its rate was measured and it is taken to need as many pairs as ours;
    None where ours missed the target or the peer failed, and then there is no ratio.
    """
    seconds: float | None = run.seconds
    basis: str | None = "measured" if run.reached else "at least"
    if race.peer_updates is not None:
        basis = "projected"
        seconds = None if run.pairs_per_s is None else cold.pairs / run.pairs_per_s
    if run.failed or not (cold.reached and cached.reached) or not seconds:
        basis, seconds = None, None
    last = next((lap.figures for lap in reversed(run.laps) if lap.figures), None)
    return {
        "cold": asdict(cold),
        "cached": asdict(cached),
        "peer": {
            "failed": run.failed,
            "reached": run.reached,
            "stopped": run.stopped,
            "seconds": run.seconds,
            "pairs": sum(lap.pairs for lap in run.laps),
            "pairs_per_s": run.pairs_per_s,
            "figures": last,
            "laps": [asdict(lap) for lap in run.laps],
            "settings": dict(run.settings or {}),
        },
        "basis": basis,
        "peer_s": seconds,
        "ratio_cold": None if seconds is None else seconds / cold.wall_s,
        "ratio_cached": None if seconds is None else seconds / cached.wall_s,
        "ours_pairs_per_s": cached.pairs / cached.train_s,
    }


# ---- full fine-tuning -----------------------------------------------------------------------------------------------


def race_of_updates(
    bench: Workbench, config: TrainConfig, race: TrainRace, task: PeerTraining, tell: Listener
) -> dict[str, Any]:
    """Return pairs per second of both over the same number of updates, taken in turn, after one to warm up.

    The ratio is ours to the peer's, the median of the rounds' own ratios: what else the machine does in a round slows
    both.
    """
    rounds = min(ROUNDS, race.updates)
    shares = [race.updates // rounds + (number < race.updates % rounds) for number in range(rounds)]
    model = fresh_model(fresh_architecture(config), race.seed, bench.device, config.checkpointing)
    ours: list[float] = []
    theirs: list[PeerLap] = []
    failed: str | None = None
    with running_peer(task, tell) as peer, closing(recipe_pairs(bench, model, config, race.seed, tell)) as pairs:
        failed = peer.failed
        step = _steps(bench, config, model, pairs, race.updates + _WARM_UP, tell)
        for number, updates in enumerate([_WARM_UP, *shares]):
            rate = step(updates)
            lap, failed = _lap_or_why(peer, updates, failed)
            if number:
                ours.append(rate)
                theirs += [lap] if lap else []
    rates = [lap.pairs / lap.seconds for lap in theirs]
    ratios = [] if failed else [one / other for one, other in zip(ours, rates, strict=True)]
    return {
        "batch": config.batch,
        "image_size": config.image.image_size,
        "updates": race.updates,
        "ours_pairs_per_s": median(ours),
        "ours_by_round": ours,
        "peer_pairs_per_s": None if failed else median(rates),
        "peer_by_round": rates,
        "ratio": median(ratios) if ratios else None,
        "ratio_by_round": ratios,
        "failed": failed,
        "settings": dict(peer.settings or {}),
    }


def _lap_or_why(peer: RunningPeer, updates: int, failed: str | None) -> tuple[PeerLap | None, str | None]:
    """Return the next lap, or why there is none."""
    if failed:
        return None, failed
    try:
        return peer.lap(updates, evaluate=False), None
    except PeerFailedError as error:
        return None, str(error)


def _steps(
    bench: Workbench, config: TrainConfig, model: Any, pairs: Any, total: int, tell: Listener
) -> Callable[[int], float]:
    """Return what makes the next n updates of one training of ours, and returns its pairs per second in them."""
    from chimera_cli.training.loop import LoopState

    learner, state = new_learner(model, config.optimiser, bench, total, config.ema), LoopState()

    def step(updates: int) -> float:
        pairs_before, seconds_before = state.pairs, state.train_s
        run_loop(
            learner,
            pairs,
            config.loss,
            bench,
            updates=state.done + updates,
            clip_norm=config.optimiser.clip_norm,
            micro_batch=config.micro_batch,
            state=state,
            listener=tell,
        )
        return (state.pairs - pairs_before) / (state.train_s - seconds_before)

    return step
