"""Worst and best queries on cases worked out by hand, and held against the ranks of the whole gallery."""

import numpy as np
import pytest

from chimera_cli.evaluation.examples import best_of, extremes, rank_histogram, unit
from chimera_cli.evaluation.retrieval import retrieval_ranks


def test_the_best_come_first_and_equal_ones_in_their_order() -> None:
    assert best_of(np.array([0.2, 0.9, 0.2, -1.0]), 3) == [(1, 0.9), (0, 0.2), (2, 0.2)]
    assert len(best_of(np.array([0.2, 0.9]), 50)) == 2


def test_worst_and_best_captions_by_hand() -> None:
    images = np.eye(4)
    # Captions of images 0, 0, 1, 2, 3: found with a margin of 1 and 0.2, third, fourth, found with 0.6.
    texts = np.array([[1, 0, 0, 0], [0.6, 0.4, 0, 0], [0.5, 0.2, 0.8, 0], [0.9, 0.8, 0.1, 0.7], [0, 0, 0.4, 1.0]])
    owners = np.array([0, 0, 1, 2, 3])
    ranks = np.array([1, 1, 3, 4, 1])
    worst, best = extremes(texts, images, owners, np.arange(4), ranks, 2, 2)
    assert [(one.query, one.rank) for one in worst] == [(3, 4), (2, 3)]
    assert [(one.query, one.rank) for one in best] == [(0, 1), (4, 1)]
    assert list(worst[0].found) == [(0, 0.9), (1, 0.8)]
    assert worst[0].score == 0.1
    assert worst[0].margin == pytest.approx(-0.8)
    assert best[1].margin == pytest.approx(0.6)


def test_no_query_is_both_and_no_image_twice() -> None:
    generator = np.random.default_rng(0)
    images, owners = unit(generator.normal(size=(7, 5))), np.arange(14) // 2
    texts = unit(images[owners] + 0.7 * generator.normal(size=(14, 5)))
    ranks = retrieval_ranks(images, texts, owners)
    worst, best = extremes(texts, images, owners, np.arange(7), ranks.t2i, 10, 3)
    assert (len(worst), len(best)) == (4, 3)
    assert len({one.query for one in [*worst, *best]}) == 7
    assert len({int(owners[one.query]) for one in worst}) == 4
    for one in [*worst, *best]:
        # Two ways to the same rank: all scores of one query, and the blocks of the whole gallery.
        assert one.rank == 1 + int((images @ texts[one.query] > one.score + 1e-9).sum())


def test_images_without_captions_are_no_queries() -> None:
    images, texts = np.eye(3), np.eye(3)[:2]
    ranks = retrieval_ranks(images, texts, np.array([0, 1]))
    worst, best = extremes(images, texts, np.arange(3), np.array([0, 1]), ranks.i2t, 5, 5)
    assert sorted(one.query for one in [*worst, *best]) == [0, 1]


def test_histogram_of_ranks() -> None:
    ranks = np.array([1, 1, 2, 5, 6, 10, 12, 0])
    groups = rank_histogram(ranks, 12)
    assert [label for label, _ in groups] == ["1", "2–5", "6–10", "11–12"]
    assert [share for _, share in groups] == pytest.approx([2 / 7, 2 / 7, 2 / 7, 1 / 7])
    assert rank_histogram(np.array([1]), 1) == [("1", 1.0)]
    assert sum(share for _, share in rank_histogram(np.arange(1, 2001), 2000)) == pytest.approx(1)
