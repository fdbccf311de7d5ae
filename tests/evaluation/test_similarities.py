"""The histograms of similarities: bins by hand, every matched pair once, unmatched pairs never an image's own."""

import numpy as np
import pytest

from chimera_cli.errors import ChimeraError
from chimera_cli.evaluation.similarities import BINS, similarity_histogram


def test_hand_computed_bins_on_both_ends_and_in_the_middle() -> None:
    image = np.array([[2.0, 0.0], [0.0, 3.0]])
    # Cosines with their own image: 1, -1, 0.6; with the other one: 0, 0, 0.8.
    text = np.array([[5.0, 0.0], [0.0, -1.0], [0.6, 0.8]])
    found = similarity_histogram(image, text, np.array([0, 1, 0]), unmatched_pairs=3000)
    assert found["edges"][0] == -1.0
    assert found["edges"][-1] == 1.0
    assert np.diff(found["edges"]) == pytest.approx(2 / BINS)
    matched, unmatched = np.array(found["matched"]), np.array(found["unmatched"])
    assert {int(place): int(matched[place]) for place in np.flatnonzero(matched)} == {0: 1, 80: 1, 99: 1}
    # Two of three captions are at 0 of the other image, one at 0.8; drawn evenly.
    assert set(np.flatnonzero(unmatched)) == {50, 90}
    assert unmatched.sum() == 3000
    assert unmatched[90] == pytest.approx(1000, abs=100)


def test_unmatched_pairs_never_hold_an_images_own_caption() -> None:
    # Orthogonal images: a matched pair has cosine 1, any other 0.
    generator = np.random.default_rng(0)
    owner = generator.integers(0, 30, size=200)
    found = similarity_histogram(np.eye(30), np.eye(30)[owner], owner)
    assert found["matched"][-1] == 200
    assert found["unmatched"][50] == sum(found["unmatched"]) == 100_000


def test_the_counts_are_those_of_numpy_in_many_parts_and_repeatable() -> None:
    generator = np.random.default_rng(1)
    image, owner = generator.normal(size=(50, 6)).astype(np.float32), generator.integers(0, 50, size=9000)
    text = generator.normal(size=(9000, 6)).astype(np.float32)
    found = similarity_histogram(image, text, owner)
    cosines = (image[owner] * text).sum(1) / np.linalg.norm(image[owner], axis=1) / np.linalg.norm(text, axis=1)
    assert found["matched"] == np.histogram(cosines.astype(np.float64), BINS, (-1, 1))[0].tolist()
    assert found == similarity_histogram(image, text, owner)


def test_one_image_has_no_unmatched_pairs_and_a_zero_vector_no_direction() -> None:
    found = similarity_histogram(np.ones((1, 4)), np.zeros((2, 4)), np.array([0, 0]))
    assert sum(found["unmatched"]) == 0
    assert found["matched"][BINS // 2] == 2


def test_features_that_are_not_finite_are_refused() -> None:
    with pytest.raises(ChimeraError, match="1 of 2 text features"):
        similarity_histogram(np.ones((1, 2)), np.array([[1.0, np.nan], [1.0, 1.0]]), np.array([0, 0]))
