"""Closed-form CCA: against a generalised eigenproblem, on cases with a known answer, and where data is poor."""

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import linalg

from chimera_cli.errors import ChimeraError
from chimera_cli.evaluation.cca import Grid, Pairs, embed, fit, moments, project, spread_out, tune
from chimera_cli.evaluation.retrieval import retrieval_figures, retrieval_ranks

SMALL = Grid(image_ridges=(0.01, 1.0), text_ridges=(0.01, 1.0), dims=(2, 4), powers=(1.0, 4.0))


def make_pairs(
    images: int, per_image: int = 5, width: int = 12, text_width: int = 8, noise: float = 0.3, seed: int = 0
) -> Pairs:
    """Return images and captions that share 4 hidden causes."""
    draw = np.random.default_rng(seed)
    # The same view of the causes for every split.
    views = np.random.default_rng(99)
    to_image, to_text = views.normal(size=(4, width)), views.normal(size=(4, text_width))
    causes = draw.normal(size=(images, 4))
    owner = np.repeat(np.arange(images), per_image)
    texts = causes[owner] @ to_text + noise * draw.normal(size=(images * per_image, text_width))
    return Pairs(causes @ to_image + noise * draw.normal(size=(images, width)), texts, owner)


def figures(pairs: Pairs) -> dict[str, float]:
    return retrieval_figures(retrieval_ranks(pairs.images, pairs.texts, pairs.image_of_text))


def test_correlations_and_directions_are_those_of_the_generalised_eigenproblem() -> None:
    pairs = make_pairs(80, per_image=3)
    cca = fit(moments(pairs), image_ridge=0.2, text_ridge=0.5)
    means = np.stack([pairs.texts[pairs.image_of_text == i].mean(axis=0) for i in range(80)])
    together = np.cov(np.hstack([pairs.images, means]).T, bias=True)
    images, texts, cross = together[:12, :12], together[12:, 12:], together[:12, 12:]
    images += 0.2 * np.trace(images) / 12 * np.eye(12)
    texts += 0.5 * np.trace(texts) / 8 * np.eye(8)
    left = np.block([[np.zeros((12, 12)), cross], [cross.T, np.zeros((8, 8))]])
    values, vectors = linalg.eigh(left, linalg.block_diag(images, texts))
    np.testing.assert_allclose(cca.correlations, values[::-1][:8], rtol=1e-9)
    for place in range(4):
        theirs = vectors[:12, -1 - place]
        ours = cca.image_directions[:, place]
        # An eigenvector of both sides together has half its length on each; its sign is arbitrary.
        np.testing.assert_allclose(np.abs(ours), np.abs(theirs) * np.sqrt(2), rtol=1e-7, atol=1e-9)
    np.testing.assert_allclose(cca.image_directions.T @ images @ cca.image_directions, np.eye(8), atol=1e-9)
    np.testing.assert_allclose(cca.text_directions.T @ texts @ cca.text_directions, np.eye(8), atol=1e-9)


def test_one_dimension_by_hand() -> None:
    pairs = Pairs(np.array([[-1.0], [0.0], [1.0]]), np.array([[-2.0], [1.0], [1.0]]), np.arange(3))
    known = moments(pairs)
    # Covariances 2/3, 2 and 1: the correlation is 1 / sqrt(4/3); a ridge of 1 doubles both variances.
    assert (known.images.item(), known.texts.item(), known.cross.item()) == pytest.approx((2 / 3, 2, 1))
    assert fit(known, 0, 0).correlations == pytest.approx([np.sqrt(3) / 2])
    assert fit(known, 1, 1).correlations == pytest.approx([np.sqrt(3) / 4])
    found = embed(fit(known, 0, 0), project(fit(known, 0, 0), pairs), 1, 4)
    # The image in the middle is at the mean: no direction, the zero vector.
    assert np.abs(found.images).tolist() == [[1.0], [0.0], [1.0]]


def test_captions_that_are_a_rotation_of_their_image_are_all_found() -> None:
    draw = np.random.default_rng(3)
    turn = np.linalg.qr(draw.normal(size=(6, 6)))[0]
    train, dev = (draw.normal(size=(count, 6)) for count in (200, 50))
    grid = Grid(SMALL.image_ridges, SMALL.text_ridges, (6,), SMALL.powers)
    tuned = tune(Pairs(train, train @ turn + 7, np.arange(200)), Pairs(dev, dev @ turn + 7, np.arange(50)), grid)
    assert tuned.rsum == 6.0
    assert tuned.tries == 2 * 2 * 2


def test_directions_count_by_a_power_of_their_correlation() -> None:
    pairs = make_pairs(60)
    cca = fit(moments(pairs), 0.1, 0.1)
    projected = project(cca, pairs)
    found = embed(cca, projected, 3, 4.0)
    expected = projected.images[:, :3] * cca.correlations[:3] ** 4
    np.testing.assert_allclose(found.images, expected / np.linalg.norm(expected, axis=1, keepdims=True))
    assert found.texts.shape == (300, 3)


def test_settings_are_the_best_on_dev_and_only_dev_decides() -> None:
    train, dev, other = make_pairs(60, seed=1), make_pairs(40, seed=2), make_pairs(40, seed=3, noise=3.0)
    tuned = tune(train, dev, SMALL)
    known = moments(train)
    tried = {}
    for one in SMALL.image_ridges:
        for two in SMALL.text_ridges:
            for power in SMALL.powers:
                cca = fit(known, one, two)
                tried[one, two, power] = figures(embed(cca, project(cca, dev), 4, power))["rsum"]
    best = (tuned.settings.image_ridge, tuned.settings.text_ridge, tuned.settings.power)
    assert tuned.tries == 2 * 2 * 2 + 1
    assert tried[best] == max(tried.values()) <= tuned.rsum
    used = embed(tuned.cca, project(tuned.cca, dev), tuned.settings.dim, tuned.settings.power)
    assert figures(used)["rsum"] == tuned.rsum
    # Again the same to the bit; another dev split leaves what was learned from train as it is.
    again = tune(train, dev, SMALL)
    assert again.settings == tuned.settings
    assert np.array_equal(again.cca.image_directions, tuned.cca.image_directions)
    assert np.array_equal(tune(train, other, SMALL).cca.image_mean, tuned.cca.image_mean)


@pytest.mark.parametrize(
    ("images", "per_image", "width"), [(6, 1, 40), (2, 1, 12), (60, 1, 12)], ids=["few", "two", "one caption each"]
)
def test_fewer_images_than_features_and_one_caption_each_are_no_trouble(
    images: int, per_image: int, width: int
) -> None:
    train = make_pairs(images, per_image, width)
    tuned = tune(train, make_pairs(20, per_image, width, seed=5), SMALL)
    assert np.isfinite(tuned.cca.image_directions).all()
    assert (tuned.cca.correlations <= 1).all()
    # n centred images span n - 1 directions at most.
    assert len(tuned.cca.correlations) <= images - 1
    assert tuned.images_learned == images


def test_constant_and_doubled_features_change_nothing_that_counts() -> None:
    train, dev = make_pairs(60), make_pairs(30, seed=4)

    def poorer(pairs: Pairs) -> Pairs:
        constant = np.full((len(pairs.images), 1), 0.1)
        return Pairs(np.hstack([pairs.images, pairs.images, constant]), pairs.texts, pairs.image_of_text)

    plain, padded = (tune(a, b, SMALL) for a, b in ((train, dev), (poorer(train), poorer(dev))))
    assert np.isfinite(padded.cca.image_directions).all()
    assert padded.rsum == pytest.approx(plain.rsum, abs=0.3)


def test_images_without_captions_are_left_out_and_order_does_not_matter() -> None:
    pairs = make_pairs(40, per_image=2)
    extra = Pairs(np.vstack([pairs.images, 1e6 * np.ones((1, 12))]), pairs.texts, pairs.image_of_text)
    order = np.random.default_rng(0).permutation(80)
    mixed = Pairs(extra.images, pairs.texts[order], pairs.image_of_text[order])
    plain, shuffled = moments(pairs), moments(mixed)
    assert shuffled.images_learned == 40
    np.testing.assert_allclose(shuffled.cross, plain.cross)
    np.testing.assert_allclose(shuffled.texts, plain.texts)


def nothing_in_common() -> Pairs:
    cross = np.array([[1.0], [1.0], [-1.0], [-1.0]]), np.array([[1.0], [-1.0], [1.0], [-1.0]])
    return Pairs(*cross, np.arange(4))


@pytest.mark.parametrize(
    ("pairs", "words"),
    [
        (Pairs(np.full((5, 3), 0.1, dtype=np.float32), np.eye(5), np.arange(5)), "all images"),
        (Pairs(np.eye(5), np.full((5, 3), 0.1), np.arange(5)), "all captions"),
        (Pairs(np.eye(1), np.eye(1), np.arange(1)), "all images"),
        (Pairs(np.array([[np.nan], [1.0]]), np.eye(2), np.arange(2)), "NaN or infinite"),
        (nothing_in_common(), "tell nothing"),
    ],
    ids=["same images", "same captions", "one pair", "not finite", "unrelated"],
)
def test_what_can_not_be_learned_from_is_one_sentence(pairs: Pairs, words: str) -> None:
    with pytest.raises(ChimeraError, match=words):
        tune(pairs, pairs, SMALL)


def test_the_signed_root_keeps_order_and_sign() -> None:
    values: NDArray[np.float32] = np.array([[-4.0, 0.0, 9.0]], dtype=np.float32)
    assert spread_out(values).tolist() == [[-2.0, 0.0, 3.0]]
