"""The losses against hand-computed values and against plain references written another way."""

import math

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
