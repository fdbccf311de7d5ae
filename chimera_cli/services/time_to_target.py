"""How long a recipe takes from the pack to a recall on dev: what `bench speedrun` and `bench train` have in common."""

from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from chimera_cli.config import TrainConfig
from chimera_cli.errors import UsageError
from chimera_cli.events import Listener
from chimera_cli.services.inputs import Workbench, dev_evaluation, training_batches, warm_caches
from chimera_cli.services.learning import (
    epoch_updates,
    fresh_architecture,
    fresh_model,
    new_learner,
    refuse_unfit_pack,
    run_loop,
)

if TYPE_CHECKING:
    from chimera_cli.models.dual_encoder import DualEncoder
    from chimera_cli.training.batches import PairBatch
    from chimera_cli.training.loop import Figures, Keeper, LoopState, Outcome

TARGET_FIGURE = "t2i_r10"


@dataclass(frozen=True, slots=True)
class Sprint:
    """One training from the pack towards a target, which it has `reached` or not.

    `wall_s` is `model_s` (building the towers and loading their weights), `features_s` (those of locked towers, train
    and dev: computed, or read from the cache and checked) and `train_s` (the updates). `evaluation_s`, dev after each
    epoch, is not in it. `figures` are those of dev where the target was reached, else of the best epoch by it.
    """

    reached: bool
    wall_s: float
    model_s: float
    features_s: float
    train_s: float
    evaluation_s: float
    epochs: int
    updates: int
    pairs: int
    figures: "Figures"


def refuse_unfit(config: TrainConfig, bench: Workbench) -> None:
    """Raise UsageError for a recipe, ChimeraError for a pack, that can't be timed from the pack to a recall on dev."""
    if config.stream is not None:
        raise UsageError("a stream is not timed from a pack", "--set stream=null")
    if config.init_from is not None:
        raise UsageError("what another run has learned is not timed from a pack", "--set init_from=null")
    refuse_unfit_pack(bench.pack, config.batch, ("train", "dev"), config.captions_per_image)


def caches_features(config: TrainConfig) -> bool:
    """Whether anything of a recipe's towers is locked, so that its features are computed once."""
    return config.image.locked or config.text.learn_layers is not None


@contextmanager
def empty_cache(bench: Workbench) -> Iterator[Workbench]:
    """Yield the bench with a cache of features that is empty at first and gone in the end.

    The cache of the home is neither read nor written. Set TMPDIR where the system's folder is too small.
    """
    with TemporaryDirectory(prefix="chimera-cold-") as folder:
        path = Path(folder) / bench.pack.name
        path.symlink_to(bench.pack.path.resolve(), target_is_directory=True)
        yield replace(bench, pack=replace(bench.pack, path=path))


def run_to_target(bench: Workbench, config: TrainConfig, seed: int, target: float, tell: Listener) -> Sprint:
    """Return how long it took until the dev split's text to image R@10 was `target`, looked at after each epoch.

    It is the training of `chimera train full`, with its epochs, schedule and patience; it ends where the target is
    reached, and writes no checkpoints.
    """
    from chimera_cli.runtime import Stopwatch

    clock, evaluating = Stopwatch(bench.device), Stopwatch(bench.device)
    clock.start()
    model = fresh_model(fresh_architecture(config), seed, bench.device, config.checkpointing)
    model_s = clock.stop()
    clock.start()
    warm_caches(model, bench, tell, **_views(config))
    features_s = clock.stop()
    clock.start()
    evaluation = dev_evaluation(model, bench, tell)
    seen: list[Figures] = []

    def evaluate() -> "Figures":
        clock.stop()
        evaluating.start()
        seen.append(evaluation())
        evaluating.stop()
        clock.start()
        return seen[-1]

    def reached() -> bool:
        return bool(seen) and (seen[-1][TARGET_FIGURE] or 0.0) >= target

    with closing(recipe_pairs(bench, model, config, seed, tell)) as pairs:
        outcome = _train(bench, model, config, pairs, evaluate, _until(reached), tell)
    clock.stop()
    best = max(seen, key=lambda figures: figures[TARGET_FIGURE] or 0.0, default={})
    return Sprint(
        reached=reached(),
        wall_s=clock.seconds,
        model_s=model_s,
        features_s=features_s,
        train_s=clock.seconds - model_s - features_s,
        evaluation_s=evaluating.seconds,
        epochs=len(seen),
        updates=outcome.updates,
        pairs=outcome.pairs,
        figures=dict(seen[-1] if reached() else best),
    )


def _views(config: TrainConfig) -> dict[str, Any]:
    """Return what the views of an image are like, as caches and batches take it."""
    looks = config.augmentation
    return {"views": looks.views, "crop_scale": looks.crop_scale, "colour_jitter": looks.colour_jitter}


def recipe_pairs(
    bench: Workbench, model: "DualEncoder", config: TrainConfig, seed: int, tell: Listener
) -> "Generator[PairBatch, None, None]":
    """Return the endless pairs that a recipe trains on."""
    return training_batches(
        bench,
        model,
        config.batch,
        seed,
        tell,
        feature_noise=config.feature_noise,
        mixup=config.mixup,
        captions_per_image=config.captions_per_image,
        **_views(config),
    )


def _train(
    bench: Workbench,
    model: "DualEncoder",
    config: TrainConfig,
    pairs: "Iterator[PairBatch]",
    evaluate: "Callable[[], Figures]",
    keeper: "Keeper",
    tell: Listener,
) -> "Outcome":
    every = epoch_updates(bench.pack, config.batch, config.captions_per_image)
    total = config.epochs * every
    return run_loop(
        new_learner(model, config.optimiser, bench, total, config.ema),
        pairs,
        config.loss,
        bench,
        updates=total,
        clip_norm=config.optimiser.clip_norm,
        micro_batch=config.micro_batch,
        evaluate=evaluate,
        evaluate_every=every,
        patience=config.patience,
        keeper=keeper,
        listener=tell,
    )


def _until(reached: Callable[[], bool]) -> "Keeper":
    """Return what ends a loop once the target is reached, and keeps nothing."""
    from chimera_cli.training.loop import Keeper

    def forget(_state: "LoopState", _better: bool) -> None:
        """Write no checkpoint: what is measured is the way to a recall."""

    return Keeper(due=lambda _state: False, save=forget, stop=reached)
