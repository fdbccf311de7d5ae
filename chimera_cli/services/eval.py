"""`chimera eval`: retrieval figures of a run's best checkpoints on a split, with intervals and chance beside them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chimera_cli.errors import ChimeraError, UsageError
from chimera_cli.events import Evaluated, Listener, Note, Saved, ignore
from chimera_cli.figures import RETRIEVAL
from chimera_cli.runs import (
    MADE_WITH,
    SCHEMA_VERSION,
    Group,
    count_test_look,
    looks_at_test,
    read_json,
    resolve_run,
    seal_problem,
    source_hash,
    utc_now,
    write_sealed_json,
)
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
    from chimera_cli.data.pack import SPLITS, open_pack, split_name
    from chimera_cli.runtime import pick_device

    group, seed = resolve_run(home, run)
    if group.kind != "train":
        raise UsageError(f"{group.name} is a {group.kind} run", "`chimera eval` takes a train run")
    seeds = group.seeds if seed is None else (seed,)
    _need_finished(group, seeds)
    name = split_name(split)
    if name not in SPLITS:
        raise UsageError(f"the split {name!r} can't be evaluated", f"the splits are {', '.join(SPLITS)}")
    pack = open_pack(home / "data", data or _trained_on(group))
    table = _captions_of(pack, name)
    labels = None if zero_shot is None else _labels(pack, name, zero_shot)
    chosen = pick_device(device)
    looks = _count_look(group, name, listener)
    # Once, and before the work: what is loaded does not change where somebody edits the files meanwhile.
    source = source_hash()
    documents = []
    for one in seeds:
        document, ranks = _evaluate_seed(
            group.seed_dir(one), one, pack, name, table, labels, chosen, resamples, listener
        )
        document |= {"source_hash": source} | _origin(group, one)
        document = _store(group.seed_dir(one) / "evaluations", f"{pack.name}-{name}", document, ranks)
        listener(Evaluated(int(document["checkpoint_step"] or 0), name, document["figures"]))
        documents.append(document)
    _write_aggregate(group, pack, name, looks)
    _deliver(home, group, listener)
    return _result(group, pack, name, documents, looks)


def _need_finished(group: Group, seeds: Sequence[int]) -> None:
    """Refuse seeds that are still at work or never came to their end: their best checkpoint may yet change."""
    if group.status == "finished":
        return
    for seed in seeds:
        result = group.seed_dir(seed) / "result.json"
        if not result.exists() or read_json(result).get("status") != "finished":
            wait = "wait until it has finished; `chimera runs list` shows whether it is still alive"
            hint = wait if group.status == "running" else "train it again"
            raise ChimeraError(f"seed {seed} of {group.name} is not finished: the run is {group.status}", hint)


def _origin(group: Group, seed: int) -> dict[str, Any]:
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


def _deliver(home: Path, group: Group, listener: Listener) -> None:
    """Let MLflow have what has just been written; what can't be sent now waits for `chimera runs sync`."""
    from chimera_cli.tracking import track

    with track(home, group, listener) as tell:
        tell(Saved(str(group.path / "evaluations"), "evaluations"))


def _trained_on(group: Group) -> str:
    pack = group.facts.get("pack")
    if not isinstance(pack, Mapping) or "name" not in pack:
        raise ChimeraError(f"{group.path / 'group.json'} names no pack", "say which one with --data")
    return str(pack["name"])


def _path(directory: Path, pack: "Pack", split: str) -> Path:
    return directory / "evaluations" / f"{pack.name}-{split}.json"


def _captions_of(pack: "Pack", split: str) -> "CaptionTable":
    table = pack.captions(split)
    if not len(table):
        raise ChimeraError(f"the {split} split of {pack.name} has no captions", "retrieval needs images with captions")
    return table


def _count_look(group: Group, split: str, listener: Listener) -> int:
    """Return how often the test split was looked at with this run, this time included."""
    if split != "test":
        return looks_at_test(group.facts)
    looks = count_test_look(group)
    times = "once" if looks == 1 else f"{looks} times"
    message = f"the test split has now been looked at {times} with {group.name}; choose nothing by what it shows"
    listener(Note(message, "warning"))
    return looks


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
    }
