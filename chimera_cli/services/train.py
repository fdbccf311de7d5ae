"""`chimera train`: proof of life, and real training over seeds."""

import math
import os
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from chimera_cli.config import Heads, ImageTower, Loss, Optimiser, SanityConfig, TextTower, TrainConfig
from chimera_cli.errors import ChimeraError, UsageError
from chimera_cli.events import Listener, Note, ignore
from chimera_cli.figures import RETRIEVAL
from chimera_cli.runs import Group
from chimera_cli.services.inputs import Workbench, dev_evaluation, training_batches, warm_caches
from chimera_cli.services.resume import (
    Kept,
    finished_result,
    highest,
    keeper_of,
    kept_by,
    note_other_source,
    refuse_changes,
    relief_of,
    step_back,
    take_up,
)
from chimera_cli.services.streaming import Stream, open_stream, stream_pairs, warm_dev

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from chimera_cli.data.pack import Pack
    from chimera_cli.models.dual_encoder import Architecture, DualEncoder
    from chimera_cli.services.session import SeedSession, Stop
    from chimera_cli.training.batches import PairBatch
    from chimera_cli.training.checkpoints import Learner
    from chimera_cli.training.distributed import Processes
    from chimera_cli.training.loop import Figures, Outcome

# The law compares 200 updates: loss[0] against loss[200], and the mean of the last ten losses against chance.
_TAIL = 10
SANITY_LOSS_DROP = 0.15
SANITY_WALL_S = 25 * 60
# More updates than any benchmark makes; the learning rate of so long a run is still warming up.
_ENDLESS = 1_000_000


# ---- proof of life --------------------------------------------------------------------------------------------------


def train_sanity(
    home: Path, config: SanityConfig, seed: int, command: str, listener: Listener = ignore, shuffled: bool = False
) -> dict[str, Any]:
    """Return the result of 200 updates of both towers: did the loss fall, and for the right reason?

    `shuffled` pairs every image with another image's caption: the control that must fail. Writes a group of kind
    `sanity`; the caller decides the exit code from `details.passed`.
    """
    from chimera_cli.services.provenance import group_facts
    from chimera_cli.services.session import group_session, seed_session
    from chimera_cli.tracking import track

    bench = _bench(home, config.data, config.device, config.precision, listener)
    _refuse_unfit_pack(bench.pack, config.batch, ("train",))
    facts = group_facts(command, bench.pack, config.model_dump(), bench.device)
    label = "shuffled" if shuffled else ""
    with group_session(home, "sanity", label, [seed], facts) as group, track(home, group, listener) as tracker:
        listeners = [listener, tracker]
        with seed_session(group, seed, config.model_dump(), bench.device, listeners, config.updates) as session:
            return {"group": group.name} | _sanity_seed(bench, config, seed, session, shuffled)


def _sanity_seed(
    bench: Workbench, config: SanityConfig, seed: int, session: "SeedSession", shuffled: bool
) -> dict[str, Any]:
    from chimera_cli.services.session import memory_figures

    started = time.perf_counter()
    architecture = _architecture(config.image, config.text, config.heads, config.loss, flipped_view=False)
    model = _fresh_model(architecture, seed, bench.device)
    batches = training_batches(bench, model, config.batch, seed, session.tell, shuffled=shuffled)
    learner = _learner(model, config.optimiser, bench, config.updates)
    outcome = _run_loop(
        learner,
        batches,
        config.loss,
        bench,
        updates=config.updates,
        clip_norm=config.optimiser.clip_norm,
        closing_loss=True,
        listener=session.tell,
    )
    tail = sum(outcome.losses[-_TAIL:]) / _TAIL
    # Batches are as even as can be, so their size may be a little off the configured one.
    images = len(bench.pack.split_indices("train"))
    chance = math.log(images / epoch_updates(bench.pack, config.batch))
    figures: dict[str, float | None] = {
        "loss_first": outcome.losses[0],
        "loss_last": outcome.losses[-1],
        "loss_drop": outcome.losses[0] - outcome.losses[-1],
        "loss_tail_mean": tail,
        "chance_loss": chance,
        "wall_s": time.perf_counter() - started,
        "pairs_per_s": outcome.pairs / outcome.train_s,
        "gpu_util_mean": session.mean_gpu_util(),
    } | memory_figures(bench.device)
    drop, wall_s = outcome.losses[0] - outcome.losses[-1], time.perf_counter() - started
    passed = drop >= SANITY_LOSS_DROP and tail <= chance - SANITY_LOSS_DROP and wall_s <= SANITY_WALL_S
    return session.finish(figures, {"passed": passed} | _sanity_details(bench, config, outcome, shuffled))


def _sanity_details(bench: Workbench, config: SanityConfig, outcome: "Outcome", shuffled: bool) -> dict[str, Any]:
    return {
        "batch": config.batch,
        "image_size": config.image.image_size,
        "updates": outcome.updates,
        "precision": bench.precision,
        "device": bench.device.type,
        "shuffled": shuffled,
        "losses": list(outcome.losses),
    }


# ---- real training --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Job:
    """What all seeds of a group are trained with; `total` updates each."""

    bench: Workbench
    config: TrainConfig
    stream: Stream | None
    total: int
    processes: "Processes"
    stop: "Stop"
    resumed: bool
    contingency: bool

    def identity(self, seed: int) -> dict[str, Any]:
        """Return what a checkpoint must have been made with for this seed to go on from it."""
        stream = None if self.stream is None else self.stream.facts()["digest"]
        return {"seed": seed, "pack": self.bench.pack.fingerprint, "stream": stream} | self.config.model_dump()


def train_full(
    home: Path,
    config: TrainConfig,
    seeds: Sequence[int],
    label: str,
    command: str,
    listener: Listener = ignore,
    resumed: Group | None = None,
    contingency: Literal["off", "auto"] = "off",
) -> dict[str, Any]:
    """Return the results of one group with one run per seed, the best checkpoint of each chosen by dev `rsum`.

    With `stream` set the pairs come from shards and the pack gives the dev split alone. `resumed` goes on instead of
    beginning anew: finished seeds stay, the interrupted one goes on from its checkpoint, the others are trained. Under
    `torchrun` each process trains on its share and all return the results. With `contingency` auto it helps itself
    where memory runs out or the loss is no number, and says so in the details of the result. Raises ChimeraError where
    the pack, the shards or a setting make training impossible, UsageError where the settings are not those of
    `resumed`.
    """
    from chimera_cli.services.provenance import group_facts
    from chimera_cli.services.session import stoppable
    from chimera_cli.training.distributed import joined

    with joined(_own_device(config.device)) as processes, stoppable() as stop:
        tell = listener if processes.leads else ignore
        # A run without a pack's name goes on with the pack it was begun with, not with one that is newer.
        data = config.data if resumed is None or config.data else str(resumed.facts["pack"]["name"])
        bench = _bench(home, data, config.device, config.precision, tell)
        _refuse_unfit_pack(bench.pack, config.batch, ("train", "dev") if config.stream is None else ("dev",))
        _limit_memory(config.vram_limit_gb, bench.device)
        stream = open_stream(config, bench.pack, tell)
        _refuse_shares(config, processes, contingency)
        facts = group_facts(command, bench.pack, config.model_dump(), bench.device)
        facts |= {} if stream is None else {"stream": stream.facts()}
        if resumed is not None:
            refuse_changes(resumed, config, seeds, facts)
            note_other_source(resumed, facts, tell)
        total = config.epochs * _epoch_updates(bench, config, stream)
        job = _Job(bench, config, stream, total, processes, stop, resumed is not None, contingency == "auto")
        with _group(home, label, seeds, facts, resumed, command, tell, processes) as (group, tracker):
            results = [_one_seed(job, group, seed, [tell, tracker]) for seed in seeds]
    return _over_seeds(group.name, seeds, results)


@contextmanager
def _group(
    home: Path,
    label: str,
    seeds: Sequence[int],
    facts: Mapping[str, Any],
    resumed: Group | None,
    command: str,
    tell: Listener,
    processes: "Processes",
) -> Iterator[tuple[Group, Listener]]:
    """Yield the group and the listener that tells MLflow; only the first process makes and closes it."""
    from chimera_cli.services.session import group_session
    from chimera_cli.tracking import track

    if not processes.leads:
        yield processes.share(None), ignore
        return
    with (
        group_session(home, "train", label, seeds, facts, resumed, command) as group,
        track(home, group, tell) as tracker,
    ):
        yield processes.share(group), tracker


def _one_seed(job: _Job, group: Group, seed: int, listeners: Sequence[Listener]) -> dict[str, Any]:
    """Return the result of a seed: the one that is there, or that of its training from where it stands."""
    from chimera_cli.services.session import SeedSession, seed_session

    directory = group.seed_dir(seed)
    done = finished_result(group, seed) if job.resumed else None
    if done is not None:
        return done
    kept = kept_by(directory, job.identity(seed), listeners[0]) if job.resumed else Kept()
    if not job.processes.leads:
        silent = SeedSession(directory, ignore, "", lambda: None, lambda _figures, _details: {})
        return dict(job.processes.share(_full_seed(job, seed, silent, kept)))
    behind = (kept.updates, kept.started_at) if job.resumed else (None, None)
    settings = job.config.model_dump()
    with seed_session(group, seed, settings, job.bench.device, listeners, job.total, *behind) as session:
        if job.resumed:
            session.tell(Note(f"seed {seed} goes on after {kept.updates:,} of {job.total:,} updates"))
        return dict(job.processes.share(_full_seed(job, seed, session, kept)))


def _over_seeds(group: str, seeds: Sequence[int], results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return what the command prints: means by name under `figures`, spreads and seeds beside them."""
    from chimera_cli.statistics import summarise_known

    summaries = {name: summarise_known([r["figures"][name] for r in results]) for name in results[0]["figures"]}
    best = {name: summarise_known([r["details"]["best_dev"][name] for r in results]) for name in RETRIEVAL}
    return {
        "group": group,
        "seeds": list(seeds),
        "figures": {name: None if one is None else one.mean for name, one in (best | summaries).items()},
        "over_seeds": {name: None if one is None else one.as_dict() for name, one in (best | summaries).items()},
        "results": list(results),
    }


def _full_seed(job: _Job, seed: int, session: "SeedSession", kept: Kept) -> dict[str, Any]:
    from chimera_cli.models.dual_encoder import count_parameters
    from chimera_cli.training.checkpoints import save_shown

    bench, config, stream = job.bench, job.config, job.stream
    model = _fresh_model(fresh_architecture(config), seed, bench.device, config.checkpointing)
    features_s, features_pairs_s = _warm(model, bench, stream, session.tell)
    # The seeds share the features: `wall_s` is the rest, the same work for the first seed as for the others.
    started = time.perf_counter()
    learner = _learner(model, config.optimiser, bench, job.total, config.ema)
    measures = list(kept.measures)
    outcome = _train_on(job, learner, seed, session, kept, measures)
    if outcome.interrupted:
        words = f"stopped after {outcome.updates:,} of {job.total:,} updates and saved"
        session.tell(Note(f"{words}; `chimera train full --resume {session.directory.parent.name}` goes on"))
        raise KeyboardInterrupt
    if job.processes.leads:
        save_shown(learner, session.directory / "checkpoints" / "last.safetensors")
    figures = _full_figures(bench, session, outcome, features_s, features_pairs_s)
    figures |= highest(kept.peaks, {name: figures[name] for name in figures if "_peak_" in name})
    figures["wall_s"] = kept.wall_s + time.perf_counter() - started
    details = dict(count_parameters(model)) | _full_details(bench, outcome, config.batch, stream)
    details |= {"contingency": measures} if job.contingency else {}
    return session.finish(figures, details)


def _train_on(
    job: _Job, learner: "Learner", seed: int, session: "SeedSession", kept: Kept, measures: list[dict[str, Any]]
) -> "Outcome":
    """Return the outcome of the updates that are still to be made; measures that had to be taken are added."""
    from chimera_cli.training.loop import NotFiniteError

    while True:
        try:
            return _train_once(job, learner, seed, session, kept, measures)
        except NotFiniteError as error:
            if not job.contingency:
                raise
            kept = step_back(session, job.identity(seed), measures, error)


def _train_once(
    job: _Job, learner: "Learner", seed: int, session: "SeedSession", kept: Kept, measures: list[dict[str, Any]]
) -> "Outcome":
    bench, config, processes = job.bench, job.config, job.processes
    evaluation = dev_evaluation(learner.model, bench, session.tell)

    def evaluate() -> "Figures":
        figures: Figures = processes.share(evaluation() if processes.leads else None)
        return figures

    keeper = keeper_of(learner, session, config, job.identity(seed), kept, measures, bench.device, processes, job.stop)
    with closing(_full_pairs(job, learner.model, seed, session.tell, kept.place)) as pairs, job.stop.heed():
        state = take_up(kept, learner, session.directory, bench.device, processes, measures)
        if job.contingency and kept.content is None:
            keeper.save(state, False)  # there has to be a step to go back to
        return _run_loop(
            learner,
            pairs,
            config.loss,
            bench,
            updates=job.total,
            clip_norm=config.optimiser.clip_norm,
            micro_batch=config.micro_batch,
            evaluate=evaluate,
            evaluate_every=_epoch_updates(bench, config, job.stream),
            patience=config.patience,
            state=state,
            keeper=keeper,
            processes=processes,
            relief=relief_of(config, session, measures, state) if job.contingency else None,
            listener=session.tell,
        )


def _warm(model: "DualEncoder", bench: Workbench, stream: Stream | None, tell: Listener) -> tuple[float | None, float]:
    """Make what can be cached, and return the seconds for the train features and those per pair.

    A stream caches none: its seconds are None, and the time its features take is in every update.
    """
    if stream is None:
        return warm_caches(model, bench, tell)
    warm_dev(model, bench, tell)
    return None, 0.0


def _full_pairs(
    job: _Job, model: "DualEncoder", seed: int, tell: Listener, start: tuple[int, int]
) -> "Generator[PairBatch, None, None]":
    """Return the endless pairs of a run from `start` on, (epoch, number), from the pack or from a stream.

    Their threads end when it is closed.
    """
    config = job.config
    if job.stream is not None:
        return stream_pairs(job.stream, job.bench, model, config, seed, tell, start)
    return training_batches(
        job.bench,
        model,
        config.batch,
        seed,
        tell,
        crop_scale=config.augmentation.crop_scale,
        colour_jitter=config.augmentation.colour_jitter,
        feature_noise=config.feature_noise,
        start=start,
        rank=job.processes.rank,
        world=job.processes.world,
    )


def _epoch_updates(bench: Workbench, config: TrainConfig, stream: Stream | None) -> int:
    """Return the updates between two evaluations: an epoch of the pack, or of the samples a stream was counted to."""
    if stream is None:
        return epoch_updates(bench.pack, config.batch)
    return stream.updates_per_epoch(config.batch)


def _full_details(bench: Workbench, outcome: "Outcome", batch: int, stream: Stream | None) -> dict[str, Any]:
    images = len(bench.pack.split_indices("train")) if stream is None else stream.shards.samples
    details = {
        "best_step": outcome.best_step,
        "best_epoch": outcome.best_epoch,
        "best_dev": dict(outcome.best_figures or {}),
        "epochs_done": round(outcome.pairs / images, 2),
        "stopped_early": outcome.stopped_early,
        "batch": batch,
        "precision": bench.precision,
        "device": bench.device.type,
    }
    return details if stream is None else details | {"stream": {"left_out": dict(stream.left_out)}}


def _full_figures(
    bench: Workbench, session: "SeedSession", outcome: "Outcome", features_s: float | None, seconds_per_pair: float
) -> dict[str, float | None]:
    """Return the figures of one seed but its wall clock.

    10,000 pairs from cold: every pair is charged its own feature extraction at the measured rate, although a set with
    fewer images needs each image once only. That is the dearer reading of the law. A stream computes them in every
    update: its training rate is the whole of it, and there is no cached time.
    """
    from chimera_cli.services.session import memory_figures

    pairs_per_s = outcome.pairs / outcome.train_s
    return {
        "pairs_per_s": pairs_per_s,
        "features_s": features_s,
        "epoch_10k_pairs_s": 10_000 * (seconds_per_pair + 1 / pairs_per_s),
        "epoch_10k_pairs_cached_s": None if features_s is None else 10_000 / pairs_per_s,
        "loss_first": outcome.losses[0],
        "loss_last": outcome.losses[-1],
        "gpu_util_mean": session.mean_gpu_util(),
    } | memory_figures(bench.device)


# ---- parts ----------------------------------------------------------------------------------------------------------


def _bench(home: Path, data: str | None, device: str, precision: Any, listener: Listener) -> Workbench:
    from chimera_cli.runtime import device_capability, pick_device, pick_precision
    from chimera_cli.services.session import need_pack

    picked = pick_device(device)
    pack = need_pack(home, data, listener)
    listener(Note(f"data: {pack.name}, device: {picked.type}"))
    return Workbench(pack, picked, pick_precision(precision, device_capability(picked)))


def _refuse_unfit_pack(pack: "Pack", batch: int, needed: Sequence[str]) -> None:
    """Raise before anything is made where the pack has too few train images, or a needed split is without captions."""
    splits = pack.manifest["splits"]
    images = splits["train"]["images"]
    if "train" in needed and images < batch:
        raise ChimeraError(
            f"batch {batch} is larger than the {images} training images of {pack.name}",
            f"--set batch={max(2, images // 2)}",
        )
    for split in needed:
        if splits[split]["images"] == 1:
            raise ChimeraError(
                f"the {split} split of {pack.name} has a single image",
                "a caption finds it always: prepare a larger set",
            )
        if not (splits[split]["images"] and splits[split]["captions"]):
            raise ChimeraError(
                f"the pack {pack.name} has no captioned images in its {split} split",
                "prepare a set with captions, train and dev images: the best epoch is chosen on dev",
            )


def epoch_updates(pack: "Pack", batch: int) -> int:
    """Return how many updates show every training image once."""
    return max(1, round(len(pack.split_indices("train")) / batch))


def fresh_architecture(config: TrainConfig) -> "Architecture":
    """Return the architecture that a recipe trains."""
    return _architecture(config.image, config.text, config.heads, config.loss, config.augmentation.flip)


def _architecture(image: ImageTower, text: TextTower, heads: Heads, loss: Loss, flipped_view: bool) -> "Architecture":
    from chimera_cli.models.dual_encoder import Architecture

    return Architecture(
        image_weights=image.weights,
        image_size=image.image_size,
        image_locked=image.locked,
        flipped_view=flipped_view,
        text_weights=text.weights,
        learn_layers=text.learn_layers,
        max_tokens=text.max_tokens,
        head=heads.kind,
        hidden=heads.hidden,
        dim=heads.dim,
        dropout=heads.dropout,
        temperature=loss.temperature,
        # SigLIP starts its bias at -10, where almost all pairs are negatives (Zhai et al. 2023, section 3.2).
        logit_bias=-10.0 if loss.kind == "sigmoid" else None,
    )


def _fresh_model(
    architecture: "Architecture", seed: int, device: "torch.device", checkpointing: bool = False
) -> "DualEncoder":
    """Return the model of a seed: heads, dropout and towers from scratch all draw from it."""
    import torch

    from chimera_cli.models.dual_encoder import build_dual_encoder
    from chimera_cli.runtime import reset_memory_peaks, seed_everything
    from chimera_cli.training.memory import recompute_activations

    seed_everything(seed)
    reset_memory_peaks(device)
    # Channels last is what convolutions want on CPUs and on tensor cores.
    model = build_dual_encoder(architecture).to(device)
    model.image_tower.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if checkpointing:
        recompute_activations(model)
    return model


def _learner(model: "DualEncoder", optimiser: Optimiser, bench: Workbench, updates: int, ema: float = 0.0) -> "Learner":
    """Return the model with all that an update changes beside it; the schedule is made for so many updates."""
    from chimera_cli.training.averaging import WeightAverage
    from chimera_cli.training.checkpoints import Learner
    from chimera_cli.training.loop import gradient_scaler
    from chimera_cli.training.optimiser import build_optimiser, build_schedule

    adamw = build_optimiser(
        model,
        lr_heads=optimiser.lr_heads,
        lr_image=optimiser.lr_image,
        lr_text=optimiser.lr_text,
        weight_decay=optimiser.weight_decay,
        layer_decay=optimiser.layer_decay,
    )
    schedule = build_schedule(adamw, updates, optimiser.warmup_share, optimiser.schedule, optimiser.decay_share)
    average = WeightAverage.of(model, ema) if ema else None
    return Learner(model, adamw, schedule, gradient_scaler(bench.device, bench.precision), average)


def _run_loop(learner: "Learner", batches: Any, loss: Loss, bench: Workbench, **settings: Any) -> "Outcome":
    """Return the outcome of the loop with a learner; `settings` are those of `training.loop.train`."""
    from chimera_cli.training.loop import train
    from chimera_cli.training.losses import contrastive_loss

    return train(
        learner.model,
        batches,
        contrastive_loss(loss.kind, label_smoothing=loss.label_smoothing, hardness=loss.hardness),
        learner.optimiser,
        learner.schedule,
        device=bench.device,
        precision=bench.precision,
        scaler=learner.scaler,
        average=learner.average,
        **settings,
    )


def _own_device(wanted: str) -> "torch.device":
    """Return the device of this process: of several on one machine each takes the card of its number."""
    import torch

    from chimera_cli.runtime import pick_device

    if torch.cuda.is_available() and wanted != "cpu" and "LOCAL_RANK" in os.environ:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    return pick_device(wanted)


def _limit_memory(limit_gb: float | None, device: "torch.device") -> None:
    """Let the allocator refuse more than `limit_gb` GiB: a larger card rehearses a smaller one."""
    if limit_gb is None or device.type != "cuda":
        return
    import torch

    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, limit_gb * 2**30 / total), device)


def _refuse_shares(config: TrainConfig, processes: "Processes", contingency: str) -> None:
    """Raise UsageError where a batch can't be shared by the processes with the result of a single one."""
    if processes.world == 1:
        return
    if contingency == "auto":
        raise UsageError("--contingency auto is for one process: the others would wait for it", "leave it out")
    if config.stream is not None:
        raise UsageError("a stream is trained on by one process", "leave out torchrun, or prepare a pack of the shards")
    if config.batch < 2 * processes.world:
        raise UsageError(f"batch {config.batch} is too small for {processes.world} processes", "--set batch=...")
    if config.image.weights == "tiny":
        raise UsageError(
            "an image tower from scratch has the statistics of its process's pairs, not of the batch",
            "take pretrained weights, whose statistics are frozen, or a single process",
        )


def make_training_step(
    config: TrainConfig, pack: "Pack", device: "torch.device"
) -> "tuple[Callable[[Tensor], PairBatch], Callable[[Iterator[PairBatch]], None]]":
    """Return what makes a batch of normalised pixels (batch, 3, S, S) one of pairs, and what trains until these end.

    For the loader's benchmark: it is the loop, the loss and the optimiser of training. A locked image tower runs
    without gradients, as it does when its features are computed; a locked text tower's features are computed once. The
    captions are the first ones of the pack: what a step costs does not depend on which they are. Raises ChimeraError
    for a pack without captions.
    """
    from chimera_cli.runtime import device_capability, pick_precision
    from chimera_cli.training.batches import PairBatch

    shape = _architecture(config.image, config.text, config.heads, config.loss, flipped_view=False)
    model = _fresh_model(shape, 0, device, config.checkpointing)
    bench = Workbench(pack, device, pick_precision(config.precision, device_capability(device)))
    captions = _first_captions(model, pack, device)

    def pairs(pixels: "Tensor") -> PairBatch:
        text, image_ids = captions(len(pixels))
        return PairBatch(0, pixels, text, image_ids)

    def run(batches: "Iterator[PairBatch]") -> None:
        # The batches decide when it ends, not the number of updates.
        with suppress(StopIteration):
            _run_loop(
                _learner(model, config.optimiser, bench, _ENDLESS, config.ema),
                batches,
                config.loss,
                bench,
                updates=_ENDLESS,
                clip_norm=config.optimiser.clip_norm,
                micro_batch=config.micro_batch,
            )

    return pairs, run


def _first_captions(
    model: "DualEncoder", pack: "Pack", device: "torch.device"
) -> "Callable[[int], tuple[Tensor | dict[str, Tensor], Tensor]]":
    """Return what gives n captions, tokenised anew each time or as features of a locked tower, and n image ids."""
    import torch

    texts = pack.captions("train").texts
    if not texts:
        raise ChimeraError(
            f"the pack {pack.name} has no captions in its train split", "a training step needs them: leave out --config"
        )
    known: dict[int, Tensor] = {}

    def tokens(count: int) -> "dict[str, Tensor]":
        encoded = model.tokenise([texts[row % len(texts)] for row in range(count)])
        return {name: part.to(device, non_blocking=True) for name, part in encoded.items()}

    def captions(count: int) -> "tuple[Tensor | dict[str, Tensor], Tensor]":
        image_ids = torch.arange(count, device=device)
        if model.architecture.learn_layers != 0:
            return tokens(count), image_ids
        if count not in known:
            with torch.no_grad():
                known[count] = model.text_tower(tokens(count)).float()
        return known[count], image_ids

    return captions
