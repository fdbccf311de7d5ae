"""Retrieval, zero-shot classification and the ladder in a report."""

from collections.abc import Iterator, Mapping
from typing import Any

from chimera_cli.figures import FIGURES, RECALLS, RETRIEVAL, format_value
from chimera_cli.reporting.document import Block, Mono, Paragraph, Section, Strong, Text, table
from chimera_cli.reporting.facts import ZERO_SHOT, Evaluation, Facts
from chimera_cli.reporting.words import plural, spread
from chimera_cli.reporting.zero_shot import zero_shot_blocks
from chimera_cli.slo.baseline import METHODS, baseline_words
from chimera_cli.slo.ladder import LADDER, PACK_SOURCE, comparable


def retrieval_section(facts: Facts) -> Section:
    """Return the figures of every evaluated split by seed, with intervals, spread and chance."""
    if not facts.evaluations:
        missing: Text = ("Not evaluated: run ", Mono(f"chimera eval --run {facts.group.name}"), ".")
        return Section("retrieval", "Retrieval", (Paragraph(missing), *zero_shot_blocks(facts.group, facts.seeds)))
    blocks: list[Block] = []
    for evaluation in facts.evaluations:
        blocks += [*_evaluation(facts, evaluation), *_zero_shot(evaluation)]
    return Section("retrieval", "Retrieval", (*blocks, *zero_shot_blocks(facts.group, facts.seeds)))


def _evaluation(facts: Facts, evaluation: Evaluation) -> Iterator[Block]:
    first = evaluation.first
    counts = f": {plural(first['images'], 'image')}, {plural(first['captions'], 'caption')}. "
    counts = f": {evaluation.mixed}. " if evaluation.mixed else counts
    yield Paragraph((Strong(f"{evaluation.pack}, {evaluation.split}"), counts, caveat(facts, evaluation)))
    baseline = evaluation.baseline
    beside = () if baseline is None else (f"{METHODS[baseline['baseline']]} baseline",)
    columns = ("figure", *(f"seed {seed}" for seed in evaluation.by_seed), "mean ± std (n)", *beside, "chance")
    rows = []
    for name in RETRIEVAL:
        cells = [_with_interval(name, one) for one in evaluation.by_seed.values()]
        against = () if baseline is None else (_with_interval(name, baseline),)
        chance = format_value(name, (first.get("chance") or {}).get(name))
        rows.append((FIGURES[name].label, *cells, spread(name, evaluation.figures.get(name)), *against, chance))
    yield table(columns, rows, right=range(1, len(columns)))
    if baseline is not None:
        yield Paragraph(_against(evaluation, baseline))
    resamples = (first.get("bootstrap") or {}).get("resamples")
    if resamples:
        yield Paragraph(f"In brackets the 95 % bootstrap interval over query images ({resamples} resamples).")


def _against(evaluation: Evaluation, baseline: Mapping[str, Any]) -> str:
    """Return what the baseline is, and how the mean over the seeds stands to it."""
    means = {name: summary.mean if (summary := evaluation.figures.get(name)) else None for name in RECALLS}
    words = baseline_words(means, baseline.get("figures") or {}, baseline["baseline"])
    what = (
        "The baseline is regularised canonical correlation analysis in closed form on the frozen features, learned "
        "from the train split and tuned on dev."
    )
    return what if evaluation.mixed else f"{what} The run is {words}."


def caveat(facts: Facts, evaluation: Evaluation) -> str:
    """Return what a reader must know of the split: chosen on it, or how often it was looked at."""
    if evaluation.split == "dev":
        return "The checkpoint was chosen on this split, so its figures are a little optimistic."
    if evaluation.split == "test":
        looks = facts.group.facts.get("test_looks")
        if type(looks) is not int:
            return "How often the test split was looked at with this run is not known."
        return f"The test split was looked at {plural(looks, 'time')} with this run."
    return ""


def _with_interval(name: str, evaluation: Mapping[str, Any]) -> str:
    value = (evaluation.get("figures") or {}).get(name)
    interval = (evaluation.get("intervals") or {}).get(name)
    text = format_value(name, value)
    if value is None or not interval:
        return text
    low, high = (format_value(name, end).removesuffix(" %") for end in interval)
    return f"{text} ({low} – {high})"


def _zero_shot(evaluation: Evaluation) -> Iterator[Block]:
    """Yield the zero-shot figures of a split by seed; nothing where it was not asked for."""
    guesses = {seed: one["zero_shot"] for seed, one in evaluation.by_seed.items() if one.get("zero_shot")}
    if not guesses:
        return
    first = next(iter(guesses.values()))
    classes, prompts = len(first.get("classes") or ()), len(first.get("templates") or ())
    by = (": by the column ", Mono(str(first.get("column"))), f", {classes} classes, {plural(prompts, 'prompt')} each.")
    yield Paragraph((Strong(f"Zero-shot, {evaluation.pack}, {evaluation.split}"), *by))
    columns = ("figure", *(f"seed {seed}" for seed in guesses), "mean ± std (n)", "chance")
    rows = []
    for name in ZERO_SHOT:
        cells = [format_value(name, (one.get("figures") or {}).get(name)) for one in guesses.values()]
        chance = format_value(name, (first.get("chance") or {}).get(name))
        rows.append((FIGURES[name].label, *cells, spread(name, evaluation.figures.get(name)), chance))
    yield table(columns, rows, right=range(1, len(columns)))


# ---- ladder ---------------------------------------------------------------------------------------------------------


def ladder_rows(facts: Facts) -> list[tuple[str, str, Mapping[str, float | None], bool]]:
    """Return (name, source, figures, ours) from the lowest rung up, [] where no fair comparison is possible.

    The published figures are of the Flickr8k test split, so they stand only beside test figures of that set.
    """
    pack = facts.group.facts.get("pack") or {}
    test = next((e for e in facts.evaluations if e.split == "test" and e.pack == pack.get("name")), None)
    if test is None or not comparable(str(pack.get("source")), test.split, test.first["images"]):
        return []
    rows: list[tuple[str, str, Mapping[str, float | None], bool]] = []
    rows += [(rung.name, rung.source, dict(rung.figures), False) for rung in LADDER]
    ours = {name: summary.mean if (summary := test.figures.get(name)) else None for name in RECALLS}
    if all(value is None for value in ours.values()):
        return []
    rows.append((f"this run, mean of {len(test.by_seed)}", facts.group.name, ours, True))
    return sorted(rows, key=lambda row: row[2].get("i2t_r10") or 0.0)


def ladder_section(facts: Facts) -> Section:
    """Return the run among published figures, or what keeps it from standing there."""
    rows = ladder_rows(facts)
    if not rows:
        return Section("ladder", "Ladder", (Paragraph(_no_ladder(facts)),))
    columns = ("method", *(name.replace("_r", " R@") for name in RECALLS), "source")
    cells: list[tuple[Text, ...]] = []
    for name, source, figures, ours in rows:
        values = [format_value(recall, figures.get(recall)) for recall in RECALLS]
        cells.append((Strong(name), *map(Strong, values), Mono(source)) if ours else (name, *values, source))
    text = (
        "Published figures on the 1,000 images of the Flickr8k test split, trained on Flickr8k pairs unless said; "
        "i2t is image to text, t2i is text to image."
    )
    return Section("ladder", "Ladder", (Paragraph(text), table(columns, cells, right=range(1, 7))))


def _no_ladder(facts: Facts) -> Text:
    if (facts.group.facts.get("pack") or {}).get("source") != PACK_SOURCE:
        return "Published figures are of the Flickr8k test split; this pack is another one, so they can't stand here."
    command = f"chimera eval --run {facts.group.name} --split test"
    if any(one.split == "test" and one.mixed for one in facts.evaluations):
        return ("Seeds that were not evaluated alike have no place on the ladder: run ", Mono(command), " again.")
    return ("Published figures stand only beside figures of the test split: run ", Mono(command), ".")
