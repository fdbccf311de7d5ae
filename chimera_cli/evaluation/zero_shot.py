"""Zero-shot classification: an image belongs to the class whose prompts lie nearest (Radford et al. 2021, 3.1.4)."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from chimera_cli.evaluation.retrieval import finite_features, retrieval_ranks

Floats = NDArray[np.floating]
Ints = NDArray[np.int64]

# Prompts for words of any kind: a thing ("dog"), an adjective or a colour ("red") reads tolerably in each.
TEMPLATES = ("{}", "a {}", "a photo of a {}", "a picture of something {}", "an image that shows {}")


def prompts(classes: Sequence[str], templates: Sequence[str] = TEMPLATES) -> list[str]:
    """Return every class name in every template, class by class: (classes * templates) texts."""
    return [template.format(name) for name in classes for template in templates]


def class_weights(prompt_features: Floats, classes: int) -> NDArray[np.float64]:
    """Return (classes, dim) unit vectors: the mean of each class's normalised prompt features, normalised again.

    `prompt_features` (classes * templates, dim) are ordered as `prompts` gives them. A class whose prompts cancel out
    keeps the zero vector.
    """
    features = np.asarray(prompt_features, dtype=np.float64).reshape(classes, -1, prompt_features.shape[1])
    mean = _normalised(features).mean(axis=1)
    return _normalised(mean)


def _normalised(vectors: NDArray[np.float64]) -> NDArray[np.float64]:
    norms = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return vectors / np.where(norms > 0, norms, 1.0)


def class_ranks(image_features: Floats, weights: Floats, labels: Ints) -> Ints:
    """Return (images,) the 1-based rank of each image's own class; equal scores count against the model.

    Ranking the classes for an image is ranking a gallery of classes for a query: the images stand where captions do.
    """
    return retrieval_ranks(weights, finite_features(image_features, "image"), labels).t2i


def zero_shot_figures(ranks: Ints, classes: int) -> dict[str, float | None]:
    """Return top-1 and top-5 accuracy, 0-1; top-5 is None with five classes or fewer, where it can't miss."""
    return {
        "zero_shot_top1": float((ranks <= 1).mean()),
        "zero_shot_top5": float((ranks <= 5).mean()) if classes > 5 else None,
    }
