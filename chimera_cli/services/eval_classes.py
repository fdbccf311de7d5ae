"""`chimera eval --classes`: every image of a split goes to the class whose prompts lie nearest."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chimera_cli.errors import ChimeraError
from chimera_cli.events import Listener, ignore
from chimera_cli.runs import SCHEMA_VERSION, content_hash, read_json, source_hash, utc_now, write_sealed_json
from chimera_cli.services.eval_subject import Subject, best_model, count_look, open_subject, tell_of_length
from chimera_cli.statistics import summarise_known

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

BOOTSTRAP_SEED = 0
FIGURES = ("zero_shot_top1", "zero_shot_top5", "zero_shot_class_recall")
# Below the folder of evaluations, which holds those of retrieval.
FOLDER = "zero-shot"
# Letters of the column, and digits of the hash of the whole question, in the name of a file.
_WORD, _DIGITS = 60, 10
_GUESSES = 5  # classes told of an image without a label


@dataclass(frozen=True, slots=True)
class _Choice:
    """What there is to choose from: class names, and the templates that they stand in."""

    classes: tuple[str, ...]
    templates: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Labels:
    """The column of the pack with the true classes, and the number (images,) of that of each image."""

    column: str
    truth: "NDArray[np.int64]"


def classify_images(
    home: Path,
    classes: Path,
    templates: Path | None = None,
    labels: str | None = None,
    run: str = "latest",
    split: str = "dev",
    data: str | None = None,
    device: str = "auto",
    resamples: int = 1000,
    listener: Listener = ignore,
) -> dict[str, Any]:
    """Return zero-shot classification of a split among the classes of a file, with the templates of another.

    With `labels`, a column of the pack's items, `figures` are accuracies with intervals, and a file per seed is written
    beside its evaluations. Without, `predictions` holds the best classes of every image, by the mean similarity over
    the seeds. A look at the test split is counted. Raises UsageError or ChimeraError for files, labels, runs, packs and
    splits that are not there or not what they should be.
    """
    from chimera_cli.evaluation.prompt_files import read_classes, read_templates
    from chimera_cli.evaluation.zero_shot import TEMPLATES
    from chimera_cli.services.eval import deliver

    choice = _Choice(read_classes(classes), TEMPLATES if templates is None else read_templates(templates))
    subject = open_subject(home, run, split, data, device)
    known = None if labels is None else _labels(subject, labels, choice.classes, classes)
    looks = count_look(subject.group, subject.split, listener)
    # Once, and before the work: what is loaded does not change where somebody edits the files meanwhile.
    source = source_hash()
    features = [_embed(subject, seed, choice, listener) for seed in subject.seeds]
    result = {
        "schema_version": SCHEMA_VERSION,
        **subject.facts,
        "seeds": list(subject.seeds),
        "column": labels,
        "classes": list(choice.classes),
        "templates": list(choice.templates),
        "images": len(features[0][0]),
        "test_looks": looks,
    }
    if known is None:
        return result | {"figures": {}, "predictions": _predictions(subject, choice, features)}
    documents = [
        _measure(subject, seed, choice, known, pair, resamples) | {"source_hash": source}
        for seed, pair in zip(subject.seeds, features, strict=True)
    ]
    _store(subject, known, documents)
    deliver(home, subject.group, listener)
    return result | _over_seeds(choice, known, features, documents)


def _labels(subject: Subject, column: str, classes: Sequence[str], path: Path) -> _Labels:
    """Return the class of each image of the split. Raises ChimeraError for a label that is none of the classes."""
    import numpy as np

    pack, split = subject.pack, subject.split
    values = pack.column(column)
    words = [
        "" if values[index] is None else str(values[index]).strip() for index in pack.split_indices(split).tolist()
    ]
    missing = words.count("")
    if missing:
        raise ChimeraError(f"{missing:,} images of {pack.name}, {split}, have no {column}", "every image needs a label")
    place = {name: number for number, name in enumerate(classes)}
    foreign = sorted({word for word in words if " ".join(word.split()) not in place})
    if foreign:
        told = ", ".join(map(repr, foreign[:3])) + (f" and {len(foreign) - 3} more" if len(foreign) > 3 else "")
        be = "is" if len(foreign) == 1 else "are"
        raise ChimeraError(
            f"{told} of the column {column} of {pack.name}, {split}, {be} not among the classes of {path}",
            "write classes as the column does, or leave --labels out",
        )
    return _Labels(column, np.asarray([place[" ".join(word.split())] for word in words], dtype=np.int64))


def _embed(
    subject: Subject, seed: int, choice: _Choice, listener: Listener
) -> "tuple[NDArray[np.float32], NDArray[np.float64]]":
    """Return image_features (images, dim) and the class weights (classes, dim) of a seed."""
    from chimera_cli.evaluation.zero_shot import class_weights, prompts
    from chimera_cli.services.embeddings import embed_images, embed_texts_with

    model = best_model(subject, seed)
    texts = prompts(choice.classes, choice.templates)
    if seed == subject.seeds[0]:
        tell_of_length(model, texts, "prompt", listener)
    weights = class_weights(embed_texts_with(model, texts, subject.device, listener), len(choice.classes))
    return embed_images(model, subject.pack, subject.split, subject.device, listener), weights


# ---- without labels -------------------------------------------------------------------------------------------------


def _predictions(
    subject: Subject, choice: _Choice, features: "Sequence[tuple[NDArray[np.float32], NDArray[np.float64]]]"
) -> list[dict[str, Any]]:
    """Return the best classes of every image, by the mean similarity over the seeds, in the order of the split."""
    import numpy as np

    from chimera_cli.evaluation.examples import best_of
    from chimera_cli.evaluation.zero_shot import class_scores

    scores = np.mean([class_scores(images, weights) for images, weights in features], axis=0)
    files, indices = subject.pack.column("source_file"), subject.pack.split_indices(subject.split).tolist()
    return [
        {
            "file": files[index],
            "image_index": index,
            "classes": [{"class": choice.classes[number], "score": score} for number, score in best_of(row, _GUESSES)],
        }
        for index, row in zip(indices, scores, strict=True)
    ]


# ---- with labels ----------------------------------------------------------------------------------------------------


def _measure(
    subject: Subject,
    seed: int,
    choice: _Choice,
    labels: _Labels,
    features: "tuple[NDArray[np.float32], NDArray[np.float64]]",
    resamples: int,
) -> dict[str, Any]:
    """Return the content of a seed's file."""
    from chimera_cli.evaluation.zero_shot import (
        class_ranks,
        class_recall,
        class_results,
        class_scores,
        confusion,
        zero_shot_figures,
        zero_shot_intervals,
    )
    from chimera_cli.services.eval import origin

    images, weights = features
    count = len(choice.classes)
    ranks = class_ranks(images, weights, labels.truth)
    best = subject.group.seed_dir(seed) / "checkpoints" / "best.json"
    figures = zero_shot_figures(ranks, count)
    figures["zero_shot_class_recall"] = class_recall(ranks, labels.truth, count)
    intervals = zero_shot_intervals(ranks, labels.truth, count, resamples, BOOTSTRAP_SEED)
    by_class = class_results(confusion(class_scores(images, weights), labels.truth, ranks))
    return {
        "schema_version": SCHEMA_VERSION,
        "pack": subject.facts["pack"],
        "split": subject.split,
        "seed": seed,
        "checkpoint": "best",
        "checkpoint_step": read_json(best).get("step") if best.exists() else None,
        "column": labels.column,
        "classes": list(choice.classes),
        "templates": list(choice.templates),
        "images": len(images),
        "figures": figures,
        "intervals": {name: list(ends) for name, ends in intervals.items()},
        "bootstrap": {"resamples": resamples, "seed": BOOTSTRAP_SEED, "units": "images"},
        "chance": _chance(count),
        "recall_by_class": [one.recall for one in by_class],
        "created_at": utc_now(),
    } | origin(subject.group, seed)


def _chance(classes: int) -> dict[str, float | None]:
    even = 1 / classes
    return dict(zip(FIGURES, (even, 5 * even if classes > 5 else None, even), strict=True))


def _store(subject: Subject, labels: _Labels, documents: Sequence[Mapping[str, Any]]) -> None:
    """Write each seed's file, sealed; what was asked stands in its name, so that no other question replaces it."""
    first = documents[0]
    # The word is for the reader: columns may differ in what no file name should hold.
    word = re.sub(r"[^A-Za-z0-9._-]+", "-", labels.column)[:_WORD]
    word += "-" + content_hash([labels.column, first["classes"], first["templates"]])[:_DIGITS]
    for document in documents:
        folder = subject.group.seed_dir(document["seed"]) / "evaluations" / FOLDER
        write_sealed_json(folder / f"{subject.pack.name}-{subject.split}-{word}.json", document)


def _over_seeds(
    choice: _Choice,
    labels: _Labels,
    features: "Sequence[tuple[NDArray[np.float32], NDArray[np.float64]]]",
    documents: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """Return figures over the seeds, and of every class how often it is found and what it is taken for."""
    import numpy as np

    from chimera_cli.evaluation.zero_shot import class_ranks, class_results, class_scores, confusion

    over = {name: summarise_known([document["figures"][name] for document in documents]) for name in FIGURES}
    counts = np.sum(
        [confusion(class_scores(*pair), labels.truth, class_ranks(*pair, labels.truth)) for pair in features], axis=0
    )
    return {
        "figures": {name: None if one is None else one.mean for name, one in over.items()},
        "over_seeds": {name: None if one is None else one.as_dict() for name, one in over.items()},
        "chance": documents[0]["chance"],
        "by_class": [
            {
                "class": name,
                "images": one.images // len(documents),
                "recall": one.recall,
                "mistaken_for": None if one.mistaken_for is None else choice.classes[one.mistaken_for],
                "mistaken_share": one.mistaken_share,
            }
            for name, one in zip(choice.classes, class_results(counts), strict=True)
        ],
        "by_seed": list(documents),
    }
