"""Contrastive losses that know which pairs show the same image."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

ContrastiveLoss = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None], Tensor]


def infonce(
    image_features: Tensor,
    text_features: Tensor,
    image_ids: Tensor,
    logit_scale: Tensor,
    _logit_bias: Tensor | None = None,
    *,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Return the symmetric InfoNCE loss of a batch of pairs, a scalar; about ln(batch) for unrelated features.

    `image_features` and `text_features` are (batch, dim), L2-normalised; `image_ids` (batch,) says which pairs show the
    same image: their captions are no negatives of each other. `logit_scale` is the logarithm of the scale.
    Source: Radford et al. 2021, figure 3.
    """
    logits = logit_scale.exp() * image_features @ text_features.T
    same = image_ids[:, None] == image_ids[None, :]
    own = torch.eye(len(image_ids), dtype=torch.bool, device=logits.device)
    # A finite floor, not -inf: label smoothing multiplies it by its share.
    excluded = same & ~own
    if label_smoothing and bool(excluded.any()):
        logits = logits.masked_fill(excluded, -1e4)
        return (_smoothed(logits, excluded, label_smoothing) + _smoothed(logits.T, excluded.T, label_smoothing)) / 2
    logits = logits.masked_fill(excluded, float("-inf"))
    target = torch.arange(len(image_ids), device=logits.device)
    rows = F.cross_entropy(logits, target, label_smoothing=label_smoothing)
    columns = F.cross_entropy(logits.T, target, label_smoothing=label_smoothing)
    return (rows + columns) / 2


def sigmoid(
    image_features: Tensor,
    text_features: Tensor,
    image_ids: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor | None = None,
) -> Tensor:
    """Return the pairwise sigmoid loss of a batch, a scalar: sum over all pairs divided by the batch.

    Arguments as for `infonce`; every caption of the same image is a positive. Source: Zhai et al. 2023, algorithm 1.
    """
    logits = logit_scale.exp() * image_features @ text_features.T
    if logit_bias is not None:
        logits = logits + logit_bias
    positive = image_ids[:, None] == image_ids[None, :]
    signs = torch.where(positive, 1.0, -1.0).to(logits.dtype)
    return -F.logsigmoid(signs * logits).sum() / len(image_ids)


def _smoothed(logits: Tensor, excluded: Tensor, smoothing: float) -> Tensor:
    """Return cross entropy against the diagonal, smoothing mass spread over the candidates that are not excluded."""
    log_probabilities = logits.log_softmax(dim=1)
    own = log_probabilities.diagonal()
    allowed = ~excluded
    uniform = (log_probabilities * allowed).sum(dim=1) / allowed.sum(dim=1)
    return -((1 - smoothing) * own + smoothing * uniform).mean()


LOSSES: dict[str, ContrastiveLoss] = {"infonce": infonce, "sigmoid": sigmoid}
