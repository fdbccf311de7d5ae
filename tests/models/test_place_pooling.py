"""Learned queries that choose among the places of an image: by hand, in a tower, in heads and checkpoints."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tiny_model import TINY

from chimera_cli.errors import UsageError
from chimera_cli.models.checkpoint import save_model
from chimera_cli.models.combination import load_model
from chimera_cli.models.dual_encoder import build_dual_encoder
from chimera_cli.models.heads import PlacePooling
from chimera_cli.models.image_tower import build_image_tower
from chimera_cli.models.weights import DEFAULT_IMAGE
from chimera_cli.training.optimiser import build_optimiser

CPU = torch.device("cpu")
SEEING = replace(
    TINY, image_weights=DEFAULT_IMAGE, image_size=64, image_locked=True, image_stages=2, image_queries=3, head="mlp"
)


def by_hand(pooling: PlacePooling, features: torch.Tensor) -> torch.Tensor:
    """Return what the pooling should make of features, image by image, place by place and query by query."""
    rows = []
    for image in features.double():
        own, rest = image[: pooling.own], image[pooling.own :]
        places = [rest[start : start + pooling.channels] for start in range(0, len(rest), pooling.channels)]
        normed = [(place - place.mean()) / (place.var(unbiased=False) + 1e-5).sqrt() for place in places]
        found = []
        for query in range(len(pooling.values)):
            scores = [math.exp(float(place @ pooling.queries.weight[query].double())) for place in normed]
            # Every place's values first, and then their mean as they are attended to.
            bias = pooling.bias.view(len(pooling.values), -1)[query].double()
            values = [place @ pooling.values[query].double() + bias for place in normed]
            found.append(sum(score * value for score, value in zip(scores, values, strict=True)) / sum(scores))
        rows.append(torch.cat([own, sum(places) / len(places), *found]))
    return torch.stack(rows)


def test_queries_attend_to_places_as_computed_by_hand() -> None:
    torch.manual_seed(0)
    pooling = PlacePooling(own=4, channels=6, queries=2)
    torch.nn.init.normal_(pooling.queries.weight)
    torch.nn.init.normal_(pooling.bias)
    features = torch.randn(3, 4 + 5 * 6)
    made = pooling(features)
    assert made.shape == (3, pooling.width) == (3, 4 + 6 + 2 * 64)
    assert torch.allclose(made.double(), by_hand(pooling, features), atol=1e-5)


def test_a_query_finds_the_one_place_that_has_what_it_looks_for() -> None:
    pooling = PlacePooling(own=1, channels=4, queries=1)
    with torch.no_grad():
        pooling.queries.weight.copy_(torch.tensor([[100.0, 0, 0, 0]]))
    places = torch.randn(7, 4, generator=torch.Generator().manual_seed(3)).clamp(-1, 1)
    places[5, 0] = 9.0
    found = pooling(torch.cat([torch.zeros(1), places.flatten()])[None])[0, -64:]
    assert torch.allclose(found, F.layer_norm(places[5], (4,)) @ pooling.values[0], atol=1e-4)
    # The order of places means nothing.
    moved = pooling(torch.cat([torch.zeros(1), places.roll(2, 0).flatten()])[None])[0, -64:]
    assert torch.allclose(found, moved, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "size", "stages"),
    [(DEFAULT_IMAGE, 64, 2), ("test_resnet", 64, 3), ("test_vit", 160, 2), ("swin_tiny_patch4_window7_224", 224, 2)],
)
def test_places_are_those_that_the_pooled_stages_are_the_means_of(name: str, size: int, stages: int) -> None:
    torch.manual_seed(0)
    pretrained = name == DEFAULT_IMAGE
    pooled = build_image_tower(name, pretrained, stages).eval()
    tower = build_image_tower(name, pretrained, stages, places=True).eval()
    tower.load_state_dict(pooled.state_dict())
    assert (tower.width, tower.own_width) == (pooled.width, pooled.backbone.num_features)
    with torch.no_grad():
        pixels = torch.randn(2, 3, size, size)
        wanted, found = pooled(pixels), tower(pixels)
    own, channels = tower.own_width, tower.width - tower.own_width
    places = found[:, own:].reshape(2, -1, channels)
    assert places.shape[1] > 1
    assert torch.equal(found[:, :own], wanted[:, :own])
    assert torch.allclose(places.mean(dim=1), wanted[:, own:], atol=1e-4)
    assert not torch.allclose(places[:, 0], places[:, -1], atol=1e-2)


def test_the_width_of_a_head_before_the_classifier_counts_as_its_own() -> None:
    tower = build_image_tower("mobilenetv3_small_050", pretrained=False, stages=2, places=True).eval()
    with torch.no_grad():
        features = tower(torch.zeros(1, 3, 64, 64))
    assert tower.own_width == tower.backbone(torch.zeros(1, 3, 64, 64)).shape[1] != tower.backbone.num_features
    pooling = PlacePooling(tower.own_width, tower.width - tower.own_width, 2)
    assert pooling(features).shape == (1, pooling.width)


def test_stages_with_other_numbers_of_tokens_have_no_common_places() -> None:
    with pytest.raises(UsageError, match=r"the last 2 stages of Levit.* have unlike tokens"):
        build_image_tower("levit_128s", pretrained=False, stages=2, places=True)
    assert build_image_tower("levit_128s", pretrained=False, stages=1, places=True).places


def test_biases_of_the_pooling_do_not_decay() -> None:
    model = build_dual_encoder(SEEING)
    optimiser = build_optimiser(model, lr_heads=1e-3, lr_image=1e-4, lr_text=1e-4, weight_decay=0.05)
    decay = {id(part): group["weight_decay"] for group in optimiser.param_groups for part in group["params"]}
    (pooling,) = (module for module in model.modules() if isinstance(module, PlacePooling))
    assert decay[id(pooling.bias)] == 0
    assert decay[id(pooling.values)] == decay[id(pooling.queries.weight)] == 0.05


@pytest.mark.parametrize("members", [1, 2])
def test_a_checkpoint_keeps_the_queries_of_each_member(tmp_path: Path, members: int) -> None:
    model = build_dual_encoder(replace(SEEING, members=members)).eval()
    poolings = [module for module in model.modules() if isinstance(module, PlacePooling)]
    assert len(poolings) == members, "each member looks with queries of its own"
    for pooling in poolings:
        torch.nn.init.normal_(pooling.queries.weight)
    save_model(model, tmp_path / "best.safetensors")
    again = load_model(tmp_path / "best.safetensors", CPU)
    assert again.architecture == model.architecture
    pixels = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        assert torch.equal(again.encode_image(pixels), model.encode_image(pixels))


def test_without_queries_a_head_is_as_it_was() -> None:
    model = build_dual_encoder(replace(SEEING, image_queries=0))
    assert not any(isinstance(module, PlacePooling) for module in model.modules())
    assert "image_head.norm.weight" in model.state_dict()
    before = {name: value for name, value in TINY.as_dict().items() if name != "image_queries"}
    assert type(TINY)(**before) == TINY, "checkpoints from before there were queries are read"
