"""`chimera eval`: retrieval figures of a run's best checkpoints on a split, with intervals and chance beside them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chimera_cli.errors import ChimeraError, UsageError
from chimera_cli.events import Evaluated, Listener, Saved, ignore
from chimera_cli.figures import RETRIEVAL
from chimera_cli.runs import (
    MADE_WITH,
    SCHEMA_VERSION,
    Group,
    looks_at_test,
    read_json,
    seal_problem,
    source_hash,
    utc_now,
    write_sealed_json,
)
from chimera_cli.services.eval_subject import Subject, captions_of, count_look, open_subject
from chimera_cli.slo.baseline import read_baseline
from chimera_cli.statistics import Summary, summarise_known

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

    from chimera_cli.data.pack import CaptionTable, Pack
    from chimera_cli.evaluation.retrieval import Ranks

BOOTSTRAP_SEED = 0


def evaluate_group(
    home: Path,
    run: str = "latest",
    split: str = "dev",
    data: str | None = None,
    device: str = "auto",
    resamples: int = 1000,
    zero_shot: str | None = None,
    listener: Listener = ignore,
) -> dict[str, Any]:
    """Return the evaluation of a run over its seeds and write it beside the run, per seed and for the group.

    `data` is another pack than the one trained on; `zero_shot` names a column of its items whose values are classes.
    The ranks of all queries lie beside each seed's file, for `chimera slo diff`. Every look at the test split is
    counted in the group. Raises UsageError for a run, pack, split or column that is not there, ChimeraError for a seed
    that is not finished, a checkpoint that can't be read or embeddings that are not finite.
    """
    subject = open_subject(home, run, split, data, device)
    group, pack, name = subject.group, subject.pack, subject.split
    table = captions_of(pack, name)
    labels = None if zero_shot is None else _labels(pack, name, zero_shot)
    looks = count_look(group, name, listener)
    # Once, and before the work: what is loaded does not change where somebody edits the files meanwhile.
    source = source_hash()
    documents = []
    for one in subject.seeds:
        document, ranks = _evaluate_seed(
            group.seed_dir(one), one, pack, name, table, labels, subject.device, resamples, listener
        )
        document |= {"source_hash": source} | origin(group, one)
        document = _store(group.seed_dir(one) / "evaluations", f"{pack.name}-{name}", document, ranks)
        listener(Evaluated(int(document["checkpoint_step"] or 0), name, document["figures"]))
        documents.append(document)
    _write_aggregate(group, pack, name, looks)
    deliver(home, group, listener)
    return _result(group, pack, name, documents, looks)


def stored_evaluation(subject: Subject, resamples: int) -> dict[str, Any] | None:
    """Return what `evaluate_group` returned, from the files that it wrote; None where one of them no longer holds.

    They hold while nobody edited them and checkpoint, content of the pack and source code are the same.
    """
    pack, source = subject.pack, source_hash()
    documents = []
    for seed in subject.seeds:
        path = _path(subject.group.seed_dir(seed), pack, subject.split)
        document = read_json(path) if path.is_file() else {}
        facts = origin(subject.group, seed) | {"pack": {"name": pack.name, "fingerprint": pack.fingerprint}}
        facts["source_hash"] = source
        same = all(document.get(key) == fact for key, fact in facts.items())
        if not same or seal_problem(document) or document["bootstrap"]["resamples"] != resamples:
            return None
        documents.append(document)
    return _result(subject.group, pack, subject.split, documents, looks_at_test(subject.group.facts))


def origin(group: Group, seed: int) -> dict[str, Any]:
    """Return what ties an evaluation to its run: put beside another one, it is noticed."""
    from chimera_cli.models.weights import file_hash

    checkpoint = group.seed_dir(seed) / "checkpoints" / "best.safetensors"
    return {
        "group": group.name,
        "made_with": {key: group.facts.get(key) for key in MADE_WITH},
        "checkpoint_sha256": file_hash(checkpoint) if checkpoint.is_file() else None,
    }


def _store(folder: Path, name: str, document: Mapping[str, Any], ranks: "Ranks") -> dict[str, Any]:
    """Write a seed's evaluation, sealed, after its ranks, whose name and hash it holds; return it as it was written."""
    from chimera_cli.evaluation.rank_files import write_ranks

    file = f"{name}.ranks.npz"
    facts = {"file": file, "sha256": write_ranks(folder / file, ranks)}
    write_sealed_json(folder / f"{name}.json", {**document, "ranks": facts})
    return read_json(folder / f"{name}.json")


def deliver(home: Path, group: Group, listener: Listener) -> None:
    """Let MLflow have what has just been written; what can't be sent now waits for `chimera runs sync`."""
    from chimera_cli.tracking import track

    with track(home, group, listener) as tell:
        tell(Saved(str(group.path / "evaluations"), "evaluations"))


def _path(directory: Path, pack: "Pack", split: str) -> Path:
    return directory / "evaluations" / f"{pack.name}-{split}.json"


# ---- one seed -------------------------------------------------------------------------------------------------------


def _evaluate_seed(
    directory: Path,
    seed: int,
    pack: "Pack",
    split: str,
    table: "CaptionTable",
    labels: "tuple[str, tuple[str, ...], NDArray[np.int64]] | None",
    device: "torch.device",
    resamples: int,
    listener: Listener,
) -> "tuple[dict[str, Any], Ranks]":
    """Return the content of a seed's evaluation file, and the ranks of its queries."""
    from chimera_cli.services.embeddings import embed_split

    best = directory / "checkpoints" / "best.json"
    step = read_json(best).get("step") if best.exists() else None
    image, text = embed_split(directory, pack, split, device, listener)
    measured, ranks = measure(image, text, table.image_positions, resamples)
    document = {
        "schema_version": SCHEMA_VERSION,
        "pack": {"name": pack.name, "fingerprint": pack.fingerprint},
        "split": split,
        "seed": seed,
        "checkpoint": "best",
        "checkpoint_step": step,
        **measured,
        "zero_shot": None if labels is None else _classify(directory, image, labels, device, listener),
        "created_at": utc_now(),
    }
    return document, ranks


def measure(
    image_features: "NDArray[np.float32]",
    text_features: "NDArray[np.float32]",
    image_of_text: "NDArray[np.int64]",
    resamples: int,
) -> "tuple[dict[str, Any], Ranks]":
    """Return what the evaluation file says of embeddings (counts, figures, intervals, chance, similarities), and ranks.

    `image_features` (images, dim), `text_features` (captions, dim), `image_of_text` (captions,).
    """
    from chimera_cli.evaluation.retrieval import (
        chance_figures,
        retrieval_figures,
        retrieval_intervals,
        retrieval_ranks,
    )
    from chimera_cli.evaluation.similarities import similarity_histogram

    ranks = retrieval_ranks(image_features, text_features, image_of_text)
    captions = ranks.captions_per_query()
    images = len(ranks.i2t)
    intervals = retrieval_intervals(ranks, resamples, BOOTSTRAP_SEED)
    facts = {
        "images": images,
        "images_without_captions": images - ranks.queries.size,
        "captions": len(ranks.t2i),
        "captions_per_image": {"min": int(captions.min()), "max": int(captions.max())},
        "figures": retrieval_figures(ranks),
        "intervals": {name: list(ends) for name, ends in intervals.items()},
        "bootstrap": {"resamples": resamples, "seed": BOOTSTRAP_SEED, "units": "query images"},
        "chance": chance_figures(images, captions),
        "similarities": similarity_histogram(image_features, text_features, image_of_text),
    }
    return facts, ranks


# ---- zero-shot ------------------------------------------------------------------------------------------------------


def _labels(pack: "Pack", split: str, column: str) -> "tuple[str, tuple[str, ...], NDArray[np.int64]]":
    """Return the column, its class names in alphabetical order, and the class (images,) of each image of the split."""
    import numpy as np

    values = [pack.column(column)[index] for index in pack.split_indices(split).tolist()]
    missing = sum(value is None or not str(value).strip() for value in values)
    if missing:
        raise ChimeraError(f"{missing:,} images of {pack.name}, {split}, have no {column}", "every image needs a label")
    names = sorted({str(value) for value in values})
    if len(names) < 2:
        raise UsageError(f"the column {column} of {pack.name} has one value only", "a choice needs two classes")
    place = {name: index for index, name in enumerate(names)}
    return column, tuple(names), np.asarray([place[str(value)] for value in values], dtype=np.int64)


def _classify(
    directory: Path,
    image_features: "NDArray[np.float32]",
    labels: "tuple[str, tuple[str, ...], NDArray[np.int64]]",
    device: "torch.device",
    listener: Listener,
) -> dict[str, Any]:
    """Return zero-shot accuracy with the class names as prompts, and that of guessing."""
    from chimera_cli.evaluation.zero_shot import TEMPLATES, class_ranks, class_weights, prompts, zero_shot_figures
    from chimera_cli.services.embeddings import embed_texts

    column, names, truth = labels
    features = embed_texts(directory, prompts(names), device, listener)
    ranks = class_ranks(image_features, class_weights(features, len(names)), truth)
    return {
        "column": column,
        "classes": list(names),
        "templates": list(TEMPLATES),
        "figures": zero_shot_figures(ranks, len(names)),
        "chance": {"zero_shot_top1": 1 / len(names), "zero_shot_top5": 5 / len(names) if len(names) > 5 else None},
    }


# ---- over seeds -----------------------------------------------------------------------------------------------------


def _over_seeds(documents: Sequence[Mapping[str, Any]]) -> dict[str, Summary | None]:
    return {name: summarise_known([document["figures"].get(name) for document in documents]) for name in RETRIEVAL}


def _write_aggregate(group: Group, pack: "Pack", split: str, looks: int) -> None:
    """Write the group's evaluation file once every seed has an unedited one of this content of the pack."""
    paths = [_path(group.seed_dir(seed), pack, split) for seed in group.seeds]
    if not all(path.exists() for path in paths):
        return
    documents = [read_json(path) for path in paths]
    if any(
        seal_problem(document) or (document.get("pack") or {}).get("fingerprint") != pack.fingerprint
        for document in documents
    ):
        return
    summaries = _over_seeds(documents)
    document = {
        "schema_version": SCHEMA_VERSION,
        "pack": {"name": pack.name, "fingerprint": pack.fingerprint},
        "split": split,
        "seeds": list(group.seeds),
        "images": documents[0]["images"],
        "captions": documents[0]["captions"],
        "figures": {name: None if one is None else one.as_dict() for name, one in summaries.items()},
        "test_looks": looks,
        "created_at": utc_now(),
    }
    write_sealed_json(_path(group.path, pack, split), document)


def _result(
    group: Group, pack: "Pack", split: str, documents: Sequence[Mapping[str, Any]], looks: int
) -> dict[str, Any]:
    """Return what `chimera eval` prints: means by name under `figures`, spreads and seeds beside them."""
    summaries = _over_seeds(documents)
    figures = {name: None if one is None else one.mean for name, one in summaries.items()}
    guesses = [document["zero_shot"]["figures"] for document in documents if document["zero_shot"]]
    for name in guesses[0] if guesses else ():
        over = summarise_known([guess[name] for guess in guesses])
        summaries[name], figures[name] = over, None if over is None else over.mean
    return {
        "schema_version": SCHEMA_VERSION,
        "run": group.name,
        "pack": {"name": pack.name, "fingerprint": pack.fingerprint},
        "split": split,
        "seeds": [document["seed"] for document in documents],
        "images": documents[0]["images"],
        "captions": documents[0]["captions"],
        "figures": figures,
        "over_seeds": {name: None if one is None else one.as_dict() for name, one in summaries.items()},
        "chance": documents[0]["chance"] | ((documents[0]["zero_shot"] or {}).get("chance") or {}),
        "by_seed": list(documents),
        "test_looks": looks,
        "baseline": read_baseline(group, {"name": pack.name, "fingerprint": pack.fingerprint}, split)[0],
    }
