"""The average of weights against the recurrence written out, and the weights back as they were."""

import torch
from tiny_model import TINY

from chimera_cli.models.dual_encoder import build_dual_encoder
from chimera_cli.training.averaging import WeightAverage


def test_the_average_follows_its_recurrence_and_is_shown_for_a_while() -> None:
    torch.manual_seed(0)
    model = build_dual_encoder(TINY)
    model.image_tower.requires_grad_(False)
    average = WeightAverage.of(model, 0.5)
    wanted = model.image_head.weight.detach().clone()
    for update, decay in enumerate((1 / 10, 2 / 11, 3 / 12, 4 / 13, 5 / 14, 6 / 15, 7 / 16, 8 / 17, 0.5, 0.5)):
        with torch.no_grad():
            model.image_head.weight.add_(update + 1.0)
        average.update(model)
        # From (1 + 8) / (10 + 8) on the decay is the configured one.
        wanted = decay * wanted + (1 - decay) * model.image_head.weight.detach()
    assert torch.allclose(average.weights["image_head.weight"], wanted, rtol=1e-6)
    assert not any(name.startswith("image_tower") for name in average.weights)

    own = model.image_head.weight.detach().clone()
    parameter = model.image_head.weight
    with average.shown(model):
        assert torch.equal(model.image_head.weight, average.weights["image_head.weight"])
    assert model.image_head.weight is parameter
    assert torch.equal(model.image_head.weight, own)
