"""`chimera train`: proof of life, and real training over seeds."""

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chimera_cli.config import Heads, ImageTower, Loss, Optimiser, SanityConfig, TextTower, TrainConfig
from chimera_cli.errors import ChimeraError
from chimera_cli.events import Listener, Note, ignore
from chimera_cli.figures import RETRIEVAL
from chimera_cli.services.inputs import Workbench, dev_evaluation, training_batches, warm_caches

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from chimera_cli.data.pack import Pack
    from chimera_cli.models.dual_encoder import Architecture, DualEncoder
    from chimera_cli.services.session import SeedSession
    from chimera_cli.training.loop import Figures, Outcome

# The law compares 200 updates: loss[0] against loss[200], and the mean of the last ten losses against chance.
_TAIL = 10
SANITY_LOSS_DROP = 0.15
SANITY_WALL_S = 25 * 60


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
    _refuse_unfit_pack(bench.pack, config.batch, needs_dev=False)
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
    outcome = _run_loop(
        model, batches, config.loss, config.optimiser, bench, config.updates, session.tell, closing_loss=True
    )
    tail = sum(outcome.losses[-_TAIL:]) / _TAIL
    # Batches are as even as can be, so their size may be a little off the configured one.
    images = len(bench.pack.split_indices("train"))
    chance = math.log(images / _updates_per_epoch(bench.pack, config.batch))
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
    details = {
        "passed": passed,
        "batch": config.batch,
        "image_size": config.image.image_size,
        "updates": outcome.updates,
        "precision": bench.precision,
        "device": bench.device.type,
        "shuffled": shuffled,
        "losses": list(outcome.losses),
    }
    return session.finish(figures, details)


# ---- real training --------------------------------------------------------------------------------------------------


def train_full(
    home: Path, config: TrainConfig, seeds: Sequence[int], label: str, command: str, listener: Listener = ignore
) -> dict[str, Any]:
    """Return the results of one group with one run per seed, the best checkpoint of each chosen by dev `rsum`.

    Raises ChimeraError where the pack or a setting makes training impossible.
    """
    from chimera_cli.services.provenance import group_facts
    from chimera_cli.services.session import group_session, seed_session
    from chimera_cli.tracking import track

    bench = _bench(home, config.data, config.device, config.precision, listener)
    _refuse_unfit_pack(bench.pack, config.batch, needs_dev=True)
    facts = group_facts(command, bench.pack, config.model_dump(), bench.device)
    total = config.epochs * _updates_per_epoch(bench.pack, config.batch)
    results = []
    with group_session(home, "train", label, seeds, facts) as group, track(home, group, listener) as tracker:
        for seed in seeds:
            listeners = [listener, tracker]
            with seed_session(group, seed, config.model_dump(), bench.device, listeners, total) as session:
                results.append(_full_seed(bench, config, seed, session, total))
    return _over_seeds(group.name, seeds, results)


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


def _full_seed(bench: Workbench, config: TrainConfig, seed: int, session: "SeedSession", total: int) -> dict[str, Any]:
    from chimera_cli.models.dual_encoder import count_parameters

    architecture = _architecture(config.image, config.text, config.heads, config.loss, config.augmentation.flip)
    model = _fresh_model(architecture, seed, bench.device)
    features_s, features_pairs_s = warm_caches(model, bench, session.tell)
    # The seeds share the features: `wall_s` is the rest, the same work for the first seed as for the others.
    started = time.perf_counter()
    batches = training_batches(
        bench,
        model,
        config.batch,
        seed,
        session.tell,
        crop_scale=config.augmentation.crop_scale,
        feature_noise=config.feature_noise,
    )
    outcome = _run_loop(
        model,
        batches,
        config.loss,
        config.optimiser,
        bench,
        total,
        session.tell,
        evaluate=dev_evaluation(model, bench, session.tell),
        evaluate_every=_updates_per_epoch(bench.pack, config.batch),
        patience=config.patience,
        directory=session.directory,
    )
    figures = _full_figures(bench, session, outcome, features_s, features_pairs_s)
    figures["wall_s"] = time.perf_counter() - started
    details = dict(count_parameters(model)) | _full_details(bench, outcome, config.batch)
    return session.finish(figures, details)


def _full_details(bench: Workbench, outcome: "Outcome", batch: int) -> dict[str, Any]:
    return {
        "best_step": outcome.best_step,
        "best_epoch": outcome.best_epoch,
        "best_dev": dict(outcome.best_figures or {}),
        "epochs_done": round(outcome.pairs / len(bench.pack.split_indices("train")), 2),
        "stopped_early": outcome.stopped_early,
        "batch": batch,
        "precision": bench.precision,
        "device": bench.device.type,
    }


def _full_figures(
    bench: Workbench, session: "SeedSession", outcome: "Outcome", features_s: float, seconds_per_pair: float
) -> dict[str, float | None]:
    """Return the figures of one seed but its wall clock.

    10,000 pairs from cold: every pair is charged its own feature extraction at the measured rate, although a set with
    fewer images needs each image once only. That is the dearer reading of the law.
    """
    from chimera_cli.services.session import memory_figures

    pairs_per_s = outcome.pairs / outcome.train_s
    return {
        "pairs_per_s": pairs_per_s,
        "features_s": features_s,
        "epoch_10k_pairs_s": 10_000 * (seconds_per_pair + 1 / pairs_per_s),
        "epoch_10k_pairs_cached_s": 10_000 / pairs_per_s,
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


def _refuse_unfit_pack(pack: "Pack", batch: int, *, needs_dev: bool) -> None:
    """Raise before anything is made where the pack has too few images, no captions or no dev split."""
    splits = pack.manifest["splits"]
    images = splits["train"]["images"]
    if images < batch:
        raise ChimeraError(
            f"batch {batch} is larger than the {images} training images of {pack.name}",
            f"--set batch={max(2, images // 2)}",
        )
    for split in ("train", "dev") if needs_dev else ("train",):
        if not (splits[split]["images"] and splits[split]["captions"]):
            raise ChimeraError(
                f"the pack {pack.name} has no captioned images in its {split} split",
                "prepare a set with captions, train and dev images: the best epoch is chosen on dev",
            )


def _updates_per_epoch(pack: "Pack", batch: int) -> int:
    return max(1, round(len(pack.split_indices("train")) / batch))


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


def _fresh_model(architecture: "Architecture", seed: int, device: "torch.device") -> "DualEncoder":
    """Return the model of a seed: heads, dropout and towers from scratch all draw from it."""
    import torch

    from chimera_cli.models.dual_encoder import build_dual_encoder
    from chimera_cli.runtime import reset_memory_peaks, seed_everything

    seed_everything(seed)
    reset_memory_peaks(device)
    # Channels last is what convolutions want on CPUs and on tensor cores.
    model = build_dual_encoder(architecture).to(device)
    model.image_tower.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model


def _run_loop(
    model: "DualEncoder",
    batches: Any,
    loss: Loss,
    optimiser: Optimiser,
    bench: Workbench,
    updates: int,
    tell: Listener,
    *,
    evaluate: "Callable[[], Figures] | None" = None,
    evaluate_every: int = 0,
    patience: int = 0,
    closing_loss: bool = False,
    directory: Path | None = None,
) -> "Outcome":
    from functools import partial

    from chimera_cli.training.loop import train
    from chimera_cli.training.losses import LOSSES
    from chimera_cli.training.optimiser import build_optimiser, build_schedule

    adamw = build_optimiser(
        model,
        lr_heads=optimiser.lr_heads,
        lr_image=optimiser.lr_image,
        lr_text=optimiser.lr_text,
        weight_decay=optimiser.weight_decay,
    )
    smoothing = {"label_smoothing": loss.label_smoothing} if loss.kind == "infonce" else {}
    return train(
        model,
        batches,
        partial(LOSSES[loss.kind], **smoothing),
        adamw,
        build_schedule(adamw, updates, optimiser.warmup_share),
        updates=updates,
        device=bench.device,
        precision=bench.precision,
        clip_norm=optimiser.clip_norm,
        evaluate=evaluate,
        evaluate_every=evaluate_every,
        patience=patience,
        closing_loss=closing_loss,
        on_evaluated=None if directory is None else _checkpointer(model, directory, tell),
        listener=tell,
    )


def _checkpointer(
    model: "DualEncoder", directory: Path, tell: Listener
) -> Callable[[int, int, bool, dict[str, Any]], None]:
    from chimera_cli.events import Saved
    from chimera_cli.models.checkpoint import save_model, save_state
    from chimera_cli.runs import SCHEMA_VERSION, write_json

    folder = directory / "checkpoints"

    def save(step: int, epoch: int, better: bool, state: dict[str, Any]) -> None:
        save_model(model, folder / "last.safetensors")
        save_state(state, folder / "last.pt")
        if better:
            save_model(model, folder / "best.safetensors")
            write_json(folder / "best.json", {"schema_version": SCHEMA_VERSION, "step": step, "epoch": epoch})
            tell(Saved(str(folder / "best.safetensors"), "best checkpoint", step))

    return save


def make_training_step(config: TrainConfig, pack: "Pack", device: "torch.device") -> "Callable[[Tensor], None]":
    """Return one real update of a config on normalised pixels (batch, 3, S, S), for the loader's benchmark.

    A locked image tower runs without gradients, as it does when its features are computed. The captions are those of
    the first images: what a step costs does not depend on which they are.
    """
    import torch

    from chimera_cli.runtime import device_capability, pick_precision
    from chimera_cli.training.batches import PairBatch
    from chimera_cli.training.loop import train
    from chimera_cli.training.losses import LOSSES
    from chimera_cli.training.optimiser import build_optimiser, build_schedule

    rates = config.optimiser.model_dump(include={"lr_heads", "lr_image", "lr_text", "weight_decay"})
    shape = _architecture(config.image, config.text, config.heads, config.loss, flipped_view=False)
    model = _fresh_model(shape, 0, device)
    texts = pack.captions("train").texts
    precision = pick_precision(config.precision, device_capability(device))
    optimiser = build_optimiser(model, **rates)
    schedule = build_schedule(optimiser, 1_000_000, 0.0)

    def step(pixels: "Tensor") -> None:
        tokens = {name: part.to(device) for name, part in model.tokenise(texts[: len(pixels)]).items()}
        batch = PairBatch(0, pixels, tokens, torch.arange(len(pixels), device=device))
        train(
            model,
            iter([batch]),
            LOSSES[config.loss.kind],
            optimiser,
            schedule,
            updates=1,
            device=device,
            precision=precision,
        )

    return step
