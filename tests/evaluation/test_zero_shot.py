"""Zero-shot classification: prompts, class weights and pessimistic accuracy on cases computed by hand."""

import numpy as np
import pytest

from chimera_cli.errors import ChimeraError
from chimera_cli.evaluation.zero_shot import class_ranks, class_weights, prompts, zero_shot_figures


def test_prompts_and_weights_keep_the_order_of_classes() -> None:
    assert prompts(["red", "blue"], ("{}", "a {}")) == ["red", "a red", "blue", "a blue"]
    features = np.array([[2.0, 0.0], [0.0, 5.0], [0.0, 1.0], [0.0, 3.0]])
    assert class_weights(features, 2) == pytest.approx(np.array([[0.5**0.5, 0.5**0.5], [0.0, 1.0]]))


def test_prompts_that_cancel_out_leave_the_zero_vector() -> None:
    assert (class_weights(np.array([[1.0, 0.0], [-1.0, 0.0]]), 1) == 0).all()


def test_ranks_count_ties_against_the_model() -> None:
    weights = np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    images = np.array([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])
    assert class_ranks(images, weights, np.array([0, 1, 2])).tolist() == [2, 1, 3]


def test_a_model_that_sees_nothing_is_never_right() -> None:
    labels = np.arange(30) % 6
    ranks = class_ranks(np.ones((30, 4)), np.ones((6, 4)), labels)
    assert zero_shot_figures(ranks, 6) == {"zero_shot_top1": 0.0, "zero_shot_top5": 0.0}


def test_top5_is_missing_where_it_cannot_miss() -> None:
    ranks = np.array([1, 2, 5, 1])
    assert zero_shot_figures(ranks, 5) == {"zero_shot_top1": 0.5, "zero_shot_top5": None}
    assert zero_shot_figures(ranks, 6)["zero_shot_top5"] == 1.0


def test_features_that_are_not_finite_are_an_error() -> None:
    with pytest.raises(ChimeraError, match="1 of 1 image features are NaN or infinite"):
        class_ranks(np.array([[np.nan, 1.0]]), np.eye(2), np.array([0]))
