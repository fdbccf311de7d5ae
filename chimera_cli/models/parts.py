"""Modules with others in the place of some of their parts: how a tower is computed in two, what is locked and the rest.

No weight is copied: what learns in such a part learns in the whole.
"""

import copy
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn


def exchanged(module: nn.Module, others: Mapping[nn.Module, nn.Module]) -> Any:
    """Return `module` with `others` in the place of those modules in it, all else being the same modules and weights.

    The module itself is left as it is.
    """
    if module in others:
        return others[module]
    children = {name: None if child is None else exchanged(child, others) for name, child in module._modules.items()}
    if all(children[name] is child for name, child in module._modules.items()):
        return module
    twin = copy.copy(module)
    twin._modules = children
    return twin


class Tapped(nn.Module):
    """Stands in for a block: does the same, and `tap` is told what comes out."""

    def __init__(self, block: nn.Module, tap: Callable[[Tensor], None]) -> None:
        super().__init__()
        self.block = block
        self.tap = tap

    def __getattr__(self, name: str) -> Any:
        # What a model asks of its blocks beside their outputs.
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("block"), name)

    def forward(self, *inputs: Any, **settings: Any) -> Any:
        """Return what the block makes of `inputs`."""
        outputs = self.block(*inputs, **settings)
        self.tap(outputs)
        return outputs


class Passed(nn.Module):
    """Stands in for what is left out: gives what it is given, whatever is told it beside that."""

    def forward(self, inputs: Tensor, *_others: Any, **_settings: Any) -> Tensor:
        """Return the inputs."""
        return inputs


class Begun(nn.Module):
    """Stands in for the first block of an upper part: it is given `inputs` in the place of what comes to it."""

    def __init__(self, block: nn.Module, inputs: Tensor) -> None:
        super().__init__()
        self.block = block
        self.inputs = inputs

    def forward(self, _inputs: Tensor, *others: Any, **settings: Any) -> Any:
        """Return what the block makes of `inputs`."""
        return self.block(self.inputs, *others, **settings)
