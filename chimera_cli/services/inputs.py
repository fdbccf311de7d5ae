"""What the trainer reads: pixels and tokens of a pack, or the cached features of locked towers."""

from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from chimera_cli.errors import ChimeraError
from chimera_cli.events import Listener
from chimera_cli.services.embeddings import (
    Crops,
    as_floats,
    caption_states,
    embed_captions,
    embed_images,
    image_maps,
    images_without_sides,
    locked_image_features,
    pooled_caption_features,
)

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray
    from torch import Tensor

    from chimera_cli.data.pack import Pack
    from chimera_cli.models.combination import Encoder
    from chimera_cli.models.dual_encoder import DualEncoder
    from chimera_cli.models.tokens import Tokens
    from chimera_cli.training.batches import PairBatch, Place
    from chimera_cli.training.loop import Figures


@dataclass(frozen=True, slots=True)
class Workbench:
    """What all seeds of a group share: the pack, the device and the precision to compute in."""

    pack: "Pack"
    device: "torch.device"
    precision: Literal["float32", "bfloat16", "float16"]


def warm_caches(
    model: "DualEncoder",
    bench: Workbench,
    tell: Listener,
    *,
    views: int = 1,
    crop_scale: float = 1.0,
    colour_jitter: float = 0.0,
) -> tuple[float, float]:
    """Make the cached features of locked towers for train, with `views` of each image, and dev.

    Returns the seconds that computing the train features took, now or when they were made, and the seconds per pair.
    """
    total, per_pair = 0.0, 0.0
    for split in ("train", "dev"):
        parts = []
        crops = _crops(model, views, crop_scale, colour_jitter) if split == "train" else None
        if model.architecture.image_locked:
            parts.append(locked_image_features(model, bench.pack, split, bench.device, tell, crops))
        if model.architecture.learn_layers == 0:
            parts.append(pooled_caption_features(model, bench.pack, split, bench.device, tell))
        if (maps := image_maps(model, bench.pack, split, bench.device, tell, crops)) is not None:
            parts.append(maps)
        seconds = [part.seconds for part in parts]
        if (states := caption_states(model, bench.pack, split, bench.device, tell)) is not None:
            seconds.append(states[1])
        if split == "train":
            total = sum(seconds)
            # Each pair is charged an image of its own and all captions of it, also where several pairs share one.
            per_pair = total / len(bench.pack.split_indices(split))
    return total, per_pair


def _crops(model: "DualEncoder", views: int, crop_scale: float, colour_jitter: float) -> Crops | None:
    """Return what `views` views of an image are beyond the plain one and, for a model that averages it, the mirrored.

    These two are always there: the model is evaluated with them.
    """
    count = views - (2 if model.architecture.flipped_view else 1)
    return Crops(count, crop_scale, colour_jitter) if count > 0 else None


def training_batches(
    bench: Workbench,
    model: "DualEncoder",
    batch: int,
    seed: int,
    tell: Listener,
    *,
    crop_scale: float = 1.0,
    colour_jitter: float = 0.0,
    views: int = 1,
    feature_noise: float = 0.0,
    captions_per_image: int = 1,
    mixup: float = 0.0,
    shuffled: bool = False,
    start: tuple[int, int] = (0, 0),
    rank: int = 0,
    world: int = 1,
) -> "Generator[PairBatch, None, None]":
    """Return the endless batches of the train split, from cached features as far as the towers are locked.

    Of the `views` that are cached of an image each batch shows another one at random. The batches begin at `start`,
    (epoch, number in the epoch), with what an uninterrupted sequence has there; of the `batch`
    pairs process `rank` of `world` gets its share. Where pixels or tokens have to be made, a thread makes those of the
    next batch while this one is trained on. `mixup` as in `pair_batches`.
    """
    from chimera_cli.training.batches import pair_batches

    images = _image_inputs(bench, model, seed, tell, crop_scale, colour_jitter, views, feature_noise)
    cached = model.architecture.image_locked and model.architecture.learn_layers == 0
    return pair_batches(
        _caption_rows(bench, shuffled),
        bench.pack.image_ids("train"),
        images,
        _text_inputs(bench, model, seed, tell, feature_noise),
        batch=batch,
        seed=seed,
        device=bench.device,
        start=start,
        prefetch=0 if cached else 1,
        captions_per_image=captions_per_image,
        mixup=mixup,
        rank=rank,
        world=world,
    )


def _caption_rows(bench: Workbench, shuffled: bool) -> "list[NDArray[np.int64]]":
    """Return for each training image the rows of its captions, `shuffled` of another image's."""
    import numpy as np

    rows = [np.asarray(part, dtype=np.int64) for part in bench.pack.captions("train").by_image()]
    empty = sum(len(part) == 0 for part in rows)
    if empty:
        raise ChimeraError(
            f"{empty} training images of {bench.pack.name} have no caption",
            "prepare the pack again from a set with captions",
        )
    # Captions move by half the set: no image keeps its own, and the marginal distributions stay what they were.
    return rows[len(rows) // 2 :] + rows[: len(rows) // 2] if shuffled else rows


def _image_inputs(
    bench: Workbench,
    model: "DualEncoder",
    seed: int,
    tell: Listener,
    crop_scale: float,
    colour_jitter: float,
    views: int,
    feature_noise: float,
) -> "Callable[[NDArray[np.int64], Place], Tensor]":
    """Return what gives the loader's images at positions: cached features or maps, or augmented pixels of the pack."""
    import torch

    from chimera_cli.data.augmentation import Augmentation
    from chimera_cli.training.augment import augmented_pixels, noisy_rows

    flip = model.architecture.flipped_view
    may_flip = images_without_sides(bench.pack) if flip else None
    crops = _crops(model, views, crop_scale, colour_jitter)
    if model.architecture.image_locked:
        features = torch.from_numpy(locked_image_features(model, bench.pack, "train", bench.device, tell, crops).values)
        if not model.image_tower.places:
            return noisy_rows(features.to(bench.device), seed, feature_noise, may_flip)
        return _from_disk(features, seed, bench.device, may_flip)
    if (maps := image_maps(model, bench.pack, "train", bench.device, tell, crops)) is not None:
        return _from_disk(torch.from_numpy(maps.values), seed, bench.device, may_flip)
    how = Augmentation(
        model.architecture.image_size,
        crop_scale=crop_scale,
        flip=flip,
        colour_jitter=colour_jitter,
        mean=model.image_tower.mean,
        std=model.image_tower.std,
    )
    return augmented_pixels(bench.pack.images, bench.pack.split_indices("train"), how, seed, bench.device, may_flip)


def _from_disk(
    views: "Tensor", seed: int, device: "torch.device", may_flip: "Tensor | None"
) -> "Callable[[NDArray[np.int64], Place], Tensor]":
    """Return what gives the loader a view (images, ...) of each image; of `views` only those of a batch are read."""
    from chimera_cli.training.augment import noisy_rows

    rows = noisy_rows(views, seed, 0.0, may_flip)
    return lambda positions, place: as_floats(rows(positions, place), device)


def _text_inputs(
    bench: Workbench, model: "DualEncoder", seed: int, tell: Listener, feature_noise: float
) -> "Callable[[NDArray[np.int64], Place], Tensor | Tokens]":
    """Return what gives the loader's captions of rows: cached features, cached states of locked layers, or tokens."""
    import torch

    from chimera_cli.training.augment import noisy_rows

    if model.architecture.learn_layers == 0:
        pooled = torch.from_numpy(pooled_caption_features(model, bench.pack, "train", bench.device, tell).values)
        return noisy_rows(pooled.unsqueeze(1).to(bench.device), seed, feature_noise, stream="texts")
    known = caption_states(model, bench.pack, "train", bench.device, tell)
    texts = bench.pack.captions("train").texts
    table = model.text_tower.token_table(texts, model.architecture.max_tokens) if known is None else known[0]

    def tokens(rows: "NDArray[np.int64]", _place: "Place") -> "Tokens":
        return {name: tensor.to(bench.device, non_blocking=True) for name, tensor in table.batch(rows).items()}

    return tokens


def dev_evaluation(model: "Encoder", bench: Workbench, tell: Listener) -> "Callable[[], Figures]":
    """Return the retrieval figures of the dev split with the model as it is when called."""
    from chimera_cli.evaluation.retrieval import retrieval_figures, retrieval_ranks

    table = bench.pack.captions("dev")

    def evaluate() -> Mapping[str, float | None]:
        image = embed_images(model, bench.pack, "dev", bench.device, tell)
        text = embed_captions(model, bench.pack, "dev", bench.device, tell)
        return retrieval_figures(retrieval_ranks(image, text, table.image_positions))

    return evaluate
