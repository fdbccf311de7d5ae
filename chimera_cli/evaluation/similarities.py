"""How similar images are to captions of their own and to others': two histograms on one axis."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from chimera_cli.evaluation.retrieval import Floats, Ints, finite_features

BINS = 100
UNMATCHED_PAIRS = 100_000
_PART = 8192


def similarity_histogram(
    image_features: Floats, text_features: Floats, image_of_text: Ints, unmatched_pairs: int = UNMATCHED_PAIRS
) -> dict[str, Any]:
    """Return counts of cosine similarities in equal bins from -1 to 1 (the last one closed), as JSON takes them.

    `edges` (bins + 1,), `matched` (bins,): every caption with its image, `unmatched` (bins,): captions drawn with seed
    0, each with another image drawn evenly; none where there is one image alone. The features need no normalisation;
    a zero vector has similarity 0. Raises ChimeraError for features that are not finite.
    """
    images, texts = finite_features(image_features, "image"), finite_features(text_features, "text")
    owner = np.asarray(image_of_text, dtype=np.int64)
    generator = np.random.default_rng(0)
    drawn = generator.integers(0, len(texts), size=unmatched_pairs if len(images) > 1 else 0)
    # A step of 1 to n - 1 images around the ring leads to every other image, never back.
    other = (owner[drawn] + generator.integers(1, max(len(images), 2), size=drawn.size)) % len(images)
    edges = np.linspace(-1, 1, BINS + 1).round(9)
    matched = _counts(images, owner, texts, np.arange(len(texts)), edges)
    unmatched = _counts(images, other, texts, drawn, edges)
    return {"edges": edges.tolist(), "matched": matched.tolist(), "unmatched": unmatched.tolist()}


def _counts(images: Floats, image: Ints, texts: Floats, text: Ints, edges: NDArray[np.float64]) -> Ints:
    """Return how many of the pairs of `image` (pairs,) and `text` (pairs,) fall into each bin; a part at a time."""
    counts = np.zeros(edges.size - 1, dtype=np.int64)
    for start in range(0, len(image), _PART):
        x, y = _unit(images[image[start : start + _PART]]), _unit(texts[text[start : start + _PART]])
        # Rounding may carry a cosine past 1, where no bin would take it.
        cosines = np.clip(np.einsum("pd,pd->p", x, y), -1, 1)
        counts += np.histogram(cosines, edges)[0]
    return counts


def _unit(vectors: Floats) -> NDArray[np.float64]:
    exact = vectors.astype(np.float64)
    norms = np.linalg.norm(exact, axis=1, keepdims=True)
    return exact / np.where(norms > 0, norms, 1.0)
