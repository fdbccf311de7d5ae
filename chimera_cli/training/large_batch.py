"""One step of any effective batch in any memory: the exact gradient of the whole batch from micro-batches.

Features of all micro-batches are computed without a graph, the loss and its gradient by the features in tiles; then
each micro-batch goes forward again, with a graph and the same random numbers, and takes its part of the gradient back.
Source: Gao et al. 2021, Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from chimera_cli.errors import ChimeraError
from chimera_cli.models.dual_encoder import DualEncoder
from chimera_cli.training.batches import PairBatch, embed_pairs
from chimera_cli.training.losses import ContrastiveLoss

# A fresh context for every pass: autocast caches the casts of weights while it lasts, and those of a pass without a
# graph would cut the gradients of the next.
Autocast = Callable[[], AbstractContextManager[object]]
# Features of this process -> (features of all processes, where its own stand in them).
Exchange = Callable[[Tensor], tuple[Tensor, slice]]


def alone(features: Tensor) -> tuple[Tensor, slice]:
    """Return what a single process exchanges: its own features."""
    return features, slice(len(features))


def backward(
    model: DualEncoder,
    batch: PairBatch,
    loss_of: ContrastiveLoss,
    *,
    micro_batch: int | None = None,
    autocast: Autocast = nullcontext,
    scaled: Callable[[Tensor], Tensor] = lambda loss: loss,
    exchange: Exchange = alone,
) -> Tensor:
    """Add the gradient of the batch's loss to the parameters' `grad` and return the loss, a scalar without a graph.

    At most `micro_batch` pairs (None: all) are in memory with their activations. The gradient is that of one graph
    through the same micro-batches with the same dropout masks, temperature included. `scaled` multiplies the loss by
    the factor of a gradient scaler. With many processes each ends up with the gradient through its own pairs, to be
    summed over the processes, and with the whole gradient of temperature and bias. Raises ChimeraError where batch
    normalisation would see micro-batches instead of the batch, which is another function.
    """
    pieces = split(batch, micro_batch or len(batch))
    if len(pieces) == 1 and exchange is alone:
        with autocast():
            image, text = embed_pairs(model, batch)
        loss = loss_of(_wide(image), _wide(text), batch.image_ids, model.logit_scale, model.logit_bias)
        torch.autograd.backward(scaled(loss))
        return loss.detach()
    refuse_batch_statistics(model)
    images, texts, states = _without_graph(model, pieces, autocast)
    loss, *slopes = _by_features(model, images, texts, batch.image_ids, loss_of, scaled, exchange)
    sizes = [len(piece) for piece in pieces]
    by_piece = zip(pieces, states, *(torch.split(part, sizes) for part in slopes), strict=True)
    for piece, state, image_slope, text_slope in by_piece:
        with state.again(), autocast():
            features = embed_pairs(model, piece)
        torch.autograd.backward([_wide(part) for part in features], [image_slope, text_slope])
    return loss


def loss_without_gradient(
    model: DualEncoder,
    batch: PairBatch,
    loss_of: ContrastiveLoss,
    *,
    micro_batch: int | None = None,
    autocast: Autocast = nullcontext,
    exchange: Exchange = alone,
) -> Tensor:
    """Return the loss that `backward` would return, without its gradient."""
    images, texts, _ = _without_graph(model, split(batch, micro_batch or len(batch)), autocast)
    with torch.no_grad():
        ids, _ = exchange(batch.image_ids)
        image, text = (exchange(torch.cat(part))[0] for part in (images, texts))
        return loss_of(image, text, ids, model.logit_scale, model.logit_bias)


def split(batch: PairBatch, micro_batch: int) -> list[PairBatch]:
    """Return the batch in pieces of at most `micro_batch` pairs, in order; tokens end with the longest of a piece."""
    if micro_batch >= len(batch):
        return [batch]
    starts = range(0, len(batch), micro_batch)
    return [_piece(batch, slice(start, start + micro_batch)) for start in starts]


def refuse_batch_statistics(model: nn.Module) -> None:
    """Raise ChimeraError where a batch normalisation computes its statistics from what it is given."""
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and (module.training or not module.track_running_stats):
            raise ChimeraError(
                f"{name} normalises by the statistics of its batch, and a micro-batch has others than the batch",
                "leave micro_batch out, or take a pretrained tower, whose statistics are frozen",
            )


# ---- parts ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class RandomState:
    """The random numbers as they were: those of the CPU, and of the GPU the model is on."""

    cpu: Tensor
    gpu: Tensor | None
    device: torch.device

    @classmethod
    def now(cls, device: torch.device) -> "RandomState":
        """Return the state at this moment."""
        gpu = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        return cls(torch.get_rng_state(), gpu, device)

    @contextmanager
    def again(self) -> Iterator[None]:
        """Go on from this state for a while; afterwards the numbers continue where they were before."""
        before = RandomState.now(self.device)
        self.put_back()
        try:
            yield
        finally:
            before.put_back()

    def put_back(self) -> None:
        """Let all random numbers go on from this state."""
        torch.set_rng_state(self.cpu)
        if self.gpu is not None:
            torch.cuda.set_rng_state(self.gpu, self.device)


def _without_graph(
    model: DualEncoder, pieces: Sequence[PairBatch], autocast: Autocast
) -> tuple[list[Tensor], list[Tensor], list[RandomState]]:
    """Return image_features and text_features (micro-batch, dim) of each piece, and the random state before each."""
    images, texts, states = [], [], []
    for piece in pieces:
        states.append(RandomState.now(piece.image_ids.device))
        with torch.no_grad(), autocast():
            image, text = embed_pairs(model, piece)
        images.append(_wide(image))
        texts.append(_wide(text))
    return images, texts, states


def _by_features(
    model: DualEncoder,
    images: Sequence[Tensor],
    texts: Sequence[Tensor],
    image_ids: Tensor,
    loss_of: ContrastiveLoss,
    scaled: Callable[[Tensor], Tensor],
    exchange: Exchange,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the loss of the whole batch and its gradients by this process's features, two of (batch, dim).

    Temperature and bias get their gradients here, whole.
    """
    ids, _ = exchange(image_ids)
    (image, own), (text, _) = (exchange(torch.cat(list(part))) for part in (images, texts))
    image.requires_grad_()
    text.requires_grad_()
    loss = loss_of(image, text, ids, model.logit_scale, model.logit_bias)
    torch.autograd.backward(scaled(loss))
    assert image.grad is not None
    assert text.grad is not None
    return loss.detach(), image.grad[own], text.grad[own]


def _wide(features: Tensor) -> Tensor:
    """Return features in the precision of the loss: a half-precision softmax over a large batch loses small terms."""
    return features if features.dtype == torch.float64 else features.float()


def _piece(batch: PairBatch, rows: slice) -> PairBatch:
    """Return the pairs `rows` of a batch, with all that goes into their mixtures."""
    shown: Tensor | slice = rows
    texts: Tensor | slice = rows
    again = mixtures = None
    if batch.image_rows is not None:
        # They rise without gaps: a slice of images, which takes no memory of its own.
        of_pairs = batch.image_rows[rows]
        shown, again = slice(int(of_pairs[0]), int(of_pairs[-1]) + 1), of_pairs - of_pairs[0]
    if batch.mixtures is not None:
        (shown, of_images), (texts, of_texts) = (
            mixture.part(which) for mixture, which in zip(batch.mixtures, (shown, texts), strict=True)
        )
        mixtures = of_images, of_texts
    text = batch.text
    if isinstance(text, Tensor):
        part: Tensor | dict[str, Tensor] = text[texts]
    else:
        longest = int(text["attention_mask"][texts].sum(dim=1).max())
        part = {name: tokens[texts, :longest] for name, tokens in text.items()}
    ids = batch.image_ids[rows]
    return PairBatch(batch.epoch, batch.image[shown], part, ids, batch.number, image_rows=again, mixtures=mixtures)
