"""AdamW in parameter groups, and the learning-rate schedule."""

import math

import torch
from torch import nn

from chimera_cli.models.dual_encoder import DualEncoder


def build_optimiser(
    model: DualEncoder, *, lr_heads: float, lr_image: float, lr_text: float, weight_decay: float
) -> torch.optim.AdamW:
    """Return AdamW over all that learns; matrices decay, while norms, biases and the temperature do not.

    Raises ValueError where nothing learns.
    """
    parts: tuple[tuple[str, nn.Module, float], ...] = (
        ("image_tower", model.image_tower, lr_image),
        ("text_tower", model.text_tower, lr_text),
        ("image_head", model.image_head, lr_heads),
        ("text_head", model.text_head, lr_heads),
    )
    groups = []
    for name, module, rate in parts:
        learning = [parameter for parameter in module.parameters() if parameter.requires_grad]
        matrices = [parameter for parameter in learning if parameter.ndim >= 2]
        vectors = [parameter for parameter in learning if parameter.ndim < 2]
        for parameters, decay in ((matrices, weight_decay), (vectors, 0.0)):
            if parameters:
                groups.append({"params": parameters, "lr": rate, "weight_decay": decay, "name": name})
    scalars = [p for p in (model.logit_scale, model.logit_bias) if p is not None]
    groups.append({"params": scalars, "lr": lr_heads, "weight_decay": 0.0, "name": "temperature"})
    # Betas and epsilon as in CLIP (Radford et al. 2021, table 18): a slow second moment lags behind a young loss.
    return torch.optim.AdamW(groups, betas=(0.9, 0.98), eps=1e-6)


def build_schedule(
    optimiser: torch.optim.Optimizer, updates: int, warmup_share: float
) -> torch.optim.lr_scheduler.LambdaLR:
    """Return linear warm-up over `warmup_share` of the updates, then a cosine to zero (Loshchilov and Hutter 2017)."""
    warmup = round(updates * warmup_share)

    def factor(update: int) -> float:
        if update < warmup:
            return (update + 1) / (warmup + 1)
        done = (update - warmup) / max(1, updates - warmup)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))

    return torch.optim.lr_scheduler.LambdaLR(optimiser, factor)
