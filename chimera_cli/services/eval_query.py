"""`chimera eval --query`: the images of a split that lie nearest to a sentence."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chimera_cli.errors import UsageError
from chimera_cli.events import Listener, ignore
from chimera_cli.runs import SCHEMA_VERSION
from chimera_cli.services.eval_subject import Subject, best_model, count_look, open_subject, tell_of_length

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


def search_images(
    home: Path,
    query: str,
    run: str = "latest",
    split: str = "dev",
    data: str | None = None,
    device: str = "auto",
    top: int = 12,
    sheet: Path | None = None,
    listener: Listener = ignore,
) -> dict[str, Any]:
    """Return the `top` images of a split for a sentence, best first, with cosine similarities averaged over the seeds.

    `sheet` is an image file for a contact sheet of them. A look at the test split is counted. Raises UsageError for an
    empty query, a sheet of another format, and words that name nothing; ChimeraError for a run that can't be read.
    """
    import numpy as np

    from chimera_cli.data.preview import check_ending, write_sheet
    from chimera_cli.evaluation.examples import best_of

    sentence = _sentence(query)
    if sheet is not None:
        check_ending(sheet)
    subject = open_subject(home, run, split, data, device)
    looks = count_look(subject.group, subject.split, listener)
    by_seed = [_similarities(subject, seed, sentence, listener) for seed in subject.seeds]
    images = _described(subject, best_of(np.mean(by_seed, axis=0), top), by_seed)
    if sheet is not None:
        texts = [f"{one['score']:.3f}  {one['file']}  {one['caption'] or ''}" for one in images]
        write_sheet(subject.pack, [one["image_index"] for one in images], texts, sheet)
    return {
        "schema_version": SCHEMA_VERSION,
        **subject.facts,
        "seeds": list(subject.seeds),
        "query": sentence,
        "figures": {},
        "images": images,
        "searched": len(by_seed[0]),
        "sheet": None if sheet is None else str(sheet),
        "test_looks": looks,
    }


def _sentence(query: str) -> str:
    """Return the query on one line. Raises UsageError where nothing is left of it, or where it is no text."""
    from chimera_cli.data.captions import tidy

    sentence = tidy(query)
    try:
        sentence.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UsageError("the query is not UTF-8", "type it in a terminal with a UTF-8 locale") from error
    if not any(sign.isprintable() and not sign.isspace() for sign in sentence):
        raise UsageError("the query is empty", 'say what to look for: --query "two dogs on a beach"')
    return sentence


def _similarities(subject: Subject, seed: int, sentence: str, listener: Listener) -> "NDArray[np.float64]":
    """Return the cosine similarity (images,) of each image of the split to the sentence."""
    from chimera_cli.evaluation.examples import unit
    from chimera_cli.evaluation.retrieval import finite_features
    from chimera_cli.services.embeddings import embed_images, embed_texts_with

    model = best_model(subject, seed)
    if seed == subject.seeds[0]:
        tell_of_length(model, [sentence], "query", listener)
    image = embed_images(model, subject.pack, subject.split, subject.device, listener)
    text = embed_texts_with(model, [sentence], subject.device, listener)
    scores: NDArray[np.float64] = unit(finite_features(image, "image")) @ unit(finite_features(text, "query"))[0]
    return scores


def _described(
    subject: Subject, best: Sequence[tuple[int, float]], by_seed: "Sequence[NDArray[np.float64]]"
) -> list[dict[str, Any]]:
    """Return each image found, best first: where it is, how similar on average and by seed, its first caption."""
    indices, table = subject.pack.split_indices(subject.split), subject.pack.captions(subject.split)
    files, rows = subject.pack.column("source_file"), table.by_image()
    found = []
    for rank, (place, score) in enumerate(best, 1):
        index, captions = int(indices[place]), rows[place]
        found.append(
            {
                "rank": rank,
                "file": files[index],
                "image_index": index,
                "score": score,
                "by_seed": [float(scores[place]) for scores in by_seed],
                "caption": table.texts[captions[0]] if captions else None,
            }
        )
    return found
