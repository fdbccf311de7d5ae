"""The loss of an ensemble: each member learns as if it were alone, in whole batches and in micro-batches."""

from dataclasses import replace

import pytest
import torch
from tiny_model import TINY

from chimera_cli.models.dual_encoder import DualEncoder, build_dual_encoder
from chimera_cli.training.batches import PairBatch
from chimera_cli.training.large_batch import backward
from chimera_cli.training.losses import LOSSES, contrastive_loss

N = 9
SETTINGS = {"label_smoothing": 0.1, "hardness": 0.5}


def model(members: int, kind: str = "infonce") -> DualEncoder:
    bias = -2.0 if kind == "sigmoid" else None
    torch.manual_seed(members)
    architecture = replace(TINY, head="mlp", members=members, logit_bias=bias)
    made = build_dual_encoder(architecture).double()
    made.image_tower.frozen_statistics = True
    return made.train()


def pairs(of: DualEncoder) -> PairBatch:
    """Return pooled features; two pairs show the same image."""
    generator = torch.Generator().manual_seed(1)
    features = [
        torch.randn(N, tower.width, generator=generator, dtype=torch.float64)
        for tower in (of.image_tower, of.text_tower)
    ]
    return PairBatch(0, features[0], features[1], torch.tensor([0, 0, *range(1, N - 1)]))


def member(of: DualEncoder, index: int, kind: str) -> DualEncoder:
    """Return a model of its own with the heads of one member."""
    alone = model(1, kind)
    for side in ("image_head", "text_head"):
        getattr(alone, side).load_state_dict(getattr(of, side).members[index].state_dict())
    return alone


@pytest.mark.parametrize("kind", ["infonce", "sigmoid"])
def test_each_member_gets_the_gradient_it_would_get_alone(kind: str) -> None:
    of = model(2, kind)
    loss = backward(of, pairs(of), contrastive_loss(kind, 2, **SETTINGS))
    losses, scales = [], []
    for index in range(2):
        alone = member(of, index, kind)
        losses.append(backward(alone, pairs(alone), contrastive_loss(kind, **SETTINGS)))
        scales.append(alone.logit_scale.grad)
        for side in ("image_head", "text_head"):
            wanted = dict(getattr(alone, side).named_parameters())
            for name, parameter in getattr(of, side).members[index].named_parameters():
                assert torch.allclose(parameter.grad, wanted[name].grad / 2, rtol=1e-10, atol=1e-14), (side, name)
    assert loss.item() == pytest.approx(sum(part.item() for part in losses) / 2, rel=1e-12)
    assert of.logit_scale.grad.item() == pytest.approx(sum(part.item() for part in scales) / 2, rel=1e-10)


def test_a_loss_of_the_mean_similarity_would_be_another() -> None:
    of = model(2)
    with torch.no_grad():
        image, text = of.project_image(pairs(of).image), of.project_text(pairs(of).text)
        ids = pairs(of).image_ids
        own = contrastive_loss("infonce", 2)(image, text, ids, of.logit_scale, None)
        assert LOSSES["infonce"](image, text, ids, of.logit_scale) < own - 0.01


@pytest.mark.parametrize("kind", ["infonce", "sigmoid"])
@pytest.mark.parametrize("micro", [1, 4])
def test_micro_batches_give_the_gradient_of_the_whole_batch(kind: str, micro: int) -> None:
    found = []
    for size in (None, micro):
        of = model(3, kind)
        backward(of, pairs(of), contrastive_loss(kind, 3, tile=4, **SETTINGS), micro_batch=size)
        gradients = (parameter.grad for parameter in of.parameters() if parameter.grad is not None)
        found.append(torch.cat([part.flatten() for part in gradients]))
    assert (found[1] - found[0]).norm() <= 1e-10 * found[0].norm()


def test_half_precision_leaves_the_members_independent() -> None:
    """In bfloat16 what one member learns is the same, to the last bit, whatever the other has."""
    found = []
    for seed in (5, 6):
        of = model(2).float()
        batch = replace(pairs(of), image=pairs(of).image.float(), text=pairs(of).text.float())
        torch.manual_seed(seed)
        for side in (of.image_head, of.text_head):
            for parameter in side.members[1].parameters():  # type: ignore[union-attr,index]
                parameter.data.normal_()
        loss = contrastive_loss("infonce", 2)
        backward(of, batch, loss, autocast=lambda: torch.autocast("cpu", torch.bfloat16))
        heads = (of.image_head.members[0], of.text_head.members[0])  # type: ignore[index]
        found.append(torch.cat([part.grad.flatten() for head in heads for part in head.parameters()]))
    assert found[0].isfinite().all()
    assert torch.equal(found[0], found[1])


def test_features_of_another_width_are_refused() -> None:
    features = torch.nn.functional.normalize(torch.randn(4, 8), dim=-1)
    with pytest.raises(ValueError, match="features of 3 members can't be 8 wide"):
        contrastive_loss("infonce", 3)(features, features, torch.arange(4), torch.tensor(1.0), None)


def test_one_member_has_the_loss_itself() -> None:
    features = torch.nn.functional.normalize(torch.randn(4, 8), dim=-1)
    given = (features, features.flip(0), torch.arange(4), torch.tensor(1.0), None)
    assert torch.equal(contrastive_loss("infonce", 1)(*given), LOSSES["infonce"](*given))
