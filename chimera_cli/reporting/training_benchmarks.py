"""The way to a recall in a report: `bench speedrun` over its seeds, and `bench train` beside a peer."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from chimera_cli.figures import format_seconds, format_spread
from chimera_cli.reporting.document import Block, Mono, Paragraph, Span, Strong, Text, table
from chimera_cli.reporting.facts import Evidence, Facts
from chimera_cli.reporting.reading import mapping_of, number_of, read, read_environment
from chimera_cli.reporting.words import DASH, commit_words, plural, sentence, times
from chimera_cli.runs import Group
from chimera_cli.statistics import Summary, summarise_known

_TASKS = ("locked", "full")
_KINDS = {"cold": "nothing cached", "cached": "features cached"}


def training_benchmarks(facts: Facts) -> Iterator[Block]:
    """Yield the tables of the newest speedrun and race that fit the reported run; none where they were not run.

    Seeds whose result is missing or was edited are named, and then nothing has a mean.
    """
    for title, evidence in (("Time to a recall", facts.speedrun), ("Training beside a peer", facts.race)):
        if evidence is None:
            continue
        seeds, problems = _whole(evidence.group)
        yield Paragraph((Strong(title), ": ", *_origin(evidence.group)))
        for file, problem in problems.items():
            yield Paragraph((Mono(file), f" {problem}, so there is no mean over the seeds."), quoted=True)
        if seeds:
            yield from race_blocks(seeds) if evidence is facts.race else speedrun_blocks(seeds, not problems)


def over_seeds(evidence: Evidence, names: Sequence[str]) -> dict[str, Summary | None]:
    """Return figures over all seeds of a benchmark; None where a seed lacks them or has no whole result."""
    seeds, problems = _whole(evidence.group)
    values = {name: [mapping_of(seed.get("figures")).get(name) for seed in seeds] for name in names}
    return {name: None if problems else summarise_known(values[name]) for name in names}


def _whole(group: Group) -> tuple[list[Mapping[str, Any]], dict[str, str]]:
    """Return the results of the seeds of a group, and by name what is wrong with those that are none."""
    seeds: list[Mapping[str, Any]] = []
    problems: dict[str, str] = {}
    for seed in group.seeds:
        path = group.seed_dir(seed) / "result.json"
        result, problem = read(path) if path.is_file() else ({}, "is missing")
        if problem is None and result.get("seed", seed) != seed:
            problem = f"is the result of seed {result['seed']}"
        if problem is None:
            seeds.append(result)
        else:
            problems[f"{group.name}/seed-{seed}/result.json"] = problem
    return seeds, problems


def _origin(group: Group) -> tuple[Span, ...]:
    """Return which run the figures below are of: its name, recipe, command and commit."""
    first = next((path for seed in group.seeds if (path := group.seed_dir(seed) / "environment.json").is_file()), None)
    environment = {} if first is None else read_environment(first)[0]
    recipe, settings = group.facts.get("label"), group.facts.get("config_hash")
    words: list[Span] = ["run ", Mono(group.name)]
    words += [", recipe ", Mono(str(recipe))] if recipe else []
    words += [", settings ", Mono(str(settings)[:12])] if settings else []
    return (*words, ", ", *commit_words(environment), ", by ", Mono(str(group.facts.get("command"))), ".")


# ---- bench speedrun -------------------------------------------------------------------------------------------------


def speedrun_blocks(seeds: Sequence[Mapping[str, Any]], complete: bool = True) -> Iterator[Block]:
    """Yield the time to the target over seeds, cold and cached; a seed that missed it is told, never averaged.

    Where seeds lack, `complete` is False and each of the others stands for itself.
    """
    details = mapping_of(seeds[0].get("details"))
    plain = number_of(mapping_of(details.get("plain")).get("seconds"))
    against = "" if plain is None else f", of {format_seconds(plain)}"
    yield Paragraph(
        f"From the pack to dev text to image R@10 of {_percent(details.get('target'))}: the clock holds the model, the "
        "features of train and dev and the updates; evaluations are not in it. A plain pass is both towers in eager "
        f"float32 once over the images and captions of train and dev{against}, drawn out from a random sample."
    )
    row = _speedrun_row if complete else _each_seed
    rows = [row(kind, name, seeds) for kind, name in _KINDS.items() if _has(seeds, f"{kind}_s")]
    yield table(("features", "time to the target", "share of a plain pass"), rows, right=(1, 2))


def _has(seeds: Sequence[Mapping[str, Any]], name: str) -> bool:
    return any(name in mapping_of(seed.get("figures")) for seed in seeds)


def _speedrun_row(kind: str, name: str, seeds: Sequence[Mapping[str, Any]]) -> tuple[Text, ...]:
    values = [mapping_of(seed.get("figures")).get(f"{kind}_s") for seed in seeds]
    summary = summarise_known(values)
    if summary is None:
        return (name, f"missed by {values.count(None)} of {plural(len(seeds), 'seed')}", DASH)
    share = summarise_known([mapping_of(seed.get("figures")).get(f"{kind}_share") for seed in seeds])
    time = format_spread("wall_s", summary.mean, summary.std, summary.n)
    return (name, time, DASH if share is None else share_words(share))


def _each_seed(kind: str, name: str, seeds: Sequence[Mapping[str, Any]]) -> tuple[Text, ...]:
    times_s = [mapping_of(seed.get("figures")).get(f"{kind}_s") for seed in seeds]
    shares = [mapping_of(seed.get("figures")).get(f"{kind}_share") for seed in seeds]
    return (name, ", ".join(map(_reached, times_s)), ", ".join(DASH if one is None else f"{one:.3f}" for one in shares))


def share_words(share: Summary) -> str:
    """Return a share as mean and standard deviation, with the digits that bars on it have."""
    spread = "" if share.std is None else f" ± {share.std:.3f}"
    return f"{share.mean:.3f}{spread} (n={share.n})"


# ---- bench train ----------------------------------------------------------------------------------------------------


def race_blocks(seeds: Sequence[Mapping[str, Any]]) -> Iterator[Block]:
    """Yield our training beside the peer's: the way to the target, and pairs per second of full fine-tuning.

    A target that ours missed and a peer that failed have words in the place of their figures, and the reason below.
    """
    figures, details = mapping_of(seeds[0].get("figures")), mapping_of(seeds[0].get("details"))
    peer, locked, full = str(details.get("against") or "the peer"), *(mapping_of(details.get(task)) for task in _TASKS)
    basis, broke = locked.get("basis"), mapping_of(locked.get("peer")).get("failed")
    rows: list[tuple[Text, ...]] = []
    for kind, name in _KINDS.items() if locked else ():
        task = f"locked, to R@10 of {_percent(details.get('target'))}, {name}"
        theirs = "failed" if broke else _seconds(figures.get("peer_s"))
        ratio = ratio_words(basis, figures.get(f"ratio_{kind}"))
        rows.append((task, _reached(figures.get(f"{kind}_s")), theirs, ratio))
    if figures.get("full_pairs_per_s") is not None:
        theirs = "failed" if full.get("failed") else _rate(figures.get("full_peer_pairs_per_s"))
        rows.append(("full fine-tuning", _rate(figures["full_pairs_per_s"]), theirs, times(figures.get("ratio_full"))))
    if not rows:
        return
    yield Paragraph(
        ("Training beside ", Mono(peer), ": the same towers, weights, pairs in their order, batch and threads, in turn "
         f"in one run; evaluations count for neither. Ours is ahead by the last column{_basis(basis)}.")
    )  # fmt: skip
    yield table(("task", "chimera", peer, "ahead by"), rows, right=(1, 2, 3))
    for task, reason in (("on the way to the recall", broke), ("in full fine-tuning", full.get("failed"))):
        if reason:
            yield Paragraph((Mono(peer), f" failed {task}: {sentence(' '.join(str(reason).split()))}"))


def _basis(basis: Any) -> str:
    """Return how to read a ratio that is not measured to its end."""
    return {
        "at least": "; the peer was stopped, or ended, without the target",
        "projected": "; projected: the pairs that ours needed, at the peer's measured rate",
    }.get(str(basis), "")


def ratio_words(basis: Any, ratio: float | None) -> str:
    """Return by how much the peer took longer, and whether that is measured, a lower end, or projected."""
    before, after = {"at least": ("more than ", ""), "projected": ("", " projected")}.get(str(basis), ("", ""))
    return DASH if ratio is None else f"{before}{times(ratio)}{after}"


def _percent(share: Any) -> str:
    number = number_of(share)
    return "?" if number is None else f"{100 * number:g} %"


def _reached(value: float | None) -> str:
    """Return our time to the target, or that it was missed."""
    return "missed" if value is None else format_seconds(value)


def _seconds(value: float | None) -> str:
    return DASH if value is None else format_seconds(value)


def _rate(value: float | None) -> str:
    return DASH if value is None else f"{value:,.1f} pairs/s"
