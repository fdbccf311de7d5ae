"""Pooled stages beside a tower's own features: what they are, of which towers, and what is refused."""

import pytest
import timm
import torch
from torch import Tensor, nn

from chimera_cli.errors import UsageError
from chimera_cli.models.image_tower import ImageTower, build_image_tower
from chimera_cli.models.sessions import image_session, session_backend
from chimera_cli.models.weights import DEFAULT_IMAGE

HALF = (0.5, 0.5, 0.5)


def pixels(images: int = 2, size: int = 64) -> Tensor:
    return torch.randn(images, 3, size, size, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_stages_are_the_means_of_what_leaves_them() -> None:
    tower = build_image_tower(DEFAULT_IMAGE, stages=2).eval()
    kept: list[Tensor] = []
    backbone = tower.backbone
    # The reference goes through the layers by hand.
    maps = backbone.bn1(backbone.conv_stem(pixels()))
    for stage in backbone.blocks:
        maps = stage(maps)
        kept.append(maps.mean(dim=(2, 3)))
    own = build_image_tower(DEFAULT_IMAGE).eval()(pixels())
    assert tower.width == 1280 + 192 + 320
    assert torch.allclose(tower(pixels()), torch.cat([own, *kept[-2:]], dim=-1), atol=1e-5)


@pytest.mark.parametrize(
    ("name", "size", "stages", "width"),
    [
        ("resnet18", 64, 2, 512 + 256 + 512),
        ("vit_tiny_patch16_224", 224, 3, 4 * 192),
        ("swin_tiny_patch4_window7_224", 224, 2, 768 + 384 + 768),
    ],
)
@torch.no_grad()
def test_stages_of_other_towers(name: str, size: int, stages: int, width: int) -> None:
    torch.manual_seed(0)
    backbone = timm.create_model(name, pretrained=False, num_classes=0)
    tower = ImageTower(backbone, backbone.num_features, HALF, HALF, frozen_statistics=True).eval()
    alone = tower(pixels(size=size))
    tower.join_stages(stages)
    joined = tower(pixels(size=size))
    assert tower.width == joined.shape[1] == width
    assert torch.equal(joined[:, : alone.shape[1]], alone)


@pytest.mark.skipif(session_backend() is None, reason="onnxruntime and onnx are not installed")
@pytest.mark.parametrize(("places", "parts"), [(False, (1280, 112, 192, 320)), (True, (1280, *4 * (112 + 192 + 320,)))])
@torch.no_grad()
def test_a_session_gives_the_stages_too(places: bool, parts: tuple[int, ...]) -> None:
    # At 64 pixels the last two stages have 2 x 2 places, and the one before them has 4 x 4.
    tower = build_image_tower(DEFAULT_IMAGE, stages=3, places=places).eval()
    run = image_session(tower, pixels())
    ours, theirs = run(pixels(3)), tower(pixels(3))
    # Each kind of feature by itself: small ones must not hide behind large ones.
    for mine, its in zip(ours.split(parts, 1), theirs.split(parts, 1), strict=True):
        assert ((mine - its).norm(dim=1) / its.norm(dim=1)).max() < 1e-3


def test_no_stages_leave_the_tower_as_it_is() -> None:
    tower = build_image_tower(DEFAULT_IMAGE, stages=0)
    assert tower.width == tower.backbone.num_features == 1280


def test_too_many_stages_and_none_to_choose_from() -> None:
    with pytest.raises(UsageError, match=r"image\.stages: 9 is more than the tower's 7") as refused:
        build_image_tower(DEFAULT_IMAGE, stages=9)
    assert refused.value.hint == "--set image.stages=7"
    bare = nn.Sequential(nn.Flatten())
    with pytest.raises(UsageError, match="has no blocks to choose from"):
        ImageTower(bare, 1, HALF, HALF, frozen_statistics=True).join_stages(1)
