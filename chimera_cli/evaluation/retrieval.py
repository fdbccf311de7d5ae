"""Image-text retrieval: ranks with pessimistic ties, recalls, bootstrap intervals over images, and chance.

The protocol is the published one (LAION CLIP_benchmark, `image_retrieval_recall` and `text_retrieval_recall`): a
caption is found when its own image is among the k best images, an image when any of its own captions is among the k
best captions. Where scores are equal this module counts against the model, so that constant embeddings find nothing.
"""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

from chimera_cli.errors import ChimeraError
from chimera_cli.figures import RECALLS
from chimera_cli.runtime import cpu_cores

Floats = NDArray[np.floating]
Ints = NDArray[np.int64]

# Half the distance from 1.0 to the next number: the relative error of one rounding.
_ROUNDOFF_64, _ROUNDOFF_32 = 2.0**-53, 2.0**-24
# The smallest normal float32: what a product may lose at most where it underflows.
_TINY_32 = 2.0**-126
# A block of scores (2 MB) stays in the cache while it is compared. What counts is counted in single bytes, so that 255
# rows, and 255 times the eight bytes of a word in a row, are the most there may be.
BLOCK_ROWS, BLOCK_COLUMNS = 240, 255 * 8
_BLOCK_SCORES = BLOCK_ROWS * BLOCK_COLUMNS
# With fewer rows it costs more to hand a comparison to another thread than to make it.
_STRIP_ROWS = 16
# Rows converted to float64 at once.
_PART = 2048
# With more scores in doubt than this, a whole block in float64 is cheaper than pair by pair.
_PAIRS = 4096


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
    The products are taken in float32, twice as fast, and again in float64 where its rounding leaves a doubt. Products
    and comparisons use all cores (`threads`); at most `block_scores` scores are held at once. Raises ChimeraError for
    NaN or infinite features or nothing to rank, ValueError for shapes that don't fit.
    """
    images, texts = _scaled(finite_features(image_features, "image")), _scaled(finite_features(text_features, "text"))
    owner = np.asarray(image_of_text, dtype=np.int64)
    count, captions = len(images.values), len(texts.values)
    if owner.shape != (captions,) or images.values.shape[1] != texts.values.shape[1]:
        shapes = f"{images.values.shape} images, {texts.values.shape} captions and {owner.shape} owners"
        raise ValueError(f"{shapes} don't fit together")
    if owner.min() < 0 or owner.max() >= count:
        raise ValueError(f"a caption belongs to an image outside the {count} there are")
    width = min(captions, BLOCK_COLUMNS, max(1, block_scores))
    i2t, t2i = np.ones(count, dtype=np.int64), np.ones(captions, dtype=np.int64)
    cores = threads()
    with ThreadPoolExecutor(cores) as pool:
        image_bar, text_bar = _bars(images, texts, owner, pool)
        for rows in _spans(count, max(1, min(BLOCK_ROWS, block_scores // width))):
            for columns in _spans(captions, width):
                strips = _block(images, texts, owner, rows, columns).strips(cores)
                # The product takes all cores by itself, and a comparison one: of its own rows.
                for strip, found in zip(strips, pool.map(partial(_compare, image_bar, text_bar), strips), strict=True):
                    i2t[strip.rows] += found[0]
                    t2i[columns] += found[1]
    i2t[np.bincount(owner, minlength=count) == 0] = 0
    return Ranks(i2t, t2i, owner)


def threads() -> int:
    """Return on how many cores ranks are computed: those of the process, or fewer where the environment says so.

    The same variables keep the matrix product to fewer.
    """
    limits = [os.environ.get(name, "") for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS")]
    return max(1, min([cpu_cores(), *(int(limit) for limit in limits if limit.isdecimal())]))


def finite_features(features: Floats, what: str) -> NDArray[np.float32] | NDArray[np.float64]:
    """Return (n, dim) features in float32 or float64. Raises ChimeraError where one is not finite or there is none."""
    array = np.asarray(features)
    array = array.astype(np.float32 if array.dtype in (np.float16, np.float32) else np.float64, copy=False)
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


# ---- rivals ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Scaled:
    """Features (n, dim) times `scale`, a power of two that brings them near 1: `single` in float32."""

    values: Floats
    scale: float
    single: NDArray[np.float32]

    def exact(self, rows: slice | Ints) -> NDArray[np.float64]:
        """Return some of the scaled features without any rounding."""
        return self.values[rows].astype(np.float64) * self.scale


@dataclass(frozen=True, slots=True)
class _Bar:
    """From which score (n,) on a rival counts: `exact` in float64; in float32 it `surely` or `maybe` does."""

    exact: NDArray[np.float64]
    surely: NDArray[np.float32]
    maybe: NDArray[np.float32]

    def part(self, span: slice) -> "_Bar":
        return _Bar(self.exact[span], self.surely[span], self.maybe[span])


@dataclass(frozen=True, slots=True)
class _Block:
    """Scores (rows, columns) of some images and captions, -inf for own pairs; the features are there to ask again."""

    scores: NDArray[np.float32]
    images: _Scaled
    texts: _Scaled
    rows: slice
    columns: slice

    def strips(self, count: int) -> list["_Block"]:
        """Return the block cut into as many parts of its rows; fewer where that would leave them a handful each."""
        height, top = len(self.scores), self.rows.start
        return [
            replace(self, scores=self.scores[rows], rows=slice(top + rows.start, top + rows.stop))
            for rows in _spans(height, max(_STRIP_ROWS, -(-height // count)))
        ]


def _spans(count: int, size: int) -> Iterator[slice]:
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


def _scaled(features: Floats) -> _Scaled:
    """Return features whose inner products neither overflow nor vanish in float32."""
    largest = float(np.abs(features).max(initial=0.0))
    # The scale itself must be a number of the type: short of its ends by as much as a norm and a sum can need.
    limit = 120 if features.dtype == np.float32 else 1000
    scale = 2.0 ** -int(np.clip(np.frexp(largest)[1], -limit, limit))
    return _Scaled(features, scale, (features * features.dtype.type(scale)).astype(np.float32, copy=False))


def _bars(images: _Scaled, texts: _Scaled, owner: Ints, pool: Executor) -> tuple[_Bar, _Bar]:
    """Return the bars of the images (images,) and of the captions (captions,)."""

    def of_captions(part: slice) -> NDArray[np.float64]:
        exact = texts.exact(part)
        return np.stack([np.einsum("md,md->m", images.exact(owner[part]), exact), np.linalg.norm(exact, axis=1)])

    own, text_norms = np.concatenate(list(pool.map(of_captions, _spans(len(owner), _PART))), axis=1)
    parts = pool.map(lambda part: np.linalg.norm(images.exact(part), axis=1), _spans(len(images.values), _PART))
    image_norms, dim = np.concatenate(list(parts)), images.values.shape[1]
    best = np.full(len(images.values), -np.inf)
    np.maximum.at(best, owner, own)
    return _bar(best, image_norms * text_norms.max(), dim), _bar(own, text_norms * image_norms.max(), dim)


def _bar(own: NDArray[np.float64], reach: NDArray[np.float64], dim: int) -> _Bar:
    """Return the bar below own scores (n,); `reach` (n,) is |x| |y| at most.

    A float32 product of rounded features is off by n u / (1 - n u) |x| |y| at most, whatever the order of its sum, with
    n = dim for the sum and 8 more for features and bar (Higham, 3.1), besides what underflows.
    """
    bar = own - 2 * dim * _ROUNDOFF_64 * reach
    steps = (dim + 8) * _ROUNDOFF_32
    doubt = steps / (1 - steps) * reach + 4 * dim * _TINY_32
    return _Bar(bar, (bar + doubt).astype(np.float32), (bar - doubt).astype(np.float32))


def _block(images: _Scaled, texts: _Scaled, owner: Ints, rows: slice, columns: slice) -> _Block:
    scores = images.single[rows] @ texts.single[columns].T
    owners = owner[columns]
    own = np.flatnonzero((owners >= rows.start) & (owners < rows.stop))
    scores[owners[own] - rows.start, own] = -np.inf
    return _Block(scores, images, texts, rows, columns)


def _compare(image_bar: _Bar, text_bar: _Bar, block: _Block) -> tuple[Ints, Ints]:
    """Return the rivals that a block has of each of its images (rows,) and of each of its captions (columns,)."""
    return _rivals(block, image_bar.part(block.rows), 1), _rivals(block, text_bar.part(block.columns), 0)


def _rivals(block: _Block, bar: _Bar, axis: int) -> Ints:
    """Return the number of rivals in a block: of each image (rows,) with axis 1, of each caption (columns,) with 0."""
    maybe = _count(block.scores >= np.expand_dims(bar.maybe, axis), axis)
    surely = _count(block.scores >= np.expand_dims(bar.surely, axis), axis)
    lines = np.flatnonzero(maybe != surely)
    if lines.size:
        surely[lines] += _settle(block, bar, axis, lines)
    return surely


def _count(found: NDArray[np.bool_], axis: int) -> Ints:
    """Return how many are true along an axis: ten times as fast as `found.sum(axis)`, which widens each byte first."""
    if axis == 0:
        counts: Ints = np.add.reduce(found.view(np.uint8), axis=0, dtype=np.uint8).astype(np.int64)
        return counts
    rows, columns = found.shape
    if columns % 8:
        return np.asarray(found.sum(axis=1))
    # Eight bytes are added as one word; up to 255 of them none runs over into its neighbour.
    words = np.add.reduce(found.view(np.uint64), axis=1)
    return np.asarray(words.view(np.uint8).reshape(rows, 8).sum(axis=1, dtype=np.int64))


def _settle(block: _Block, bar: _Bar, axis: int, lines: Ints) -> Ints:
    """Return for some rows or columns of a block how many of the scores in doubt do count, asked in float64."""
    scores = np.take(block.scores, lines, axis=1 - axis)
    maybe, surely = np.expand_dims(bar.maybe[lines], axis), np.expand_dims(bar.surely[lines], axis)
    doubtful = (scores >= maybe) & (scores < surely)
    row, column = np.nonzero(doubtful)
    place = lines[row if axis else column]
    if len(row) > _PAIRS:
        products = np.take(block.images.exact(block.rows) @ block.texts.exact(block.columns).T, lines, axis=1 - axis)
        found: Ints = np.count_nonzero(doubtful & (products >= np.expand_dims(bar.exact[lines], axis)), axis=axis)
        return found
    image = block.images.exact(block.rows.start + (place if axis else row))
    text = block.texts.exact(block.columns.start + (column if axis else place))
    counts = np.einsum("pd,pd->p", image, text) >= bar.exact[place]
    return np.bincount(row if axis else column, weights=counts, minlength=lines.size).astype(np.int64)


def retrieval_figures(ranks: Ranks) -> dict[str, float]:
    """Return the nine retrieval figures: recalls 0-1, median ranks from 1, `rsum` 0-6."""
    i2t = ranks.i2t[ranks.queries]
    figures = {f"i2t_r{k}": float((i2t <= k).mean()) for k in (1, 5, 10)}
    figures["i2t_medr"] = float(np.median(i2t))
    figures |= {f"t2i_r{k}": float((ranks.t2i <= k).mean()) for k in (1, 5, 10)}
    figures["t2i_medr"] = float(np.median(ranks.t2i))
    return figures | {"rsum": sum(figures[name] for name in RECALLS)}


def hits_by_image(ranks: Ranks) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return what each query image adds to the six `figures.RECALLS`, and its weight, both (6, queries).

    A recall is the sum of hits over the sum of weights: for i2t an image found (0 or 1) of one image, for t2i its
    captions found of its captions.
    """
    queries, captions = ranks.queries, ranks.captions_per_query()
    hits: list[NDArray[np.float64]] = []
    sizes: list[NDArray[np.float64]] = []
    for name in RECALLS:
        direction, _, k = name.partition("_r")
        if direction == "i2t":
            hits.append((ranks.i2t[queries] <= int(k)).astype(np.float64))
            sizes.append(np.ones(queries.size))
        else:
            found = np.bincount(ranks.image_of_text, weights=ranks.t2i <= int(k), minlength=ranks.i2t.size)
            hits.append(found[queries].astype(np.float64))
            sizes.append(captions.astype(np.float64))
    return np.stack(hits), np.stack(sizes)


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
