"""The losses against hand-computed values and against plain references written another way."""

import math
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from chimera_cli.training.losses import infonce, sigmoid

SCALE = torch.tensor(math.log(10.0), dtype=torch.float64)


def unit(rows: int, dim: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(rows, dim, generator=generator, dtype=torch.float64), dim=-1)


def test_equal_features_cost_the_logarithm_of_the_batch() -> None:
    same = torch.ones(8, 4, dtype=torch.float64) / 2
    loss = infonce(same, same, torch.arange(8), SCALE)
    assert loss.item() == pytest.approx(math.log(8), abs=1e-12)


def test_two_orthogonal_pairs_by_hand() -> None:
    features = torch.eye(2, dtype=torch.float64)
    loss = infonce(features, features, torch.tensor([0, 1]), torch.tensor(0.0, dtype=torch.float64))
    # Both rows and columns: -log(e / (e + 1)).
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-1)), abs=1e-12)


def test_another_caption_of_the_same_image_is_no_negative() -> None:
    image, text = unit(4, 6, 0), unit(4, 6, 1)
    ids = torch.tensor([7, 7, 8, 9])
    logits = (SCALE.exp() * image @ text.T).tolist()
    allowed = [[0, 2, 3], [1, 2, 3], [0, 1, 2, 3], [0, 1, 2, 3]]
    rows = [math.log(sum(math.exp(logits[i][j]) for j in allowed[i])) - logits[i][i] for i in range(4)]
    columns = [math.log(sum(math.exp(logits[i][j]) for i in allowed[j])) - logits[j][j] for j in range(4)]
    assert infonce(image, text, ids, SCALE).item() == pytest.approx((sum(rows) + sum(columns)) / 8, rel=1e-12)


def test_label_smoothing_equals_torch_where_all_images_differ() -> None:
    image, text = unit(5, 6, 2), unit(5, 6, 3)
    logits = SCALE.exp() * image @ text.T
    target = torch.arange(5)
    wanted = sum(F.cross_entropy(part, target, label_smoothing=0.2) for part in (logits, logits.T)) / 2
    loss = infonce(image, text, torch.arange(5), SCALE, label_smoothing=0.2)
    assert loss.item() == pytest.approx(float(wanted), rel=1e-12)


def test_label_smoothing_gives_no_mass_to_excluded_pairs() -> None:
    image, text = unit(4, 6, 2), unit(4, 6, 3)
    ids = torch.tensor([1, 1, 2, 3])
    logits = SCALE.exp() * image @ text.T
    total = 0.0
    for matrix in (logits, logits.T):
        for row in range(4):
            allowed = [j for j in range(4) if j == row or ids[j] != ids[row]]
            log_p = matrix[row, allowed] - matrix[row, allowed].logsumexp(0)
            own = log_p[allowed.index(row)]
            total += -(0.8 * own + 0.2 * log_p.mean()).item() / 8
    loss = infonce(image, text, ids, SCALE, label_smoothing=0.2)
    assert loss.item() == pytest.approx(total, rel=1e-9)


def test_sigmoid_by_hand_with_two_captions_of_one_image() -> None:
    image, text = unit(3, 4, 4), unit(3, 4, 5)
    ids, bias = torch.tensor([0, 0, 1]), torch.tensor(-1.5, dtype=torch.float64)
    logits = (SCALE.exp() * image @ text.T + bias).tolist()
    total = 0.0
    for i in range(3):
        for j in range(3):
            sign = 1 if ids[i] == ids[j] else -1
            total += math.log(1 + math.exp(-sign * logits[i][j]))
    assert sigmoid(image, text, ids, SCALE, bias).item() == pytest.approx(total / 3, rel=1e-12)


@pytest.mark.parametrize("loss", [infonce, sigmoid])
def test_gradients_are_right(loss) -> None:
    image = unit(4, 3, 6).requires_grad_()
    text = unit(4, 3, 7).requires_grad_()
    scale = SCALE.clone().requires_grad_()
    ids = torch.tensor([0, 0, 1, 2])
    assert torch.autograd.gradcheck(lambda a, b, s: loss(a, b, ids, s, None), (image, text, scale))


# ---- tiles against one matrix ---------------------------------------------------------------------------------------


def whole_infonce(image, text, ids, scale, _bias, label_smoothing, hardness):
    """The same loss from the whole matrix of logits, differentiated by torch."""
    logits = scale.exp() * image @ text.T
    negative = ids[:, None] != ids[None, :]
    total = 0
    for matrix, allowed in ((logits, negative), (logits.T, negative.T)):
        own = matrix.diagonal()
        count = allowed.sum(dim=1)
        rising = (hardness * matrix.detach()).exp() * allowed
        weights = count[:, None] * rising / rising.sum(dim=1, keepdim=True).clamp(min=1e-300)
        log_z = (own.exp() + (weights * matrix.exp() * allowed).sum(dim=1)).log()
        mean = (own + (matrix * allowed).sum(dim=1)) / (count + 1)
        total = total + (log_z - (1 - label_smoothing) * own - label_smoothing * mean).mean() / 2
    return total


def whole_sigmoid(image, text, ids, scale, bias, label_smoothing, hardness):
    logits = scale.exp() * image @ text.T + bias
    positive = ids[:, None] == ids[None, :]
    target = torch.where(positive, 1 - label_smoothing / 2, label_smoothing / 2).to(logits.dtype)
    terms = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    rising = (hardness * logits.detach()).exp() * ~positive
    rows = (~positive).sum(dim=1, keepdim=True) * rising / rising.sum(dim=1, keepdim=True).clamp(min=1e-300)
    columns = (~positive).sum(dim=0, keepdim=True) * rising / rising.sum(dim=0, keepdim=True).clamp(min=1e-300)
    return (terms * torch.where(positive, 1.0, (rows + columns) / 2)).sum() / len(ids)


def gradients(loss, image, text, ids, **settings):
    scale = torch.tensor(2.0, dtype=image.dtype, requires_grad=True)
    bias = torch.tensor(-1.5, dtype=image.dtype, requires_grad=True)
    leaves = [image.clone().requires_grad_(), text.clone().requires_grad_(), scale, bias]
    value = loss(leaves[0], leaves[1], ids, scale, bias, **settings)
    (3 * value).backward()
    return value.item(), [leaf.grad for leaf in leaves if leaf.grad is not None]


@pytest.mark.parametrize(("tiled", "whole"), [(infonce, whole_infonce), (sigmoid, whole_sigmoid)])
@pytest.mark.parametrize("tile", [1, 3, 7, 13, 64])
@pytest.mark.parametrize(("label_smoothing", "hardness"), [(0.0, 0.0), (0.2, 0.0), (0.0, 0.5), (0.1, 1.0)])
@pytest.mark.parametrize("ids", [list(range(13)), [0, 0, 0, 1, 2, 3, 4, 4, 5, 6, 7, 8, 0]], ids=["once", "several"])
def test_tiles_give_the_loss_and_gradients_of_the_whole_matrix(
    tiled, whole, tile, label_smoothing, hardness, ids
) -> None:
    image, text, ids = unit(13, 5, 8), unit(13, 5, 9), torch.tensor(ids)
    settings = {"label_smoothing": label_smoothing, "hardness": hardness}
    value, slopes = gradients(tiled, image, text, ids, tile=tile, **settings)
    wanted, wanted_slopes = gradients(whole, image, text, ids, **settings)
    assert value == pytest.approx(wanted, rel=1e-12)
    assert len(slopes) >= 3
    for slope, reference in zip(slopes, wanted_slopes, strict=True):
        assert (slope - reference).norm() <= 1e-12 * reference.norm()


@pytest.mark.parametrize("loss", [infonce, sigmoid])
def test_a_batch_of_one_image_has_no_negatives(loss) -> None:
    image, text = unit(3, 4, 1), unit(3, 4, 2)
    value, slopes = gradients(loss, image, text, torch.zeros(3, dtype=torch.int64), hardness=0.5)
    assert math.isfinite(value)
    assert all(torch.isfinite(slope).all() for slope in slopes)


@pytest.mark.parametrize("loss", [infonce, sigmoid])
def test_parts_of_other_lengths_are_refused(loss) -> None:
    with pytest.raises(ValueError, match="are needed"):
        loss(unit(3, 4, 1), unit(2, 4, 1), torch.arange(3), SCALE, None)


MEMORY = """
import re, sys, threading, time
import torch
from chimera_cli.training.losses import LOSSES

def anonymous_mib():
    return int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024

torch.manual_seed(0)
loss, pairs, dim = LOSSES[sys.argv[1]], 32768, 64
image, text = (torch.nn.functional.normalize(torch.randn(pairs, dim), dim=1).requires_grad_() for _ in range(2))
scale, bias = torch.tensor(4.0, requires_grad=True), torch.tensor(-10.0, requires_grad=True)
loss(image[:600], text[:600], torch.arange(600), scale, bias).backward()
image.grad = text.grad = None
before, peaks, over = anonymous_mib(), [], threading.Event()

def watch():
    while not over.wait(0.005):
        peaks.append(anonymous_mib())

thread = threading.Thread(target=watch)
thread.start()
loss(image, text, torch.arange(pairs), scale, bias).backward()
over.set()
thread.join()
print(max(peaks) - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["infonce", "sigmoid"])
def test_32768_pairs_need_at_most_128_mib_beyond_their_features(loss) -> None:
    """Features and gradients of 64 dimensions are 8 MiB each; the matrix of logits alone would be 4 GiB."""
    done = subprocess.run([sys.executable, "-c", MEMORY, loss], capture_output=True, text=True, check=True)
    assert float(done.stdout) <= 128
