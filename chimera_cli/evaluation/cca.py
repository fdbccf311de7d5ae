"""Canonical correlation analysis in closed form: the baseline that a learned model of the same features has to beat.

Regularised CCA (Hardoon, Szedmak and Shawe-Taylor 2004, Neural Computation 16(12)) of image and caption features, its
directions weighted by a power of their correlations and compared by cosine (Gong, Ke, Isard and Lazebnik 2014, IJCV
106(2)). It learns from one split, is tuned on another, and draws nothing at random.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product

import numpy as np
from numpy.typing import NDArray

from chimera_cli.errors import ChimeraError
from chimera_cli.evaluation.retrieval import finite_features, retrieval_figures, retrieval_ranks

Floats = NDArray[np.float64]
Features = NDArray[np.floating]
Ints = NDArray[np.int64]

# A canonical correlation below it is rounding: its direction is arbitrary.
_NOTHING = 1e-9


@dataclass(frozen=True, slots=True)
class Pairs:
    """Features of one split: images (n, p), captions (m, q), and the position (m,) of each caption's image."""

    images: Features
    texts: Features
    image_of_text: Ints


@dataclass(frozen=True, slots=True)
class Moments:
    """Means (p,), (q,) and covariances (p, p), (q, q), (p, q) of images and the means of their captions.

    `images_learned` is how many images had captions to learn from.
    """

    image_mean: Floats
    text_mean: Floats
    images: Floats
    texts: Floats
    cross: Floats
    images_learned: int


@dataclass(frozen=True, slots=True)
class Settings:
    """One try: ridges relative to the mean variance of a feature, how many directions, the power of correlations."""

    image_ridge: float
    text_ridge: float
    dim: int
    power: float


@dataclass(frozen=True, slots=True)
class Grid:
    """What is tried of each setting; a `dim` beyond the width of the features means all directions."""

    image_ridges: tuple[float, ...] = (0.1, 0.3, 1.0, 3.0)
    text_ridges: tuple[float, ...] = (0.1, 0.3, 1.0)
    dims: tuple[int, ...] = (64, 128, 256, 512)
    powers: tuple[float, ...] = (0.5, 0.75, 1.0, 2.0, 4.0)


@dataclass(frozen=True, slots=True)
class Cca:
    """A fitted analysis: means, directions (p, r), (q, r) and their correlations (r,), 0-1, the highest first."""

    image_mean: Floats
    text_mean: Floats
    image_directions: Floats
    text_directions: Floats
    correlations: Floats


@dataclass(frozen=True, slots=True)
class Tuned:
    """The analysis of `images_learned` images that did best on the tuning split, and with which of so many settings.

    `rsum` (0-6) is what it reached there.
    """

    cca: Cca
    settings: Settings
    rsum: float
    tries: int
    images_learned: int


# ---- learning -------------------------------------------------------------------------------------------------------


def spread_out(features: Features) -> Floats:
    """Return the signed square root of each feature: few large activations no longer outweigh the many small ones.

    Source: Perronnin, Sanchez and Mensink 2010, Improving the Fisher Kernel, section 3.2. Pooled activations of a
    convolutional tower are as skewed as the counts it was made for.
    """
    values = np.asarray(features, dtype=np.float64)
    rooted: Floats = np.sign(values) * np.sqrt(np.abs(values))
    return rooted


def moments(pairs: Pairs) -> Moments:
    """Return the moments of images and the means of their captions; images without captions are left out.

    Raises ChimeraError for NaN or infinite features, and where all images or all captions are the same.
    """
    images = finite_features(pairs.images, "image").astype(np.float64)
    texts = finite_features(pairs.texts, "caption").astype(np.float64)
    order = np.argsort(pairs.image_of_text, kind="stable")
    known, starts, times = np.unique(pairs.image_of_text[order], return_index=True, return_counts=True)
    images, texts = images[known], np.add.reduceat(texts[order], starts, axis=0) / times[:, None]
    image_mean, text_mean = images.mean(axis=0), texts.mean(axis=0)
    for what, values, mean in (("images", images, image_mean), ("captions", texts, text_mean)):
        # What rounding leaves of features that are all equal is no difference.
        if np.abs(values - mean).max() <= 1e-12 * np.abs(values).max():
            raise ChimeraError(
                f"all {what} to learn the baseline from have the same features",
                "prepare a pack of different images with different captions",
            )
    images, texts, learned = images - image_mean, texts - text_mean, len(images)
    covariances = (images.T @ images / learned, texts.T @ texts / learned, images.T @ texts / learned)
    return Moments(image_mean, text_mean, *covariances, learned)


def fit(known: Moments, image_ridge: float, text_ridge: float) -> Cca:
    """Return the analysis of covariances with `ridge` times the mean variance of a feature added to their diagonals.

    With C = L L' the whitened features are L^-1 x; the singular vectors of their cross-covariance are the directions,
    its singular values the correlations. Raises ChimeraError where images and captions have nothing in common.
    """
    image_root, text_root = _root(known.images, image_ridge), _root(known.texts, text_ridge)
    half = np.linalg.solve(image_root, known.cross)
    left, correlations, right = np.linalg.svd(np.linalg.solve(text_root, half.T).T, full_matrices=False)
    rank = int((correlations > _NOTHING).sum())
    if not rank:
        raise ChimeraError(
            "the image features tell nothing of the captions, not even in the pairs to learn from",
            "check that the pack pairs images with their own captions",
        )
    return Cca(
        known.image_mean,
        known.text_mean,
        np.linalg.solve(image_root.T, left[:, :rank]),
        np.linalg.solve(text_root.T, right[:rank].T),
        correlations[:rank],
    )


def _root(covariance: Floats, ridge: float) -> Floats:
    """Return the lower Cholesky factor of a covariance with its ridge."""
    variance = np.trace(covariance) / len(covariance)
    root: Floats = np.linalg.cholesky(covariance + ridge * variance * np.eye(len(covariance)))
    return root


# ---- use ------------------------------------------------------------------------------------------------------------


def project(cca: Cca, pairs: Pairs) -> Pairs:
    """Return images (n, r) and captions (m, r) along the directions. Raises ChimeraError where one is not finite."""
    images = (finite_features(pairs.images, "image") - cca.image_mean) @ cca.image_directions
    texts = (finite_features(pairs.texts, "caption") - cca.text_mean) @ cca.text_directions
    return Pairs(images, texts, pairs.image_of_text)


def embed(cca: Cca, projected: Pairs, dim: int, power: float) -> Pairs:
    """Return embeddings (n, min(dim, r)) and (m, min(dim, r)), L2-normalised: each direction counts by its correlation.

    What lies at the mean keeps the zero vector, which finds nothing.
    """
    weights = cca.correlations[:dim] ** power
    images, texts = (_normalised(values[:, :dim] * weights) for values in (projected.images, projected.texts))
    return Pairs(images, texts, projected.image_of_text)


def _normalised(vectors: Floats) -> Floats:
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    unit: Floats = vectors / np.where(norms > 0, norms, 1.0)
    return unit


# ---- tuning ---------------------------------------------------------------------------------------------------------


def tune(
    train: Pairs, dev: Pairs, grid: Grid = Grid(), tell: Callable[[int, int], object] = lambda _done, _total: None
) -> Tuned:
    """Return the analysis of `train` by the settings with the highest `rsum` on `dev`; of equals the first tried.

    Ridges and powers are tried with as many directions as there may be, and fewer directions with the best of them.
    `tell` hears how many were tried of how many. Raises ChimeraError as `moments` and `fit` do.
    """
    known = moments(train)
    width = min(known.cross.shape)
    dims = tuple(dict.fromkeys(min(dim, width) for dim in grid.dims))
    # All directions with the best ridges and power were tried before.
    total = len(grid.image_ridges) * len(grid.text_ridges) * len(grid.powers) + len(dims) - 1
    fitted: dict[tuple[float, float], tuple[Cca, Pairs]] = {}
    tried: dict[Settings, float] = {}

    def rsum(settings: Settings) -> float:
        ridges = settings.image_ridge, settings.text_ridge
        if ridges not in fitted:
            # One at a time: what a split of COCO is projected to takes as much memory as its features.
            fitted.clear()
            cca = fit(known, *ridges)
            fitted[ridges] = cca, project(cca, dev)
        if settings not in tried:
            found = embed(*fitted[ridges], settings.dim, settings.power)
            ranks = retrieval_ranks(found.images, found.texts, found.image_of_text)
            tried[settings] = retrieval_figures(ranks)["rsum"]
            tell(len(tried), total)
        return tried[settings]

    points = product(grid.image_ridges, grid.text_ridges, grid.powers)
    best = max((Settings(one, other, max(dims), power) for one, other, power in points), key=rsum)
    best = max((replace(best, dim=dim) for dim in dims), key=rsum)
    return Tuned(fit(known, best.image_ridge, best.text_ridge), best, tried[best], len(tried), known.images_learned)
