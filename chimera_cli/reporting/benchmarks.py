"""The benchmark tables of a report: components, peers, tasks, and the seeds one by one."""

from collections.abc import Iterator, Mapping
from typing import Any

from chimera_cli.figures import format_seconds, format_value
from chimera_cli.reporting.document import Block, Mono, Paragraph, Section, Text, table
from chimera_cli.reporting.facts import Evidence, Facts
from chimera_cli.reporting.reading import mapping_of
from chimera_cli.reporting.training_benchmarks import training_benchmarks
from chimera_cli.reporting.words import DASH, format_ms, gib, spread, times, unmeasured

_COMPONENTS = ("component", "batch", "latency p50", "latency p95", "throughput", "peak VRAM", "of the machine's limit")


def benchmarks_section(facts: Facts) -> Section:
    """Return what the parts and the tasks cost, with the command that measures it where nothing has."""
    rows = [*_prepare_row(facts.prepare), *_loader_row(facts.loader), *_encoder_rows(facts.encoders)]
    blocks: list[Block] = [
        Paragraph("Components: latency is per batch, warmed up, with the device synchronised."),
        table(_COMPONENTS, rows, right=range(1, 6)),
        *_peers(facts.loader),
        Paragraph("Tasks: mean ± sample standard deviation over n seeds."),
        table(("task", "wall clock", "remark"), _task_rows(facts), right=(1,)),
        *_seeds(facts),
        *training_benchmarks(facts),
    ]
    return Section("benchmarks", "Benchmarks", tuple(blocks))


# ---- components -----------------------------------------------------------------------------------------------------


def _prepare_row(evidence: Evidence | None) -> list[tuple[Text, ...]]:
    """Return the row of `bench prepare`; none where it was not run: no law asks for it."""
    if evidence is None:
        return []
    figures, details = evidence.figures, evidence.details
    size = f"preparing a pack ({details.get('size', '?')} px)"
    speed = format_value("prepare_images_per_s", figures.get("prepare_images_per_s"))
    ratio = details.get("ratio_to_pillow")
    limit = _ceiling(details.get("ceiling")) + (f"; {times(ratio)} Pillow alone" if ratio is not None else "")
    return [(size, DASH, DASH, DASH, speed, DASH, limit)]


def _loader_row(evidence: Evidence | None) -> list[tuple[Text, ...]]:
    if evidence is None:
        return [unmeasured("data loader", "chimera bench loader", len(_COMPONENTS))]
    figures, details = evidence.figures, evidence.details
    feeding = f", feeding {details['config']}" if details.get("config") else ""
    name = f"data loader ({details.get('image_size', '?')} px{feeding})"
    speed = format_value("loader_images_per_s", figures.get("loader_images_per_s"))
    limit = _ceiling(details.get("ceiling")) + (f"; bound by the {bound}" if (bound := details.get("bound_by")) else "")
    return [(name, *_batch_and_latency(details), speed, gib(figures.get("vram_peak_gb")), limit)]


def _encoder_rows(evidence: Evidence | None) -> list[tuple[Text, ...]]:
    if evidence is None:
        names = ("image encoder", "text encoder")
        return [unmeasured(name, "chimera bench encoders", len(_COMPONENTS)) for name in names]
    return [
        (
            (f"{part.get('component', 'encoder')} (", Mono(str(part.get("name"))), ")"),
            *_batch_and_latency(part),
            f"{format_value('', part.get('throughput_per_s'))} {part.get('unit', '')}/s",
            gib(part.get("vram_peak_gb")),
            _ceiling(part.get("ceiling")),
        )
        for part in evidence.details.get("components") or ()
    ]


def _batch_and_latency(part: Mapping[str, Any]) -> tuple[str, str, str]:
    return (
        str(part.get("batch", DASH)),
        format_ms(part.get("latency_ms_p50")),
        format_ms(part.get("latency_ms_p95")),
    )


def _ceiling(ceiling: Mapping[str, Any] | None) -> str:
    if not ceiling or ceiling.get("share_reached") is None:
        return DASH
    return f"{100 * ceiling['share_reached']:.1f} % of {ceiling.get('name', 'what is possible')}"


# ---- peers ----------------------------------------------------------------------------------------------------------


def _peers(loader: Evidence | None) -> Iterator[Block]:
    """Yield the table of the loader against its peers where they were measured."""
    peers = [] if loader is None else loader.details.get("peers") or []
    if loader is None or not peers:
        return
    against = mapping_of(loader.details.get("against"))
    columns = ("loader", "median (range)", "ours, equal output", "ours, pixels alone", "settings")
    ours = [(f"chimera, {one.get('name')}", _rate(one), DASH, DASH, DASH) for one in against.get("ours") or ()]
    yield Paragraph(
        f"The data loader against peers in the same call{_on_which(against)}. Multiples of a peer's throughput are of "
        "ours with equal output (augmented, normalised floats) and of ours reading pixels alone."
    )
    yield table(columns, [*ours, *map(_peer_row, peers)], right=(1, 2, 3))


def _on_which(against: Mapping[str, Any]) -> str:
    """Return the images that all loaders read, in words."""
    if not against.get("images"):
        return ""
    size = f" of {against.get('width', '?')} x {against.get('height', '?')} px"
    mean = f", {against['mean_kb']:.0f} KB on average" if against.get("mean_kb") else ""
    return f", on the same {against['images']:,} JPEGs{size}{mean}"


def _peer_row(peer: Mapping[str, Any]) -> tuple[Text, ...]:
    ratios = (times(peer.get("ratio_equal_output")), times(peer.get("ratio_gather")))
    failed, shards = peer.get("failed"), peer.get("ratio_shards")
    words = f"failed: {failed}" if failed else _settings(peer)
    words += "" if shards is None else f"; ours from the same shards {times(shards)}"
    return (Mono(str(peer.get("name"))), _rate(peer), *ratios, words)


def _rate(lap: Mapping[str, Any]) -> str:
    """Return images per second with the lowest and the highest round."""
    words = format_value("loader_images_per_s", lap.get("images_per_s"))
    ends = lap.get("spread")
    if lap.get("images_per_s") is None or not isinstance(ends, list | tuple) or len(ends) != 2:
        return words
    low, high = (format_value("loader_images_per_s", end).removesuffix(" images/s") for end in ends)
    return f"{words} ({low} – {high})"


def _settings(peer: Mapping[str, Any]) -> str:
    """Return in words what a peer was run with."""
    value = peer.get("settings")
    if isinstance(value, Mapping):
        return ", ".join(f"{str(key).replace('_', ' ')} {item}" for key, item in value.items()) or DASH
    return str(value or DASH)


# ---- tasks ----------------------------------------------------------------------------------------------------------


def _task_rows(facts: Facts) -> list[tuple[Text, ...]]:
    rows: list[tuple[Text, ...]] = [_sanity_row(facts.sanity)]
    for name, task in (
        ("epoch_10k_pairs_s", "epoch of 10,000 pairs, from cold"),
        ("epoch_10k_pairs_cached_s", "epoch of 10,000 pairs, features cached"),
        ("features_s", "feature extraction"),
        ("wall_s", "whole training of one seed"),
    ):
        rows.append((task, spread(name, facts.figures.get(name)), _task_remark(facts, name)))
    return [*rows, *_recall_row(facts.retrieval)]


def _recall_row(evidence: Evidence | None) -> list[tuple[Text, ...]]:
    """Return the row of `bench retrieval`; none where it was not run: no law asks for it."""
    if evidence is None or evidence.details.get("ranks_s") is None:
        return []
    details = evidence.details
    sizes = f"{details.get('images') or 0:,} images x {details.get('captions') or 0:,} captions"
    remark = f"{times(details.get('ratio'))} the bare matrix product; {gib(details.get('extra_memory_gb'))} extra"
    name = f"recall of {sizes}, {details.get('dim', '?')} dimensions"
    return [(name, format_seconds(details["ranks_s"]), remark)]


def _sanity_row(evidence: Evidence | None) -> tuple[Text, ...]:
    if evidence is None:
        return unmeasured("proof of life, 200 updates", "chimera train sanity --seed 0", 3)
    figures, details = evidence.figures, evidence.details
    loss = f"loss {format_value('loss_first', figures.get('loss_first'))} → {_loss(figures, 'loss_last')}"
    remark = f"{loss}, drop {_loss(figures, 'loss_drop')}; batch {details.get('batch')}, {details.get('image_size')} px"
    return (
        f"proof of life, {details.get('updates', 200)} updates",
        format_value("wall_s", figures.get("wall_s")),
        remark,
    )


def _loss(figures: Mapping[str, Any], name: str) -> str:
    return format_value(name, figures.get(name))


def _task_remark(facts: Facts, name: str) -> str:
    if name == "wall_s":
        return spread("pairs_per_s", facts.figures.get("pairs_per_s"))
    if name == "epoch_10k_pairs_s":
        return "feature extraction included"
    return ""


def _seeds(facts: Facts) -> Iterator[Block]:
    """Yield what each seed took: time, memory, and the checkpoint it kept."""
    if not facts.results:
        return
    columns = (
        "seed",
        "wall clock",
        "throughput",
        "first loss",
        "last loss",
        "checkpoint kept",
        "peak RAM",
        "peak VRAM",
    )
    yield Paragraph("Seeds one by one:")
    yield table(columns, [_seed_row(seed, result) for seed, result in facts.results.items()], right=range(1, 8))


def _seed_row(seed: int, result: Mapping[str, Any]) -> tuple[Text, ...]:
    figures, details = result.get("figures") or {}, result.get("details") or {}
    names = ("pairs_per_s", "loss_first", "loss_last")
    kept = DASH if details.get("best_step") is None else f"update {details['best_step']}"
    seconds = figures.get("wall_s")
    return (
        f"seed {seed}",
        DASH if seconds is None else format_seconds(seconds),
        *(format_value(name, figures.get(name)) for name in names),
        kept,
        *(format_value(name, figures.get(name)) for name in ("ram_peak_gb", "vram_peak_gb")),
    )
