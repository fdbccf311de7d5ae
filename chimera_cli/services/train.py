"""`chimera train`: proof of life, and real training over seeds."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from chimera_cli.config import Heads, ImageTower, Loss, Optimiser, SanityConfig, TextTower, TrainConfig
from chimera_cli.errors import ChimeraError
from chimera_cli.events import Listener, Note, ignore
from chimera_cli.runs import Group

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray
    from torch import Tensor

    from chimera_cli.data.pack import Pack
    from chimera_cli.models.dual_encoder import Architecture, DualEncoder
    from chimera_cli.models.text_tower import Tokens
    from chimera_cli.services.session import SeedSession
    from chimera_cli.training.loop import Figures, Outcome

# The law compares 200 updates: loss[0] against loss[200], and the mean of the last ten losses against chance.
_TAIL = 10
SANITY_LOSS_DROP = 0.15


@dataclass(frozen=True, slots=True)
class Bench:
    """What all seeds of a group share: the pack, the device and the precision to compute in."""

    pack: "Pack"
    device: "torch.device"
    precision: Literal["float32", "bfloat16", "float16"]


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
    _refuse_small_split(bench.pack, config.batch)
    facts = group_facts(command, bench.pack, config.model_dump(), bench.device)
    label = "shuffled" if shuffled else ""
    with group_session(home, "sanity", label, [seed], facts) as group, track(home, group) as tracker:
        listeners = [listener, tracker]
        with seed_session(group, seed, config.model_dump(), bench.device, listeners, config.updates) as session:
            return {"group": group.name} | _sanity_seed(bench, config, seed, session, shuffled)


def _sanity_seed(
    bench: Bench, config: SanityConfig, seed: int, session: "SeedSession", shuffled: bool
) -> dict[str, Any]:
    from chimera_cli.services.session import memory_figures

    started = time.perf_counter()
    architecture = _architecture(config.image, config.text, config.heads, config.loss, flipped_view=False)
    model = _fresh_model(architecture, seed, bench.device)
    batches = _training_batches(bench, model, config.batch, seed, session.tell, shuffled=shuffled)
    outcome = _run_loop(
        model, batches, config.loss, config.optimiser, bench, config.updates, session.tell, closing_loss=True
    )
    tail = sum(outcome.losses[-_TAIL:]) / _TAIL
    chance = math.log(config.batch)
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
    passed = figures["loss_drop"] >= SANITY_LOSS_DROP and tail <= chance - SANITY_LOSS_DROP  # type: ignore[operator]
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
    from chimera_cli.statistics import summarise_known
    from chimera_cli.tracking import track

    bench = _bench(home, config.data, config.device, config.precision, listener)
    _refuse_small_split(bench.pack, config.batch)
    facts = group_facts(command, bench.pack, config.model_dump(), bench.device)
    total = config.epochs * _updates_per_epoch(bench.pack, config.batch)
    results = []
    with group_session(home, "train", label, seeds, facts) as group, track(home, group) as tracker:
        for seed in seeds:
            listeners = [listener, tracker]
            with seed_session(group, seed, config.model_dump(), bench.device, listeners, total) as session:
                results.append(_full_seed(bench, config, seed, session, total))
    figures = {
        name: None if (summary := summarise_known([r["figures"][name] for r in results])) is None else summary.as_dict()
        for name in results[0]["figures"]
    }
    best = {
        name: None
        if (summary := summarise_known([r["details"]["best_dev"][name] for r in results])) is None
        else summary.as_dict()
        for name in results[0]["details"]["best_dev"]
    }
    return {"group": group.name, "seeds": list(seeds), "figures": figures, "dev": best, "results": results}


def _full_seed(bench: Bench, config: TrainConfig, seed: int, session: "SeedSession", total: int) -> dict[str, Any]:
    from chimera_cli.models.dual_encoder import count_parameters

    started = time.perf_counter()
    architecture = _architecture(config.image, config.text, config.heads, config.loss, config.augmentation.flip)
    model = _fresh_model(architecture, seed, bench.device)
    features_s, features_pairs_s = _warm_caches(model, bench, session.tell)
    batches = _training_batches(
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
        evaluate=_dev_evaluation(model, bench, session.tell),
        evaluate_every=_updates_per_epoch(bench.pack, config.batch),
        patience=config.patience,
        directory=session.directory,
    )
    pairs_per_s = outcome.pairs / outcome.train_s
    figures = _full_figures(bench, session, outcome, features_s, features_pairs_s)
    figures["wall_s"] = time.perf_counter() - started
    details = dict(count_parameters(model)) | {
        "best_step": outcome.best_step,
        "best_epoch": outcome.best_epoch,
        "best_dev": dict(outcome.best_figures or {}),
        "epochs_done": round(outcome.pairs / len(bench.pack.split_indices("train")), 2),
        "stopped_early": outcome.stopped_early,
        "batch": config.batch,
        "precision": bench.precision,
        "device": bench.device.type,
        "pairs_per_s_final": pairs_per_s,
    }
    return session.finish(figures, details)


def _full_figures(
    bench: Bench, session: "SeedSession", outcome: "Outcome", features_s: float, seconds_per_pair: float
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


def _bench(home: Path, data: str | None, device: str, precision: Any, listener: Listener) -> Bench:
    from chimera_cli.runtime import device_capability, pick_device, pick_precision
    from chimera_cli.services.session import need_pack

    picked = pick_device(device)
    pack = need_pack(home, data, listener)
    listener(Note(f"data: {pack.name}, device: {picked.type}"))
    return Bench(pack, picked, pick_precision(precision, device_capability(picked)))


def _refuse_small_split(pack: "Pack", batch: int) -> None:
    images = len(pack.split_indices("train"))
    if images < batch:
        raise ChimeraError(
            f"batch {batch} is larger than the {images} training images of {pack.name}",
            f"--set batch={max(2, images // 2)}",
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
    return build_dual_encoder(architecture).to(device, memory_format=torch.channels_last)


def _run_loop(
    model: "DualEncoder",
    batches: Any,
    loss: Loss,
    optimiser: Optimiser,
    bench: Bench,
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


def _warm_caches(model: "DualEncoder", bench: Bench, tell: Listener) -> tuple[float, float]:
    """Make the cached features of locked towers for train and dev.

    Returns the seconds that computing the train features took, now or when they were made, and the seconds per pair.
    """
    from chimera_cli.services.embeddings import pooled_caption_features, pooled_image_features

    total, per_pair = 0.0, 0.0
    for split in ("train", "dev"):
        parts = []
        if model.architecture.image_locked:
            parts.append(pooled_image_features(model, bench.pack, split, bench.device, tell))
        if model.architecture.learn_layers == 0:
            parts.append(pooled_caption_features(model, bench.pack, split, bench.device, tell))
        if split == "train":
            total = sum(part.seconds for part in parts)
            per_pair = sum(part.seconds / len(part.values) for part in parts)
    return total, per_pair


def _training_batches(
    bench: Bench,
    model: "DualEncoder",
    batch: int,
    seed: int,
    tell: Listener,
    *,
    crop_scale: float = 1.0,
    feature_noise: float = 0.0,
    shuffled: bool = False,
) -> Any:
    """Return the endless batches of the train split, from cached features where a tower is locked."""
    import numpy as np

    from chimera_cli.training.batches import pair_batches

    table = bench.pack.captions("train")
    rows = [np.asarray(part, dtype=np.int64) for part in table.by_image()]
    empty = sum(len(part) == 0 for part in rows)
    if empty:
        raise ChimeraError(
            f"{empty} training images of {bench.pack.name} have no caption",
            "prepare the pack again from a set with captions",
        )
    if shuffled:
        # Captions move by half the set: no image keeps its own, and the marginal distributions stay what they were.
        rows = rows[len(rows) // 2 :] + rows[: len(rows) // 2]
    return pair_batches(
        rows,
        bench.pack.image_ids("train"),
        _image_inputs(bench, model, seed, tell, crop_scale, feature_noise),
        _text_inputs(bench, model, seed, tell, feature_noise),
        batch=batch,
        seed=seed,
        device=bench.device,
    )


def _image_inputs(
    bench: Bench, model: "DualEncoder", seed: int, tell: Listener, crop_scale: float, feature_noise: float
) -> "Callable[[NDArray[np.int64], int], Tensor]":
    """Return what gives the loader's images at positions: cached features, or augmented pixels from the pack."""
    import torch

    from chimera_cli.services.embeddings import pooled_image_features
    from chimera_cli.training.augment import augmented_pixels, noisy_rows

    generator = torch.Generator(bench.device).manual_seed(seed)
    if model.architecture.image_locked:
        pooled = pooled_image_features(model, bench.pack, "train", bench.device, tell).values
        return noisy_rows(torch.from_numpy(pooled).to(bench.device), generator, feature_noise)
    return augmented_pixels(
        bench.pack.images,
        bench.pack.split_indices("train"),
        model.image_tower,
        model.architecture.image_size,
        bench.device,
        generator,
        crop_scale=crop_scale,
        flip=model.architecture.flipped_view,
    )


def _text_inputs(
    bench: Bench, model: "DualEncoder", seed: int, tell: Listener, feature_noise: float
) -> "Callable[[NDArray[np.int64]], Tensor | Tokens]":
    """Return what gives the loader's captions of rows: cached features, or tokens on the device."""
    import torch

    from chimera_cli.services.embeddings import pooled_caption_features
    from chimera_cli.training.augment import noisy_rows

    if model.architecture.learn_layers == 0:
        pooled = torch.from_numpy(pooled_caption_features(model, bench.pack, "train", bench.device, tell).values)
        generator = torch.Generator(bench.device).manual_seed(seed + 1)
        views = noisy_rows(pooled.unsqueeze(1).to(bench.device), generator, feature_noise)
        return lambda rows: views(rows, 0)
    texts = bench.pack.captions("train").texts

    def tokens(rows: "NDArray[np.int64]") -> "Tokens":
        encoded = model.tokenise([texts[row] for row in rows])
        return {name: tensor.to(bench.device, non_blocking=True) for name, tensor in encoded.items()}

    return tokens


def _dev_evaluation(model: "DualEncoder", bench: Bench, tell: Listener) -> "Callable[[], Figures]":
    """Return the retrieval figures of the dev split with the model as it is when called."""
    import torch

    from chimera_cli.evaluation.retrieval import retrieval_figures, retrieval_ranks
    from chimera_cli.services.embeddings import embed_images, embed_texts_with, pooled_caption_features

    table = bench.pack.captions("dev")
    if not table.texts:
        raise ChimeraError(
            f"{bench.pack.name} has no dev split", "prepare a pack with dev images: the best epoch is chosen on it"
        )

    def texts() -> "NDArray[np.float32]":
        if model.architecture.learn_layers != 0:
            return embed_texts_with(model, table.texts, bench.device, tell)
        pooled = pooled_caption_features(model, bench.pack, "dev", bench.device, tell).values
        with torch.inference_mode():
            return model.project_text(torch.from_numpy(pooled).to(bench.device)).float().cpu().numpy()

    def evaluate() -> Mapping[str, float | None]:
        image = embed_images(model, bench.pack, "dev", bench.device, tell)
        return retrieval_figures(retrieval_ranks(image, texts(), table.image_positions))

    return evaluate
