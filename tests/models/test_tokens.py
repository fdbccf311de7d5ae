"""Tokens made once: batches of any rows equal what the tokeniser makes of them, states lie at their tokens' places."""

import numpy as np
import pytest
import torch

from chimera_cli.models import text_tower
from chimera_cli.models.text_tower import TextTower, build_text_tower
from chimera_cli.models.tokens import StateTable, TokenTable

TEXTS = ["a dog", "two children play with a red ball on the grass", "a dog runs", "snow", "a man on a very steep rock"]


@pytest.fixture(scope="module")
def tower() -> TextTower:
    return build_text_tower("tiny").eval()


@pytest.mark.parametrize("rows", [[0, 1, 2, 3, 4], [3], [4, 0, 4], [2, 0]])
def test_a_batch_of_the_table_is_what_the_tokeniser_makes_of_its_rows(tower: TextTower, rows: list[int]) -> None:
    ours = tower.token_table(TEXTS, 8).batch(np.array(rows))
    theirs = tower.tokenise([TEXTS[row] for row in rows], 8)
    for name in ("input_ids", "attention_mask"):
        assert torch.equal(ours[name], theirs[name]), name


def test_a_table_made_in_pieces_is_the_same(tower: TextTower, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = tower.token_table(TEXTS, 8)
    monkeypatch.setattr(text_tower, "_TOKENISED", 2)
    pieces = tower.token_table(TEXTS, 8)
    assert np.array_equal(whole.ids, pieces.ids)
    assert np.array_equal(whole.starts, pieces.starts)
    assert len(pieces) == 5


def test_samples_go_from_the_shortest_to_the_longest(tower: TextTower) -> None:
    table = tower.token_table(TEXTS, 32)
    lengths = [len(sample) for sample in table.samples(3)]
    assert lengths[0] == table.lengths.min()
    assert lengths[-1] == table.lengths.max()
    assert len(table.samples(8)) == 5


def test_states_are_given_back_to_their_tokens() -> None:
    # Captions of 2, 1 and 3 tokens; the state of a token is its number in the table.
    table = TokenTable(np.arange(6, dtype=np.int32), np.array([0, 2, 3, 6]), 0)
    states = StateTable(table, np.arange(6, dtype=np.float16).reshape(6, 1))
    batch = states.batch(np.array([2, 1]))
    assert batch["states"].squeeze(2).tolist() == [[3, 4, 5], [2, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["states"].dtype == torch.float32
    assert states.lengths.tolist() == [2, 1, 3]
