"""The report's sections from its facts: every missing figure is a dash or the command that measures it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from chimera_cli.figures import FIGURES, RECALLS, RETRIEVAL, format_spread, format_value
from chimera_cli.reporting.document import Block, Code, Document, Mono, Paragraph, Section, Span, Strong, Text, table
from chimera_cli.reporting.facts import Evaluation, Evidence, Facts
from chimera_cli.slo.ladder import LADDER, PACK_SOURCE, comparable
from chimera_cli.statistics import Summary

DASH = "–"


@dataclass(frozen=True, slots=True)
class Verdict:
    """One condition of an objective as the report shows it; what all of them share stands in the first one alone."""

    objective: str
    title: str
    law: str
    measured: str
    verdict: str
    evidence: Text


@dataclass(frozen=True, slots=True)
class Verdicts:
    """The outcome of `slo check`: `remarks` are sentences that every output of it must carry.

    Without `law` the objectives are a check of the plumbing, and the report says so before anything else.
    """

    rows: tuple[Verdict, ...]
    remarks: tuple[str, ...]
    command: str
    law: bool = True


def build(facts: Facts, verdicts: Verdicts) -> Document:
    """Return the report as a document."""
    sections = (
        _benchmarks(facts),
        _slo(verdicts),
        _retrieval(facts),
        _ladder(facts),
        _memory(facts),
        _environment(facts),
        Section("configuration", "Configuration", (Code(facts.config or "# not recorded", "yaml"),)),
        _reproduce(facts, verdicts),
    )
    return Document("Chimera benchmarks", (*_not_the_law(verdicts), *_lead(facts)), sections)


# ---- what this is ---------------------------------------------------------------------------------------------------


def _lead(facts: Facts) -> tuple[Block, ...]:
    group, pack = facts.group, facts.group.facts.get("pack") or {}
    seeds = f"{len(facts.seeds)} seed{'s' if len(facts.seeds) != 1 else ''} ({', '.join(map(str, facts.seeds))})"
    when = group.facts.get("finished_at")
    state = f", {group.status} {when[:16].replace('T', ' ')} UTC." if when else f", {group.status}."
    what: Text = ("Run ", Mono(group.name), f": {seeds} on the pack ", Mono(str(pack.get("name", "none"))), state)
    where: Text = (
        hardware_line(group.facts.get("hardware") or {}),
        f"; chimera {group.facts.get('chimera_version', '?')}, ",
        *_commit(facts.environment),
        ", source ",
        Mono(str(group.facts.get("source_hash", "?"))[:12]),
        ".",
    )
    return (*_warnings(facts), Paragraph(what), Paragraph(where))


def _not_the_law(verdicts: Verdicts) -> tuple[Block, ...]:
    if verdicts.law:
        return ()
    text = " The objectives in this report check the plumbing and carry no weight."
    return (Paragraph((Strong("Not the law."), text), quoted=True),)


def _warnings(facts: Facts) -> tuple[Block, ...]:
    found: list[Block] = []
    if (facts.group.facts.get("pack") or {}).get("source") == "toy":
        text = " The figures below show that the plumbing works; they say nothing about photographs."
        found.append(Paragraph((Strong("Built-in toy set."), text), quoted=True))
    missing = [seed for seed in facts.seeds if seed not in facts.results]
    if missing:
        seeds = ", ".join(map(str, missing))
        found.append(Paragraph((Strong("Incomplete."), f" No result of seed {seeds}."), quoted=True))
    return tuple(found)


def hardware_line(hardware: Mapping[str, Any]) -> str:
    """Return the machine in one line."""
    cpu = f"{hardware.get('cpu') or 'unknown processor'}, {hardware.get('cores', '?')} cores"
    return f"{hardware['gpu']}; {cpu}" if hardware.get("gpu") else f"{cpu}, no GPU"


def _commit(environment: Mapping[str, Any]) -> tuple[Any, ...]:
    commit = environment.get("git_commit")
    if not commit:
        return ("no git commit",)
    return ("commit ", Mono(commit[:12]), " with uncommitted changes" if environment.get("git_dirty") else "")


# ---- the two benchmark tables ---------------------------------------------------------------------------------------


def _benchmarks(facts: Facts) -> Section:
    columns = ("component", "batch", "latency p50", "latency p95", "throughput", "peak VRAM", "of the machine's limit")
    components = table(columns, [*_loader_row(facts.loader), *_encoder_rows(facts.encoders)], right=range(1, 6))
    seconds = "wall clock"
    tasks = table(("task", seconds, "remark"), _task_rows(facts), right=(1,))
    return Section(
        "benchmarks",
        "Benchmarks",
        (
            Paragraph("Components: latency is per batch, warmed up, with the device synchronised."),
            components,
            Paragraph("Tasks: mean ± sample standard deviation over n seeds."),
            tasks,
        ),
    )


def _loader_row(evidence: Evidence | None) -> list[tuple[Text, ...]]:
    if evidence is None:
        return [_unmeasured("data loader", "chimera bench loader", 7)]
    figures, details = evidence.figures, evidence.details
    feeding = f", feeding {details['config']}" if details.get("config") else ""
    name = f"data loader ({details.get('image_size', '?')} px{feeding})"
    speed = format_value("loader_images_per_s", figures.get("loader_images_per_s"))
    limit = _ceiling(details.get("ceiling")) + (f"; bound by the {bound}" if (bound := details.get("bound_by")) else "")
    return [(name, *_batch_and_latency(details), speed, _gib(figures.get("vram_peak_gb")), limit)]


def _encoder_rows(evidence: Evidence | None) -> list[tuple[Text, ...]]:
    if evidence is None:
        return [_unmeasured(name, "chimera bench encoders", 7) for name in ("image encoder", "text encoder")]
    return [
        (
            (f"{part['component']} (", Mono(str(part["name"])), ")"),
            *_batch_and_latency(part),
            f"{format_value('', part.get('throughput_per_s'))} {part.get('unit', '')}/s",
            _gib(part.get("vram_peak_gb")),
            _ceiling(part.get("ceiling")),
        )
        for part in evidence.details.get("components", ())
    ]


def _batch_and_latency(part: Mapping[str, Any]) -> tuple[str, str, str]:
    return (
        str(part.get("batch", DASH)),
        format_ms(part.get("latency_ms_p50")),
        format_ms(part.get("latency_ms_p95")),
    )


def format_ms(value: float | None) -> str:
    """Return milliseconds with three meaningful digits."""
    if value is None:
        return DASH
    return f"{value:,.{0 if value >= 100 else 1 if value >= 10 else 2}f} ms"


def _gib(value: float | None) -> str:
    return format_value("vram_peak_gb", value)


def _ceiling(ceiling: Mapping[str, Any] | None) -> str:
    if not ceiling or ceiling.get("share_reached") is None:
        return DASH
    return f"{100 * ceiling['share_reached']:.1f} % of {ceiling['name']}"


def _unmeasured(name: str, command: str, width: int) -> tuple[Text, ...]:
    """Return a row of dashes that names what would fill it in."""
    return (((f"{name}: not measured here, run ", Mono(command))), *[DASH] * (width - 1))


def _task_rows(facts: Facts) -> list[tuple[Text, ...]]:
    rows: list[tuple[Text, ...]] = [_sanity_row(facts.sanity)]
    for name, task in (
        ("epoch_10k_pairs_s", "epoch of 10,000 pairs, from cold"),
        ("epoch_10k_pairs_cached_s", "epoch of 10,000 pairs, features cached"),
        ("features_s", "feature extraction"),
        ("wall_s", "whole training of one seed"),
    ):
        rows.append((task, spread(name, facts.figures.get(name)), _task_remark(facts, name)))
    return rows


def _sanity_row(evidence: Evidence | None) -> tuple[Text, ...]:
    if evidence is None:
        return _unmeasured("proof of life, 200 updates", "chimera train sanity --seed 0", 3)
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


def spread(name: str, summary: Summary | None) -> str:
    """Return a figure over seeds as text."""
    return DASH if summary is None else format_spread(name, summary.mean, summary.std, summary.n)


# ---- verdicts -------------------------------------------------------------------------------------------------------


def verdicts_of(check: Mapping[str, Any], remarks: Sequence[str] = ()) -> Verdicts:
    """Return the result of `slo check`, as JSON has it, for a report; `remarks` come before its own."""
    rows = []
    for objective in check["objectives"]:
        for index, condition in enumerate(objective["conditions"]):
            shared = (objective["id"], objective["title"], objective["verdict"]) if index == 0 else ("", "", "")
            name, title, word = shared
            evidence: Text = _evidence(objective) if index == 0 else ""
            rows.append(Verdict(name, title, condition["law"], condition["measured"], word, evidence))
    return Verdicts(tuple(rows), (*remarks, *check["remarks"]), str(check["command"]), bool(check["law"]))


def _evidence(objective: Mapping[str, Any]) -> Text:
    """Return which run the verdict rests on, why it is no pass, and what would measure it."""
    run, reason = objective["run"], objective["reason"]
    parts: list[Span] = [Mono(run)] if run and run not in reason else []
    if reason:
        parts += [*(["; "] if parts else []), reason]
    if objective["measure"]:
        parts += ["; run " if parts else "run ", Mono(objective["measure"])]
    return tuple(parts)


def _slo(verdicts: Verdicts) -> Section:
    rows: list[tuple[Text, ...]] = []
    for row in verdicts.rows:
        name: Text = (Mono(row.objective), f" {row.title}") if row.objective else ""
        word: Text = Strong(row.verdict) if row.verdict not in ("pass", "") else row.verdict
        rows.append((name, row.law, row.measured, word, row.evidence))
    remarks = tuple(Paragraph(_sentence(remark), quoted=True) for remark in verdicts.remarks)
    columns = ("objective", "law", "measured", "verdict", "evidence")
    return Section("slo", "Service level objectives", (*remarks, table(columns, rows)))


def _sentence(text: str) -> str:
    """Return a remark as a sentence of its own."""
    return text[:1].upper() + text[1:] + ("" if text.endswith((".", "!", "?")) else ".")


# ---- retrieval ------------------------------------------------------------------------------------------------------


def _retrieval(facts: Facts) -> Section:
    if not facts.evaluations:
        missing: Text = ("Not evaluated: run ", Mono(f"chimera eval --run {facts.group.name}"), ".")
        return Section("retrieval", "Retrieval", (Paragraph(missing),))
    blocks: list[Block] = []
    for evaluation in facts.evaluations:
        blocks += _evaluation(facts, evaluation)
    return Section("retrieval", "Retrieval", tuple(blocks))


def _evaluation(facts: Facts, evaluation: Evaluation) -> list[Block]:
    first = evaluation.first
    counts = f": {first['images']:,} images, {first['captions']:,} captions. "
    text = (Strong(f"{evaluation.pack}, {evaluation.split}"), counts, _caveat(facts, evaluation))
    columns = ("figure", *(f"seed {seed}" for seed in evaluation.by_seed), "mean ± std (n)", "chance")
    rows = []
    for name in RETRIEVAL:
        cells = [_with_interval(name, one) for one in evaluation.by_seed.values()]
        chance = format_value(name, (first.get("chance") or {}).get(name))
        rows.append((FIGURES[name].label, *cells, spread(name, evaluation.figures.get(name)), chance))
    resamples = (first.get("bootstrap") or {}).get("resamples")
    note = f"In brackets the 95 % bootstrap interval over query images ({resamples} resamples)." if resamples else ""
    return [Paragraph(text), table(columns, rows, right=range(1, len(columns))), *([Paragraph(note)] if note else [])]


def _caveat(facts: Facts, evaluation: Evaluation) -> str:
    """Return what a reader must know of the split: chosen on it, or how often it was looked at."""
    if evaluation.split == "dev":
        return "The checkpoint was chosen on this split, so its figures are a little optimistic."
    if evaluation.split == "test":
        looks = int(facts.group.facts.get("test_looks") or 0)
        return f"The test split was looked at {looks} time{'' if looks == 1 else 's'} with this run."
    return ""


def _with_interval(name: str, evaluation: Mapping[str, Any]) -> str:
    value = evaluation["figures"].get(name)
    interval = (evaluation.get("intervals") or {}).get(name)
    text = format_value(name, value)
    if value is None or not interval:
        return text
    low, high = (format_value(name, end).removesuffix(" %") for end in interval)
    return f"{text} ({low} – {high})"


# ---- ladder ---------------------------------------------------------------------------------------------------------


def ladder_rows(facts: Facts) -> list[tuple[str, str, Mapping[str, float | None], bool]]:
    """Return (name, source, figures, ours) from the lowest rung up, [] where no fair comparison is possible.

    The published figures are of the Flickr8k test split, so they stand only beside test figures of that set.
    """
    pack = facts.group.facts.get("pack") or {}
    test = next((e for e in facts.evaluations if e.split == "test" and e.pack == pack.get("name")), None)
    if test is None or not comparable(str(pack.get("source")), test.split, int(test.first["images"])):
        return []
    rows: list[tuple[str, str, Mapping[str, float | None], bool]] = []
    rows += [(rung.name, rung.source, dict(rung.figures), False) for rung in LADDER]
    ours = {name: summary.mean if (summary := test.figures.get(name)) else None for name in RECALLS}
    rows.append((f"this run, mean of {len(test.by_seed)}", facts.group.name, ours, True))
    return sorted(rows, key=lambda row: row[2].get("i2t_r10") or 0.0)


def _ladder(facts: Facts) -> Section:
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
    return ("Published figures stand only beside figures of the test split: run ", Mono(command), ".")


# ---- memory, environment, commands ----------------------------------------------------------------------------------


def _memory(facts: Facts) -> Section:
    names = ("ram_peak_gb", "vram_peak_gb", "vram_reserved_peak_gb", "gpu_util_mean")
    rows = [("training, highest of all seeds", *(_highest(name, facts.figures.get(name)) for name in names))]
    for title, evidence in (
        ("proof of life", facts.sanity),
        ("data loader", facts.loader),
        ("encoders", facts.encoders),
    ):
        if evidence is not None:
            rows.append((title, *(format_value(name, evidence.figures.get(name)) for name in names)))
    columns = ("task", *(FIGURES[name].label for name in names))
    return Section("memory", "Memory and utilisation", (table(columns, rows, right=range(1, 5)),))


def _highest(name: str, summary: Summary | None) -> str:
    """Return the peak over seeds; a utilisation is a mean, not a peak."""
    if summary is None:
        return DASH
    return format_value(name, summary.mean if name == "gpu_util_mean" else max(summary.values))


def _environment(facts: Facts) -> Section:
    environment = facts.environment
    if not environment:
        return Section("environment", "Environment", (Paragraph("Not recorded."),))
    torch = environment.get("torch") or {}
    ram = environment.get("ram_gb")
    pairs: list[tuple[str, Any]] = [
        ("processor", f"{environment.get('cpu')}, {environment.get('cores')} cores"),
        ("memory", None if ram is None else f"{ram:g} GiB"),
        ("GPU", environment.get("gpu") or "none"),
        ("driver", environment.get("driver")),
        ("system", environment.get("platform")),
        ("Python", environment.get("python")),
        ("torch", f"{torch.get('version')}, CUDA {torch.get('cuda') or 'none'}"),
        *((name, version) for name, version in (environment.get("packages") or {}).items() if name != "torch"),
        ("git commit", Mono(environment["git_commit"]) if environment.get("git_commit") else None),
        ("requirements.lock", Mono(environment["lock_sha256"]) if environment.get("lock_sha256") else None),
    ]
    rows = [(name, value if isinstance(value, Mono) else str(value)) for name, value in pairs if value]
    return Section("environment", "Environment", (table(("", "of the first seed"), rows),))


def _reproduce(facts: Facts, verdicts: Verdicts) -> Section:
    facts_of = facts.group.facts
    evidence = [item.group.facts for item in (facts.sanity, facts.loader, facts.encoders) if item is not None]
    pack = facts_of.get("pack") or {}
    splits = [e.split for e in facts.evaluations if e.pack == pack.get("name")] or ["dev"]
    commands = [
        prepare_command(pack),
        *(str(item.get("command")) for item in evidence),
        str(facts_of.get("command")),
        *(f"chimera eval --run latest --split {split}" for split in splits),
        verdicts.command,
        "chimera report --run latest > benchmarks.md",
    ]
    text = "With the commit and the lock file above installed by `make install`:"
    lines = "\n".join(_unique(command for command in commands if command and command != "None"))
    return Section("reproduce", "Reproduce", (Paragraph(tuple(_code_spans(text))), Code(lines, "sh")))


def prepare_command(pack: Mapping[str, Any]) -> str:
    """Return the command that makes the pack again; the folder of the source is the reader's own."""
    if not pack:
        return ""
    source, name = str(pack.get("source")), str(pack.get("name"))
    return f"chimera data prepare {source}" + ("" if name == source else f" --name {name}")


def _code_spans(text: str) -> Sequence[str | Mono]:
    return [Mono(part) if index % 2 else part for index, part in enumerate(text.split("`"))]


def _unique(commands: Any) -> list[str]:
    return list(dict.fromkeys(commands))
