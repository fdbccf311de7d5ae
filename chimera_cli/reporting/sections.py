"""The report as a document: what it is about, then section by section from its facts."""

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from chimera_cli.figures import FIGURES, format_value
from chimera_cli.reporting.benchmarks import benchmarks_section
from chimera_cli.reporting.document import Block, Code, Document, Mono, Paragraph, Section, Strong, Text, table
from chimera_cli.reporting.facts import Evaluation, Facts
from chimera_cli.reporting.reading import mapping_of
from chimera_cli.reporting.retrieval import ladder_section, retrieval_section
from chimera_cli.reporting.training_benchmarks import over_seeds
from chimera_cli.reporting.verdicts import Verdicts, slo_section
from chimera_cli.reporting.words import DASH, commit_words, hardware_line, plural
from chimera_cli.statistics import Summary


def build(facts: Facts, verdicts: Verdicts) -> Document:
    """Return the report as a document."""
    sections = (
        benchmarks_section(facts),
        slo_section(facts, verdicts),
        retrieval_section(facts),
        ladder_section(facts),
        _memory(facts),
        _environment(facts),
        Section("configuration", "Configuration", (Code(facts.config or "# not recorded", "yaml"),)),
        _reproduce(facts, verdicts),
    )
    return Document("Chimera benchmarks", (*warnings(facts, verdicts), *_lead(facts)), sections)


# ---- what this is ---------------------------------------------------------------------------------------------------


def _lead(facts: Facts) -> tuple[Block, ...]:
    where: Text = (
        hardware_line(facts.group.facts.get("hardware") or {}),
        f"; chimera {facts.group.facts.get('chimera_version', '?')}, ",
        *commit_words(facts.environment),
        ", source ",
        Mono(str(facts.group.facts.get("source_hash", "?"))[:12]),
        ".",
    )
    return (Paragraph(run_line(facts)), Paragraph(where), *_start(facts), *_plan(facts))


def run_line(facts: Facts) -> Text:
    """Return which run this is: name, seeds, pack, status and time."""
    group, pack = facts.group, facts.group.facts.get("pack") or {}
    stream = (group.facts.get("stream") or {}).get("pattern")
    seeds = f"{plural(len(facts.seeds), 'seed')} ({', '.join(map(str, facts.seeds))})"
    when = group.facts.get("finished_at")
    state = f", {group.status} {when[:16].replace('T', ' ')} UTC." if when else f", {group.status}."
    name = Mono(str(pack.get("name", "none")))
    on = (" on the stream ", Mono(str(stream)), ", dev and test of the pack ") if stream else (" on the pack ",)
    return ("Run ", Mono(group.name), f": {seeds}", *on, name, state)


def _start(facts: Facts) -> tuple[Block, ...]:
    """Return which runs this one combines or began with, () where it began with pretrained towers alone."""
    if parts := facts.group.combines:
        names = [Mono(str(part.get("run"))) for part in parts]
        told = tuple(item for name in names for item in (", ", name))[1:]
        times = " Times are those of one training after another." if facts.figures.get("wall_s") else ""
        began = [item for part, name in zip(parts, names, strict=True) for item in _began(part, name)]
        return (Paragraph(("It is the mean of ", *told, f".{times}", *began)),)
    began = _began(facts.group.facts, "It")
    return (Paragraph((*began[1:], " Times and rates are of this run alone.")),) if began else ()


def _began(facts: Mapping[str, Any], who: Mono | str) -> list[Mono | str]:
    """Return the sentence that says what a run, or a member of one, learned from besides its pack; [] for nothing."""
    start, stream = facts.get("init_from"), mapping_of(facts.get("stream")).get("pattern")
    found: list[Mono | str] = []
    if isinstance(start, Mapping):
        packs = sorted({str(pack.get("name")) for pack in start.get("packs", []) if isinstance(pack, Mapping)})
        learned = f", which has learned from {', '.join(packs)}" if packs else ""
        began = ("It began" if who == "It" else " began") + " with the weights of "
        found += [" ", *([] if who == "It" else [who]), began, Mono(str(start.get("run"))), f"{learned}."]
    if stream and who != "It":
        found += [" ", who, " learned from the stream ", Mono(str(stream)), "."]
    return found


def _plan(facts: Facts) -> tuple[Block, ...]:
    """Return which step of the contingency plan this run is, () where it is none."""
    plan = facts.group.facts.get("plan")
    if not isinstance(plan, Mapping):
        return ()
    step, law = Mono(str(plan.get("action"))), Mono(str(plan.get("objective")))
    return (Paragraph(("This run takes the contingency step ", step, " of the objective ", law, ".")),)


def warnings(facts: Facts, verdicts: Verdicts) -> tuple[Block, ...]:
    """Return what must be read before any figure: no law, made-up data, missing seeds, files that were changed."""
    found: list[Text] = []
    if not verdicts.law:
        found.append((Strong("Not the law."), " The objectives in this report check the plumbing and carry no weight."))
    if (facts.group.facts.get("pack") or {}).get("source") == "toy":
        text = " The figures below show that the plumbing works; they say nothing about photographs."
        found.append((Strong("Built-in toy set."), text))
    missing = [str(seed) for seed in facts.seeds if seed not in facts.results]
    if missing:
        found.append((Strong("Incomplete."), f" No result of seed {', '.join(missing)}."))
    found += [_not_averaged(facts, one) for one in facts.evaluations if one.mixed]
    for problem, files in facts.seal_problems.items():
        more = f" and {len(files) - 1} more" if len(files) > 1 else ""
        found.append((Strong("No evidence."), " ", Mono(files[0]), f"{more} {problem}."))
    return tuple(Paragraph(text, quoted=True) for text in found)


def _not_averaged(facts: Facts, evaluation: Evaluation) -> Text:
    """Return which seeds keep a split from having a mean, and the command that evaluates all of them alike."""
    words = ["chimera", "eval", "--run", facts.group.name, "--split", evaluation.split]
    if evaluation.pack != (facts.group.facts.get("pack") or {}).get("name"):
        words += ["--data", evaluation.pack]
    told = f" {evaluation.pack}, {evaluation.split}: {evaluation.mixed}; run "
    return (Strong("Not averaged."), told, Mono(shlex.join(words)), ".")


# ---- memory, environment, commands ----------------------------------------------------------------------------------


def _memory(facts: Facts) -> Section:
    names = ("ram_peak_gb", "vram_peak_gb", "vram_reserved_peak_gb", "gpu_util_mean")
    rows = [("training, highest of all seeds", *(_highest(name, facts.figures.get(name)) for name in names))]
    for title, evidence in (
        ("preparing a pack", facts.prepare),
        ("proof of life", facts.sanity),
        ("data loader", facts.loader),
        ("encoders", facts.encoders),
        ("recall", facts.retrieval),
    ):
        if evidence is not None:
            rows.append((title, *(format_value(name, evidence.figures.get(name)) for name in names)))
    for title, evidence in (
        ("speedrun, highest of all seeds", facts.speedrun),
        ("training beside a peer, ours", facts.race),
    ):
        if evidence is not None:
            rows.append((title, *(_highest(name, summary) for name, summary in over_seeds(evidence, names).items())))
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
    names = "; the runs that you train have other times in their names" if facts.group.combines else ""
    text: Text = ("With the commit and the lock file above installed by ", Mono("make install"), f"{names}:")
    lines = "\n".join(commands(facts, verdicts))
    return Section("reproduce", "Reproduce", (Paragraph(text), Code(lines, "sh")))


def commands(facts: Facts, verdicts: Verdicts) -> list[str]:
    """Return the commands that make the report again from nothing, each once, in their order."""
    facts_of = facts.group.facts
    benchmarks = (
        facts.prepare,
        facts.sanity,
        facts.loader,
        facts.encoders,
        facts.retrieval,
        facts.speedrun,
        facts.race,
    )
    pack = facts_of.get("pack") or {}
    splits = [e.split for e in facts.evaluations if e.pack == pack.get("name")] or ["dev"]
    wanted = [
        prepare_command(pack),
        *(item.group.facts.get("command") for item in benchmarks if item is not None),
        *(part.get("command") for part in facts.group.combines),
        facts_of.get("command"),
        *(f"chimera eval --run latest --split {split}" for split in splits),
        shlex.join(_on_latest(shlex.split(verdicts.command), facts.group.name)),
        shlex.join(["chimera", "report", "--run", _latest(facts), *verdicts.options]) + " > benchmarks.md",
    ]
    return list(dict.fromkeys(str(command) for command in wanted if command))


def _on_latest(words: Sequence[str], run: str) -> list[str]:
    """Return the words of a command on the newest run, or its seed: made again, the run has another name."""
    return ["latest" + word.removeprefix(run) if word == run or word.startswith(f"{run}/") else word for word in words]


def _latest(facts: Facts) -> str:
    """Return what names the reported run, or its one reported seed, once it is the newest."""
    return "latest" if facts.seeds == facts.group.seeds else f"latest/seed-{facts.seeds[0]}"


def prepare_command(pack: Mapping[str, Any]) -> str:
    """Return the command that makes the pack again; where its source lies (PATH) the reader must say."""
    if not pack:
        return ""
    source, name = str(pack.get("source")), str(pack.get("name"))
    words = ["chimera", "data", "prepare", source]
    words += [] if source in ("flickr8k", "toy") else ["--from", "PATH"]
    return shlex.join([*words, *([] if name == source else ["--name", name])])
