"""The way to a recall in a report: `bench speedrun` over its seeds, and `bench train` beside a peer."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from chimera_cli.figures import format_seconds, format_spread
from chimera_cli.reporting.document import Block, Mono, Paragraph, Text, table
from chimera_cli.reporting.facts import Facts, newest_like
from chimera_cli.reporting.reading import mapping_of, number_of, results
from chimera_cli.reporting.words import DASH, plural, times
from chimera_cli.statistics import Summary, summarise_known

_KINDS = {"cold": "nothing cached", "cached": "features cached"}


def training_benchmarks(facts: Facts) -> Iterator[Block]:
    """Yield the tables of the newest speedrun and race that fit the reported run; none where they were not run."""
    home = facts.group.path.parent.parent
    for kind, blocks in (("bench-speedrun", speedrun_blocks), ("bench-train", race_blocks)):
        found = newest_like(home, facts.group, kind)
        if found is None:
            continue
        whole = [result for _file, result, problem in results(found.group) if problem is None]
        if whole:
            yield from blocks(whole)


# ---- bench speedrun -------------------------------------------------------------------------------------------------


def speedrun_blocks(seeds: Sequence[Mapping[str, Any]]) -> Iterator[Block]:
    """Yield the time to the target over seeds, cold and cached; a seed that missed it is told, never averaged."""
    details = mapping_of(seeds[0].get("details"))
    plain = number_of(mapping_of(details.get("plain")).get("seconds"))
    against = "" if plain is None else f", of {format_seconds(plain)}"
    yield Paragraph(
        f"From the pack to dev text to image R@10 of {_percent(details.get('target'))}: the clock holds the model, the "
        "features of train and dev and the updates; evaluations are not in it. A plain pass is both towers in eager "
        f"float32 once over the images and captions of train and dev{against}, drawn out from a random sample."
    )
    rows = [_speedrun_row(kind, name, seeds) for kind, name in _KINDS.items() if _has(seeds, f"{kind}_s")]
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


def share_words(share: Summary) -> str:
    """Return a share as mean and standard deviation, with the digits that bars on it have."""
    spread = "" if share.std is None else f" ± {share.std:.3f}"
    return f"{share.mean:.3f}{spread} (n={share.n})"


# ---- bench train ----------------------------------------------------------------------------------------------------


def race_blocks(seeds: Sequence[Mapping[str, Any]]) -> Iterator[Block]:
    """Yield our training beside the peer's: the way to the target, and pairs per second of full fine-tuning."""
    figures, details = mapping_of(seeds[0].get("figures")), mapping_of(seeds[0].get("details"))
    peer, basis = str(details.get("against") or "the peer"), mapping_of(details.get("locked")).get("basis")
    rows: list[tuple[Text, ...]] = []
    for kind, name in _KINDS.items():
        if figures.get(f"{kind}_s") is not None or figures.get(f"ratio_{kind}") is not None:
            task = f"locked, to R@10 of {_percent(details.get('target'))}, {name}"
            ratio = ratio_words(basis, figures.get(f"ratio_{kind}"))
            rows.append((task, _seconds(figures.get(f"{kind}_s")), _seconds(figures.get("peer_s")), ratio))
    if figures.get("full_pairs_per_s") is not None:
        rates = (_rate(figures.get(f"{who}pairs_per_s")) for who in ("full_", "full_peer_"))
        rows.append(("full fine-tuning", *rates, times(figures.get("ratio_full"))))
    if not rows:
        return
    yield Paragraph(
        ("Training beside ", Mono(peer), ": the same towers, weights, pairs in their order, batch and threads, in turn "
         f"in one run; evaluations count for neither. Ours is ahead by the last column{_basis(basis)}.")
    )  # fmt: skip
    yield table(("task", "chimera", peer, "ahead by"), rows, right=(1, 2, 3))


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


def _seconds(value: float | None) -> str:
    return DASH if value is None else format_seconds(value)


def _rate(value: float | None) -> str:
    return DASH if value is None else f"{value:,.1f} pairs/s"
