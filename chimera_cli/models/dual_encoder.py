"""The dual encoder: two towers, two projection heads and a learned temperature."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from chimera_cli.models.heads import EnsembleHead, LinearHead, MlpHead, PlacePooling
from chimera_cli.models.image_tower import ImageTower, build_image_tower
from chimera_cli.models.text_tower import TextTower, build_text_tower
from chimera_cli.models.tokens import Tokens

# CLIP clamps the scale at 100 so that logits don't outgrow the loss (Radford et al. 2021, section 2.5).
MAX_LOGIT_SCALE = math.log(100)


@dataclass(frozen=True, slots=True)
class Architecture:
    """All that shapes a dual encoder: what a checkpoint needs beside its tensors.

    `learn_layers`: how many of the text tower's last layers learn, None for all of it; `learn_blocks` likewise of the
    blocks of an image tower that is not `image_locked` as a whole. `image_stages`: how many of its last stages are
    pooled beside its own features, `text_hidden_states` which hidden states of the text tower beside its last one.
    `image_queries`: how many learned queries pool the places of these stages in the image head, beside their mean.
    `flipped_view`: an image's feature is the mean over the image and its mirror image. `members`: how many pairs of
    heads there are, each `dim` wide.
    """

    image_weights: str
    image_size: int
    image_locked: bool
    flipped_view: bool
    text_weights: str
    learn_layers: int | None
    max_tokens: int
    head: Literal["linear", "mlp"]
    hidden: int
    dim: int
    dropout: float
    temperature: float
    logit_bias: float | None = None
    learn_blocks: int | None = None
    image_stages: int = 0
    members: int = 1
    text_hidden_states: tuple[int, ...] = ()
    image_queries: int = 0

    @property
    def embedding_width(self) -> int:
        """Return how many numbers an embedding has: those of all members."""
        return self.members * self.dim

    def __post_init__(self) -> None:
        # JSON gives lists.
        object.__setattr__(self, "text_hidden_states", tuple(self.text_hidden_states))

    def as_dict(self) -> dict[str, Any]:
        """Return the architecture as JSON takes it."""
        return asdict(self)


class DualEncoder(nn.Module):
    """Maps images and captions into one space, where matching pairs have a high cosine similarity.

    `encode_*` take what a tower takes, `project_*` take what a tower gives (the way of locked towers, whose pooled
    features are computed once); both return L2-normalised features (batch, dim), dim being the `embedding_width`.
    """

    def __init__(self, architecture: Architecture, image_tower: ImageTower, text_tower: TextTower) -> None:
        super().__init__()
        self.architecture = architecture
        self.image_tower = image_tower
        self.text_tower = text_tower
        self.image_head = _head(architecture, lambda: _image_head(architecture, image_tower))
        self.text_head = _head(architecture, lambda: _single_head(architecture, text_tower.width))
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / architecture.temperature)))
        bias = architecture.logit_bias
        self.logit_bias = None if bias is None else nn.Parameter(torch.tensor(bias))

    def project_image(self, pooled: Tensor) -> Tensor:
        """Return image_features (batch, dim), L2-normalised, of pooled tower features (batch, width)."""
        return self._unit(self.image_head(pooled))

    def project_text(self, pooled: Tensor) -> Tensor:
        """Return text_features (batch, dim), L2-normalised, of pooled tower features (batch, width)."""
        return self._unit(self.text_head(pooled))

    def _unit(self, embedding: Tensor) -> Tensor:
        # An ensemble's is of unit length already: dividing again would let rounding mix what the members learn.
        return embedding if self.architecture.members > 1 else F.normalize(embedding, dim=-1)

    def encode_image(self, pixels: Tensor) -> Tensor:
        """Return image_features (batch, dim), L2-normalised, of normalised pixels (batch, 3, S, S) or maps."""
        return self.project_image(self.image_tower(pixels))

    def encode_text(self, tokens: Tokens) -> Tensor:
        """Return text_features (batch, dim), L2-normalised, of `input_ids` and `attention_mask` (batch, tokens)."""
        return self.project_text(self.text_tower(tokens))

    def tokenise(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """Return the tokens of `texts`, cut to the model's `max_tokens`."""
        return self.text_tower.tokenise(texts, self.architecture.max_tokens)

    def clamp_logit_scale(self) -> None:
        """Keep the learned temperature in the range CLIP allows: scale between 1 and 100."""
        with torch.no_grad():
            self.logit_scale.clamp_(0, MAX_LOGIT_SCALE)


def build_dual_encoder(architecture: Architecture, pretrained: bool = True) -> DualEncoder:
    """Return the dual encoder of `architecture`: heads fresh, towers pretrained where asked, locked as it says."""
    places = architecture.image_queries > 0
    image_tower = build_image_tower(architecture.image_weights, pretrained, architecture.image_stages, places)
    text_tower = build_text_tower(architecture.text_weights, pretrained, architecture.text_hidden_states)
    image_tower.learn_only(0 if architecture.image_locked else architecture.learn_blocks)
    text_tower.learn_only(architecture.learn_layers)
    return DualEncoder(architecture, image_tower, text_tower)


def count_parameters(model: nn.Module) -> Mapping[str, int]:
    """Return how many parameters there are in total and how many of them learn."""
    total = sum(parameter.numel() for parameter in model.parameters())
    learning = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return {"parameters_total": total, "parameters_learning": learning}


def _head(architecture: Architecture, single: Callable[[], nn.Module]) -> nn.Module:
    # A single head keeps its names in checkpoints.
    return single() if architecture.members == 1 else EnsembleHead([single() for _ in range(architecture.members)])


def _image_head(architecture: Architecture, tower: ImageTower) -> nn.Module:
    if not architecture.image_queries:
        return _single_head(architecture, tower.width)
    # Each member of an ensemble looks with queries of its own.
    pooling = PlacePooling(tower.own_width, tower.width - tower.own_width, architecture.image_queries)
    return nn.Sequential(pooling, _single_head(architecture, pooling.width))


def _single_head(architecture: Architecture, width: int) -> nn.Module:
    if architecture.head == "linear":
        return LinearHead(width, architecture.dim, bias=False)
    return MlpHead(width, architecture.hidden, architecture.dim, architecture.dropout)
