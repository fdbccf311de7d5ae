"""Zero-shot classification: prompts, class weights and pessimistic accuracy on cases computed by hand."""

import numpy as np
import pytest

from chimera_cli.errors import ChimeraError
from chimera_cli.evaluation.zero_shot import (
    ClassResult,
    class_ranks,
    class_recall,
    class_results,
    class_scores,
    class_weights,
    confusion,
    prompts,
    zero_shot_figures,
    zero_shot_intervals,
)


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


def test_other_braces_in_a_template_mean_nothing() -> None:
    assert prompts(["{red}"], ("a {} {0} {{",)) == ["a {red} {0} {{"]


def test_recall_per_class_lets_no_frequent_class_speak_for_all() -> None:
    labels = np.array([0] * 8 + [1, 1])
    ranks = np.array([1] * 8 + [2, 1])
    assert class_recall(ranks, labels, 3) == pytest.approx((1 + 0.5) / 2)
    assert zero_shot_figures(ranks, 3)["zero_shot_top1"] == pytest.approx(0.9)


def test_confusion_and_what_it_says_of_each_class() -> None:
    scores = np.array([[0.9, 0.1, 0.0], [0.2, 0.3, 0.1], [0.1, 0.8, 0.2], [0.0, 0.5, 0.4], [0.7, 0.1, 0.0]])
    counts = confusion(scores, np.array([0, 0, 1, 1, 1]), np.array([1, 2, 1, 1, 2]))
    assert counts.tolist() == [[1, 1, 0], [1, 2, 0], [0, 0, 0]]
    first, second, third = class_results(counts)
    assert first == ClassResult(2, 0.5, 1, 0.5)
    assert second == ClassResult(3, pytest.approx(2 / 3), 0, pytest.approx(1 / 3))
    assert third == ClassResult(0, None, None, None)


def test_what_ties_is_found_in_no_table_as_in_no_figure() -> None:
    weights, images = np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]), np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    labels = np.array([0, 1, 2])
    ranks = class_ranks(images, weights, labels)
    counts = confusion(class_scores(images, weights), labels, ranks)
    assert counts.tolist() == [[0, 1, 0], [1, 0, 0], [0, 0, 1]]
    recalls = [one.recall or 0.0 for one in class_results(counts)]
    assert np.mean(recalls) == pytest.approx(class_recall(ranks, labels, 3))


def test_scores_are_cosines_whatever_the_length_of_the_features() -> None:
    scores = class_scores(np.array([[3.0, 4.0], [0.0, 0.0]]), np.eye(2))
    assert scores == pytest.approx(np.array([[0.6, 0.8], [0.0, 0.0]]))


def test_intervals_hold_the_figures_and_depend_on_the_seed_alone() -> None:
    generator = np.random.default_rng(1)
    labels, ranks = generator.integers(0, 6, 200), generator.integers(1, 7, 200)
    intervals = zero_shot_intervals(ranks, labels, 6, 200, 0)
    figures = zero_shot_figures(ranks, 6) | {"zero_shot_class_recall": class_recall(ranks, labels, 6)}
    assert set(intervals) == set(figures)
    for name, (low, high) in intervals.items():
        assert low < (figures[name] or 0.0) < high
    assert zero_shot_intervals(ranks, labels, 6, 200, 0) == intervals
    assert "zero_shot_top5" not in zero_shot_intervals(ranks, labels % 5, 5, 100, 0)
