"""A moving average of the weights that learn: it is evaluated and kept in place of the last ones."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from chimera_cli.models.dual_encoder import DualEncoder


@dataclass(slots=True)
class WeightAverage:
    """Exponential moving average of the learning parameters, by name; `updates` counts what has gone into it.

    The decay of update n is min(`decay`, (1 + n) / (10 + n)): a fixed decay near 1 would keep the random start for
    thousands of updates (as in TensorFlow's ExponentialMovingAverage with `num_updates`).
    """

    decay: float
    weights: dict[str, Tensor]
    updates: int = 0

    @classmethod
    def of(cls, model: DualEncoder, decay: float) -> "WeightAverage":
        """Return an average that begins with the weights as they are; `decay` is in (0, 1)."""
        return cls(decay, {name: value.detach().clone() for name, value in _learning(model).items()})

    def update(self, model: DualEncoder) -> None:
        """Take in the weights after an update."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        values = [value.detach() for value in _learning(model).values()]
        torch._foreach_lerp_(list(self.weights.values()), values, 1 - decay)
        self.updates += 1

    @contextmanager
    def shown(self, model: DualEncoder) -> Iterator[None]:
        """Let the model have the averaged weights for a while; afterwards its own are back, bit for bit."""
        learning = _learning(model)
        own = {name: value.data for name, value in learning.items()}
        for name, value in learning.items():
            value.data = self.weights[name]
        try:
            yield
        finally:
            for name, value in learning.items():
                value.data = own[name]


def _learning(model: DualEncoder) -> dict[str, Tensor]:
    return {name: value for name, value in model.named_parameters() if value.requires_grad}
