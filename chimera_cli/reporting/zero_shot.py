"""Zero-shot classification among the classes of a file in a report: accuracies by seed, and recall class by class."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from chimera_cli.figures import FIGURES, format_value
from chimera_cli.reporting import reading
from chimera_cli.reporting.document import Block, Mono, Paragraph, Strong, table
from chimera_cli.reporting.words import plural, spread
from chimera_cli.runs import MADE_WITH, Group
from chimera_cli.statistics import summarise_known

_FIGURES = ("zero_shot_top1", "zero_shot_top5", "zero_shot_class_recall")
# What seeds must share before a mean over them is the figure of anything.
_SHARED = ("pack", "split", "column", "classes", "templates", "source_hash")
_CLASSES = 20  # of more the report names the hardest


def zero_shot_blocks(group: Group, seeds: Sequence[int]) -> Iterator[Block]:
    """Yield the classifications that `chimera eval --classes` has written for the seeds, file by file.

    One that was edited, can't be read or is of another run or seed is named and left out.
    """
    found: dict[str, dict[int, Mapping[str, Any]]] = {}
    for seed in seeds:
        for path in sorted((group.seed_dir(seed) / "evaluations" / "zero-shot").glob("*.json")):
            document, problem = reading.read(path)
            problem = problem or _unfit(document, group, seed)
            if problem:
                yield Paragraph((Mono("/".join(path.parts[-5:])), f" {problem} and is left out."), True)
            else:
                found.setdefault(path.name, {})[seed] = document
    for by_seed in found.values():
        yield from _blocks(by_seed)


def _unfit(document: Mapping[str, Any], group: Group, seed: int) -> str | None:
    """Return why a file is no classification of this seed of this group; None where it is one."""
    if document.get("seed") != seed or not document.get("figures"):
        return "is no classification of this seed"
    if document.get("group") != group.name:
        return f"is of {document.get('group') or 'a run without a name'}"
    made = reading.mapping_of(document.get("made_with"))
    changed = [key for key in MADE_WITH if made.get(key) != group.facts.get(key)]
    return f"is of a run that was made otherwise ({', '.join(changed)})" if changed else None


def _blocks(by_seed: Mapping[int, Mapping[str, Any]]) -> Iterator[Block]:
    first = next(iter(by_seed.values()))
    classes, templates = first.get("classes") or (), first.get("templates") or ()
    counts = f", {len(classes)} classes, {plural(len(templates), 'prompt')} each"
    where = f"Zero-shot, {(first.get('pack') or {}).get('name')}, {first.get('split')}"
    images = plural(first.get("images") or 0, "image")
    yield Paragraph((Strong(where), ": classes of a file, labels of the column ", Mono(str(first.get("column"))),
                     f"{counts}, {images}."))  # fmt: skip
    if any(one.get(key) != first.get(key) for one in by_seed.values() for key in _SHARED):
        yield Paragraph("The seeds were not classified alike, so there is no mean over them.", True)
    columns = ("figure", *(f"seed {seed}" for seed in by_seed), "mean ± std (n)", "chance")
    yield table(columns, [_row(name, by_seed) for name in _FIGURES], right=range(1, len(columns)))
    resamples = (first.get("bootstrap") or {}).get("resamples")
    if resamples:
        yield Paragraph(f"In brackets the 95 % bootstrap interval over images ({resamples} resamples).")
    yield from _by_class(by_seed, classes)


def _row(name: str, by_seed: Mapping[int, Mapping[str, Any]]) -> tuple[str, ...]:
    documents = list(by_seed.values())
    alike = all(one.get(key) == documents[0].get(key) for one in documents for key in _SHARED)
    values = [(one.get("figures") or {}).get(name) for one in documents]
    cells = [_with_interval(name, one) for one in documents]
    mean = spread(name, summarise_known(values) if alike else None)
    return FIGURES[name].label, *cells, mean, format_value(name, (documents[0].get("chance") or {}).get(name))


def _with_interval(name: str, document: Mapping[str, Any]) -> str:
    value, ends = document["figures"].get(name), (document.get("intervals") or {}).get(name)
    text = format_value(name, value)
    if value is None or not ends:
        return text
    low, high = (format_value(name, end).removesuffix(" %") for end in ends)
    return f"{text} ({low} – {high})"


def _by_class(by_seed: Mapping[int, Mapping[str, Any]], classes: Sequence[Any]) -> Iterator[Block]:
    """Yield the recall of every class, the hardest first."""
    recalls = [[reading.number_of(value) for value in one.get("recall_by_class") or ()] for one in by_seed.values()]
    if not classes or any(len(one) != len(classes) for one in recalls):
        return
    means = [summarise_known(values) for values in zip(*recalls, strict=True)]
    known = [(one.mean, str(name), one) for name, one in zip(classes, means, strict=True) if one is not None]
    known.sort(key=lambda each: (each[0], each[1]))
    if len(known) > _CLASSES:
        yield Paragraph(f"The {_CLASSES} classes of {len(classes)} that are found least:")
    rows = [(name, spread("zero_shot_class_recall", one)) for _, name, one in known[:_CLASSES]]
    yield table(("class", "recall, mean ± std (n)"), rows, right=(1,))
