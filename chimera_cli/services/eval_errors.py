"""`chimera eval --errors`: a page with the worst and best queries of a run, their images and what was found instead."""

import base64
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chimera_cli.events import Listener, Note, ignore
from chimera_cli.figures import format_value
from chimera_cli.runs import SCHEMA_VERSION, write_text
from chimera_cli.services.eval_subject import Subject, captions_of, count_look, open_subject
from chimera_cli.services.report import check_page

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from chimera_cli.data.pack import CaptionTable
    from chimera_cli.evaluation.examples import Example
    from chimera_cli.evaluation.retrieval import Ranks
    from chimera_cli.reporting.errors_page import Case, Direction, Page, Picture

_WORST, _BEST, _FOUND = 12, 6, 5
_SIDE = 160  # pixels of an inlined image: about 6 kB


def error_page(
    home: Path,
    path: Path,
    run: str = "latest",
    split: str = "dev",
    data: str | None = None,
    device: str = "auto",
    listener: Listener = ignore,
) -> dict[str, Any]:
    """Write a page with the worst and best queries of both directions to `path`; return its figures and its cases.

    Of a run with several seeds it shows the first: a query is hard for one model, and a mean of several is none of
    them. A look at the test split is counted. Raises UsageError for words that name nothing and a `path` that is
    something else than a page, ChimeraError for a run that can't be read or a page that can't be written.
    """
    from chimera_cli.evaluation.retrieval import retrieval_figures, retrieval_ranks
    from chimera_cli.reporting.errors_page import render
    from chimera_cli.services.embeddings import embed_split

    check_page(path)
    subject = open_subject(home, run, split, data, device)
    table = captions_of(subject.pack, subject.split)
    looks = count_look(subject.group, subject.split, listener)
    seed = subject.seeds[0]
    if len(subject.seeds) > 1:
        listener(Note(f"the page is of seed {seed}; --run {subject.group.name}/seed-{subject.seeds[1]} is another one"))
    image, text = embed_split(subject.group.seed_dir(seed), subject.pack, subject.split, subject.device, listener)
    ranks = retrieval_ranks(image, text, table.image_positions)
    figures = retrieval_figures(ranks)
    directions = _directions(subject, table, image, text, ranks)
    write_text(path, render(_page(subject, seed, figures, directions)))
    return {
        "schema_version": SCHEMA_VERSION,
        **subject.facts,
        "seed": seed,
        "figures": figures,
        "page": str(path),
        "cases": {one.key: {"worst": _as_json(one.worst), "best": _as_json(one.best)} for one in directions},
        "rank_shares": {one.key: dict(one.histogram) for one in directions},
        "test_looks": looks,
    }


@dataclass(frozen=True, slots=True)
class _Side:
    """One direction: unit features of queries and gallery, the image (position in the split) of each, the ranks."""

    key: str
    queries: "NDArray[np.float64]"
    gallery: "NDArray[np.float64]"
    owner_of_query: "NDArray[np.int64]"
    owner_of_item: "NDArray[np.int64]"
    ranks: "NDArray[np.int64]"


def _directions(
    subject: Subject,
    table: "CaptionTable",
    image: "NDArray[np.float32]",
    text: "NDArray[np.float32]",
    ranks: "Ranks",
) -> "tuple[Direction, ...]":
    """Return the cases of both directions, text to image first: its failures are seen at a glance."""
    import numpy as np

    from chimera_cli.evaluation.examples import extremes, rank_histogram, unit
    from chimera_cli.reporting.errors_page import Direction

    images, texts, places = unit(image), unit(text), np.arange(len(image))
    sides = {
        "Text to image": _Side("t2i", texts, images, table.image_positions, places, ranks.t2i),
        "Image to text": _Side("i2t", images, texts, places, table.image_positions, ranks.i2t),
    }
    picture = _pictures(subject)
    made = []
    for title, side in sides.items():
        worst, best = extremes(
            side.queries, side.gallery, side.owner_of_query, side.owner_of_item, side.ranks, _WORST, _FOUND
        )
        cases = [_cases(chosen, side, table, picture) for chosen in (worst, best[:_BEST])]
        histogram = tuple(rank_histogram(side.ranks, len(side.gallery)))
        made.append(Direction(side.key, title, cases[0], cases[1], int((side.ranks > 0).sum()), histogram))
    return tuple(made)


def _pictures(subject: Subject) -> "Callable[[int], Picture]":
    """Return what makes a picture for the page of an image's position in the split, each once."""
    from chimera_cli.data.preview import small_jpeg
    from chimera_cli.reporting.errors_page import Picture

    indices, files = subject.pack.split_indices(subject.split), subject.pack.column("source_file")

    @cache
    def picture(place: int) -> Picture:
        index = int(indices[place])
        return Picture(str(files[index]), base64.b64encode(small_jpeg(subject.pack, index, _SIDE)).decode("ascii"))

    return picture


def _cases(
    chosen: "Sequence[Example]", side: _Side, table: "CaptionTable", picture: "Callable[[int], Picture]"
) -> "tuple[Case, ...]":
    """Return examples as the page shows them."""
    from chimera_cli.reporting.errors_page import Case, Found

    rows, to_image = table.by_image(), side.key == "t2i"
    made = []
    for one in chosen:
        owner = int(side.owner_of_query[one.query])
        found = []
        for place, score in one.found:
            image = int(side.owner_of_item[place])
            found.append(Found(picture(image), score, image == owner, "" if to_image else table.texts[place]))
        own = [one.query] if to_image else rows[owner]
        captions = tuple(table.texts[row] for row in own)
        made.append(Case(picture(owner), captions, one.rank, len(side.gallery), one.score, tuple(found)))
    return tuple(made)


def _page(subject: Subject, seed: int, figures: Mapping[str, float], directions: "tuple[Direction, ...]") -> "Page":
    from chimera_cli.reporting.errors_page import Page
    from chimera_cli.reporting.html import Headline

    of = f"Seed {seed} of {subject.group.name} on {subject.pack.name}, {subject.split}"
    others = f", one of {len(subject.group.seeds)} seeds" if len(subject.group.seeds) > 1 else ""
    remarks = (
        f"{of}{others}: {directions[1].queries:,} images with captions, {directions[0].queries:,} captions. "
        "Shown are the queries whose own item stands furthest down, and those that lead by the widest margin; at most "
        "one caption of an image. Numbers beside what was found are cosine similarities.",
        "An item marked as own is what the query was to find. A caption may describe other images just as well: "
        "what counts as wrong here need not be wrong to a person.",
    )
    names = {"t2i_r1": "text → image R@1", "t2i_r10": "text → image R@10", "t2i_medr": "text → image median rank"}
    names |= {"i2t_r1": "image → text R@1", "i2t_r10": "image → text R@10", "i2t_medr": "image → text median rank"}
    headlines = tuple(Headline(label, format_value(name, figures[name])) for name, label in names.items())
    return Page(f"Worst and best: {subject.group.name}, {subject.split}", remarks, headlines, directions)


def _as_json(cases: "Sequence[Case]") -> list[dict[str, Any]]:
    """Return cases without their pixels."""
    return [
        {
            "file": one.picture.file,
            "captions": list(one.captions),
            "rank": one.rank,
            "score": one.score,
            "found": [
                {"file": found.picture.file, "caption": found.caption or None, "score": found.score, "own": found.own}
                for found in one.found
            ],
        }
        for one in cases
    ]
