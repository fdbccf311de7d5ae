"""Text towers from transformers: captions to tokens to mean-pooled sentence features."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoTokenizer, BertConfig, BertModel
from transformers.utils.logging import disable_progress_bar

from chimera_cli.errors import UsageError
from chimera_cli.models.parts import Tapped, exchanged
from chimera_cli.models.tokens import Tokens, TokenTable
from chimera_cli.models.weights import (
    DEFAULT_TEXT,
    PACKAGED,
    TINY,
    check_modality,
    file_hash,
    hub_failed,
    require_packaged_file,
)

_PIECE = 128
# Captions that are tokenised in one go: the tokeniser's own lists of them take a hundred times what is kept.
_TOKENISED = 10_000


class TextTower(nn.Module):
    """A transformers encoder with mean pooling over real tokens, as sentence encoders are trained.

    `hidden_states`: which earlier hidden states, pooled likewise, stand beside the last one: 0 is what the embeddings
    give, k what layer k gives. They know words that the sentence vector has forgotten. `locked_layers`: how many of the
    first layers are locked, the embeddings with them; None where nothing is.
    """

    def __init__(self, encoder: nn.Module, tokeniser: Any, width: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.width = self.state_width = width
        self.locked_layers: int | None = None
        self.hidden_states: tuple[int, ...] = ()
        self._tokeniser = tokeniser

    def tokenise(self, texts: Sequence[str], max_tokens: int) -> dict[str, Tensor]:
        """Return `input_ids` and `attention_mask`, both (len(texts), longest), cut to `max_tokens`."""
        encoded = self._tokeniser(
            list(texts), padding="longest", truncation=True, max_length=max_tokens, return_tensors="pt"
        )
        return {"input_ids": encoded["input_ids"], "attention_mask": encoded["attention_mask"]}

    def token_table(self, texts: Sequence[str], max_tokens: int) -> TokenTable:
        """Return the tokens of `texts`, each cut to `max_tokens`, to make batches of in any order."""
        parts: list[NDArray[np.int32]] = []
        for start in range(0, len(texts), _TOKENISED):
            piece = list(texts[start : start + _TOKENISED])
            encoded = self._tokeniser(piece, truncation=True, max_length=max_tokens, return_attention_mask=False)
            parts += [np.asarray(ids, dtype=np.int32) for ids in encoded["input_ids"]]
        starts = np.cumsum([0, *(len(ids) for ids in parts)], dtype=np.int64)
        ids = np.concatenate(parts) if parts else np.empty(0, dtype=np.int32)
        return TokenTable(ids, starts, self._tokeniser.pad_token_id or 0)

    def forward(self, tokens: Tokens) -> Tensor:
        """Return sentence features (batch, width): the mean of the last hidden states over real tokens.

        Behind it stand the means of the earlier `hidden_states`, in their order.
        Instead of `input_ids` the tokens may bring `states`, what `lower_states` made of them: then only the layers
        that learn are computed. On a CPU a large batch is worked through in pieces of similar length: captions have 14
        tokens on average and 32 at most, so that padding all of them to the longest would more than double the work.
        """
        encode = self._encode_states if "states" in tokens else self._encode
        inputs, mask = tokens["states" if "states" in tokens else "input_ids"], tokens["attention_mask"]
        if mask.device.type != "cpu" or len(mask) <= _PIECE:
            return encode(inputs, mask)
        lengths = mask.sum(dim=1)
        order = lengths.argsort(stable=True)
        pieces = []
        for start in range(0, len(order), _PIECE):
            rows = order[start : start + _PIECE]
            longest = int(lengths[rows].max())
            pieces.append(encode(inputs[rows, :longest], mask[rows, :longest]))
        return torch.cat(pieces)[order.argsort()]

    def _encode(self, ids: Tensor, mask: Tensor) -> Tensor:
        last, states = self._computed(self.encoder, self.hidden_states, input_ids=ids, attention_mask=mask)
        return self._pooled(last, states, mask)

    def _encode_states(self, given: Tensor, mask: Tensor) -> Tensor:
        first, *below = torch.split(given, self.state_width, dim=-1)
        known = {self.locked_layers or 0: first, **dict(zip(self.lower_numbers, below, strict=True))}
        upper = self._part(slice(self.locked_layers, None), _Given())
        others = [number for number in self.hidden_states if number not in known]
        last, states = self._computed(upper, others, inputs_embeds=first, attention_mask=mask)
        return self._pooled(last, states | known, mask)

    def _computed(
        self, encoder: nn.Module, numbers: Sequence[int], **inputs: Tensor
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """Return what leaves an encoder, all of the tower's or a part, and the hidden states of those numbers in it."""
        # Taken here: transformers' own way hooks into layers that the parts share, and then gives some states twice.
        states: dict[int, Tensor] = {}

        def keep(number: int, outputs: Any) -> None:
            states[number] = outputs if isinstance(outputs, Tensor) else outputs[0]

        modules = {number: self.layers()[number - 1] if number else self._embeddings() for number in numbers}
        taps = {module: Tapped(module, partial(keep, number)) for number, module in modules.items()}
        return exchanged(encoder, taps)(**inputs).last_hidden_state, states

    def _pooled(self, last: Tensor, states: Mapping[int, Tensor], mask: Tensor) -> Tensor:
        """Return the features (batch, width) of the last hidden states and of those of the `hidden_states`."""
        return torch.cat([_mean(one, mask) for one in (last, *(states[each] for each in self.hidden_states))], dim=-1)

    @property
    def lower_numbers(self) -> list[int]:
        """Which of the `hidden_states` locked layers make before the last of them."""
        return [number for number in self.hidden_states if number < (self.locked_layers or 0)]

    @property
    def lower_width(self) -> int:
        """How many numbers a token has in `lower_states`."""
        return self.state_width * (1 + len(self.lower_numbers))

    def lower_states(self, tokens: Tokens) -> Tensor:
        """Return what `forward` takes as `states`, (batch, tokens, lower_width), of `input_ids` and `attention_mask`.

        That is the hidden states after the last locked layer, and behind them those of the `hidden_states` before it.
        Raises AttributeError for an encoder whose layers or embeddings are not where those of BERT are.
        """
        lower, below = self._part(slice(0, self.locked_layers), None), self.lower_numbers
        last, states = self._computed(
            lower, below, input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]
        )
        return torch.cat([last, *(states[number] for number in below)], dim=-1)

    def _part(self, layers: slice, embeddings: nn.Module | None) -> nn.Module:
        """Return the encoder with some of its layers alone, maybe with other embeddings; the weights are the same."""
        own = self._embeddings()
        chosen = nn.ModuleList(list(self.layers())[layers])
        part: nn.Module = exchanged(self.encoder, {self.layers(): chosen, own: embeddings or own})
        return part

    def _embeddings(self) -> nn.Module:
        return self.encoder.get_submodule("embeddings")

    def train(self, mode: bool = True) -> "TextTower":
        """Switch dropout; what is locked stays as it is when evaluated: its states are computed once."""
        super().train(mode)
        if self.locked_layers is not None:
            for locked in (getattr(self.encoder, "embeddings", None), *self.layers()[: self.locked_layers]):
                if locked is not None:
                    locked.eval()
        return self

    def _stack(self) -> str:
        return "encoder" if hasattr(self.encoder, "encoder") else "transformer"

    def layers(self) -> nn.ModuleList:
        """Return the transformer layers, first to last. Raises AttributeError for an encoder without any."""
        inner: Any = getattr(self.encoder, self._stack())
        layers = inner.layer if hasattr(inner, "layer") else inner.layers
        assert isinstance(layers, nn.ModuleList)
        return layers

    def join_states(self, numbers: Sequence[int]) -> None:
        """Let these earlier hidden states stand beside the last one; the width grows with them.

        Raises UsageError for a number that none of the encoder's earlier states has.
        """
        layers = len(self.layers()) if numbers else 0
        unknown = [number for number in numbers if not 0 <= number < layers]
        if unknown:
            others = [number for number in numbers if number not in unknown]
            raise UsageError(
                f"text.hidden_states: {unknown[0]} is none of the states before the tower's last, 0 to {layers - 1}",
                f"--set 'text.hidden_states={others}'",
            )
        self.width = self.state_width * (1 + len(numbers))
        self.hidden_states = tuple(numbers)

    def learn_only(self, last_layers: int | None) -> None:
        """Let the last `last_layers` layers learn: 0 locks the tower, None lets all of it learn, embeddings too."""
        self.requires_grad_(last_layers is None)
        self.locked_layers = None
        if last_layers is not None:
            self.locked_layers = max(0, len(self.layers()) - last_layers)
            for layer in self.layers()[self.locked_layers :]:
                layer.requires_grad_(True)


class _Given(nn.Module):
    """Stands in for embeddings where hidden states are given instead."""

    def forward(self, inputs_embeds: Tensor, **_others: Any) -> Tensor:
        """Return what is given."""
        return inputs_embeds


def _mean(states: Tensor, mask: Tensor) -> Tensor:
    """Return the mean (batch, width) of states (batch, tokens, width) over real tokens."""
    weights = mask.unsqueeze(-1).to(states.dtype)
    return (states * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1)


def build_text_tower(weights: str, pretrained: bool = True, hidden_states: Sequence[int] = ()) -> TextTower:
    """Return the tower called `weights`; with `pretrained` False only its shape, for a checkpoint to fill.

    Those earlier `hidden_states` stand beside its last one. Raises UsageError for a name that can't be meant, or a
    state that there is not, and ChimeraError where the weights can't be had.
    """
    tower = _built(weights, pretrained)
    tower.join_states(hidden_states)
    return tower


def _built(weights: str, pretrained: bool) -> TextTower:
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
