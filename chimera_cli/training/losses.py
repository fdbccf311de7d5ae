"""Contrastive losses that know which pairs show the same image, in tiles: memory is O(tile² + batch), never batch².

Forward passes once over the logits for their sums, backward a second time for the gradients; a tile lives only while
it is worked on. Plain PyTorch, so that it runs on a CPU and on Pascal as it does on anything newer.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

ContrastiveLoss = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None], Tensor]

# 1 MiB of float32: a handful of such tiles stay in the cache of a desktop processor. A GPU wants larger ones, 64 MiB.
_TILE_CPU, _TILE_GPU = 512, 4096


@dataclass(frozen=True, slots=True)
class _Settings:
    """`smoothing` and `hardness` as in the public functions; `tile` rows and columns are worked on at a time."""

    smoothing: float
    hardness: float
    tile: int


def infonce(
    image_features: Tensor,
    text_features: Tensor,
    image_ids: Tensor,
    logit_scale: Tensor,
    _logit_bias: Tensor | None = None,
    *,
    label_smoothing: float = 0.0,
    hardness: float = 0.0,
    tile: int | None = None,
) -> Tensor:
    """Return the symmetric InfoNCE loss of a batch of pairs, a scalar; about ln(batch) for unrelated features.

    `image_features` and `text_features` are (batch, dim), L2-normalised; `image_ids` (batch,) says which pairs show the
    same image: they are no negatives of each other, and an image with several captions in the batch has one term for
    each. `logit_scale` is the logarithm of the scale. `label_smoothing` spreads that share of the target over the pair
    and its negatives. `hardness` b weighs negative j of i by n exp(b l_ij) / sum_k exp(b l_ik), held constant in the
    gradient; 0 weighs them alike. Raises ValueError for a batch whose parts differ in length.
    Sources: Radford et al. 2021, figure 3; Robinson et al. 2021, equation 4.
    """
    settings = _settings(image_features, text_features, image_ids, label_smoothing, hardness, tile)
    loss: Tensor = _InfoNCE.apply(image_features, text_features, image_ids, logit_scale, settings)  # type: ignore[no-untyped-call]
    return loss


def sigmoid(
    image_features: Tensor,
    text_features: Tensor,
    image_ids: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor | None = None,
    *,
    label_smoothing: float = 0.0,
    hardness: float = 0.0,
    tile: int | None = None,
) -> Tensor:
    """Return the pairwise sigmoid loss of a batch, a scalar: sum over all pairs divided by the batch.

    Arguments as for `infonce`; every caption of the same image is a positive. `label_smoothing` e makes the targets
    1 - e/2 and e/2; `hardness` weighs negatives by the mean of their weights in their row and in their column.
    Source: Zhai et al. 2023, algorithm 1.
    """
    settings = _settings(image_features, text_features, image_ids, label_smoothing, hardness, tile)
    bias = torch.zeros_like(logit_scale) if logit_bias is None else logit_bias
    loss: Tensor = _Sigmoid.apply(image_features, text_features, image_ids, logit_scale, bias, settings)  # type: ignore[no-untyped-call]
    return loss


def _settings(
    image: Tensor, text: Tensor, image_ids: Tensor, smoothing: float, hardness: float, tile: int | None
) -> _Settings:
    if not (image.ndim == 2 and image.shape == text.shape and image_ids.shape == image.shape[:1]):
        shapes = f"{tuple(image.shape)}, {tuple(text.shape)} and {tuple(image_ids.shape)}"
        raise ValueError(f"features (batch, dim) twice and image_ids (batch,) are needed, not {shapes}")
    if tile is not None and tile < 1:
        raise ValueError(f"a tile has at least one row, not {tile}")
    return _Settings(smoothing, hardness, tile or (_TILE_CPU if image.device.type == "cpu" else _TILE_GPU))


# ---- tiles ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Tile:
    """One piece of the logits: `negative` (rows, columns) says which of its pairs are negatives, None: all of them."""

    rows: slice
    columns: slice
    logits: Tensor
    negative: Tensor | None

    def of_negatives(self, values: Tensor, otherwise: float) -> Tensor:
        """Return `values` (rows, columns) with `otherwise` in the place of what is no negative."""
        return values if self.negative is None else values.masked_fill(~self.negative, otherwise)


def _tiles(image: Tensor, text: Tensor, ids: Tensor, scale: Tensor, bias: Tensor | None, tile: int) -> Iterator[_Tile]:
    """Yield the logits (batch, batch) in pieces of at most `tile` rows and columns."""
    starts = range(0, len(ids), tile)
    # Where every image is there once, only the diagonal is not negative: the other tiles need no comparing.
    once = len(torch.unique(ids)) == len(ids)
    for top in starts:
        rows = slice(top, top + tile)
        scaled = image[rows] * scale
        for left in starts:
            columns = slice(left, left + tile)
            logits = scaled @ text[columns].T
            if bias is not None:
                logits += bias
            mixed = not once or top == left
            yield _Tile(rows, columns, logits, ids[rows, None] != ids[None, columns] if mixed else None)


def _negatives(ids: Tensor, dtype: torch.dtype) -> Tensor:
    """Return for each pair of the batch, (batch,), how many of the others show another image."""
    _, inverse, counts = torch.unique(ids, return_inverse=True, return_counts=True)
    others: Tensor = len(ids) - counts[inverse]
    return others.to(dtype)


def _add_exp(sums: Tensor, place: slice, values: Tensor, dim: int) -> None:
    """Bring the logarithms of sums of exponentials (batch,) up to date by `values` (rows, columns)."""
    sums[place] = torch.logaddexp(sums[place], values.logsumexp(dim))


def _hardness_sums(image: Tensor, text: Tensor, ids: Tensor, scale: Tensor, bias: Tensor | None, how: _Settings) -> Any:
    """Return log(sum_k exp(b l_ik) / n) over the negatives of each row and of each column, two of (batch,)."""
    rows, columns = (torch.full_like(image[:, 0], float("-inf")) for _ in range(2))
    for part in _tiles(image, text, ids, scale, bias, how.tile):
        weighed = part.of_negatives(how.hardness * part.logits, float("-inf"))
        _add_exp(rows, part.rows, weighed, 1)
        _add_exp(columns, part.columns, weighed, 0)
    # Without any negative the sum is log 0 and so is n: 0 keeps infinities out of the weights of nothing.
    count = _negatives(ids, image.dtype)
    return tuple(torch.where(count > 0, sums - count.clamp(min=1).log(), 0.0) for sums in (rows, columns))


# ---- InfoNCE --------------------------------------------------------------------------------------------------------


class _InfoNCE(torch.autograd.Function):
    """Per direction and pair: log Z - (1 - e) own - e mean(own, negatives); Z = exp(own) + sum of w exp(negative)."""

    @staticmethod
    def forward(ctx: Any, image: Tensor, text: Tensor, ids: Tensor, logit_scale: Tensor, how: _Settings) -> Tensor:
        scale = logit_scale.exp()
        own = scale * (image * text).sum(dim=1)
        logs = [torch.full_like(own, float("-inf")) for _ in range(2)]
        totals = [own.clone(), own.clone()]
        hard = _hardness_sums(image, text, ids, scale, None, how) if how.hardness else None
        for part in _tiles(image, text, ids, scale, None, how.tile):
            for dim, place in ((1, part.rows), (0, part.columns)):
                weighed = part.logits if hard is None else _weighed(part.logits, hard[1 - dim][place], dim, how)
                _add_exp(logs[1 - dim], place, part.of_negatives(weighed, float("-inf")), dim)
                if how.smoothing:
                    totals[1 - dim][place] += part.of_negatives(part.logits, 0.0).sum(dim)
        logs = [torch.logaddexp(own, negatives) for negatives in logs]
        candidates = _negatives(ids, own.dtype) + 1
        terms = sum(
            log_z - (1 - how.smoothing) * own - how.smoothing * total / candidates
            for log_z, total in zip(logs, totals, strict=True)
        )
        ctx.how, ctx.hard = how, hard
        ctx.save_for_backward(image, text, ids, logit_scale, own, *logs, candidates)
        return torch.as_tensor(terms).mean() / 2

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        image, text, ids, logit_scale, own, log_rows, log_columns, candidates = ctx.saved_tensors
        how, hard = ctx.how, ctx.hard
        scale, share = logit_scale.exp(), how.smoothing / candidates
        own_slope = (own - log_rows).exp() + (own - log_columns).exp() - 2 * (1 - how.smoothing) - 2 * share
        grads = _Gradients.of_own(image, text, own, own_slope, scale)
        for part in _tiles(image, text, ids, scale, None, how.tile):
            slope = torch.zeros_like(part.logits)
            for dim, place, log_z in ((1, part.rows, log_rows), (0, part.columns, log_columns)):
                weighed = part.logits if hard is None else _weighed(part.logits, hard[1 - dim][place], dim, how)
                slope += (weighed - log_z[place].unsqueeze(dim)).exp_()
                if how.smoothing:
                    slope -= share[place].unsqueeze(dim)
            grads.add(part, part.of_negatives(slope, 0.0), image, text, scale)
        return grads.scaled(grad / (2 * len(ids)))


def _weighed(logits: Tensor, hard: Tensor, dim: int, how: _Settings) -> Tensor:
    """Return log(w exp(l)) = (1 + b) l - log(sum exp(b l) / n) of a tile, weighed along rows (1) or columns (0)."""
    return (1 + how.hardness) * logits - hard.unsqueeze(dim)


# ---- sigmoid --------------------------------------------------------------------------------------------------------


class _Sigmoid(torch.autograd.Function):
    """Per pair: binary cross entropy of its logit, negatives weighed where that is asked for; summed, by the batch."""

    @staticmethod
    def forward(
        ctx: Any, image: Tensor, text: Tensor, ids: Tensor, logit_scale: Tensor, bias: Tensor, how: _Settings
    ) -> Tensor:
        scale = logit_scale.exp()
        hard = _hardness_sums(image, text, ids, scale, bias, how) if how.hardness else None
        total = torch.zeros((), dtype=torch.float64, device=image.device)
        for part in _tiles(image, text, ids, scale, bias, how.tile):
            # softplus(l) - t l is the binary cross entropy of the logit l against the target t.
            terms = F.softplus(part.logits).sub_(_targets(part, how) * part.logits)
            total += terms.mul_(_pair_weights(part, hard, how)).sum(dtype=torch.float64)
        ctx.how, ctx.hard = how, hard
        ctx.save_for_backward(image, text, ids, logit_scale, bias)
        return (total / len(ids)).to(image.dtype)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        image, text, ids, logit_scale, bias = ctx.saved_tensors
        how, scale = ctx.how, logit_scale.exp()
        grads = _Gradients.of_own(image, text, None, None, scale)
        for part in _tiles(image, text, ids, scale, bias, how.tile):
            slope = part.logits.sigmoid().sub_(_targets(part, how)).mul_(_pair_weights(part, ctx.hard, how))
            grads.add(part, slope, image, text, scale, bias)
        *gradients, slopes = grads.scaled(grad / len(ids), with_bias=True)
        return *gradients[:4], slopes, None


def _targets(part: _Tile, how: _Settings) -> Tensor:
    """Return the smoothed target of every pair of a tile: 1 - e/2 for positives, e/2 for negatives."""
    low, high = (torch.tensor(value).to(part.logits) for value in (how.smoothing / 2, 1 - how.smoothing / 2))
    return low if part.negative is None else torch.where(part.negative, low, high)


def _pair_weights(part: _Tile, hard: Any, how: _Settings) -> Tensor | float:
    """Return the weight of every pair of a tile: 1 for positives, the mean of both directions for negatives."""
    if hard is None:
        return 1.0
    rows, columns = hard
    rising = how.hardness * part.logits
    weights = ((rising - rows[part.rows, None]).exp() + (rising - columns[None, part.columns]).exp()) / 2
    return part.of_negatives(weights, 1.0)


# ---- gradients ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Gradients:
    """Sums over the tiles, given the slope of the loss by each logit: for both features, scale and bias."""

    image: Tensor
    text: Tensor
    scale: Tensor
    bias: Tensor

    @classmethod
    def of_own(
        cls, image: Tensor, text: Tensor, own: Tensor | None, slope: Tensor | None, scale: Tensor
    ) -> "_Gradients":
        """Return the part of the pairs themselves, from the slopes by their logits `own`, both (batch,)."""
        zero = torch.zeros((), dtype=torch.float64, device=image.device)
        if own is None or slope is None:
            return cls(torch.zeros_like(image), torch.zeros_like(text), zero, zero.clone())
        by_scale = (slope * own).sum(dtype=torch.float64)
        pull = (scale * slope).unsqueeze(1)
        return cls(pull * text, pull * image, by_scale, zero)

    def add(
        self, part: _Tile, slope: Tensor, image: Tensor, text: Tensor, scale: Tensor, bias: Tensor | None = None
    ) -> None:
        """Add a tile, given the slope of the loss by each of its logits (rows, columns)."""
        # The scale moves what stands before the bias.
        before_bias = part.logits if bias is None else part.logits - bias
        self.scale.add_((slope * before_bias).sum(dtype=torch.float64))
        self.bias.add_(slope.sum(dtype=torch.float64))
        slope = slope.mul_(scale)
        self.image[part.rows].addmm_(slope, text[part.columns])
        self.text[part.columns].addmm_(slope.T, image[part.rows])

    def scaled(self, factor: Tensor, with_bias: bool = False) -> tuple[Tensor | None, ...]:
        """Return what `backward` returns: gradients of image, text, ids, scale and then of bias or of nothing."""
        dtype = self.image.dtype
        last = (self.bias * factor).to(dtype) if with_bias else None
        return self.image.mul_(factor), self.text.mul_(factor), None, (self.scale * factor).to(dtype), last


LOSSES: dict[str, Callable[..., Tensor]] = {"infonce": infonce, "sigmoid": sigmoid}


def contrastive_loss(kind: str, members: int = 1, **settings: Any) -> ContrastiveLoss:
    """Return the loss called `kind` with its settings filled in: a function of features, ids, scale and bias.

    With several `members` the features are those of an `EnsembleHead`, and the loss is that of `per_member`.
    """
    loss = partial(LOSSES[kind], **settings)
    return loss if members == 1 else per_member(loss, members)


def per_member(loss_of: ContrastiveLoss, members: int) -> ContrastiveLoss:
    """Return the mean over the members of each one's own loss, given their embeddings side by side.

    A loss of the mean similarity would have the members make up for each other's errors; alone, each errs in its own
    way. Features are (batch, members * dim) of unit length, as an `EnsembleHead` gives them. The loss raises ValueError
    where their width is no multiple of `members`.
    """

    def parts(features: Tensor) -> tuple[Tensor, ...]:
        if features.shape[-1] % members:
            raise ValueError(f"features of {members} members can't be {features.shape[-1]} wide")
        chunks = (features * math.sqrt(members)).chunk(members, dim=-1)
        return tuple(chunk.contiguous() for chunk in chunks)

    def mean_loss(image: Tensor, text: Tensor, ids: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
        pairs = zip(parts(image), parts(text), strict=True)
        losses = [loss_of(images, texts, ids, scale, bias) for images, texts in pairs]
        return torch.stack(losses).mean()

    return mean_loss
