"""Retrieval ranks, figures, intervals and chance against hand computation and independent references."""

from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from chimera_cli.errors import ChimeraError
from chimera_cli.evaluation.retrieval import (
    Ranks,
    chance_figures,
    hits_by_image,
    retrieval_figures,
    retrieval_intervals,
    retrieval_ranks,
    threads,
)
from chimera_cli.figures import RECALLS, RETRIEVAL
from chimera_cli.statistics import bootstrap_interval


def _features(images: int, captions: int, dim: int = 16, seed: int = 0, signal: float = 0.8) -> tuple[NDArray, ...]:
    generator = np.random.default_rng(seed)
    image = generator.normal(size=(images, dim))
    owner = np.sort(generator.integers(0, images, size=captions))
    text = signal * image[owner] + generator.normal(size=(captions, dim))
    return (
        (image / np.linalg.norm(image, axis=1, keepdims=True)).astype(np.float32),
        (text / np.linalg.norm(text, axis=1, keepdims=True)).astype(np.float32),
        owner,
    )


def _naive_ranks(image: NDArray, text: NDArray, owner: NDArray) -> tuple[list[int], list[int]]:
    """Ranks by counting rivals one at a time, from the whole matrix of exact scores."""
    score = [[sum(float(a) * float(b) for a, b in zip(x, y, strict=True)) for y in text] for x in image]
    i2t = []
    for i in range(len(image)):
        own = [score[i][c] for c in range(len(text)) if owner[c] == i]
        rivals = [score[i][c] for c in range(len(text)) if owner[c] != i]
        i2t.append(1 + sum(rival >= max(own) for rival in rivals) if own else 0)
    t2i = [
        1 + sum(score[i][c] >= score[owner[c]][c] for i in range(len(image)) if i != owner[c]) for c in range(len(text))
    ]
    return i2t, t2i


# ---- ranks ----------------------------------------------------------------------------------------------------------


def test_hand_computed_ranks_and_figures() -> None:
    """Three images on the axes; captions written down so that each rank can be read off the score table.

            caption 0   1    2    3    4        owner 0 0 1 2 2
    image 0         9   1    8    0    0        best own 9, no rival above it             -> 1
    image 1         2   7    5    6    0        own 5, rivals 7 and 6 above               -> 3
    image 2         3   3    4    1    4        best own 4, rival 4 is equal, counts      -> 2
    """
    image = np.eye(3)
    text = np.array([[9, 2, 3], [1, 7, 3], [8, 5, 4], [0, 6, 1], [0, 0, 4]], dtype=float)
    ranks = retrieval_ranks(image, text, np.array([0, 0, 1, 2, 2]))
    assert ranks.i2t.tolist() == [1, 3, 2]
    assert ranks.t2i.tolist() == [1, 3, 2, 2, 1]
    figures = retrieval_figures(ranks)
    assert tuple(figures) == RETRIEVAL
    assert figures["i2t_r1"] == pytest.approx(1 / 3)
    assert figures["t2i_r1"] == pytest.approx(2 / 5)
    assert (figures["i2t_medr"], figures["t2i_medr"]) == (2.0, 2.0)
    assert figures["rsum"] == pytest.approx(1 / 3 + 2 / 5 + 4)


def test_constant_embeddings_find_nothing() -> None:
    image, text = np.full((40, 8), 0.3, dtype=np.float32), np.full((200, 8), 0.3, dtype=np.float32)
    owner = np.repeat(np.arange(40), 5)
    ranks = retrieval_ranks(image, text, owner)
    assert set(ranks.t2i) == {40}
    assert set(ranks.i2t) == {196}
    assert retrieval_figures(ranks)["rsum"] == 0


@pytest.mark.parametrize("block_scores", [50, 700, 5_001, 1 << 22])
def test_equal_embeddings_tie_wherever_they_stand_in_a_block(block_scores: int) -> None:
    image, text, _ = _features(101, 101, dim=333, signal=0.5)
    doubled, owner = np.concatenate([text, text[::-1]]), np.concatenate([np.arange(101), np.arange(101)])
    twins = np.concatenate([image, image[::-1]])
    ranks = retrieval_ranks(twins, doubled, owner, block_scores)
    once = retrieval_ranks(image, text, np.arange(101), block_scores)
    # Every image has a twin with the same score: each rival of the single gallery counts twice, and the twin once.
    assert (ranks.t2i[:101] == 2 * once.t2i).all()
    assert (ranks.i2t[101:] == 0).all()


@given(st.integers(1, 9), st.integers(1, 25), st.integers(1, 3), st.integers(0, 2**32 - 1), st.integers(1, 60))
@settings(max_examples=80, deadline=None)
def test_ranks_equal_naive_counting_with_many_ties_and_unequal_captions(
    images: int, captions: int, dim: int, seed: int, block_scores: int
) -> None:
    generator = np.random.default_rng(seed)
    # Small whole numbers: scores are exact and often equal, many images share captions or have none.
    image = generator.integers(-2, 3, size=(images, dim)).astype(float)
    text = generator.integers(-2, 3, size=(captions, dim)).astype(float)
    owner = generator.integers(0, images, size=captions)
    ranks = retrieval_ranks(image, text, owner, block_scores)
    i2t, t2i = _naive_ranks(image, text, owner)
    assert ranks.i2t.tolist() == i2t
    assert ranks.t2i.tolist() == t2i
    assert ranks.captions_per_query().tolist() == [count for count in np.bincount(owner).tolist() if count]


def _by_float64(image: NDArray, text: NDArray, owner: NDArray) -> tuple[list[int], list[int]]:
    """Ranks from the whole matrix in float64, where scores are equal up to 2 * dim * 2^-53 * |x| |y|."""
    image, text = image.astype(np.float64), text.astype(np.float64)
    scores = image @ text.T
    slack = 2 * image.shape[1] * 2.0**-53
    x, y = np.linalg.norm(image, axis=1), np.linalg.norm(text, axis=1)
    own = scores[owner, np.arange(len(text))]
    is_own = owner[None, :] == np.arange(len(image))[:, None]
    rivals = np.where(is_own, -np.inf, scores)
    best = np.where(is_own, scores, -np.inf).max(axis=1)
    i2t = 1 + (rivals >= (best - slack * x * y.max())[:, None]).sum(axis=1)
    i2t[~is_own.any(axis=1)] = 0
    t2i = 1 + (rivals >= own - slack * y * x.max()).sum(axis=0)
    return i2t.tolist(), t2i.tolist()


@given(
    st.integers(1, 40), st.integers(1, 80), st.integers(1, 40), st.integers(0, 2**32 - 1), st.integers(1, 400),
    st.sampled_from([np.float16, np.float32, np.float64]), st.sampled_from([0.0, 1e-9, 1e-7, 1e-3]),
)  # fmt: skip
@settings(max_examples=80, deadline=None)
def test_scores_that_float32_can_not_tell_apart_are_ranked_as_float64_does(
    images: int, captions: int, dim: int, seed: int, block_scores: int, dtype: type, apart: float
) -> None:
    generator = np.random.default_rng(seed)
    # Few directions, each many times and ever so slightly moved: most scores are equal or nearly so.
    places = generator.normal(size=(3, dim))
    image = (places[generator.integers(0, 3, images)] + apart * generator.normal(size=(images, dim))).astype(dtype)
    text = (places[generator.integers(0, 3, captions)] + apart * generator.normal(size=(captions, dim))).astype(dtype)
    owner = generator.integers(0, images, size=captions)
    ranks = retrieval_ranks(image, text, owner, block_scores)
    assert (ranks.i2t.tolist(), ranks.t2i.tolist()) == _by_float64(image, text, owner)


@pytest.mark.parametrize(
    ("dtype", "scales"), [(np.float32, (1e-30, 1e-20, 1e30)), (np.float64, (1e-160, 1e-30, 1e-12, 1e50, 1e150))]
)
def test_no_scale_of_the_features_is_too_large_or_too_small(dtype: type, scales: tuple[float, ...]) -> None:
    image, text, owner = _features(300, 900, dim=40, signal=0.5)
    image, text = image.astype(dtype), text.astype(dtype)
    usual = retrieval_ranks(image, text, owner)
    for scale in scales:
        # A power of two changes no digit, so that every rank must stay.
        power = dtype(2.0 ** round(np.log2(scale)))
        for moved in (retrieval_ranks(image * power, text, owner), retrieval_ranks(image, text * power, owner)):
            assert (moved.t2i == usual.t2i).all()
            assert (moved.i2t == usual.i2t).all()


def test_short_captions_beside_long_ones_are_ranked_as_float64_does() -> None:
    # Lengths from 1e-25 to 1e25: for the shortest the products underflow in float32.
    image, text, owner = _features(60, 200, dim=24, signal=0.7)
    text = text.astype(np.float64) * 10.0 ** np.random.default_rng(0).integers(-25, 26, size=(200, 1))
    ranks = retrieval_ranks(image, text, owner)
    assert (ranks.i2t.tolist(), ranks.t2i.tolist()) == _by_float64(image, text, owner)


def test_more_scores_in_doubt_than_pairs_are_asked_for() -> None:
    # One direction for all: every score of a whole block is in doubt, and float64 settles them at once.
    image, text, owner = (
        np.ones((90, 7), dtype=np.float32),
        np.full((300, 7), 0.1, dtype=np.float32),
        np.arange(300) % 90,
    )
    image[17] *= np.float32(1 + 2.0**-20)
    ranks = retrieval_ranks(image, text, owner)
    assert (ranks.i2t.tolist(), ranks.t2i.tolist()) == _by_float64(image, text, owner)
    assert ranks.t2i.tolist() == [1 if one == 17 else 90 for one in owner]


def test_many_blocks_with_edges_and_threads_equal_the_whole_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    # 500 x 4,103: three blocks by three, the last ones no multiple of eight wide or high.
    image, text, owner = _features(500, 4103, dim=8, signal=0.6)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert threads() == 1
    alone = retrieval_ranks(image, text, owner)
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr("chimera_cli.evaluation.retrieval.cpu_cores", lambda: 5)
    shared = retrieval_ranks(image, text, owner)
    assert (shared.i2t.tolist(), shared.t2i.tolist()) == (alone.i2t.tolist(), alone.t2i.tolist())
    assert (alone.i2t.tolist(), alone.t2i.tolist()) == _by_float64(image, text, owner)


def test_order_of_images_and_captions_does_not_matter() -> None:
    image, text, owner = _features(60, 240)
    shuffle, deal = np.random.default_rng(1).permutation(60), np.random.default_rng(2).permutation(240)
    moved = np.argsort(shuffle)[owner[deal]]
    ranks, again = retrieval_ranks(image, text, owner), retrieval_ranks(image[shuffle], text[deal], moved)
    assert (again.i2t == ranks.i2t[shuffle]).all()
    assert (again.t2i == ranks.t2i[deal]).all()


@pytest.mark.parametrize("k", [1, 5, 10])
def test_recalls_equal_the_published_protocol_without_ties(k: int) -> None:
    image, text, owner = _features(80, 400)
    figures = retrieval_figures(retrieval_ranks(image, text, owner))
    # CLIP_benchmark's definition from first principles: recall@k of a query is the share of its positives among the
    # k highest scores, and a query counts when that share is above zero.
    scores = text.astype(np.float64) @ image.astype(np.float64).T
    positive = owner[:, None] == np.arange(80)[None, :]

    def recall(scores: NDArray, positive: NDArray) -> NDArray:
        top = np.argpartition(-scores, k - 1, axis=1)[:, :k]
        return np.take_along_axis(positive, top, axis=1).sum(axis=1) / positive.sum(axis=1)

    asked = positive.any(axis=0)
    assert figures[f"t2i_r{k}"] == pytest.approx((recall(scores, positive) > 0).mean(), abs=1e-15)
    assert figures[f"i2t_r{k}"] == pytest.approx((recall(scores.T[asked], positive.T[asked]) > 0).mean(), abs=1e-15)


def test_images_without_captions_stay_in_the_gallery_and_are_no_queries() -> None:
    image = np.array([[1.0, 0.0], [0.9, 0.1], [2.0, 0.0]])
    text = np.array([[1.0, 0.0], [0.0, 1.0]])
    ranks = retrieval_ranks(image, text, np.array([0, 1]))
    assert ranks.queries.tolist() == [0, 1]
    assert ranks.i2t.tolist() == [1, 2, 0]
    assert ranks.t2i.tolist() == [2, 1]  # image 2, which has no caption, outranks image 0
    assert retrieval_figures(ranks)["i2t_r1"] == 0.5


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("side", ["image", "text"])
def test_features_that_are_not_finite_are_an_error_that_says_where(bad: float, side: str) -> None:
    image, text, owner = _features(6, 12)
    (image if side == "image" else text)[4, 2] = bad
    with pytest.raises(ChimeraError, match=rf"1 of \d+ {side} features are NaN or infinite, the first at position 4"):
        retrieval_ranks(image, text, owner)


def test_what_does_not_fit_is_refused() -> None:
    image, text, owner = _features(6, 12)
    with pytest.raises(ValueError, match="don't fit"):
        retrieval_ranks(image, text, owner[:-1])
    with pytest.raises(ValueError, match="outside the 5"):
        retrieval_ranks(image[:5], text, np.full(12, 5))
    with pytest.raises(ChimeraError, match="no text features"):
        retrieval_ranks(image, text[:0], owner[:0])


def test_hits_by_image_add_up_to_the_recalls() -> None:
    ranks = Ranks(np.array([1, 0, 7]), np.array([3, 12, 1, 5]), np.array([2, 2, 0, 2]))
    hits, sizes = hits_by_image(ranks)
    # Image 1 has no caption and is no query; i2t R@1, R@5, R@10, then t2i.
    assert hits.tolist() == [[1, 0], [1, 0], [1, 1], [1, 0], [1, 2], [1, 2]]
    assert sizes.tolist() == [[1, 1]] * 3 + [[1, 3]] * 3
    figures = retrieval_figures(ranks)
    assert (hits.sum(axis=1) / sizes.sum(axis=1)).tolist() == [figures[name] for name in RECALLS]


# ---- intervals ------------------------------------------------------------------------------------------------------


def test_intervals_equal_a_plain_bootstrap_over_images_that_take_their_captions_along() -> None:
    image, text, owner = _features(30, 90, signal=0.4)
    ranks = retrieval_ranks(image, text, owner)
    queries = ranks.queries
    fast = retrieval_intervals(ranks, resamples=200, seed=7)

    def figure(name: str, drawn: NDArray[np.int64]) -> float:
        texts = np.concatenate([np.flatnonzero(owner == queries[d]) for d in drawn])
        sampled = Ranks(ranks.i2t[queries[drawn]], ranks.t2i[texts], np.repeat(0, len(texts)))
        return retrieval_figures(sampled)[name]

    assert set(fast) == set(RETRIEVAL)
    for name in RETRIEVAL:
        plain = bootstrap_interval(lambda drawn, name=name: figure(name, drawn), len(queries), resamples=200, seed=7)
        assert fast[name] == pytest.approx(plain, abs=1e-12), name


def test_intervals_hold_the_figure_and_depend_on_the_seed_alone() -> None:
    image, text, owner = _features(120, 500, signal=0.4)
    ranks = retrieval_ranks(image, text, owner)
    intervals, figures = retrieval_intervals(ranks), retrieval_figures(ranks)
    assert all(low <= figures[name] <= high for name, (low, high) in intervals.items())
    assert retrieval_intervals(ranks) == intervals != retrieval_intervals(ranks, seed=1)
    # The share of 120 independent images has a known standard error; the bootstrap must be near it.
    p = figures["i2t_r10"]
    width = intervals["i2t_r10"][1] - intervals["i2t_r10"][0]
    assert width == pytest.approx(2 * 1.96 * np.sqrt(p * (1 - p) / ranks.queries.size), rel=0.25)


# ---- chance ---------------------------------------------------------------------------------------------------------


def test_chance_of_the_thousand_image_sets_is_the_ladders_lowest_rung() -> None:
    figures = chance_figures(1000, [5] * 1000)
    assert [figures[f"t2i_r{k}"] for k in (1, 5, 10)] == [0.001, 0.005, 0.01]
    assert [figures[f"i2t_r{k}"] for k in (1, 5, 10)] == pytest.approx([0.001, 0.004992, 0.009964], abs=1e-6)
    assert figures["t2i_medr"] == 500.5


def test_chance_equals_the_mean_over_all_orders() -> None:
    counts = [1, 2, 0, 3]
    owner = np.repeat(np.arange(4), counts)
    found = []
    for order in permutations(range(6)):
        ranked = owner[list(order)].tolist()
        # Rank of an image: 1 + captions of others above its first own one.
        found += [[ranked.index(image) + 1 for image in (0, 1, 3)]]
    ranks = np.asarray(found)
    figures = chance_figures(4, counts)
    assert [figures[f"i2t_r{k}"] for k in (1, 5)] == pytest.approx([(ranks <= k).mean() for k in (1, 5)])
    assert figures["i2t_r10"] == pytest.approx(1)
    assert figures["i2t_medr"] == np.median(ranks)
    assert (figures["t2i_r1"], figures["t2i_r5"], figures["t2i_medr"]) == (0.25, 1.0, 2.5)


def test_random_embeddings_score_about_chance() -> None:
    image, text, owner = _features(300, 1500, signal=0.0, dim=64)
    figures = retrieval_figures(retrieval_ranks(image, text, owner))
    chance = chance_figures(300, np.bincount(owner, minlength=300))
    assert figures["t2i_r10"] == pytest.approx(chance["t2i_r10"], abs=0.015)
    assert figures["i2t_medr"] == pytest.approx(chance["i2t_medr"], rel=0.25)
