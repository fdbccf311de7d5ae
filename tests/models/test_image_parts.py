"""An image tower with locked lower blocks: in two parts it is the same function with the same gradient."""

import copy

import pytest
import timm
import torch
from torch import Tensor, nn

from chimera_cli.errors import UsageError
from chimera_cli.models.image_tower import ImageTower, build_image_tower
from chimera_cli.models.parts import Begun, Passed, Tapped, exchanged
from chimera_cli.models.sessions import SessionError, compare_image_parts, map_session, session_backend
from chimera_cli.models.weights import DEFAULT_IMAGE

HALF = (0.5, 0.5, 0.5)


def partly(weights: str, blocks: int | None, stages: int = 0, places: bool = False) -> ImageTower:
    tower = build_image_tower(weights, stages=stages, places=places)
    tower.learn_only(blocks)
    return tower.eval()


def made(name: str, blocks: int, stages: int = 0) -> ImageTower:
    torch.manual_seed(0)
    backbone = timm.create_model(name, pretrained=False, num_classes=0)
    tower = ImageTower(backbone, backbone.num_features, HALF, HALF, frozen_statistics=True)
    tower.join_stages(stages)
    tower.learn_only(blocks)
    return tower.eval()


@pytest.mark.parametrize(("blocks", "locked"), [(None, None), (0, None), (1, 15), (3, 13), (16, 0), (99, 0)])
def test_the_last_blocks_and_what_follows_learn(blocks: int | None, locked: int | None) -> None:
    tower = partly(DEFAULT_IMAGE, blocks)
    assert len(tower.blocks()) == 16
    assert tower.locked_blocks == locked
    for number, block in enumerate(tower.blocks()):
        learns = blocks is None or (locked is not None and number >= locked)
        assert all(parameter.requires_grad == learns for parameter in block.parameters())
    assert tower.backbone.conv_stem.weight.requires_grad == (blocks is None)
    assert tower.backbone.conv_head.weight.requires_grad == (blocks != 0)
    assert tower.backbone.bn2.weight.requires_grad == (blocks != 0)


@pytest.mark.parametrize("recomputing", [False, True])
@pytest.mark.parametrize(
    ("blocks", "stages", "places"),
    # With 1 and with 5 the first of the stages is what the locked blocks make; with 16 only the stem is locked.
    [
        (1, 0, False),
        (2, 0, False),
        (5, 0, False),
        (16, 0, False),
        (1, 2, True),
        (2, 2, False),
        (5, 3, True),
        (16, 7, True),
    ],
)
def test_maps_and_then_the_rest_equal_the_unsplit_tower_and_its_gradient(
    blocks: int, stages: int, places: bool, recomputing: bool
) -> None:
    whole = partly(DEFAULT_IMAGE, blocks, stages, places).double().train()
    parts = copy.deepcopy(whole)
    parts.backbone.set_grad_checkpointing(recomputing)
    pixels = torch.randn(3, 3, 64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        maps = parts.lower_maps(pixels)
    theirs, ours = whole(pixels), parts(maps)
    assert torch.allclose(ours, theirs, rtol=0, atol=1e-12)
    assert ours.shape == (3, whole.own_width + (whole.width - whole.own_width) * (4 if places else 1))
    theirs.square().mean().backward()
    ours.square().mean().backward()
    learning = 0
    for (name, mine), (_, its) in zip(parts.named_parameters(), whole.named_parameters(), strict=True):
        assert (mine.grad is None) == (its.grad is None) == (not mine.requires_grad), name
        if mine.grad is not None and its.grad is not None:
            learning += 1
            assert (mine.grad - its.grad).norm() <= 1e-10 * its.grad.norm(), name
    assert learning > 0


# Blocks in a list of stages, in four lists, stages that are modules of their own, and tokens with positions before.
@pytest.mark.parametrize("stages", [0, 1])
@pytest.mark.parametrize("name", ["test_resnet", "test_byobnet", "test_convnext", "test_vit", "test_mambaout"])
def test_towers_of_many_makes_can_be_parted(name: str, stages: int) -> None:
    tower = made(name, 2, stages)
    pixels = torch.randn(2, *timm.data.resolve_model_data_config(tower.backbone)["input_size"])
    compare_image_parts(tower, pixels)
    with torch.inference_mode():
        maps = tower.lower_maps(pixels)
        assert len(maps) == 2
        assert torch.allclose(tower(maps), tower(pixels), atol=1e-5)
    # The tower itself is as it was.
    assert not any(isinstance(module, Passed | Begun) for module in tower.modules())


@pytest.mark.parametrize(("blocks", "stages", "needed"), [(1, 3, 5), (4, 3, 5), (8, 5, 11), (15, 7, None)])
def test_a_stage_that_ends_below_what_is_kept_is_refused(blocks: int, stages: int, needed: int | None) -> None:
    tower = build_image_tower(DEFAULT_IMAGE, stages=stages)
    if needed is None:
        tower.learn_only(blocks)
        return
    with pytest.raises(UsageError, match=rf"image\.stages: {stages} needs what leaves a block below those") as caught:
        tower.learn_only(blocks)
    assert caught.value.hint == f"--set image.learn_blocks={needed}, or fewer stages"
    tower.learn_only(needed)
    tower.learn_only(None)
    assert all(parameter.requires_grad for parameter in tower.parameters())


def test_what_is_locked_stays_as_evaluated_and_frozen_statistics_stay_frozen() -> None:
    tower = partly("tiny", 2).train()
    pixels = torch.randn(4, 3, 32, 32)
    before = {name: value.clone() for name, value in tower.state_dict().items() if "running_mean" in name}
    tower(tower.lower_maps(pixels))
    changed = {name for name, value in before.items() if not torch.equal(value, tower.state_dict()[name])}
    # A tower from scratch has no frozen statistics: those of the blocks that learn move, those below don't.
    assert "backbone.bn2.running_mean" in changed
    assert "backbone.bn1.running_mean" not in changed
    frozen = partly(DEFAULT_IMAGE, 2).train()
    assert not any(module.training for module in frozen.modules() if isinstance(module, nn.BatchNorm2d))
    assert frozen.blocks()[-1].training
    assert not frozen.blocks()[0].training


class Leaping(nn.Module):
    """A backbone whose end looks back at its first block."""

    num_features = 4
    pretrained_cfg: dict[str, object] = {"input_size": (3, 32, 32)}  # noqa: RUF012 - as timm has it

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1))

    def forward_features(self, pixels: Tensor) -> Tensor:
        first = self.blocks[0](pixels)
        return self.blocks[2](self.blocks[1](first)) + first.mean()

    def forward(self, pixels: Tensor) -> Tensor:
        return self.forward_features(pixels).mean(dim=(2, 3))


def test_a_tower_that_cannot_be_parted_is_found_out() -> None:
    tower = ImageTower(Leaping(), 4, HALF, HALF, frozen_statistics=True)
    tower.learn_only(1)
    with pytest.raises(SessionError, match="the image tower in two parts is off by"):
        compare_image_parts(tower.train(), torch.randn(2, 3, 32, 32))
    assert tower.training
    broken = made("test_resnet", 1)
    del broken.backbone.maxpool
    with pytest.raises(SessionError, match=r"this image tower can't be computed in two parts \(.*maxpool"):
        compare_image_parts(broken, torch.randn(2, 3, 32, 32))


def test_a_tower_without_blocks_is_refused() -> None:
    tower = ImageTower(nn.Sequential(nn.Conv2d(3, 4, 1)), 4, HALF, HALF, frozen_statistics=True)
    with pytest.raises(UsageError, match="Sequential has no blocks to choose from") as caught:
        tower.learn_only(1)
    assert caught.value.hint == "--set image.learn_blocks=0 --set image.stages=0 --set heads.queries=0"
    tower.learn_only(0)
    assert not any(parameter.requires_grad for parameter in tower.parameters())


def test_a_tapped_block_answers_as_the_block_does_and_tells_what_comes_out() -> None:
    seen: list[Tensor] = []
    block = nn.Linear(2, 3)
    tapped = Tapped(block, seen.append)
    assert tapped.out_features == 3
    with pytest.raises(AttributeError, match="'Linear' object has no attribute 'stride'"):
        tapped.stride  # noqa: B018 - asking for it is the test
    inputs = torch.randn(4, 2)
    outputs = tapped(inputs)
    assert torch.equal(outputs, block(inputs))
    assert seen[0] is outputs


def test_parts_share_their_weights_and_leave_the_whole_as_it_is() -> None:
    inner = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    whole = nn.Sequential(nn.Linear(2, 2), inner)
    part = exchanged(whole, {inner[0]: Passed()})
    assert part[1][1] is inner[1]
    assert part[0] is whole[0]
    assert isinstance(inner[0], nn.Linear)
    assert exchanged(whole, {}) is whole


@pytest.mark.skipif(session_backend() is None, reason="onnxruntime or onnx is not installed")
def test_a_map_session_computes_what_the_locked_blocks_do() -> None:
    tower = partly(DEFAULT_IMAGE, 2)
    run = map_session(tower, torch.randn(4, 3, 64, 64))
    pixels = torch.randn(3, 3, 64, 64)
    with torch.inference_mode():
        theirs = tower.lower_maps(pixels)
    assert theirs.shape == (3, 192, 2, 2)
    assert torch.allclose(run(pixels), theirs, atol=1e-4)
