"""What the trainer reads: pixels and tokens of a pack, or the cached features of locked towers."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from chimera_cli.errors import ChimeraError
from chimera_cli.events import Listener

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray
    from torch import Tensor

    from chimera_cli.data.pack import Pack
    from chimera_cli.models.dual_encoder import DualEncoder
    from chimera_cli.models.text_tower import Tokens
    from chimera_cli.training.batches import PairBatch
    from chimera_cli.training.loop import Figures


@dataclass(frozen=True, slots=True)
class Workbench:
    """What all seeds of a group share: the pack, the device and the precision to compute in."""

    pack: "Pack"
    device: "torch.device"
    precision: Literal["float32", "bfloat16", "float16"]


def warm_caches(model: "DualEncoder", bench: Workbench, tell: Listener) -> tuple[float, float]:
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
            # Per pair, not per caption: a cold run encodes all captions of an image for the one it then draws.
            per_pair = total / len(bench.pack.split_indices(split))
    return total, per_pair


def training_batches(
    bench: Workbench,
    model: "DualEncoder",
    batch: int,
    seed: int,
    tell: Listener,
    *,
    crop_scale: float = 1.0,
    feature_noise: float = 0.0,
    shuffled: bool = False,
) -> "Iterator[PairBatch]":
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
    bench: Workbench, model: "DualEncoder", seed: int, tell: Listener, crop_scale: float, feature_noise: float
) -> "Callable[[NDArray[np.int64], int], Tensor]":
    """Return what gives the loader's images at positions: cached features, or augmented pixels from the pack."""
    import torch

    from chimera_cli.services.embeddings import pooled_image_features
    from chimera_cli.training.augment import augmented_pixels, noisy_rows

    generator = torch.Generator().manual_seed(seed)
    if model.architecture.image_locked:
        pooled = pooled_image_features(model, bench.pack, "train", bench.device, tell).values
        views = torch.from_numpy(pooled).to(bench.device)
        return noisy_rows(views, generator, feature_noise, images_without_sides(bench.pack))
    return augmented_pixels(
        bench.pack.images,
        bench.pack.split_indices("train"),
        model.image_tower,
        model.architecture.image_size,
        bench.device,
        generator,
        crop_scale=crop_scale,
        may_flip=images_without_sides(bench.pack) if model.architecture.flipped_view else None,
    )


def images_without_sides(pack: "Pack") -> "Tensor":
    """Return for each training image, (n,) bool, that none of its captions says left or right: it may be mirrored."""
    import torch

    from chimera_cli.data.captions import mentions_side

    table = pack.captions("train")
    sided = [any(mentions_side(table.texts[row]) for row in rows) for rows in table.by_image()]
    return ~torch.tensor(sided)


def _text_inputs(
    bench: Workbench, model: "DualEncoder", seed: int, tell: Listener, feature_noise: float
) -> "Callable[[NDArray[np.int64]], Tensor | Tokens]":
    """Return what gives the loader's captions of rows: cached features, or tokens on the device."""
    import torch

    from chimera_cli.services.embeddings import pooled_caption_features
    from chimera_cli.training.augment import noisy_rows

    if model.architecture.learn_layers == 0:
        pooled = torch.from_numpy(pooled_caption_features(model, bench.pack, "train", bench.device, tell).values)
        generator = torch.Generator().manual_seed(seed + 1)
        views = noisy_rows(pooled.unsqueeze(1).to(bench.device), generator, feature_noise)
        return lambda rows: views(rows, 0)
    texts = bench.pack.captions("train").texts

    def tokens(rows: "NDArray[np.int64]") -> "Tokens":
        encoded = model.tokenise([texts[row] for row in rows])
        return {name: tensor.to(bench.device, non_blocking=True) for name, tensor in encoded.items()}

    return tokens


def dev_evaluation(model: "DualEncoder", bench: Workbench, tell: Listener) -> "Callable[[], Figures]":
    """Return the retrieval figures of the dev split with the model as it is when called."""
    import torch

    from chimera_cli.evaluation.retrieval import retrieval_figures, retrieval_ranks
    from chimera_cli.services.embeddings import embed_images, embed_texts_with, pooled_caption_features

    table = bench.pack.captions("dev")

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
