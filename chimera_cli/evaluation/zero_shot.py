"""Zero-shot classification: an image belongs to the class whose prompts lie nearest (Radford et al. 2021, 3.1.4)."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from chimera_cli.evaluation.retrieval import finite_features, retrieval_ranks
from chimera_cli.statistics import bootstrap_interval

Floats = NDArray[np.floating]
Ints = NDArray[np.int64]

# Prompts for words of any kind: a thing ("dog"), an adjective or a colour ("red") reads tolerably in each.
TEMPLATES = ("{}", "a {}", "a photo of a {}", "a picture of something {}", "an image that shows {}")


def prompts(classes: Sequence[str], templates: Sequence[str] = TEMPLATES) -> list[str]:
    """Return every class name in the place of `{}` in every template, class by class: (classes * templates) texts."""
    # Not str.format, to which other braces in a template would mean something.
    return [template.replace("{}", name) for name in classes for template in templates]


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


# ---- class by class -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ClassResult:
    """One class: its images, the share of them it is given to (None without any), and what it is mistaken for most.

    `mistaken_for` is the number of a class, None where every image is given to its own; `mistaken_share` is the share
    0-1 of its images that this class takes.
    """

    images: int
    recall: float | None
    mistaken_for: int | None
    mistaken_share: float | None


def class_scores(image_features: Floats, weights: Floats) -> NDArray[np.float64]:
    """Return the cosine similarity (images, classes) of images (images, dim) to unit class weights (classes, dim)."""
    exact = np.asarray(finite_features(image_features, "image"), dtype=np.float64)
    scores: NDArray[np.float64] = _normalised(exact) @ np.asarray(weights, dtype=np.float64).T
    return scores


def class_recall(ranks: Ints, labels: Ints, classes: int) -> float:
    """Return the mean over classes of the share of their images that are given to them, classes without images aside.

    Unlike accuracy it does not let a frequent class speak for all. Also called balanced accuracy.
    """
    images = np.bincount(labels, minlength=classes)
    found = np.bincount(labels, weights=ranks <= 1, minlength=classes)
    return float((found[images > 0] / images[images > 0]).mean())


def zero_shot_intervals(
    ranks: Ints, labels: Ints, classes: int, resamples: int, seed: int
) -> dict[str, tuple[float, float]]:
    """Return the 95 % bootstrap interval (low, high) over images of each figure that there is with so many classes."""
    statistics = {
        "zero_shot_top1": lambda rows: float((ranks[rows] <= 1).mean()),
        "zero_shot_top5": lambda rows: float((ranks[rows] <= 5).mean()),
        "zero_shot_class_recall": lambda rows: class_recall(ranks[rows], labels[rows], classes),
    }
    if classes <= 5:
        del statistics["zero_shot_top5"]
    return {
        name: bootstrap_interval(statistic, len(ranks), resamples=resamples, seed=seed)
        for name, statistic in statistics.items()
    }


def confusion(scores: Floats, labels: Ints, ranks: Ints) -> Ints:
    """Return (classes, classes) how many images of the class of a row are given to that of a column.

    `ranks` (images,) of the own classes, as `class_ranks` gives them, decide whether an image is found: another class
    with an equal score takes it. One that is not found goes to the best of the other classes.
    """
    classes, images = scores.shape[1], np.arange(len(labels))
    rivals = np.array(scores, dtype=np.float64)
    rivals[images, labels] = -np.inf
    given = np.where(ranks <= 1, labels, rivals.argmax(axis=1))
    counts = np.bincount(labels * classes + given, minlength=classes * classes)
    table: Ints = counts.reshape(classes, classes).astype(np.int64)
    return table


def class_results(counts: Ints) -> list[ClassResult]:
    """Return what a confusion matrix (classes, classes), that of one model or a sum over several, says of each class.

    `images` are counted once per model.
    """
    results = []
    for number, row in enumerate(counts):
        images, others = int(row.sum()), row.copy()
        others[number] = 0
        most = int(others.argmax())
        if not images:
            results.append(ClassResult(0, None, None, None))
        elif not others[most]:
            results.append(ClassResult(images, float(row[number] / images), None, None))
        else:
            results.append(ClassResult(images, float(row[number] / images), most, float(others[most] / images)))
    return results
