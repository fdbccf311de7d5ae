"""AdamW in parameter groups, and the learning-rate schedule."""

import math
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Literal

import torch
from timm.models import group_parameters
from torch import nn

from chimera_cli.models.dual_encoder import DualEncoder
from chimera_cli.models.image_tower import ImageTower
from chimera_cli.models.text_tower import TextTower


def build_optimiser(
    model: DualEncoder,
    *,
    lr_heads: float,
    lr_image: float,
    lr_text: float,
    weight_decay: float,
    layer_decay: float = 1.0,
) -> torch.optim.AdamW:
    """Return AdamW over all that learns; matrices decay, while norms, biases and the temperature do not.

    Inside a tower the rate of a layer is `layer_decay` times that of the layer above it, and the last layer has the
    tower's rate: what lies deeper is more general (Clark et al. 2020, ELECTRA, appendix B).
    """
    image, text = model.image_tower, model.text_tower
    parts: tuple[tuple[str, nn.Module, float, Mapping[str, int]], ...] = (
        ("image_tower", image, lr_image, image_layers(image) if layer_decay < 1 else {}),
        ("text_tower", text, lr_text, text_layers(text) if layer_decay < 1 else {}),
        ("image_head", model.image_head, lr_heads, {}),
        ("text_head", model.text_head, lr_heads, {}),
    )
    groups = []
    for name, module, rate, layers in parts:
        top = max(layers.values(), default=0)
        members: dict[tuple[int, bool], list[nn.Parameter]] = defaultdict(list)
        for key, parameter in module.named_parameters():
            if parameter.requires_grad:
                members[layers.get(key, top), parameter.ndim < 2].append(parameter)
        for (layer, is_vector), parameters in sorted(members.items()):
            decay = 0.0 if is_vector else weight_decay
            scaled = rate * layer_decay ** (top - layer)
            groups.append({"params": parameters, "lr": scaled, "weight_decay": decay, "name": name})
    scalars = [p for p in (model.logit_scale, model.logit_bias) if p is not None]
    groups.append({"params": scalars, "lr": lr_heads, "weight_decay": 0.0, "name": "temperature"})
    # Betas and epsilon as in CLIP (Radford et al. 2021, table 18): a slow second moment lags behind a young loss.
    return torch.optim.AdamW(groups, betas=(0.9, 0.98), eps=1e-6)


def image_layers(tower: ImageTower) -> dict[str, int]:
    """Return the depth of each parameter of an image tower, 0 for the stem, in timm's own order of its layers."""
    matcher = tower.backbone.group_matcher(coarse=False)  # type: ignore[operator]
    depths: dict[str, int] = group_parameters(tower.backbone, matcher, reverse=True)
    return {f"backbone.{name}": depth for name, depth in depths.items()}


def text_layers(tower: TextTower) -> dict[str, int]:
    """Return the depth of each parameter of a text tower: 0 for the embeddings, layers from 1 on."""
    layers = tower.layers()
    owner = {id(parameter): depth for depth, layer in enumerate(layers, 1) for parameter in layer.parameters()}
    embedded = {
        id(parameter)
        for module in tower.modules()
        if isinstance(module, nn.Embedding)
        for parameter in module.parameters()
    }
    # What is neither a layer nor an embedding is the norm after one of them, and learns at the end's rate.
    default = len(layers)
    return {
        name: owner.get(id(parameter), 0 if id(parameter) in embedded or "embedding" in name else default)
        for name, parameter in tower.named_parameters()
    }


def build_schedule(
    optimiser: torch.optim.Optimizer,
    updates: int,
    warmup_share: float,
    kind: Literal["cosine", "constant"] = "cosine",
    decay_share: float = 0.2,
) -> torch.optim.lr_scheduler.LambdaLR:
    """Return linear warm-up over `warmup_share` of the updates, then what `kind` says.

    `cosine` falls to zero (Loshchilov and Hutter 2017); `constant` stays until the last `decay_share` of the updates
    and then falls to zero as 1 - sqrt (Hägele et al. 2024, section 3).
    """
    warmup = round(updates * warmup_share)

    def cosine(update: int) -> float:
        done = (update - warmup) / max(1, updates - warmup)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))

    def constant(update: int) -> float:
        falling = max(1, round(updates * decay_share))
        done = (update - (updates - falling)) / falling
        return 1 - math.sqrt(min(1.0, max(0.0, done)))

    after: Callable[[int], float] = {"cosine": cosine, "constant": constant}[kind]

    def factor(update: int) -> float:
        return (update + 1) / (warmup + 1) if update < warmup else after(update)

    return torch.optim.lr_scheduler.LambdaLR(optimiser, factor)
