"""`chimera train combine`: several finished runs as one model, whose similarity is the mean of theirs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chimera_cli.errors import ChimeraError, UsageError
from chimera_cli.events import Evaluated, Event, Listener, Note, RunFinished, Saved, ignore
from chimera_cli.runs import MADE_WITH, Group, content_hash, read_sealed_json, seal_problem
from chimera_cli.services.inputs import Workbench
from chimera_cli.services.learning import over_seeds
from chimera_cli.services.warm_start import finished_run, finished_seeds
from chimera_cli.slo.evidence import pack_of

if TYPE_CHECKING:
    from chimera_cli.services.session import SeedSession

_CHECKPOINT = Path("checkpoints", "best.safetensors")
# What training its members one after another takes: times add up, the highest peak counts.
_SUMS = ("features_s", "epoch_10k_pairs_s", "epoch_10k_pairs_cached_s", "wall_s")
_PEAKS = ("ram_peak_gb", "vram_peak_gb", "vram_reserved_peak_gb")


@dataclass(frozen=True, slots=True)
class Part:
    """A finished run, or one seed of it, and by the seeds of the combination those of its own that it gives."""

    name: str
    group: Group
    seeds: Mapping[int, int]

    def folder(self, seed: int) -> Path:
        """Return the folder of its own that goes into a seed of the combination."""
        return self.group.seed_dir(self.seeds[seed])

    def result(self, seed: int) -> dict[str, Any]:
        """Return the result of the training behind it. Raises ChimeraError for that of another run."""
        path = self.folder(seed) / "result.json"
        result = read_sealed_json(path)
        foreign = [key for key in MADE_WITH if result.get("made_with", {}).get(key) != self.group.facts.get(key)]
        if foreign:
            raise ChimeraError(f"{path} was made with another {foreign[0]} than its run", "train that run again")
        return result

    def config(self, seed: int) -> Any:
        """Return the settings that it was trained with at last."""
        import yaml

        return yaml.safe_load((self.folder(seed) / "config.yaml").read_text(encoding="utf-8"))

    def facts(self) -> dict[str, Any]:
        """Return what group.json says of it: the run, what that was made with, and the SHA-256 of each checkpoint."""
        from chimera_cli.models.weights import file_hash

        made = {key: self.group.facts.get(key) for key in ("command", "source_hash", "stream", "init_from")}
        hashes = {str(seed): file_hash(self.folder(seed) / _CHECKPOINT) for seed in self.seeds}
        return {"run": self.name, **made, "checkpoints": hashes}


def combine(
    home: Path, runs: Sequence[str], label: str, device: str = "auto", command: str = "", listener: Listener = ignore
) -> dict[str, Any]:
    """Return the results of a new group whose models are those of `runs` together, seed by seed, judged on dev.

    A run is named as for `--init-from`; named with a seed each, they make one model. Its times are those of training
    the members one after another. Raises UsageError for fewer than two runs, for one that is not there, has other seeds
    or is a combination, and for a mixture of runs and seeds; ChimeraError for other packs than one, for checkpoints
    that are gone and for runs that were edited.
    """
    from chimera_cli.services.provenance import group_facts
    from chimera_cli.services.session import group_session, seed_session
    from chimera_cli.tracking import track

    parts = _parts(home, runs)
    seeds = tuple(parts[0].seeds)
    bench = _bench(home, parts, device, listener)
    results = {seed: [part.result(seed) for part in parts] for seed in seeds}
    settings = {seed: _settings(parts, seed) for seed in seeds}
    facts = group_facts(command, bench.pack, settings[seeds[0]], bench.device)
    facts |= {"combines": [part.facts() for part in parts], "source_hash": _source(parts, facts["source_hash"])}
    _tell(parts, facts, bench.pack.fingerprint, listener)
    made = []
    with group_session(home, "train", label, seeds, facts) as group, track(home, group, listener) as tracker:
        listeners = [_without_times(listener), tracker]
        for seed in seeds:
            with seed_session(group, seed, settings[seed], bench.device, listeners, 0) as session:
                made.append(_combined(parts, seed, results[seed], bench, session, facts["hardware"]))
    return over_seeds(group.name, seeds, made) | {"members": [part.name for part in parts]}


# ---- what is combined -----------------------------------------------------------------------------------------------


def _parts(home: Path, names: Sequence[str]) -> tuple[Part, ...]:
    """Return what the names mean. Raises UsageError where they can't be combined."""
    found = [finished_run(home, name, "`chimera runs list` shows what there is") for name in names]
    single = [seed is not None for _, seed in found]
    if any(single) and not all(single):
        raise UsageError("runs and seeds of runs are mixed", "name whole runs alone, or a seed of each")
    parts = [_part(group, seed, found[0]) for group, seed in found]
    taken = [part.name for part in parts]
    if len(parts) < 2:
        own = [f"{parts[0].group.name}/seed-{seed}" for seed in finished_seeds(parts[0].group)[:2]]
        seeds = f", or seeds of it: {' '.join(own)}" if len(own) > 1 else ""
        raise UsageError("one run is nothing to combine", f"name two{seeds}")
    twice = [name for number, name in enumerate(taken) if name in taken[:number]]
    if twice:
        raise UsageError(f"{twice[0]} is named twice", "a model beside itself adds nothing: name another run")
    return tuple(parts)


def _part(group: Group, only: int | None, first: tuple[Group, int | None]) -> Part:
    """Return what a name means beside the `first` one, whose seeds are those of the combination."""
    problem = seal_problem(group.facts)
    if problem:
        raise ChimeraError(f"{group.path / 'group.json'} {problem}", "restore the file, or train that run again")
    if group.combines:
        names = " ".join(str(part.get("run")) for part in group.combines)
        raise UsageError(f"{group.name} is a combination itself", f"name the runs that it is made of: {names}")
    ready = finished_seeds(group)
    if only is not None:
        if only not in ready:
            raise UsageError(f"seed {only} of {group.name} is not finished", f"it has {_numbers(ready)}")
        assert first[1] is not None
        return Part(f"{group.name}/seed-{only}", group, {first[1]: only})
    wanted = finished_seeds(first[0])
    if ready != wanted:
        raise UsageError(
            f"{group.name} has finished {_numbers(ready)}, {first[0].name} {_numbers(wanted)}",
            "train the same seeds of both, or name one seed of each: RUN/seed-N",
        )
    return Part(group.name, group, {seed: seed for seed in ready})


def _numbers(seeds: Sequence[int]) -> str:
    return f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}"


def _bench(home: Path, parts: Sequence[Part], device: str, listener: Listener) -> Workbench:
    """Return the pack of all parts, and the device. Raises ChimeraError where they were trained on several packs.

    Also for a checkpoint that is gone: before anything is made.
    """
    from chimera_cli.data.pack import open_pack
    from chimera_cli.runtime import pick_device

    by_fingerprint = {str(pack_of(part.group).get("fingerprint")): part for part in parts}
    if len(by_fingerprint) > 1:
        one, other = list(by_fingerprint.values())[:2]
        packs = " and ".join(str(pack_of(part.group).get("name")) for part in (one, other))
        raise ChimeraError(
            f"{one.name} and {other.name} were trained on different packs ({packs})",
            "combine runs of one pack: their mean is judged on its dev split",
        )
    gone = [path for part in parts for seed in part.seeds if not (path := part.folder(seed) / _CHECKPOINT).is_file()]
    if gone:
        raise ChimeraError(f"{gone[0]} is gone", "restore it, or combine other runs")
    pack = open_pack(home / "data", str(pack_of(parts[0].group).get("name")))
    if pack.fingerprint not in by_fingerprint:
        raise ChimeraError(f"{pack.name} has changed since {parts[0].name} was trained", "prepare it again as it was")
    picked = pick_device(device)
    listener(Note(f"data: {pack.name}, device: {picked.type}; members: {', '.join(part.name for part in parts)}"))
    return Workbench(pack, picked, "float32")


def _settings(parts: Sequence[Part], seed: int) -> dict[str, Any]:
    """Return what config.yaml of a seed says: the members by their numbers, each with its run and its settings."""
    members = {str(number): {"run": part.name, **part.config(seed)} for number, part in enumerate(parts)}
    return {"members": members}


def _source(parts: Sequence[Part], here: str) -> str:
    """Return the hash of the source that made members and combination; of several states it is that of none of them."""
    sources = [*(str(part.group.facts.get("source_hash")) for part in parts), here]
    return here if len(set(sources)) == 1 else content_hash(sources)


def _tell(parts: Sequence[Part], facts: Mapping[str, Any], fingerprint: str, listener: Listener) -> None:
    """Say what a reader of the figures has to know of the members."""
    if any(part.group.facts.get("source_hash") != facts["source_hash"] for part in parts):
        words = "members of other states of the source: recall of their mean is no evidence for `slo check`"
        listener(Note(words, "warning"))
    if _elsewhere(parts, facts["hardware"]):
        listener(Note("members of other hardware: the times of their training are left out", "warning"))
    for part in parts:
        packs = (part.group.facts.get("init_from") or {}).get("packs", [])
        others = [str(pack.get("name")) for pack in packs if pack.get("fingerprint") != fingerprint]
        if others:
            words = "images of it that are in this dev or test split make figures better than they are"
            listener(Note(f"{part.name} has learned from {', '.join(others)}: {words}", "warning"))


def _elsewhere(parts: Sequence[Part], hardware: Mapping[str, Any]) -> bool:
    return any(part.group.facts.get("hardware") != hardware for part in parts)


def _without_times(listener: Listener) -> Listener:
    """Return a listener that does not hear how long the members were trained: that is not what it waited for."""

    def tell(event: Event) -> None:
        listener(replace(event, figures={}) if isinstance(event, RunFinished) else event)

    return tell


# ---- one seed -------------------------------------------------------------------------------------------------------


def _combined(
    parts: Sequence[Part],
    seed: int,
    results: Sequence[Mapping[str, Any]],
    bench: Workbench,
    session: "SeedSession",
    hardware: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the result of a seed: its models in one file, judged on dev; `results` are those of its members."""
    from chimera_cli.models.combination import load_model, save_combination
    from chimera_cli.models.dual_encoder import count_parameters
    from chimera_cli.runtime import reset_memory_peaks
    from chimera_cli.services.inputs import dev_evaluation
    from chimera_cli.services.session import memory_figures

    path = session.directory / _CHECKPOINT
    save_combination([part.folder(seed) / _CHECKPOINT for part in parts], path)
    session.tell(Saved(str(path), "combination"))
    reset_memory_peaks(bench.device)
    model = load_model(path, bench.device)
    best = dict(dev_evaluation(model, bench, session.tell)())
    session.tell(Evaluated(0, "dev", best))
    # All members are in memory here: what that takes is a peak like those of their training.
    figures: dict[str, float | None] = dict.fromkeys(results[0]["figures"])
    figures |= _together([one["figures"] for one in results], memory_figures(bench.device))
    if _elsewhere(parts, hardware):
        figures = dict.fromkeys(figures)
    details: dict[str, Any] = dict(count_parameters(model)) | {"best_step": None, "best_epoch": None, "best_dev": best}
    taken = [row for one in results for row in one["details"].get("contingency", [])]
    details |= {"contingency": taken} if taken else {}
    return session.finish(figures, details | {"device": bench.device.type})


def _together(figures: Sequence[Mapping[str, Any]], here: Mapping[str, float | None]) -> dict[str, float | None]:
    """Return the figures of members that are trained one after another; None where one of them lacks it.

    `here` are the peaks of what was done with all of them.
    """

    def known(name: str, *others: float | None) -> list[float] | None:
        values = [*(one.get(name) for one in figures), *others]
        return None if None in values else [float(value) for value in values if value is not None]

    together: dict[str, float | None] = {}
    for name in _SUMS:
        together[name] = None if (values := known(name)) is None else sum(values)
    for name in _PEAKS:
        together[name] = None if (values := known(name, here[name])) is None else max(values)
    rates = known("pairs_per_s")
    together["pairs_per_s"] = None if rates is None else 1 / sum(1 / rate for rate in rates)
    return together
