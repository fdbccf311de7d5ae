"""Hidden states beside a text tower's last one: what they are, of which encoders, and what is refused."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from tiny_model import TINY
from torch import Tensor
from transformers import DistilBertConfig, DistilBertModel, MPNetConfig, MPNetModel, PreTrainedModel

from chimera_cli.config import TextTower as TextConfig
from chimera_cli.config import TrainConfig, load_config, validate
from chimera_cli.errors import UsageError
from chimera_cli.models.checkpoint import save_model
from chimera_cli.models.combination import load_model
from chimera_cli.models.dual_encoder import Architecture, build_dual_encoder
from chimera_cli.models.sessions import caption_session, session_backend
from chimera_cli.models.text_tower import TextTower, build_text_tower
from chimera_cli.models.weights import DEFAULT_TEXT

# More than a piece of captions, of several lengths.
TEXTS = ["a dog", "two children play with a red ball on the grass", "snow"] * 60


@torch.no_grad()
def means(encoder: torch.nn.Module, tokens: dict[str, Tensor], numbers: tuple[int, ...]) -> Tensor:
    """Return the pooled states, each caption by itself: without padding the mean is over all there is."""
    rows = []
    for ids, mask in zip(tokens["input_ids"], tokens["attention_mask"], strict=True):
        states = encoder(input_ids=ids[None, : int(mask.sum())], output_hidden_states=True).hidden_states
        rows.append(torch.cat([states[number][0].mean(dim=0) for number in numbers]))
    return torch.stack(rows)


@torch.no_grad()
def test_states_are_those_of_the_encoder_averaged_over_real_tokens() -> None:
    tower = build_text_tower(DEFAULT_TEXT, hidden_states=[3, 0]).eval()
    tokens = tower.tokenise(TEXTS, 16)
    features = tower(tokens)
    assert tower.width == features.shape[1] == 3 * 384
    few = {name: part[:3] for name, part in tokens.items()}
    assert torch.allclose(features[:3], means(tower.encoder, few, (6, 3, 0)), atol=1e-5)
    assert torch.allclose(features[:3], features[-3:], atol=1e-5)
    own = build_text_tower(DEFAULT_TEXT).eval()(tokens)
    assert torch.allclose(features[:, :384], own, atol=1e-6)
    # What the embeddings give, by hand: it knows of no other module.
    inputs = tower.encoder.get_submodule("embeddings")(input_ids=few["input_ids"])
    mask = few["attention_mask"].unsqueeze(-1)
    assert torch.allclose(features[:3, 768:], (inputs * mask).sum(1) / mask.sum(1), atol=1e-6)


@pytest.mark.parametrize("encoder", [
    DistilBertModel(DistilBertConfig(vocab_size=99, dim=16, n_layers=3, n_heads=2, hidden_dim=32)),
    MPNetModel(MPNetConfig(
        vocab_size=99, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32
    ), add_pooling_layer=False),
])  # fmt: skip
def test_states_of_other_encoders(encoder: PreTrainedModel) -> None:
    tower = TextTower(encoder, None, 16).eval()
    tower.join_states((0, 2))
    ids = torch.randint(5, 99, (2, 7), generator=torch.Generator().manual_seed(0))
    tokens = {"input_ids": ids, "attention_mask": torch.tensor([[1] * 7, [1] * 4 + [0] * 3])}
    with torch.no_grad():
        assert torch.allclose(tower(tokens), means(encoder, tokens, (3, 0, 2)), atol=1e-5)
    assert tower.width == 48


@pytest.mark.skipif(session_backend() is None, reason="onnxruntime and onnx are not installed")
@torch.no_grad()
def test_a_session_gives_the_states_too() -> None:
    tower = build_text_tower(DEFAULT_TEXT, hidden_states=[0, 3]).eval()
    torch.manual_seed(0)
    run = caption_session(tower, [torch.randint(1000, 9000, (tokens,)) for tokens in (4, 9)])
    for batch, length in ((1, 3), (3, 14)):
        ids = torch.randint(1000, 9000, (batch, length))
        given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        # Each state by itself: small ones must not hide behind large ones.
        for ours, theirs in zip(run(given).split(384, 1), tower(given).split(384, 1), strict=True):
            assert ((ours - theirs).norm(dim=1) / theirs.norm(dim=1)).max() < 1e-5


def test_a_checkpoint_brings_them_back_and_one_from_before_has_none(tmp_path: Path) -> None:
    torch.manual_seed(0)
    shape = replace(TINY, text_weights=DEFAULT_TEXT, learn_layers=0, text_hidden_states=(1, 4))
    model = build_dual_encoder(shape).eval()
    save_model(model, tmp_path / "model.safetensors")
    again = load_model(tmp_path / "model.safetensors", torch.device("cpu"))
    assert again.architecture == shape
    assert again.text_tower.hidden_states == (1, 4)
    tokens = model.tokenise(TEXTS[:3])
    with torch.no_grad():
        assert torch.equal(again.encode_text(tokens), model.encode_text(tokens))
    before = {name: value for name, value in TINY.as_dict().items() if name != "text_hidden_states"}
    assert Architecture(**json.loads(json.dumps(before))) == TINY


def test_a_state_that_there_is_not_is_refused() -> None:
    with pytest.raises(
        UsageError, match=r"text\.hidden_states: 2 is none of the states before .* last, 0 to 1"
    ) as told:
        build_text_tower("tiny", hidden_states=[0, 2])
    assert told.value.hint == "--set 'text.hidden_states=[0]'"


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"hidden_states": [3, 0, 3]}, r"hidden_states names a state twice: \[3, 0, 3\]"),
        ({"hidden_states": [0, -1]}, r"hidden_states\.1: .* greater than or equal to 0, not -1"),
        ({"hidden_states": 3}, r"hidden_states: give a list such as \[0, 3\], not 3"),
    ],
)
def test_what_can_not_be_meant_is_refused(given: dict[str, object], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        validate(TextConfig, given, "a file")


def test_a_recorded_config_is_the_one_that_was_given() -> None:
    config = load_config(TrainConfig, None, ["text.hidden_states=[0, 3]"])
    assert config.text.hidden_states == (0, 3)
    # As a run that goes on compares them: a list in the file, and so in what is dumped.
    assert yaml.safe_load(yaml.safe_dump(config.model_dump())) == config.model_dump()
