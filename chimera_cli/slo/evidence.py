"""Which result files stand for an objective, and what they say. Reads JSON alone; missing evidence is a sentence."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from chimera_cli.runs import Group, list_groups, read_json
from chimera_cli.slo.objectives import Objective

Values = tuple[float | None, ...]


@dataclass(frozen=True, slots=True)
class Subject:
    """The run under judgement: a group of kind `train` and those of its seeds that are looked at."""

    home: Path
    group: Group
    seeds: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Evidence:
    """Figures by seed for one objective, or in `missing` the reason why there are none.

    `files` are relative to the home folder; `figures` maps each name to one value per seed (None: not measured).
    """

    group: Group | None
    files: tuple[str, ...] = ()
    seeds: tuple[int, ...] = ()
    figures: Mapping[str, Values] = field(default_factory=dict)
    missing: str | None = None


def gather(objective: Objective, subject: Subject) -> Evidence:
    """Return the evidence for an objective: of the subject itself, or of the newest fitting group of another kind.

    Raises ChimeraError for a result file that is cut off or was edited into something else.
    """
    reason = _unfit_subject(objective, subject)
    if reason:
        return Evidence(None, missing=reason)
    if objective.kind == subject.group.kind:
        return _from_group(objective, subject.home, subject.group, subject.seeds)
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
    pack = group.facts.get("pack")
    return pack if isinstance(pack, Mapping) else {}


def device_of(group: Group) -> str:
    """Return `gpu` or `cpu`: what the group was computed on."""
    return "gpu" if (group.facts.get("hardware") or {}).get("device") == "cuda" else "cpu"


def _article(device: str) -> str:
    return f"a {device.upper()}"


# ---- one group ------------------------------------------------------------------------------------------------------


def _from_group(objective: Objective, home: Path, group: Group, seeds: tuple[int, ...]) -> Evidence:
    reason = _unfinished(group) or _different_configs(group)
    if reason:
        return Evidence(group, missing=reason)
    read = _evaluation if objective.split else _result
    documents, files = [], []
    for seed in seeds:
        path, found = read(objective, group, seed)
        if isinstance(found, str):
            return Evidence(group, missing=found)
        documents.append(found)
        files.append(path.relative_to(home).as_posix())
    if len(seeds) < objective.seeds_at_least:
        need = f"{objective.seeds_at_least} seeds are needed"
        return Evidence(group, tuple(files), missing=f"{need}, {group.name} has {len(seeds)} to look at")
    names = {name for document in documents for name in document["figures"]}
    figures = {name: tuple(_number(document["figures"].get(name)) for document in documents) for name in names}
    return Evidence(group, tuple(files), seeds, figures)


def _number(value: Any) -> float | None:
    """Return a finite number; None for anything else, NaN included, because it proves nothing."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def _unfinished(group: Group) -> str | None:
    return None if group.status == "finished" else f"{group.name} is not finished but {group.status}"


def _different_configs(group: Group) -> str | None:
    """Return why the seeds can't be one experiment: a mean over two recipes would be the figure of neither."""
    texts = {}
    for seed in group.seeds:
        path = group.seed_dir(seed) / "config.yaml"
        texts[seed] = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    first = next(iter(texts), None)
    other = next((seed for seed, text in texts.items() if first is not None and text != texts[first]), None)
    return None if other is None else f"seeds {first} and {other} of {group.name} were made with different configs"


def _result(objective: Objective, group: Group, seed: int) -> tuple[Path, dict[str, Any] | str]:
    """Return where the result of a seed lies and its content, or why it proves nothing."""
    path = group.seed_dir(seed) / "result.json"
    if not path.exists():
        return path, f"seed {seed} of {group.name} has no result"
    document = _sections(read_json(path))
    if document.get("status") != "finished":
        return path, f"seed {seed} of {group.name} is not finished but {document.get('status')}"
    for requirement in objective.requires:
        if not requirement.met_by(document["details"].get(requirement.detail)):
            return path, f"{group.name} does not count: {requirement.why}"
    return path, document


def _evaluation(objective: Objective, group: Group, seed: int) -> tuple[Path, dict[str, Any] | str]:
    """Return where the evaluation of a seed lies and its content, or why it proves nothing."""
    path, result = _result(objective, group, seed)
    if isinstance(result, str):
        return path, result
    pack = pack_of(group)
    path = group.seed_dir(seed) / "evaluations" / f"{pack.get('name')}-{objective.split}.json"
    if not path.exists():
        return path, f"seed {seed} of {group.name} was not evaluated on {objective.split}"
    document = _sections(read_json(path))
    if (document.get("pack") or {}).get("fingerprint") != pack.get("fingerprint"):
        return path, f"seed {seed} of {group.name} was evaluated on another content of the pack {pack.get('name')}"
    step, best = document.get("checkpoint_step"), result["details"].get("best_step")
    if None not in (step, best) and step != best:
        return path, f"seed {seed} of {group.name} was evaluated at step {step}, its best checkpoint is of step {best}"
    images = document.get("images")
    if objective.images_at_least and (not isinstance(images, int) or images < objective.images_at_least):
        return path, f"the {objective.split} split has {images} images, {objective.images_at_least} are needed"
    return path, document


def _sections(document: dict[str, Any]) -> dict[str, Any]:
    """Return a result with its figures and details as mappings, whatever an edit made of them."""
    found = {name: document.get(name) for name in ("figures", "details")}
    return document | {name: value if isinstance(value, dict) else {} for name, value in found.items()}


# ---- groups of another kind -----------------------------------------------------------------------------------------


def _from_newest(objective: Objective, subject: Subject) -> Evidence:
    """Return the evidence of the newest finished group of the objective's kind made like the subject.

    Where none will do, the newest that comes nearest says why.
    """
    groups = [group for group in list_groups(subject.home, objective.kind) if group.status == "finished"]
    groups.sort(key=lambda group: str(group.facts.get("finished_at")), reverse=True)
    missing = f"there is no finished {objective.kind} run"
    if groups:
        missing = f"the newest {objective.kind} run, {groups[0].name}, was made {_difference(groups[0], subject.group)}"
    alike = [group for group in groups if not _difference(group, subject.group)]
    nearest: Evidence | None = None
    for group in alike:
        evidence = _from_group(objective, subject.home, group, group.seeds)
        if evidence.missing is None:
            return evidence
        nearest = nearest or evidence
    return nearest or Evidence(None, missing=missing)


_ALIKE: Mapping[str, Callable[[Group], Any]] = {
    "with another pack": lambda group: pack_of(group).get("fingerprint"),
    "on other hardware": lambda group: group.facts.get("hardware"),
    "with another state of the source code": lambda group: group.facts.get("source_hash"),
}


def _difference(group: Group, other: Group) -> str:
    """Return in which respects two groups were made differently, as words; "" where they may stand together."""
    return " and ".join(words for words, fact in _ALIKE.items() if fact(group) is None or fact(group) != fact(other))
