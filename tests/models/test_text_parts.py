"""A text tower whose lower layers are locked: computed in two parts it is the same function with the same gradient."""

import copy
from collections.abc import Sequence

import pytest
import torch

from chimera_cli.models.sessions import SessionError, compare_text_parts
from chimera_cli.models.text_tower import TextTower, build_text_tower
from chimera_cli.models.weights import DEFAULT_TEXT

TEXTS = ["a dog", "two children play with a red ball on the grass", "snow"] * 60


def halves(layers: int | None, hidden_states: Sequence[int] = ()) -> TextTower:
    torch.manual_seed(0)
    tower = build_text_tower("tiny", hidden_states=hidden_states)
    tower.learn_only(layers)
    return tower.eval()


@pytest.mark.parametrize(("layers", "locked"), [(None, None), (0, 2), (1, 1), (2, 0), (9, 0)])
def test_the_last_layers_learn_and_the_rest_is_locked(layers: int | None, locked: int | None) -> None:
    tower = halves(layers)
    assert tower.locked_layers == locked
    learning = {name for name, parameter in tower.named_parameters() if parameter.requires_grad}
    for number, layer in enumerate(tower.layers()):
        learns = locked is None or number >= locked
        assert all(parameter.requires_grad == learns for parameter in layer.parameters())
    assert any("embeddings" in name for name in learning) == (layers is None)


@pytest.mark.parametrize(
    ("layers", "hidden_states", "lower"),
    # State 1 is what one locked layer gives; where it is the only one locked, 0 comes from before it.
    [(1, [], []), (2, [], []), (1, [1], []), (2, [1, 0], []), (1, [0], [0]), (1, [1, 0], [0]), (0, [0, 1], [0, 1])],
)
def test_states_and_then_the_rest_equal_the_whole_tower_and_its_gradient(
    layers: int, hidden_states: list[int], lower: list[int]
) -> None:
    tower = halves(layers, hidden_states)
    twin = copy.deepcopy(tower)
    # More than one piece, so that the sorting of a large batch takes part.
    tokens = tower.tokenise(TEXTS, 16)
    whole = tower(tokens)
    with torch.no_grad():
        states = twin.lower_states(tokens)
    assert states.shape[2] == twin.lower_width == 32 * (1 + len(lower))
    parts = twin({"states": states, "attention_mask": tokens["attention_mask"]})
    assert torch.allclose(parts, whole, atol=1e-6)
    if layers:
        whole.square().sum().backward()
        parts.square().sum().backward()
    for (name, ours), (_, theirs) in zip(twin.named_parameters(), tower.named_parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None) == (not ours.requires_grad), name
        assert ours.grad is None or torch.allclose(ours.grad, theirs.grad, atol=1e-5), name


@pytest.mark.parametrize("numbers", [(0, 3), (3, 5), (1, 2)])
@torch.no_grad()
def test_parts_in_any_order_give_the_states_that_the_encoder_itself_has(numbers: tuple[int, ...]) -> None:
    tower = build_text_tower(DEFAULT_TEXT, hidden_states=numbers)
    tower.learn_only(3)
    tower.eval()
    # An encoder that nobody took apart: transformers hooks into the layers that it is asked for states of.
    untouched = copy.deepcopy(tower.encoder)
    tokens = tower.tokenise(["a dog jumps over a fence"], 16)
    states = untouched(**tokens, output_hidden_states=True).hidden_states
    wanted = torch.cat([states[number].mean(dim=1) for number in (6, *numbers)], dim=-1)
    for _ in range(2):
        lower = tower.lower_states(tokens)
        parts = tower({"states": lower, "attention_mask": tokens["attention_mask"]})
        for found in (parts, tower(tokens)):
            assert torch.allclose(found, wanted, atol=1e-5)


def test_locked_layers_keep_no_dropout_while_the_others_learn() -> None:
    tower = halves(1).train()
    tokens = tower.tokenise(TEXTS[:3], 16)
    assert torch.equal(tower.lower_states(tokens), tower.lower_states(tokens))
    assert not torch.equal(tower(tokens), tower(tokens))
    tower.learn_only(None)
    tower.train()
    assert not torch.equal(tower.encoder.embeddings(tokens["input_ids"]), tower.encoder.embeddings(tokens["input_ids"]))


def test_parts_that_make_something_else_are_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    tower = halves(1)
    samples = [torch.tensor([101, 2000, 102]), torch.tensor([101, 102])]
    compare_text_parts(tower, samples, torch.device("cpu"))
    lower = tower.lower_states
    with monkeypatch.context() as patch:
        patch.setattr(tower, "lower_states", lambda tokens: lower(tokens).flip(-1))
        with pytest.raises(SessionError, match="in two parts is off by"):
            compare_text_parts(tower, samples, torch.device("cpu"))
    del tower.encoder.embeddings
    with pytest.raises(SessionError, match="can't be computed in two parts"):
        compare_text_parts(tower, samples, torch.device("cpu"))
