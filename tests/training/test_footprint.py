"""What a graph keeps, against layers whose activations can be counted by hand."""

import pytest
import torch
from tiny_model import TINY

from chimera_cli.models.dual_encoder import DualEncoder, build_dual_encoder
from chimera_cli.training.batches import PairBatch
from chimera_cli.training.footprint import _kept, measure_activations
from chimera_cli.training.memory import recompute_activations


def frozen() -> DualEncoder:
    model = build_dual_encoder(TINY)
    model.image_tower.frozen_statistics = True
    return model.train()


def pairs(count: int) -> PairBatch:
    tokens = torch.ones(count, 16, dtype=torch.int64)
    text = {"input_ids": tokens, "attention_mask": tokens}
    return PairBatch(0, torch.zeros(count, 3, 32, 32), text, torch.arange(count))


def test_two_and_four_pairs_foretell_eight() -> None:
    model = frozen()
    found = measure_activations(model, pairs)
    assert found.fixed + 8 * found.per_pair == pytest.approx(_kept(model, pairs(8)).total, rel=0.02)
    assert 0 < found.largest < found.per_pair
    assert 0 < found.segment < found.per_pair


def test_cached_features_keep_what_two_linear_heads_keep() -> None:
    model = frozen()
    widths = (model.image_tower.width, model.text_tower.width)

    def cached(count: int) -> PairBatch:
        return PairBatch(0, *(torch.zeros(count, width) for width in widths), torch.arange(count))

    # A linear layer keeps its inputs; normalising keeps the embedding of 8, its norm, and the norm broadcast to 1 or 8.
    least = 4 * (sum(widths) + 2 * (8 + 1))
    most = 4 * (sum(widths) + 2 * (2 * 8 + 2 + 8))
    assert least <= measure_activations(model, cached).per_pair <= most


def test_less_is_kept_where_activations_are_computed_again() -> None:
    plain, again = frozen(), frozen()
    recompute_activations(again)
    kept, kept_less = measure_activations(plain, pairs), measure_activations(again, pairs, plain)
    assert kept_less.per_pair < kept.per_pair
    assert kept_less.segment == kept.segment
    assert kept_less.peak_bytes(8, recomputing=True) < kept.peak_bytes(8, recomputing=False)
