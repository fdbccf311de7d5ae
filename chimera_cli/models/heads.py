"""Projection heads: what makes embeddings of the features that the towers give."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Numbers that a query makes of what it looks at: the width of an attention head in most transformers.
_QUERY_WIDTH = 64


class LinearHead(nn.Linear):
    """One matrix, as in CLIP: pooled features (batch, width) -> embedding (batch, dim)."""


class MlpHead(nn.Module):
    """A normalised two-layer perceptron beside a linear shortcut: (batch, width) -> (batch, dim)."""

    def __init__(self, width: int, hidden: int, dim: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)
        self.shortcut = nn.Linear(width, dim)
        self.expand = nn.Linear(width, hidden)
        self.contract = nn.Linear(hidden, dim)

    def forward(self, features: Tensor) -> Tensor:
        """Return the embedding (batch, dim), not yet normalised."""
        inputs = self.dropout(self.norm(features))
        hidden = self.dropout(F.gelu(self.expand(inputs)))
        embedding: Tensor = self.shortcut(inputs) + self.contract(hidden)
        return embedding


class EnsembleHead(nn.Module):
    """Heads that differ in their first weights and in their dropout: (batch, width) -> (batch, members * dim).

    The unit embeddings of the members stand side by side, each divided by the root of their number: the cosine of two
    of these embeddings is the mean of the members' cosines. Source: Lakshminarayanan et al. 2017, deep ensembles.
    """

    def __init__(self, heads: Sequence[nn.Module]) -> None:
        super().__init__()
        self.members = nn.ModuleList(heads)

    def forward(self, features: Tensor) -> Tensor:
        """Return the embedding (batch, members * dim), of unit length."""
        parts = [F.normalize(head(features), dim=-1) for head in self.members]
        return torch.cat(parts, dim=-1) / math.sqrt(len(parts))


class PlacePooling(nn.Module):
    """Attention pooling by learned queries: (batch, own + places * channels) -> (batch, width).

    What comes in is an image tower's own features and behind them the channels of each place. What goes out is the own
    features, the mean over all places, and for each query 64 numbers of the places that it attends to. Source: Lee et
    al. 2019, Set Transformer, section 3.2 (pooling by multi-head attention).
    """

    def __init__(self, own: int, channels: int, queries: int) -> None:
        super().__init__()
        self.own = own
        self.channels = channels
        self.width = own + channels + queries * _QUERY_WIDTH
        self.queries = nn.Linear(channels, queries, bias=False)
        # All places count alike at first, so that a query begins as the mean does.
        nn.init.zeros_(self.queries.weight)
        bound = 1 / math.sqrt(channels)
        self.values = nn.Parameter(torch.empty(queries, channels, _QUERY_WIDTH).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.zeros(queries * _QUERY_WIDTH))

    def forward(self, features: Tensor) -> Tensor:
        """Return own features, means and what the queries found, (batch, width)."""
        places = features[:, self.own :].reshape(len(features), -1, self.channels)
        # Without weights of its own the norm needs no gradient where the tower is locked; those of `queries` and
        # `values` do the same.
        normed = F.layer_norm(places, (self.channels,))
        attended = self.queries(normed).softmax(dim=1).transpose(1, 2) @ normed
        # The values are linear: computed after pooling they cost as many times less as there are places.
        found = torch.einsum("bqc,qcv->bqv", attended, self.values).flatten(1) + self.bias
        return torch.cat([features[:, : self.own], places.mean(dim=1), found], dim=1)
