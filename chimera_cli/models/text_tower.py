"""Text towers from transformers: captions to tokens to mean-pooled sentence features."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoTokenizer, BertConfig, BertModel
from transformers.utils.logging import disable_progress_bar

from chimera_cli.models.weights import (
    DEFAULT_TEXT,
    PACKAGED,
    TINY,
    check_modality,
    file_hash,
    hub_failed,
    require_packaged_file,
)

Tokens = Mapping[str, Tensor]

_PIECE = 128


class TextTower(nn.Module):
    """A transformers encoder with mean pooling over real tokens, as sentence encoders are trained."""

    def __init__(self, encoder: nn.Module, tokeniser: Any, width: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.width = width
        self._tokeniser = tokeniser

    def tokenise(self, texts: Sequence[str], max_tokens: int) -> dict[str, Tensor]:
        """Return `input_ids` and `attention_mask`, both (len(texts), longest), cut to `max_tokens`."""
        encoded = self._tokeniser(
            list(texts), padding="longest", truncation=True, max_length=max_tokens, return_tensors="pt"
        )
        return {"input_ids": encoded["input_ids"], "attention_mask": encoded["attention_mask"]}

    def forward(self, tokens: Tokens) -> Tensor:
        """Return sentence features (batch, width): the mean of the last hidden states over real tokens.

        On a CPU a large batch is worked through in pieces of similar length: captions have 14 tokens on average and
        32 at most, so that padding all of them to the longest would more than double the work.
        """
        ids, mask = tokens["input_ids"], tokens["attention_mask"]
        if ids.device.type != "cpu" or len(ids) <= _PIECE:
            return self._encode(ids, mask)
        lengths = mask.sum(dim=1)
        order = lengths.argsort(stable=True)
        pieces = []
        for start in range(0, len(order), _PIECE):
            rows = order[start : start + _PIECE]
            longest = int(lengths[rows].max())
            pieces.append(self._encode(ids[rows, :longest], mask[rows, :longest]))
        return torch.cat(pieces)[order.argsort()]

    def _encode(self, ids: Tensor, mask: Tensor) -> Tensor:
        states: Tensor = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        weights = mask.unsqueeze(-1).to(states.dtype)
        return (states * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1)

    def layers(self) -> nn.ModuleList:
        """Return the transformer layers, first to last. Raises AttributeError for an encoder without any."""
        encoder: Any = self.encoder
        inner = getattr(encoder, "encoder", None) or encoder.transformer
        layers = inner.layer if hasattr(inner, "layer") else inner.layers
        assert isinstance(layers, nn.ModuleList)
        return layers

    def learn_only(self, last_layers: int | None) -> None:
        """Let the last `last_layers` layers learn: 0 locks the tower, None lets all of it learn, embeddings too."""
        self.requires_grad_(last_layers is None)
        if last_layers:
            for layer in self.layers()[-last_layers:]:
                layer.requires_grad_(True)


def build_text_tower(weights: str, pretrained: bool = True) -> TextTower:
    """Return the tower called `weights`; with `pretrained` False only its shape, for a checkpoint to fill.

    Raises UsageError for a name that can't be meant and ChimeraError where the weights can't be had.
    """
    check_modality(weights, "text")
    if weights == TINY:
        return _tiny()
    disable_progress_bar()
    source = str(require_packaged_file(weights).parent) if weights in PACKAGED else weights
    try:
        tokeniser = AutoTokenizer.from_pretrained(source)
        if pretrained:
            encoder = AutoModel.from_pretrained(source, dtype=torch.float32)
        else:
            encoder = AutoModel.from_config(AutoConfig.from_pretrained(source))
    except Exception as error:
        raise hub_failed(weights, error, DEFAULT_TEXT) from error
    _drop_pooler(encoder)
    return TextTower(encoder, tokeniser, int(encoder.config.hidden_size))


def text_weights_hash(weights: str) -> str | None:
    """Return the SHA-256 of packaged or local weights, None for towers from scratch and from hubs."""
    if weights in PACKAGED:
        return file_hash(require_packaged_file(weights))
    local = Path(weights) / "model.safetensors"
    return file_hash(local) if local.is_file() else None


def _tiny() -> TextTower:
    """Return a two-layer BERT from scratch, a million parameters, with the packaged WordPiece vocabulary."""
    tokeniser = AutoTokenizer.from_pretrained(str(require_packaged_file(DEFAULT_TEXT).parent))
    settings = BertConfig(
        vocab_size=len(tokeniser), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
    )
    return TextTower(BertModel(settings, add_pooling_layer=False), tokeniser, 32)


def _drop_pooler(encoder: Any) -> None:
    # The pooler reads the first token for next-sentence prediction; mean pooling never calls it.
    if getattr(encoder, "pooler", None) is not None:
        encoder.pooler = None
