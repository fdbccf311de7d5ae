"""`chimera train full`: real training over seeds."""

import itertools
import os
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from chimera_cli.config import TrainConfig
from chimera_cli.errors import UsageError
from chimera_cli.events import Listener, Note, ignore
from chimera_cli.runs import Group
from chimera_cli.services.contingency import (
    Ladder,
    as_rows,
    begin_ladder,
    carried_on,
    faster_loader,
    half_the_rates,
    less_memory,
    relief_of,
    wants_rung,
    watch_of,
)
from chimera_cli.services.inputs import Workbench, dev_evaluation, training_batches, warm_caches
from chimera_cli.services.learning import (
    epoch_updates,
    fresh_architecture,
    fresh_model,
    new_learner,
    open_bench,
    over_seeds,
    refuse_unfit_pack,
    refuse_unfit_towers,
    run_loop,
)
from chimera_cli.services.resume import (
    Kept,
    finished_result,
    highest,
    keeper_of,
    kept_by,
    note_other_source,
    refuse_changes,
    take_up,
)
from chimera_cli.services.streaming import Stream, open_stream, stream_pairs, warm_dev
from chimera_cli.services.warm_start import WarmStart, refuse_unfit_start, tell_start, warm_start

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

    from chimera_cli.models.dual_encoder import DualEncoder
    from chimera_cli.services.session import SeedSession, Stop
    from chimera_cli.training.batches import PairBatch
    from chimera_cli.training.checkpoints import Learner
    from chimera_cli.training.contingency import LoaderWatch
    from chimera_cli.training.distributed import Processes
    from chimera_cli.training.loop import Figures, LoopState, Outcome


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
    start: WarmStart

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
    contingency: Literal["off", "auto"] | None = None,
) -> dict[str, Any]:
    """Return the results of one group with one run per seed, the best checkpoint of each chosen by dev `rsum`.

    With `stream` set the pairs come from shards and the pack gives the dev split alone. With `init_from` the seeds
    begin with the weights of another run. `resumed` goes on instead of beginning anew: finished seeds stay, the
    interrupted one goes on from its checkpoint, the others are trained. Under `torchrun` each process trains on its
    share and all return the results. With `contingency` auto it helps itself where memory runs out, the loader is too
    slow or the loss is no number, and says so in events.jsonl and the result; None takes what `resumed` was last run
    with, else off.
    Raises ChimeraError where the pack, the shards or a setting make training impossible, UsageError where the settings
    are not those of `resumed`.
    """
    from chimera_cli.services.provenance import group_facts
    from chimera_cli.services.session import stoppable
    from chimera_cli.training.distributed import joined

    with joined(_own_device(config.device)) as processes, stoppable() as stop:
        tell = listener if processes.leads else ignore
        start = warm_start(home, config, seeds)
        # The name in full: what was the latest run or the only one that began so may not be later on.
        config = config.model_copy(update={"init_from": start.run})
        # A run without a pack's name goes on with the pack it was begun with, not with one that is newer.
        data = config.data if resumed is None or config.data else str(resumed.facts["pack"]["name"])
        bench = open_bench(home, data, config.device, config.precision, tell)
        needed = ("train", "dev") if config.stream is None else ("dev",)
        refuse_unfit_pack(bench.pack, config.batch, needed, config.captions_per_image)
        refuse_unfit_towers(fresh_architecture(config))
        refuse_unfit_start(start, fresh_architecture(config))
        _limit_memory(config.vram_limit_gb, bench.device)
        tell_start(start, bench.pack.fingerprint, tell)
        stream = open_stream(config, bench.pack, tell)
        contingency = contingency or ("off" if resumed is None else resumed.facts.get("contingency", "off"))
        _refuse_shares(config, processes, contingency)
        facts = group_facts(command, bench.pack, config.model_dump(), bench.device)
        facts |= {"contingency": contingency} | ({} if stream is None else {"stream": stream.facts()})
        facts |= {} if start.run is None else {"init_from": start.facts()}
        if resumed is not None:
            refuse_changes(resumed, config, seeds, facts)
            note_other_source(resumed, facts, tell)
        total = config.epochs * _epoch_updates(bench, config, stream)
        job = _Job(bench, config, stream, total, processes, stop, resumed is not None, contingency == "auto", start)
        with _group(home, label, seeds, facts, resumed, command, tell, processes) as (group, tracker):
            results: list[dict[str, Any]] = []
            for seed in seeds:
                results.append(_one_seed(job, group, seed, [tell, tracker], results[-1] if results else None))
    return over_seeds(group.name, seeds, results)


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


def _one_seed(
    job: _Job, group: Group, seed: int, listeners: Sequence[Listener], before: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Return the result of a seed: the one that is there, or that of its training from where it stands.

    `before` is the result of the seed before it: what that one had to change is changed from the beginning.
    """
    from chimera_cli.services.session import SeedSession, seed_session

    directory = group.seed_dir(seed)
    done = finished_result(group, seed) if job.resumed else None
    if done is not None:
        return done
    kept = kept_by(directory, job.identity(seed), listeners[0]) if job.resumed else Kept()
    carried = {} if before is None else carried_on(before)
    if not job.processes.leads:
        silent = SeedSession(directory, ignore, "", lambda: None, lambda _figures, _details: {})
        return dict(job.processes.share(_full_seed(job, seed, silent, kept, carried)))
    behind = (kept.updates, kept.started_at) if job.resumed else (None, None)
    settings = job.config.model_dump()
    with seed_session(group, seed, settings, job.bench.device, listeners, job.total, *behind) as session:
        if job.resumed:
            session.tell(Note(f"seed {seed} goes on after {kept.updates:,} of {job.total:,} updates"))
        return dict(job.processes.share(_full_seed(job, seed, session, kept, carried)))


def _full_seed(job: _Job, seed: int, session: "SeedSession", kept: Kept, carried: Mapping[str, Any]) -> dict[str, Any]:
    from chimera_cli.models.dual_encoder import count_parameters
    from chimera_cli.training.checkpoints import save_shown

    bench, config = job.bench, job.config
    ladder = begin_ladder(config, session, job.contingency, kept, carried, job.processes.leads)
    learner, outcome, (features_s, features_pairs_s), started = _train_on(job, seed, session, kept, ladder)
    if outcome.interrupted:
        words = f"stopped after {outcome.updates:,} of {job.total:,} updates and saved"
        session.tell(Note(f"{words}; `chimera train full --resume {session.directory.parent.name}` goes on"))
        raise KeyboardInterrupt
    if job.processes.leads:
        save_shown(learner, session.directory / "checkpoints" / "last.safetensors")
    figures = _full_figures(bench, session, outcome, features_s, features_pairs_s)
    figures |= highest(kept.peaks, {name: figures[name] for name in figures if "_peak_" in name})
    figures["wall_s"] = kept.wall_s + time.perf_counter() - started
    details = dict(count_parameters(learner.model)) | _full_details(bench, outcome, config, job.stream)
    details |= {"contingency": as_rows(ladder.taken)} if job.contingency or ladder.taken else {}
    return session.finish(figures, details)


def _train_on(
    job: _Job, seed: int, session: "SeedSession", kept: Kept, ladder: Ladder
) -> "tuple[Learner, Outcome, tuple[float | None, float], float]":
    """Return what learned, the outcome, the seconds of features in all and per pair, and when training started.

    Where it gets into trouble and may help itself, it goes on from the next rung of the ladder.
    """
    import torch

    from chimera_cli.training.contingency import release_memory
    from chimera_cli.training.loop import NotFiniteError

    learner = _fresh_learner(job, ladder.now, seed)
    features = _warm(learner.model, job.bench, job.config, job.stream, session.tell)
    # The seeds share the features: `wall_s` is the rest, the same work for the first seed as for the others.
    started = time.perf_counter()
    while True:
        watch, side, trouble = watch_of(ladder), ladder.now.image.image_size, None
        try:
            outcome = _train_once(job, learner, seed, session, kept, ladder, watch)
        except (NotFiniteError, torch.OutOfMemoryError) as error:
            if not job.contingency:
                raise
            # The frames hold the tensors that have to go.
            trouble = error.with_traceback(None)
        if trouble is None and (watch is None or not outcome.interrupted or not watch.too_slow or job.stop.wanted):
            return learner, outcome, features, started
        kept = _next_rung(ladder, job.identity(seed), trouble, watch)
        learner.optimiser.zero_grad(set_to_none=True)
        if ladder.now.image.image_size != side:
            del learner
            release_memory()
            learner = _fresh_learner(job, ladder.now, seed)
        release_memory()


def _next_rung(
    ladder: Ladder, identity: Mapping[str, Any], trouble: BaseException | None, watch: "LoaderWatch | None"
) -> Kept:
    """Return from where to go on after the rung that `trouble`, or a loader that is too slow, asks for."""
    from chimera_cli.training.loop import NotFiniteError

    if isinstance(trouble, NotFiniteError):
        return half_the_rates(ladder, identity, trouble)
    if trouble is not None:
        return less_memory(ladder, identity, trouble)
    assert watch is not None  # nothing else ends training before its end
    return faster_loader(ladder, watch, identity)


def _fresh_learner(job: _Job, config: TrainConfig, seed: int) -> "Learner":
    from chimera_cli.models.checkpoint import begin_with

    model = fresh_model(fresh_architecture(config), seed, job.bench.device, config.checkpointing)
    if seed in job.start.checkpoints:
        begin_with(model, job.start.checkpoints[seed])
    return new_learner(model, config.optimiser, job.bench, job.total, config.ema)


def _train_once(
    job: _Job,
    learner: "Learner",
    seed: int,
    session: "SeedSession",
    kept: Kept,
    ladder: Ladder,
    watch: "LoaderWatch | None",
) -> "Outcome":
    bench, config, processes = job.bench, ladder.now, job.processes
    evaluation = dev_evaluation(learner.model, bench, session.tell)
    state: LoopState | None = None

    def evaluate() -> "Figures":
        figures: Figures = processes.share(evaluation() if processes.leads else None)
        return figures

    def stop() -> bool:
        return job.stop.wanted or (state is not None and wants_rung(ladder, watch, state, job.total))

    keeper = keeper_of(learner, session, config, job.identity(seed), kept, ladder.taken, bench.device, processes, stop)
    pairs = _full_pairs(job, learner.model, seed, session.tell, kept.place, ladder.loader_threads)
    with closing(pairs), job.stop.heed():
        state = take_up(kept, learner, session.directory, bench.device, processes, ladder.taken)
        if job.contingency and kept.content is None:
            keeper.save(state, False)  # there has to be a step to go back to
        return run_loop(
            learner,
            pairs if watch is None else watch.watched(pairs),
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
            relief=relief_of(ladder, state) if job.contingency else None,
            listener=session.tell,
        )


def _warm(
    model: "DualEncoder", bench: Workbench, config: TrainConfig, stream: Stream | None, tell: Listener
) -> tuple[float | None, float]:
    """Make what can be cached, and return the seconds for the train features and those per pair.

    A stream caches none: its seconds are None, and the time its features take is in every update.
    """
    if stream is None:
        looks = config.augmentation
        return warm_caches(
            model, bench, tell, views=looks.views, crop_scale=looks.crop_scale, colour_jitter=looks.colour_jitter
        )
    warm_dev(model, bench, tell)
    return None, 0.0


def _full_pairs(
    job: _Job, model: "DualEncoder", seed: int, tell: Listener, start: tuple[int, int], threads: int | None
) -> "Generator[PairBatch, None, None]":
    """Return the endless pairs of a run from `start` on, (epoch, number), from the pack or from a stream.

    With `threads` so many read for it: they decode the stream, or read the images of the pack ahead. They end when it
    is closed.
    """
    config = job.config
    if job.stream is not None:
        return stream_pairs(job.stream, job.bench, model, config, seed, tell, start, threads)
    pairs = training_batches(
        job.bench,
        model,
        config.batch,
        seed,
        tell,
        crop_scale=config.augmentation.crop_scale,
        colour_jitter=config.augmentation.colour_jitter,
        views=config.augmentation.views,
        feature_noise=config.feature_noise,
        mixup=config.mixup,
        captions_per_image=config.captions_per_image,
        start=start,
        rank=job.processes.rank,
        world=job.processes.world,
    )
    return pairs if threads is None else _read_ahead(job, pairs, seed, start, threads)


def _read_ahead(
    job: _Job, pairs: "Generator[PairBatch, None, None]", seed: int, start: tuple[int, int], threads: int
) -> "Generator[PairBatch, None, None]":
    """Yield the pairs from `start` on, the images of those to come read by `threads` threads meanwhile."""
    import numpy as np

    from chimera_cli.data.readahead import read_ahead
    from chimera_cli.training.batches import pair_order

    pack, world = job.bench.pack, job.processes.world
    indices, rows = pack.split_indices("train"), [np.asarray(part) for part in pack.captions("train").by_image()]

    def order() -> "Iterator[NDArray[np.int64]]":
        for epoch in itertools.count(start[0]):
            batches = pair_order(
                rows,
                job.config.batch,
                seed,
                epoch,
                captions_per_image=job.config.captions_per_image,
                rank=job.processes.rank,
                world=world,
            )
            for positions, _ in itertools.islice(batches, start[1] if epoch == start[0] else 0, None):
                yield indices[np.unique(positions)]

    with closing(pairs):
        yield from read_ahead(pairs, pack.images, order(), threads)


def _epoch_updates(bench: Workbench, config: TrainConfig, stream: Stream | None) -> int:
    """Return the updates between two evaluations: an epoch of the pack, or of the samples a stream was counted to."""
    if stream is None:
        return epoch_updates(bench.pack, config.batch, config.captions_per_image)
    return stream.updates_per_epoch(config.batch)


def _full_details(bench: Workbench, outcome: "Outcome", config: TrainConfig, stream: Stream | None) -> dict[str, Any]:
    images = len(bench.pack.split_indices("train")) if stream is None else stream.shards.samples
    details = {
        "best_step": outcome.best_step,
        "best_epoch": outcome.best_epoch,
        "best_dev": dict(outcome.best_figures or {}),
        "epochs_done": round(outcome.pairs / (images * config.captions_per_image), 2),
        "stopped_early": outcome.stopped_early,
        "batch": config.batch,
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
        raise UsageError(
            "--contingency auto is for a single process: where one of several runs out of memory, the others wait for "
            "features that never come",
            "leave it out, and set micro_batch and checkpointing for all of them",
        )
    if config.stream is not None:
        raise UsageError("a stream is trained on by one process", "leave out torchrun, or prepare a pack of the shards")
    if config.batch < (least := 2 * processes.world * config.captions_per_image):
        raise UsageError(
            f"batch {config.batch} is too small for {processes.world} processes", f"--set batch={least} or more"
        )
    if config.image.weights == "tiny":
        raise UsageError(
            "an image tower from scratch has the statistics of its process's pairs, not of the batch",
            "take pretrained weights, whose statistics are frozen, or a single process",
        )
