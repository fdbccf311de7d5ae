"""A large batch in micro-batches: the gradient of one graph through the same pieces, to the last digits."""

import functools
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from tiny_model import TINY

from chimera_cli.errors import ChimeraError
from chimera_cli.models.dual_encoder import DualEncoder, build_dual_encoder
from chimera_cli.training.batches import Mixture, PairBatch, embed_pairs
from chimera_cli.training.large_batch import alone, backward, loss_without_gradient, split
from chimera_cli.training.losses import LOSSES, contrastive_loss

N = 10
# DESIGN: relative L2 error of the whole gradient, temperature included.
BOUNDS = {torch.float64: 1e-10, torch.float32: 5e-5}


@functools.cache
def model(dropout: float, dtype: torch.dtype, loss: str = "infonce") -> DualEncoder:
    """Return the smallest dual encoder with MLP heads, in training mode but with frozen statistics.

    No test changes its parameters.
    """
    torch.manual_seed(0)
    bias = -2.0 if loss == "sigmoid" else None
    made = build_dual_encoder(replace(TINY, head="mlp", dropout=dropout, logit_bias=bias)).to(dtype)
    for module in made.text_tower.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = dropout
    made.train()
    for module in made.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    return made


def pairs(of: DualEncoder, dtype: torch.dtype, n: int = N) -> PairBatch:
    generator = torch.Generator().manual_seed(1)
    words = ["a", "red", "dog", "runs", "over", "the", "green", "hill", "and", "far", "away", "from", "here"]
    texts = [" ".join(words[: 2 + index]) for index in range(n)]
    ids = torch.tensor([0, 0, *range(1, n - 1)])
    return PairBatch(0, torch.randn(n, 3, 32, 32, generator=generator).to(dtype), of.tokenise(texts), ids)


def gradient_of(of: DualEncoder) -> torch.Tensor:
    return torch.cat([parameter.grad.flatten() for parameter in of.parameters() if parameter.grad is not None])


def one_graph(of: DualEncoder, batch: PairBatch, micro: int, loss, autocast=nullcontext) -> tuple[float, torch.Tensor]:
    """Return loss and gradient of one graph through the same micro-batches with the same random numbers."""
    torch.manual_seed(2)
    of.zero_grad()
    with autocast():
        features = [embed_pairs(of, piece) for piece in split(batch, micro)]
    image, text = (torch.cat([pair[side] for pair in features]) for side in (0, 1))
    wide = torch.float64 if image.dtype == torch.float64 else torch.float32
    value = loss(image.to(wide), text.to(wide), batch.image_ids, of.logit_scale, of.logit_bias)
    value.backward()
    return value.item(), gradient_of(of)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("tile", [1, 4, 64])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("micro", [1, 3, 7, N])
@pytest.mark.parametrize("kind", ["infonce", "sigmoid"])
def test_micro_batches_give_the_gradient_of_the_whole_batch(kind, micro, dropout, tile, dtype) -> None:
    of = model(dropout, dtype, kind)
    batch = pairs(of, dtype)
    wanted_loss, wanted = one_graph(of, batch, micro, contrastive_loss(kind, tile=N))
    of.zero_grad()
    torch.manual_seed(2)
    loss = backward(of, batch, contrastive_loss(kind, tile=tile), micro_batch=micro)
    found = gradient_of(of)
    assert loss.item() == pytest.approx(wanted_loss, rel=1e-5 if dtype == torch.float32 else 1e-12)
    assert found.shape == wanted.shape
    assert (found - wanted).norm() <= BOUNDS[dtype] * wanted.norm()
    assert of.logit_scale.grad is not None
    assert of.logit_scale.grad != 0


@pytest.mark.parametrize("micro", [1, 2, 4, 7, N])
def test_captions_that_share_an_image_have_the_gradient_of_copies_of_it(micro: int) -> None:
    of = model(0.0, torch.float64)
    copies = pairs(of, torch.float64)
    rows = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 2, 3])
    copies = replace(copies, image=copies.image[:4][rows], image_ids=rows)
    _, wanted = one_graph(of, copies, N, LOSSES["infonce"])
    shared = replace(copies, image=copies.image[[0, 3, 6, 9]], image_rows=rows)
    assert sum(len(piece.image) for piece in split(shared, micro)) < 10 or micro == 1
    of.zero_grad()
    backward(of, shared, LOSSES["infonce"], micro_batch=micro)
    assert (gradient_of(of) - wanted).norm() <= 1e-10 * wanted.norm()


@pytest.mark.parametrize("micro", [1, 2, 4, 7, N])
@pytest.mark.parametrize("captions", [1, 2])
def test_mixtures_of_what_learning_towers_make_have_one_gradient(micro: int, captions: int) -> None:
    """The reference mixes by hand what the towers make of the whole batch."""
    of = model(0.0, torch.float64)
    whole = pairs(of, torch.float64)
    images = N // captions
    rows = torch.arange(images).repeat_interleave(captions)
    others = torch.randperm(images, generator=torch.Generator().manual_seed(4))
    other_pairs = (captions * others[:, None] + torch.arange(captions)).flatten()
    of.zero_grad()
    image, text = of.image_tower(whole.image[:images]), of.text_tower(whole.text)
    image = of.project_image(0.7 * image + 0.3 * image[others])[rows]
    text = of.project_text(0.7 * text + 0.3 * text[other_pairs])
    LOSSES["infonce"](image, text, rows, of.logit_scale, of.logit_bias).backward()
    wanted = gradient_of(of)
    mixtures = Mixture(0.7, torch.arange(images), others), Mixture(0.7, torch.arange(N), other_pairs)
    batch = replace(whole, image=whole.image[:images], image_ids=rows, image_rows=rows, mixtures=mixtures)
    of.zero_grad()
    backward(of, batch, LOSSES["infonce"], micro_batch=micro)
    assert (gradient_of(of) - wanted).norm() <= 1e-10 * wanted.norm()


@pytest.mark.parametrize("micro", [1, 3, 7])
def test_without_dropout_the_micro_batch_does_not_change_the_gradient(micro: int) -> None:
    of = model(0.0, torch.float64)
    batch = pairs(of, torch.float64)
    _, wanted = one_graph(of, batch, N, LOSSES["infonce"])
    of.zero_grad()
    backward(of, batch, LOSSES["infonce"], micro_batch=micro)
    assert (gradient_of(of) - wanted).norm() <= 1e-10 * wanted.norm()


def test_random_numbers_go_on_as_after_one_forward_pass() -> None:
    """The second pass draws the numbers of the first again and leaves no trace in what comes after."""
    of = model(0.3, torch.float64)
    batch = pairs(of, torch.float64)
    one_graph(of, batch, 3, LOSSES["infonce"])
    wanted = torch.rand(4)
    of.zero_grad()
    torch.manual_seed(2)
    backward(of, batch, LOSSES["infonce"], micro_batch=3)
    assert torch.equal(torch.rand(4), wanted)


@pytest.mark.parametrize("micro", [3, N])
def test_half_precision_and_a_scaled_loss_give_the_scaled_gradient(micro: int) -> None:
    def autocast() -> torch.autocast:
        return torch.autocast("cpu", torch.bfloat16)

    of = model(0.3, torch.float32)
    batch = pairs(of, torch.float32)
    _, wanted = one_graph(of, batch, micro, LOSSES["infonce"], autocast)
    of.zero_grad()
    torch.manual_seed(2)
    backward(of, batch, LOSSES["infonce"], micro_batch=micro, autocast=autocast, scaled=lambda loss: 1024 * loss)
    # A graph through all pieces sums their bfloat16 gradients in another order: the bound is that of bfloat16.
    assert (gradient_of(of) / 1024 - wanted).norm() <= 1e-2 * wanted.norm()


def test_an_exchange_is_given_features_and_takes_back_its_own_part() -> None:
    """Another process with the second half of the batch, played by what it would have sent."""
    of = model(0.0, torch.float64)
    batch = pairs(of, torch.float64)
    _, wanted = one_graph(of, batch, 5, LOSSES["infonce"])
    halves = split(batch, 5)
    with torch.no_grad():
        sent = [(half.image_ids, *embed_pairs(of, half)) for half in halves]
    total = torch.zeros_like(wanted)
    scale = 0.0
    for own, other in ((0, 1), (1, 0)):
        waiting = list(sent[other])

        def exchange(part: torch.Tensor, own: int = own, waiting: list = waiting) -> tuple[torch.Tensor, slice]:
            parts = [part, waiting.pop(0)] if own == 0 else [waiting.pop(0), part]
            return torch.cat(parts), slice(0, 5) if own == 0 else slice(5, 10)

        of.zero_grad()
        backward(of, halves[own], LOSSES["infonce"], micro_batch=3, exchange=exchange)
        scale = of.logit_scale.grad.clone()
        of.logit_scale.grad.zero_()
        total += gradient_of(of)
    of.zero_grad()
    one_graph(of, batch, 5, LOSSES["infonce"])
    assert torch.allclose(scale, of.logit_scale.grad, rtol=1e-10)
    of.logit_scale.grad.zero_()
    reference = gradient_of(of)
    assert (total - reference).norm() <= 1e-10 * reference.norm()


def test_statistics_of_a_batch_are_refused() -> None:
    of = build_dual_encoder(TINY).train()
    with pytest.raises(ChimeraError, match="statistics of its batch"):
        backward(of, pairs(of, torch.float32), LOSSES["infonce"], micro_batch=3)
    # The whole batch at once is what batch normalisation is made for.
    backward(of, pairs(of, torch.float32), LOSSES["infonce"], micro_batch=N)


def test_pieces_keep_order_and_end_with_their_longest_caption() -> None:
    of = model(0.0, torch.float32)
    pieces = split(pairs(of, torch.float32), 4)
    assert [len(piece) for piece in pieces] == [4, 4, 2]
    assert torch.equal(torch.cat([piece.image_ids for piece in pieces]), pairs(of, torch.float32).image_ids)
    lengths = [piece.text["input_ids"].shape[1] for piece in pieces]
    assert lengths == [7, 11, 13]


def test_the_loss_alone_is_the_loss_of_the_step() -> None:
    of = model(0.3, torch.float64)
    batch = pairs(of, torch.float64)
    torch.manual_seed(2)
    wanted = backward(of, batch, LOSSES["infonce"], micro_batch=3)
    torch.manual_seed(2)
    found = loss_without_gradient(of, batch, LOSSES["infonce"], micro_batch=3, exchange=alone)
    assert torch.equal(found, wanted)
