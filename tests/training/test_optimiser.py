"""Rates by layer and over time, against values worked out by hand."""

import math

import pytest
import torch
from tiny_model import TINY

from chimera_cli.models.dual_encoder import build_dual_encoder
from chimera_cli.training.optimiser import build_optimiser, build_schedule, image_layers, text_layers


def rates(schedule_kind: str, updates: int, **settings: float) -> list[float]:
    optimiser = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = build_schedule(optimiser, updates, settings.pop("warmup", 0.0), schedule_kind, **settings)
    found = []
    for _ in range(updates):
        found.append(optimiser.param_groups[0]["lr"])
        optimiser.step()
        schedule.step()
    return found


def test_constant_then_decay() -> None:
    # 10 updates: 2 of warm-up, 4 constant, the last 4 fall as 1 - sqrt(share done).
    wanted = [1 / 3, 2 / 3, 1, 1, 1, 1, 1, 1 - math.sqrt(0.25), 1 - math.sqrt(0.5), 1 - math.sqrt(0.75)]
    assert rates("constant", 10, warmup=0.2, decay_share=0.4) == pytest.approx(wanted)


def test_cosine() -> None:
    assert rates("cosine", 4) == pytest.approx([1.0, 0.5 + math.sqrt(0.125), 0.5, 0.5 - math.sqrt(0.125)])


def test_each_layer_learns_at_a_share_of_the_rate_above_it() -> None:
    model = build_dual_encoder(TINY)
    optimiser = build_optimiser(model, lr_heads=1.0, lr_image=0.1, lr_text=0.2, weight_decay=0.05, layer_decay=0.5)
    found = {
        id(parameter): (group["lr"], group["weight_decay"])
        for group in optimiser.param_groups
        for parameter in group["params"]
    }
    assert len(found) == sum(parameter.requires_grad for parameter in model.parameters())
    named = dict(model.named_parameters())

    def of(name: str) -> tuple[float, float]:
        return found[id(named[name])]

    # timm's test network has a stem, 5 blocks (the last together with the end): depths 0 to 5.
    assert of("image_tower.backbone.conv_stem.weight") == pytest.approx((0.1 / 2**5, 0.05))
    assert of("image_tower.backbone.bn2.weight") == pytest.approx((0.1, 0.0))
    # Embeddings, then two layers.
    assert of("text_tower.encoder.embeddings.word_embeddings.weight") == pytest.approx((0.2 / 4, 0.05))
    assert of("text_tower.encoder.embeddings.LayerNorm.weight") == pytest.approx((0.2 / 4, 0.0))
    assert of("text_tower.encoder.encoder.layer.0.attention.self.query.weight") == pytest.approx((0.1, 0.05))
    assert of("text_tower.encoder.encoder.layer.1.output.LayerNorm.bias") == pytest.approx((0.2, 0.0))
    assert of("image_head.weight") == pytest.approx((1.0, 0.05))
    assert of("logit_scale") == pytest.approx((1.0, 0.0))


def test_depths_begin_at_0_and_name_every_parameter() -> None:
    model = build_dual_encoder(TINY)
    for tower, layers in ((model.image_tower, image_layers), (model.text_tower, text_layers)):
        depths = layers(tower)  # type: ignore[operator]
        assert depths.keys() == dict(tower.named_parameters()).keys()
        assert set(depths.values()) == set(range(max(depths.values()) + 1))


def test_without_layer_decay_there_are_two_groups_for_a_part() -> None:
    optimiser = build_optimiser(build_dual_encoder(TINY), lr_heads=1.0, lr_image=0.1, lr_text=0.2, weight_decay=0.05)
    names = [group["name"] for group in optimiser.param_groups]
    assert names == ["image_tower"] * 2 + ["text_tower"] * 2 + ["image_head", "text_head", "temperature"]
