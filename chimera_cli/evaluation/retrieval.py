"""Image-text retrieval: ranks with pessimistic ties, recalls, bootstrap intervals over images, and chance.

The protocol is the published one (LAION CLIP_benchmark, `image_retrieval_recall` and `text_retrieval_recall`): a
caption is found when its own image is among the k best images, an image when any of its own captions is among the k
best captions. Where scores are equal this module counts against the model, so that constant embeddings find nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from chimera_cli.errors import ChimeraError
from chimera_cli.figures import RECALLS

Floats = NDArray[np.floating]
Ints = NDArray[np.int64]

# Half the distance from 1.0 to the next float64: the relative error of one rounding.
_UNIT_ROUNDOFF = 2.0**-53
# Scores held at once, in float64: 32 MiB.
_BLOCK_SCORES = 1 << 22


@dataclass(frozen=True, slots=True)
class Ranks:
    """1-based ranks over the full gallery.

    `i2t` (images,): how far down all captions the best of an image's own stands; 0 where an image has none and so
    can't be a query. `t2i` (captions,): how far down all images the caption's own stands. `image_of_text` (captions,)
    is the position of each caption's image.
    """

    i2t: Ints
    t2i: Ints
    image_of_text: Ints

    @property
    def queries(self) -> Ints:
        """Return the positions of the images that have captions, ascending."""
        return np.flatnonzero(self.i2t)

    def captions_per_query(self) -> Ints:
        """Return the number of captions of each image in `queries`, at least 1."""
        return np.bincount(self.image_of_text, minlength=self.i2t.size)[self.queries]


def retrieval_ranks(
    image_features: Floats, text_features: Floats, image_of_text: Ints, block_scores: int = _BLOCK_SCORES
) -> Ranks:
    """Return the ranks of (images, dim) against (captions, dim) features by inner product, in both directions.

    A rank is 1 + the number of rivals with an equal or higher score; an image competes with its best own caption, and
    its other captions are no rivals. Two scores are equal when they differ by no more than the rounding of a float64
    inner product, 2 * dim * 2^-53 * |x| |y| (Higham, Accuracy and Stability of Numerical Algorithms, 3.1): matrix
    products sum in an order that depends on the place in the block, and equal embeddings must tie wherever they stand.
    At most `block_scores` scores are held at once. Raises ChimeraError for NaN or infinite features or nothing to rank,
    ValueError for shapes that don't fit.
    """
    images, texts = finite_features(image_features, "image"), finite_features(text_features, "text")
    owner = np.asarray(image_of_text, dtype=np.int64)
    if owner.shape != texts.shape[:1] or images.shape[1] != texts.shape[1]:
        raise ValueError(f"{images.shape} images, {texts.shape} captions and {owner.shape} owners don't fit together")
    if owner.min() < 0 or owner.max() >= len(images):
        raise ValueError(f"a caption belongs to an image outside the {len(images)} there are")
    text_bar, image_bar = _bars(images, texts, owner)
    rows = max(1, block_scores // len(texts))
    i2t = np.zeros(len(images), dtype=np.int64)
    t2i = np.ones(len(texts), dtype=np.int64)
    for start in range(0, len(images), rows):
        stop = min(start + rows, len(images))
        scores = images[start:stop] @ texts.T
        own = np.flatnonzero((owner >= start) & (owner < stop))
        scores[owner[own] - start, own] = -np.inf
        i2t[start:stop] = 1 + (scores >= image_bar[start:stop, None]).sum(axis=1)
        t2i += (scores >= text_bar).sum(axis=0)
    i2t[np.bincount(owner, minlength=len(images)) == 0] = 0
    return Ranks(i2t, t2i, owner)


def finite_features(features: Floats, what: str) -> NDArray[np.float64]:
    """Return (n, dim) features in float64. Raises ChimeraError where one is not finite or there is none."""
    array = np.asarray(features, dtype=np.float64)
    if array.ndim != 2:
        raise ValueError(f"{what} features have shape {array.shape}, not (n, dim)")
    if not len(array):
        raise ChimeraError(f"there are no {what} features to rank", "evaluate a split that has images with captions")
    bad = np.flatnonzero(~np.isfinite(array).all(axis=1))
    if bad.size:
        raise ChimeraError(
            f"{bad.size:,} of {len(array):,} {what} features are NaN or infinite, the first at position {bad[0]}",
            "the model diverged: train it again with a smaller learning rate or in float32",
        )
    return array


def _bars(
    images: NDArray[np.float64], texts: NDArray[np.float64], owner: Ints
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the score from which on a rival counts, for each caption (captions,) and for each image (images,)."""
    own = np.einsum("md,md->m", images[owner], texts)
    best = np.full(len(images), -np.inf)
    np.maximum.at(best, owner, own)
    slack = 2 * images.shape[1] * _UNIT_ROUNDOFF
    image_norms, text_norms = np.linalg.norm(images, axis=1), np.linalg.norm(texts, axis=1)
    return own - slack * text_norms * image_norms.max(), best - slack * image_norms * text_norms.max()


def retrieval_figures(ranks: Ranks) -> dict[str, float]:
    """Return the nine retrieval figures: recalls 0-1, median ranks from 1, `rsum` 0-6."""
    i2t = ranks.i2t[ranks.queries]
    figures = {f"i2t_r{k}": float((i2t <= k).mean()) for k in (1, 5, 10)}
    figures["i2t_medr"] = float(np.median(i2t))
    figures |= {f"t2i_r{k}": float((ranks.t2i <= k).mean()) for k in (1, 5, 10)}
    figures["t2i_medr"] = float(np.median(ranks.t2i))
    return figures | {"rsum": sum(figures[name] for name in RECALLS)}


def retrieval_intervals(ranks: Ranks, resamples: int = 1000, seed: int = 0) -> dict[str, tuple[float, float]]:
    """Return the 95 % percentile bootstrap interval (low, high) of each figure over query images.

    An image takes its captions along, because captions of one image are not independent. Ranks stay those of the full
    gallery. The draws are those of `statistics.bootstrap_interval` with the same seed.
    """
    queries = ranks.queries
    generator = np.random.default_rng(seed)
    draws = generator.integers(0, queries.size, size=(resamples, queries.size))
    flat = draws + np.arange(resamples)[:, None] * queries.size
    times = np.bincount(flat.ravel(), minlength=resamples * queries.size).reshape(resamples, queries.size)
    position = np.full(ranks.i2t.size, -1)
    position[queries] = np.arange(queries.size)
    samples = _resampled(ranks.i2t[queries], np.arange(queries.size), times, "i2t")
    samples |= _resampled(ranks.t2i, position[ranks.image_of_text], times, "t2i")
    samples["rsum"] = np.sum([samples[name] for name in RECALLS], axis=0)
    ends = {name: np.quantile(values, (0.025, 0.975)) for name, values in samples.items()}
    return {name: (float(low), float(high)) for name, (low, high) in ends.items()}


def _resampled(rank: Ints, query: Ints, times: Ints, direction: str) -> dict[str, NDArray[np.float64]]:
    """Return (resamples,) values of each figure of one direction.

    `rank` (n,) belongs to query image `query` (n,), which resample r draws `times[r]` times.
    """
    total = times @ np.bincount(query, minlength=times.shape[1])
    samples: dict[str, NDArray[np.float64]] = {}
    for k in (1, 5, 10):
        hits = np.bincount(query, weights=rank <= k, minlength=times.shape[1])
        samples[f"{direction}_r{k}"] = (times @ hits) / total
    order = np.argsort(rank, kind="stable")
    # One resample at a time: the (resamples, captions) matrix of weights would take 40 MB on Flickr8k and 200 on COCO.
    medians = [_weighted_median(rank[order], weights[query[order]]) for weights in times]
    return samples | {f"{direction}_medr": np.asarray(medians)}


def _weighted_median(ascending: Ints, weights: Ints) -> float:
    """Return the median of values that occur `weights` times each, as numpy.median of the repeated values would."""
    upto = np.cumsum(weights)
    middle = np.searchsorted(upto, ((upto[-1] - 1) // 2, upto[-1] // 2), side="right")
    return float(ascending[middle].mean())


def chance_figures(images: int, captions_per_image: Sequence[int] | Ints) -> dict[str, float]:
    """Return what a random ranking of `images` images is expected to score; images without captions are no queries.

    t2i: R@k = k / images. i2t: of all m captions, an image with c has none among the k best with the hypergeometric
    probability C(m - c, k) / C(m, k). Medians are those of the distributions of ranks.
    """
    counts = np.asarray([count for count in captions_per_image if count], dtype=np.int64)
    i2t, t2i = _found_at_random(counts), np.arange(1, images + 1) / images
    figures: dict[str, float] = {}
    for direction, found in (("i2t", i2t), ("t2i", t2i)):
        figures |= {f"{direction}_r{k}": float(found[min(k, found.size) - 1]) for k in (1, 5, 10)}
        figures[f"{direction}_medr"] = _median_rank(found)
    return figures | {"rsum": sum(figures[name] for name in RECALLS)}


def _found_at_random(counts: Ints) -> NDArray[np.float64]:
    """Return (captions,) the expected share of images found among the 1, 2, ... best captions of a random order.

    `counts` (images,) are the captions of each image, at least 1.
    """
    captions = int(counts.sum())
    before = np.arange(captions)
    found = np.zeros(captions)
    for count, times in zip(*np.unique(counts, return_counts=True), strict=True):
        # C(m - c, k) / C(m, k) as a running product: the next caption drawn is not one of the c either.
        missed = np.cumprod(np.clip(captions - count - before, 0, None) / (captions - before))
        found += times / counts.size * (1 - missed)
    return found


def _median_rank(found: NDArray[np.float64]) -> float:
    """Return the median of a distribution over ranks 1, 2, ... given the share that lies at or below each rank.

    Where exactly half does, the median is midway to the next rank, as for an even number of values.
    """
    lower, upper = np.searchsorted(found, (0.5 - 1e-12, 0.5 + 1e-12)) + 1
    return float(lower + upper) / 2
