"""Embeddings of a split by the checkpoint of a run, with the cached features of locked towers where there are any."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chimera_cli.events import Listener, ignore

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

    from chimera_cli.data.pack import Pack
    from chimera_cli.models.dual_encoder import DualEncoder
    from chimera_cli.training.features import CachedFeatures


def embed_split(
    seed_dir: Path, pack: "Pack", split: str, device: "torch.device", listener: Listener = ignore
) -> "tuple[NDArray[np.float32], NDArray[np.float32]]":
    """Return image_features (images, dim) and text_features (captions, dim) of a split, L2-normalised.

    Rows are in the order of `pack.split_indices(split)` and `pack.captions(split)`. Raises ChimeraError for a
    checkpoint that is missing or damaged.
    """
    from chimera_cli.models.checkpoint import load_model

    model = load_model(seed_dir / "checkpoints" / "best.safetensors", device)
    return embed_images(model, pack, split, device, listener), embed_texts_with(
        model, pack.captions(split).texts, device, listener
    )


def embed_texts(
    seed_dir: Path, texts: Sequence[str], device: "torch.device", listener: Listener = ignore
) -> "NDArray[np.float32]":
    """Return text_features (texts, dim), L2-normalised, of any sentences by the best checkpoint of a seed."""
    from chimera_cli.models.checkpoint import load_model

    model = load_model(seed_dir / "checkpoints" / "best.safetensors", device)
    return embed_texts_with(model, texts, device, listener)


def embed_images(
    model: "DualEncoder", pack: "Pack", split: str, device: "torch.device", listener: Listener
) -> "NDArray[np.float32]":
    """Return image_features (images, dim) of a split; views of a model that averages them are averaged."""
    import torch

    from chimera_cli.training.features import image_features

    if model.architecture.image_locked:
        pooled = pooled_image_features(model, pack, split, device, listener).values
        with torch.inference_mode():
            return project_views(model, torch.from_numpy(pooled).to(device)).float().cpu().numpy()
    values = image_features(
        model.encode_image,
        model.image_tower,
        pack.images,
        pack.split_indices(split),
        image_size=model.architecture.image_size,
        device=device,
        flipped_view=model.architecture.flipped_view,
        listener=listener,
        stage=f"{split} images",
    )
    return mean_direction(torch.from_numpy(values)).numpy()


def embed_texts_with(
    model: "DualEncoder", texts: Sequence[str], device: "torch.device", listener: Listener = ignore
) -> "NDArray[np.float32]":
    """Return text_features (texts, dim), L2-normalised, of any sentences."""
    from chimera_cli.training.features import caption_features

    return caption_features(
        model.encode_text,
        model.text_tower,
        texts,
        max_tokens=model.architecture.max_tokens,
        device=device,
        listener=listener,
        stage="captions",
    )


def mean_direction(views: "torch.Tensor") -> "torch.Tensor":
    """Return the normalised mean (n, dim) of unit features (n, views, dim)."""
    import torch.nn.functional as F

    return F.normalize(views.mean(dim=1), dim=-1)


def project_views(model: "DualEncoder", pooled: "torch.Tensor") -> "torch.Tensor":
    """Return image_features (n, dim) of pooled features (n, views, width): each view projected, then averaged."""
    images, views, _width = pooled.shape
    return mean_direction(model.project_image(pooled.flatten(0, 1)).view(images, views, -1))


def pooled_image_features(
    model: "DualEncoder", pack: "Pack", split: str, device: "torch.device", listener: Listener
) -> "CachedFeatures":
    """Return the locked image tower's features (images, views, width) of a split from the cache, made if need be."""
    from chimera_cli.models.image_tower import image_weights_hash
    from chimera_cli.training.features import cached, image_features

    shape = model.architecture
    key = _key(pack, split, shape.image_weights, image_weights_hash(shape.image_weights), device)
    key |= {"image_size": shape.image_size, "flipped_view": shape.flipped_view}

    def compute() -> "NDArray[np.float32]":
        return image_features(
            model.image_tower.eval(),
            model.image_tower,
            pack.images,
            pack.split_indices(split),
            image_size=shape.image_size,
            device=device,
            flipped_view=shape.flipped_view,
            listener=listener,
            stage=f"{split} image features",
        )

    return cached(_features_dir(pack), f"{split}-images", key, compute, device)


def pooled_caption_features(
    model: "DualEncoder", pack: "Pack", split: str, device: "torch.device", listener: Listener
) -> "CachedFeatures":
    """Return the locked text tower's features (captions, width) of a split from the cache, made if need be."""
    from chimera_cli.models.text_tower import text_weights_hash
    from chimera_cli.training.features import cached, caption_features

    shape = model.architecture
    key = _key(pack, split, shape.text_weights, text_weights_hash(shape.text_weights), device)
    key |= {"max_tokens": shape.max_tokens}

    def compute() -> "NDArray[np.float32]":
        return caption_features(
            model.text_tower.eval(),
            model.text_tower,
            pack.captions(split).texts,
            max_tokens=shape.max_tokens,
            device=device,
            listener=listener,
            stage=f"{split} caption features",
        )

    return cached(_features_dir(pack), f"{split}-captions", key, compute, device)


def _key(pack: "Pack", split: str, weights: str, weights_hash: str | None, device: "torch.device") -> dict[str, Any]:
    import timm
    import torch
    import transformers

    from chimera_cli.runs import source_hash
    from chimera_cli.runtime import hardware

    # Versions are part of the key: a changed resize or attention kernel changes the features in their last digits.
    versions = {"torch": torch.__version__, "timm": timm.__version__, "transformers": transformers.__version__}
    return {
        "pack": pack.fingerprint,
        "split": split,
        "weights": weights,
        "weights_sha256": weights_hash,
        "versions": versions,
        # The stored seconds are evidence: those of another machine or of other code must not be taken for this one's.
        "hardware": hardware(device),
        "source_sha256": source_hash("models", "training/features.py", "data/augmentation.py"),
    }


def _features_dir(pack: "Pack") -> Path:
    return pack.path.parent / ".features" / pack.name
