"""Captions as tokens, and as the hidden states that a locked part of a text tower makes of them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# `input_ids` or `states`, and `attention_mask`.
Tokens = Mapping[str, Tensor]


@dataclass(frozen=True, slots=True)
class TokenTable:
    """Tokens of many captions, made once: those of caption k are `ids[starts[k] : starts[k + 1]]`."""

    ids: NDArray[np.int32]
    starts: NDArray[np.int64]
    pad_id: int

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each caption, (captions,)."""
        return np.diff(self.starts)

    def samples(self, count: int) -> list[Tensor]:
        """Return the `input_ids`, (tokens,) each, of up to `count` captions evenly spread from shortest to longest."""
        order = np.argsort(self.lengths, kind="stable")
        rows = order[np.unique(np.linspace(0, len(order) - 1, count).round().astype(int))]
        return [self.batch(rows[k : k + 1])["input_ids"][0] for k in range(len(rows))]

    def places(self, rows: NDArray[np.int64]) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
        """Return which tokens of a batch are no padding, (len(rows), longest), and where in the table those are."""
        starts, lengths = self.starts[rows], self.starts[rows + 1] - self.starts[rows]
        columns = np.arange(lengths.max(initial=0))
        real = columns < lengths[:, None]
        return real, (starts[:, None] + columns)[real]

    def batch(self, rows: NDArray[np.int64]) -> dict[str, Tensor]:
        """Return `input_ids` and `attention_mask`, (len(rows), longest of them), with padding at the end."""
        real, places = self.places(rows)
        ids = np.full(real.shape, self.pad_id, dtype=np.int64)
        ids[real] = self.ids[places]
        return {"input_ids": torch.from_numpy(ids), "attention_mask": _mask(real)}


@dataclass(frozen=True, slots=True)
class StateTable:
    """Hidden states (all tokens, width) of the captions of `tokens`, each at the place of its token there."""

    tokens: TokenTable
    states: NDArray[Any]

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each caption, (captions,)."""
        return self.tokens.lengths

    def batch(self, rows: NDArray[np.int64]) -> dict[str, Tensor]:
        """Return `states` (len(rows), longest of them, width) in float32, zero where there is none, and the mask."""
        real, places = self.tokens.places(rows)
        states = np.zeros((*real.shape, self.states.shape[1]), dtype=np.float32)
        states[real] = self.states[places]
        return {"states": torch.from_numpy(states), "attention_mask": _mask(real)}


def _mask(real: NDArray[np.bool_]) -> Tensor:
    return torch.from_numpy(real.astype(np.int64))
