"""Which result files stand for an objective, and what they say. Reads JSON alone; missing evidence is a sentence."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from chimera_cli.errors import ChimeraError
from chimera_cli.runs import MADE_WITH, Group, read_json, seal_problem, source_hash
from chimera_cli.slo.objectives import Objective

# No figure comes near; what is larger was put there by hand, and sums of it would overflow.
_LARGEST = 1e15

Values = tuple[float | None, ...]


@dataclass(frozen=True, slots=True)
class Subject:
    """The run under judgement: a group of kind `train` and those of its seeds that are looked at.

    `groups` are all groups of the home folder, the newest first: read once, because there may be thousands.
    """

    home: Path
    group: Group
    seeds: tuple[int, ...]
    groups: tuple[Group, ...] = ()


@dataclass(frozen=True, slots=True)
class Evidence:
    """Figures by seed for one objective, or in `missing` the reason why there are none.

    `files` are relative to the home folder, one per seed; `figures` maps each name to one value per seed (None: not
    measured). `again`: what is missing only the whole command of the group can make, not a measurement of it.
    """

    group: Group | None
    files: tuple[str, ...] = ()
    seeds: tuple[int, ...] = ()
    figures: Mapping[str, Values] = field(default_factory=dict)
    missing: str | None = None
    again: bool = False


def gather(objective: Objective, subject: Subject) -> Evidence:
    """Return the evidence for an objective: of the subject itself, or of the newest fitting group of another kind.

    A file that is cut off, was edited or comes from a newer chimera is missing evidence, told in a sentence.
    """
    reason = _unfit_subject(objective, subject)
    if reason:
        return Evidence(None, missing=reason)
    if objective.kind == subject.group.kind:
        return evidence_of(objective, subject.home, subject.group, subject.seeds)
    return _from_newest(objective, subject)


def _unfit_subject(objective: Objective, subject: Subject) -> str | None:
    """Return why no evidence about this subject can meet the objective; None where it can."""
    source, device = pack_of(subject.group).get("source"), device_of(subject.group)
    if objective.pack is not None and source != objective.pack:
        return f"it is about {objective.pack}, this run was trained on {source or 'an unknown set'}"
    if objective.hardware != "any" and device != objective.hardware:
        return f"needs {_article(objective.hardware)}, this run was made on {_article(device)}"
    return None


def pack_of(group: Group) -> Mapping[str, Any]:
    """Return name, fingerprint and source of the pack of a group; empty where it had none."""
    return _mapping(group.facts.get("pack"))


def device_of(group: Group) -> str:
    """Return `gpu` or `cpu`: what the group was computed on."""
    return "gpu" if _mapping(group.facts.get("hardware")).get("device") == "cuda" else "cpu"


def _mapping(value: Any) -> Mapping[str, Any]:
    """Return `value`, or nothing where an edit made something else of it."""
    return value if isinstance(value, Mapping) else {}


def _article(device: str) -> str:
    return f"a {device.upper()}"


# ---- one group ------------------------------------------------------------------------------------------------------


def evidence_of(objective: Objective, home: Path, group: Group, seeds: Sequence[int]) -> Evidence:
    """Return the evidence that one group of the objective's kind gives."""
    reason = _unfinished(group) or _unsealed(group, home) or _different_configs(group)
    if reason:
        return Evidence(group, missing=reason, again=True)
    found = [_of_seed(objective, home, group, seed) for seed in seeds]
    poor = next((one for one in found if one.missing), None)
    if poor is not None:
        return Evidence(group, missing=poor.missing, again=poor.again)
    files = tuple(one.file for one in found)
    mixed = _mixed(group, seeds, [one.document.get("source_hash") for one in found])
    if mixed:
        return Evidence(group, files, missing=mixed)
    if len(seeds) < objective.seeds_at_least:
        need = f"{objective.seeds_at_least} seeds are needed"
        return Evidence(group, files, missing=f"{need}, {group.name} has {len(seeds)} to look at", again=True)
    by_seed = [one.document["figures"] for one in found]
    names = {name for figures in by_seed for name in figures}
    figures = {name: tuple(number(figures.get(name)) for figures in by_seed) for name in names}
    return Evidence(group, files, tuple(seeds), figures)


def number(value: Any) -> float | None:
    """Return a number that was measured; None for anything else, NaN and the immeasurably large included."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= _LARGEST:
        return None
    return float(value)


def _unfinished(group: Group) -> str | None:
    return None if group.status == "finished" else f"{group.name} is not finished but {group.status}"


def _unsealed(group: Group, home: Path) -> str | None:
    problem = seal_problem(group.facts)
    return None if problem is None else f"{_relative(group.path / 'group.json', home)} {problem}"


def _different_configs(group: Group) -> str | None:
    """Return why the seeds can't be one experiment: a mean over two recipes would be the figure of neither."""
    texts = {}
    for seed in group.seeds:
        path = group.seed_dir(seed) / "config.yaml"
        texts[seed] = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    first = next(iter(texts), None)
    other = next((seed for seed, text in texts.items() if first is not None and text != texts[first]), None)
    return None if other is None else f"seeds {first} and {other} of {group.name} were made with different configs"


def _mixed(group: Group, seeds: Sequence[int], hashes: Sequence[Any]) -> str | None:
    """Return why files of several seeds may not be averaged: they were not written by one state of the source code."""
    for seed, value in zip(seeds[1:], hashes[1:], strict=True):
        if value != hashes[0]:
            states = f"{_short(hashes[0])} and {_short(value)}"
            return f"seeds {seeds[0]} and {seed} of {group.name} were evaluated by different source code ({states})"
    return None


# ---- one seed -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Found:
    """One file of a seed: its content, or in `missing` why it proves nothing, and whether to run it all `again`."""

    file: str
    document: Mapping[str, Any] = field(default_factory=dict)
    missing: str | None = None
    again: bool = False


def _of_seed(objective: Objective, home: Path, group: Group, seed: int) -> _Found:
    result = _result(objective, home, group, seed)
    if result.missing or objective.split is None:
        return result
    return _evaluation(objective, home, group, seed, result.document)


def _read(path: Path, home: Path) -> _Found:
    """Return a result file with its figures and details as mappings, or in one sentence why it is no evidence."""
    name = _relative(path, home)
    try:
        document = read_json(path)
    except ChimeraError as error:
        return _Found(name, missing=error.message.replace(str(path), name))
    problem = seal_problem(document)
    if problem:
        return _Found(name, missing=f"{name} {problem}")
    return _Found(name, document | {key: _mapping(document.get(key)) for key in ("figures", "details")})


def _relative(path: Path, home: Path) -> str:
    return path.relative_to(home).as_posix()


def _result(objective: Objective, home: Path, group: Group, seed: int) -> _Found:
    """Return the result of a seed, or why it proves nothing."""
    path = group.seed_dir(seed) / "result.json"
    name = f"seed {seed} of {group.name}"
    if not path.exists():
        return _Found(_relative(path, home), missing=f"{name} has no result", again=True)
    found = _read(path, home)
    reason = found.missing or _unfit_result(found.document, group, seed)
    if reason:
        return replace(found, missing=reason, again=True)
    details = found.document["details"]
    for requirement in objective.requires:
        if not requirement.met_by(details.get(requirement.detail)):
            return replace(found, missing=f"{group.name} does not count: {requirement.why}")
    return found


def _unfit_result(document: Mapping[str, Any], group: Group, seed: int) -> str | None:
    """Return why a result is not that of this seed of this group: it broke off, or was put there from elsewhere."""
    name = f"seed {seed} of {group.name}"
    if document.get("status") != "finished":
        return f"{name} is not finished but {document.get('status')}"
    if document.get("seed", seed) != seed:
        return f"the result of {name} is that of seed {document['seed']}"
    words = _made_otherwise(document, group)
    return f"{name} was made {words}: its result is no part of this group" if words else None


def _made_otherwise(document: Mapping[str, Any], group: Group) -> str:
    """Return in which respects the run of a file was made differently than a group; "" where in none it tells."""
    made = document.get("made_with")
    if not isinstance(made, Mapping):
        return ""
    other = Group(group.path, dict(made))
    changed = [key for key in MADE_WITH if made.get(key) != group.facts.get(key)]
    return " and ".join(_DIFFERENCES[key](other, group) for key in changed)


def foreign_evaluation(document: Mapping[str, Any], group: Group, seed: int) -> str | None:
    """Return why an evaluation is not one of this seed of this group but was put there from elsewhere; None if it is.

    It names its group and what that was made with.
    """
    name = f"seed {seed} of {group.name}"
    if document.get("seed", seed) != seed:
        return f"the evaluation of {name} is that of seed {document['seed']}"
    if document.get("group", group.name) != group.name:
        return f"the evaluation of {name} is that of a seed of {document['group']}"
    words = _made_otherwise(document, group)
    return f"the evaluation of {name} is of a run made {words}: it is no part of this group" if words else None


def _evaluation(objective: Objective, home: Path, group: Group, seed: int, result: Mapping[str, Any]) -> _Found:
    """Return the evaluation of a seed, or why it proves nothing."""
    pack = pack_of(group)
    path = group.seed_dir(seed) / "evaluations" / f"{pack.get('name')}-{objective.split}.json"
    if not path.exists():
        return _Found(
            _relative(path, home), missing=f"seed {seed} of {group.name} was not evaluated on {objective.split}"
        )
    found = _read(path, home)
    reason = found.missing or _unfit_evaluation(found.document, objective, group, seed, result)
    if reason:
        return replace(found, missing=reason)
    by_other = _evaluated_by_other_code(found.document, group, seed)
    return replace(found, missing=by_other, again=bool(by_other) and source_hash() != group.facts["source_hash"])


def _evaluated_by_other_code(document: Mapping[str, Any], group: Group, seed: int) -> str | None:
    """Return why the code that evaluated says nothing of the run: it is not the one that trained it."""
    trained, evaluated = group.facts.get("source_hash"), document.get("source_hash")
    if None in (trained, evaluated) or trained == evaluated:
        return None
    states = f"({_short(evaluated)} instead of {_short(trained)})"
    return (
        f"seed {seed} of {group.name} was evaluated by another state of the source code than it was trained with "
        f"{states}: train again, or evaluate with the code that trained it"
    )


def _unfit_evaluation(
    document: Mapping[str, Any], objective: Objective, group: Group, seed: int, result: Mapping[str, Any]
) -> str | None:
    """Return why an evaluation is not one of this checkpoint on this split."""
    pack, name = pack_of(group), f"seed {seed} of {group.name}"
    foreign = foreign_evaluation(document, group, seed)
    if foreign:
        return foreign
    if document.get("split", objective.split) != objective.split:
        return f"the evaluation of {name} on {objective.split} is that on {document['split']}"
    theirs, ours = _mapping(document.get("pack")).get("fingerprint"), pack.get("fingerprint")
    if theirs != ours:
        what = f"another content of the pack {pack.get('name')} ({_short(theirs)} instead of {_short(ours)})"
        return f"{name} was evaluated on {what}"
    step, best = document.get("checkpoint_step"), result["details"].get("best_step")
    if None not in (step, best) and step != best:
        return f"{name} was evaluated at step {step}, its best checkpoint is of step {best}"
    images = document.get("images")
    if objective.images_at_least and (not isinstance(images, int) or images < objective.images_at_least):
        return f"the {objective.split} split has {images} images, {objective.images_at_least} are needed"
    return None


# ---- groups of another kind -----------------------------------------------------------------------------------------


def _from_newest(objective: Objective, subject: Subject) -> Evidence:
    """Return the evidence of the newest finished group of the objective's kind made like the subject.

    Where none will do, the newest that comes nearest says why.
    """
    groups = [group for group in subject.groups if group.kind == objective.kind and group.status == "finished"]
    groups.sort(key=lambda group: str(group.facts.get("finished_at")), reverse=True)
    missing = f"there is no finished {objective.kind} run"
    if groups:
        missing = f"the newest {objective.kind} run, {groups[0].name}, was made {differences(groups[0], subject.group)}"
    nearest: Evidence | None = None
    for group in groups:
        if differences(group, subject.group):
            continue
        evidence = evidence_of(objective, subject.home, group, group.seeds)
        if evidence.missing is None:
            return evidence
        nearest = nearest or evidence
    return nearest or Evidence(None, missing=missing)


def differences(group: Group, other: Group) -> str:
    """Return in which respects a group was made differently than another, with both values; "" where in none.

    Such groups are never mixed: a figure of one says nothing about the other. What is not known counts as different.
    """
    ours, theirs = _identity(group), _identity(other)
    unlike = [key for key, fact in ours.items() if fact is None or fact != theirs[key]]
    return " and ".join(_DIFFERENCES[key](group, other) for key in unlike)


def _identity(group: Group) -> dict[str, Any]:
    facts = group.facts
    pack, hardware = pack_of(group).get("fingerprint"), facts.get("hardware")
    return {"pack": pack, "hardware": hardware, "source_hash": facts.get("source_hash")}


def _other_pack(group: Group, other: Group) -> str:
    one, two = (f"{pack.get('name')} {_short(pack.get('fingerprint'))}" for pack in map(pack_of, (group, other)))
    return f"with another pack ({one} instead of {two})"


def _other_hardware(group: Group, other: Group) -> str:
    one, two = (_mapping(of.facts.get("hardware")) for of in (group, other))
    keys = [key for key in dict.fromkeys((*one, *two)) if one.get(key) != two.get(key)]
    words = ", ".join(f"{key} {one.get(key)} instead of {two.get(key)}" for key in keys)
    return f"on other hardware ({words or 'unknown'})"


def _other_source(group: Group, other: Group) -> str:
    one, two = (_short(of.facts.get("source_hash")) for of in (group, other))
    return f"with another state of the source code ({one} instead of {two})"


def _other_config(group: Group, other: Group) -> str:
    one, two = (_short(of.facts.get("config_hash")) for of in (group, other))
    return f"with another config ({one} instead of {two})"


def _other_stream(group: Group, other: Group) -> str:
    one, two = (_mapping(of.facts.get("stream")) for of in (group, other))
    if not (one and two):
        return "from a stream instead of the pack" if one else "from the pack instead of a stream"
    return f"from another stream ({_short(one.get('digest'))} instead of {_short(two.get('digest'))})"


_DIFFERENCES: Mapping[str, Callable[[Group, Group], str]] = {
    "pack": _other_pack,
    "stream": _other_stream,
    "config_hash": _other_config,
    "source_hash": _other_source,
    "hardware": _other_hardware,
}


def _short(value: Any) -> str:
    """Return the beginning of a hash, enough to tell two apart."""
    return "unknown" if value is None else str(value)[:8]
