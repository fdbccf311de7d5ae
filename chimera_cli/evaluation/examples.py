"""The queries that a model does worst and best, what it found instead, and how the ranks of all are spread."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from chimera_cli.evaluation.retrieval import Floats, Ints

# Queries whose scores against the whole gallery are held at once: 8 MB with 40,000 captions.
_PART = 50
# Upper ends of the groups of ranks; each tells more than the one before it, as recalls at 1, 5 and 10 do.
_EDGES = (1, 5, 10, 50, 100, 500, 1000)


@dataclass(frozen=True, slots=True)
class Example:
    """A query, the rank of its own item (1-based) and their similarity, and what stands before all else.

    `found` are (position in the gallery, cosine similarity) from the best down. `margin` is the own similarity less
    that of the best rival: positive where the query finds what it should.
    """

    query: int
    rank: int
    score: float
    margin: float
    found: tuple[tuple[int, float], ...]


def unit(features: Floats) -> NDArray[np.float64]:
    """Return features (n, dim) of length 1 in float64; a zero vector stays one."""
    exact = np.asarray(features, dtype=np.float64)
    norms = np.linalg.norm(exact, axis=1, keepdims=True)
    return exact / np.where(norms > 0, norms, 1.0)


def best_of(scores: Floats, count: int) -> list[tuple[int, float]]:
    """Return up to `count` (position, score) of scores (n,), best first; equal ones keep their order."""
    return [(place, float(scores[place])) for place in np.argsort(-scores, kind="stable")[:count].tolist()]


def examples(
    queries: Floats,
    gallery: Floats,
    owner_of_query: Ints,
    owner_of_item: Ints,
    ranks: Ints,
    rows: Sequence[int],
    found: int,
) -> list[Example]:
    """Return examples of the query rows (positions in `queries`), in their order.

    `queries` (q, dim) and `gallery` (n, dim) are unit features; a query's own items are those of the same image:
    `owner_of_query` (q,), `owner_of_item` (n,). `ranks` (q,) are those of `retrieval.retrieval_ranks`.
    """
    made = []
    for start in range(0, len(rows), _PART):
        part = np.asarray(rows[start : start + _PART], dtype=np.int64)
        for row, scores in zip(part.tolist(), queries[part] @ gallery.T, strict=True):
            own = owner_of_item == owner_of_query[row]
            score, rival = float(scores[own].max()), float(np.max(scores[~own], initial=-1.0))
            # Sorting takes most of the time, and margins alone need none.
            best = tuple(best_of(scores, found)) if found else ()
            made.append(Example(row, int(ranks[row]), score, score - rival, best))
    return made


def extremes(
    queries: Floats, gallery: Floats, owner_of_query: Ints, owner_of_item: Ints, ranks: Ints, count: int, found: int
) -> tuple[list[Example], list[Example]]:
    """Return the worst and the best examples, up to `count` of each, at most one of an image.

    Worst is the lowest rank, best the highest; among equal ranks the margin decides, then the order. Queries of rank 0
    (images without captions) are none. No query is in both lists: with few of them the lists are shorter.
    """
    asked = np.flatnonzero(ranks)
    margins = np.asarray(
        [one.margin for one in examples(queries, gallery, owner_of_query, owner_of_item, ranks, asked.tolist(), 0)]
    )
    order = asked[np.lexsort((margins, -ranks[asked]))]
    worst = _one_each(order, owner_of_query, count)
    best = _one_each(order[::-1], owner_of_query, count)
    images = np.unique(owner_of_query[asked]).size
    if len(worst) + len(best) > images:
        worst, best = worst[: images - images // 2], best[: images // 2]
    chosen = examples(queries, gallery, owner_of_query, owner_of_item, ranks, [*worst, *best], found)
    return chosen[: len(worst)], chosen[len(worst) :]


def _one_each(order: Ints, owners: Ints, count: int) -> list[int]:
    """Return the first `count` rows of `order` that belong to different images."""
    _, first = np.unique(owners[order], return_index=True)
    rows: list[int] = order[np.sort(first)[:count]].tolist()
    return rows


def rank_histogram(ranks: Ints, gallery: int) -> list[tuple[str, float]]:
    """Return (label, share 0-1 of the queries) for groups of ranks up to the size of the gallery; rank 0 is no query.

    The groups are 1, 2-5, 6-10, 11-50 and so on, each ten times as far as the one before the last.
    """
    asked = ranks[ranks > 0]
    ends = [end for end in _EDGES if end < gallery] + [max(gallery, 1)]
    groups = []
    for low, high in zip([1, *(end + 1 for end in ends[:-1])], ends, strict=True):
        label = f"{low:,}" if low == high else f"{low:,}–{high:,}"
        groups.append((label, float(((asked >= low) & (asked <= high)).mean())))
    return groups
