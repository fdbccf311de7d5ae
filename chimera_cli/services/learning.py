"""What every training is made of: a pack that fits, a model, what an update changes, and the loop."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chimera_cli.config import Heads, ImageTower, Loss, Optimiser, TextTower, TrainConfig
from chimera_cli.errors import ChimeraError
from chimera_cli.events import Listener, Note
from chimera_cli.services.inputs import Workbench

if TYPE_CHECKING:
    import torch

    from chimera_cli.data.pack import Pack
    from chimera_cli.models.dual_encoder import Architecture, DualEncoder
    from chimera_cli.training.checkpoints import Learner
    from chimera_cli.training.loop import Outcome


def open_bench(home: Path, data: str | None, device: str, precision: Any, listener: Listener) -> Workbench:
    """Return pack, device and precision to train with, as they were asked for or as they fit the machine."""
    from chimera_cli.runtime import device_capability, pick_device, pick_precision
    from chimera_cli.services.session import need_pack

    picked = pick_device(device)
    pack = need_pack(home, data, listener)
    listener(Note(f"data: {pack.name}, device: {picked.type}"))
    return Workbench(pack, picked, pick_precision(precision, device_capability(picked)))


def refuse_unfit_pack(pack: "Pack", batch: int, needed: Sequence[str], captions_per_image: int = 1) -> None:
    """Raise before anything is made where the pack has too few train images, or a needed split is without captions."""
    splits = pack.manifest["splits"]
    images = splits["train"]["images"]
    pairs = images * captions_per_image
    if "train" in needed and pairs < batch:
        times = f" with {captions_per_image} captions each" if captions_per_image > 1 else ""
        raise ChimeraError(
            f"batch {batch} is larger than the {images} training images of {pack.name}{times}",
            f"--set batch={max(2, pairs // 2)}",
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
    if "train" in needed:
        _refuse_missing_captions(pack)


def _refuse_missing_captions(pack: "Pack") -> None:
    """Raise ChimeraError naming the first training image that has no caption: nothing could be drawn for it."""
    without = [position for position, rows in enumerate(pack.captions("train").by_image()) if not rows]
    if not without:
        return
    file = pack.column("source_file")[int(pack.split_indices("train")[without[0]])]
    more = f" and {len(without) - 1:,} more training images of {pack.name} have" if len(without) > 1 else " has"
    raise ChimeraError(
        f"{file}{more} no caption",
        "give each a caption in the source, or take it out of the train split, and prepare the pack again",
    )


def epoch_updates(pack: "Pack", batch: int, captions_per_image: int = 1) -> int:
    """Return how many updates show every training image with so many of its captions."""
    return max(1, round(len(pack.split_indices("train")) * captions_per_image / batch))


def fresh_architecture(config: TrainConfig) -> "Architecture":
    """Return the architecture that a recipe trains."""
    return architecture_of(config.image, config.text, config.heads, config.loss, config.augmentation.flip)


def architecture_of(image: ImageTower, text: TextTower, heads: Heads, loss: Loss, flipped_view: bool) -> "Architecture":
    """Return the architecture that these parts of a config make."""
    from chimera_cli.models.dual_encoder import Architecture

    return Architecture(
        image_weights=image.weights,
        image_size=image.image_size,
        # Where its last blocks learn, a locked tower is not computed once as a whole.
        image_locked=image.locked and not image.learn_blocks,
        learn_blocks=image.learn_blocks or None,
        image_stages=image.stages,
        flipped_view=flipped_view,
        text_weights=text.weights,
        learn_layers=text.learn_layers,
        max_tokens=text.max_tokens,
        text_hidden_states=text.hidden_states,
        head=heads.kind,
        hidden=heads.hidden,
        dim=heads.dim,
        dropout=heads.dropout,
        members=heads.members,
        image_queries=heads.queries,
        temperature=loss.temperature,
        # SigLIP starts its bias at -10, where almost all pairs are negatives (Zhai et al. 2023, section 3.2).
        logit_bias=-10.0 if loss.kind == "sigmoid" else None,
    )


def refuse_unfit_towers(architecture: "Architecture") -> None:
    """Raise UsageError, before anything is made, where a tower lacks stages, blocks or states that are asked for."""
    from chimera_cli.models.dual_encoder import build_dual_encoder

    if architecture.image_stages or architecture.learn_blocks or architecture.text_hidden_states:
        build_dual_encoder(architecture, pretrained=False)


def fresh_model(
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


def new_learner(
    model: "DualEncoder", optimiser: Optimiser, bench: Workbench, updates: int, ema: float = 0.0
) -> "Learner":
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


def run_loop(learner: "Learner", batches: Any, loss: Loss, bench: Workbench, **settings: Any) -> "Outcome":
    """Return the outcome of the loop with a learner; `settings` are those of `training.loop.train`."""
    from chimera_cli.training.loop import train
    from chimera_cli.training.losses import contrastive_loss

    members = learner.model.architecture.members
    return train(
        learner.model,
        batches,
        contrastive_loss(loss.kind, members, label_smoothing=loss.label_smoothing, hardness=loss.hardness),
        learner.optimiser,
        learner.schedule,
        device=bench.device,
        precision=bench.precision,
        scaler=learner.scaler,
        average=learner.average,
        **settings,
    )


def over_seeds(group: str, seeds: Sequence[int], results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return what a command prints of a training run: means by name under `figures`, spreads and seeds beside."""
    from chimera_cli.figures import RETRIEVAL
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
