"""`chimera train combine`: several finished runs as one model, whose similarity is the mean of theirs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chimera_cli.errors import ChimeraError, UsageError
from chimera_cli.events import Evaluated, Listener, Note, Saved, ignore
from chimera_cli.runs import Group, content_hash, read_sealed_json
from chimera_cli.services.inputs import Workbench
from chimera_cli.services.learning import over_seeds
from chimera_cli.services.warm_start import finished_run, finished_seeds
from chimera_cli.slo.evidence import pack_of

if TYPE_CHECKING:
    from chimera_cli.services.session import SeedSession

LABEL = "combined"
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

    def checkpoint(self, seed: int) -> Path:
        """Return the checkpoint that goes into a seed of the combination."""
        return self.group.seed_dir(self.seeds[seed]) / _CHECKPOINT

    def result(self, seed: int) -> dict[str, Any]:
        """Return the result of the training behind it."""
        return read_sealed_json(self.group.seed_dir(self.seeds[seed]) / "result.json")

    def facts(self) -> dict[str, Any]:
        """Return what group.json says of it: the run, its command and source, and the SHA-256 of each checkpoint."""
        from chimera_cli.models.weights import file_hash

        facts = self.group.facts
        hashes = {str(seed): file_hash(self.checkpoint(seed)) for seed in self.seeds}
        made = {"command": facts.get("command"), "source_hash": facts.get("source_hash")}
        return {"run": self.name, **made, "checkpoints": hashes}


def combine(
    home: Path,
    runs: Sequence[str],
    label: str = LABEL,
    device: str = "auto",
    command: str = "",
    listener: Listener = ignore,
) -> dict[str, Any]:
    """Return the results of a new group whose models are those of `runs` together, seed by seed, judged on dev.

    A run is named as for `--init-from`; named with a seed each, they make one model. Its times are those of training
    the members one after another. Raises UsageError for fewer than two runs, for one that is not there or has other
    seeds, and for a mixture of runs and seeds; ChimeraError for other packs than one, and for checkpoints that are
    gone or combinations themselves.
    """
    from chimera_cli.services.provenance import group_facts
    from chimera_cli.services.session import group_session, seed_session
    from chimera_cli.tracking import track

    parts = _parts(home, runs)
    bench = _bench(home, parts, device, listener)
    seeds = tuple(parts[0].seeds)
    settings = {"members": [{"run": part.name, "config": _config(part)} for part in parts]}
    facts = group_facts(command, bench.pack, settings, bench.device)
    facts |= {"combines": [part.facts() for part in parts]} | _source(parts, facts["source_hash"], listener)
    with group_session(home, "train", label, seeds, facts) as group, track(home, group, listener) as tracker:
        results = []
        for seed in seeds:
            with seed_session(group, seed, settings, bench.device, [listener, tracker], 0) as session:
                results.append(_combined(parts, seed, bench, session, facts["hardware"]))
    return over_seeds(group.name, seeds, results) | {"members": [part.name for part in parts]}


# ---- what is combined -----------------------------------------------------------------------------------------------


def _parts(home: Path, names: Sequence[str]) -> tuple[Part, ...]:
    """Return what the names mean. Raises UsageError where they can't be combined."""
    found = [finished_run(home, name, "name one that there is") for name in names]
    single = [seed is not None for _, seed in found]
    if any(single) and not all(single):
        raise UsageError("runs and seeds of runs are mixed", "name whole runs alone, or a seed of each")
    parts = [_part(group, seed, found[0]) for group, seed in found]
    taken = [part.name for part in parts]
    if len(parts) < 2:
        group = parts[0].group
        own = " ".join(f"{group.name}/seed-{seed}" for seed in finished_seeds(group)[:2])
        raise UsageError("one run is nothing to combine", f"name two, or seeds of it: {own}")
    twice = [name for number, name in enumerate(taken) if name in taken[:number]]
    if twice:
        raise UsageError(f"{twice[0]} is named twice", "a model beside itself adds nothing: name another run")
    return tuple(parts)


def _part(group: Group, only: int | None, first: tuple[Group, int | None]) -> Part:
    """Return what a name means beside the `first` one, whose seeds are those of the combination."""
    if "combines" in group.facts:
        names = " ".join(str(part.get("run")) for part in group.facts["combines"])
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

    names = {str(pack_of(part.group).get("fingerprint")): part for part in parts}
    if len(names) > 1:
        one, other = list(names.values())[:2]
        packs = " and ".join(str(pack_of(part.group).get("name")) for part in (one, other))
        raise ChimeraError(
            f"{one.name} and {other.name} were trained on different packs ({packs})",
            "figures of their mean would be of no split that both have never seen",
        )
    gone = [path for part in parts for seed in part.seeds if not (path := part.checkpoint(seed)).is_file()]
    if gone:
        raise ChimeraError(f"{gone[0]} is gone", "restore it, or combine other runs")
    pack = open_pack(home / "data", str(pack_of(parts[0].group).get("name")))
    if pack.fingerprint not in names:
        raise ChimeraError(f"{pack.name} has changed since {parts[0].name} was trained", "prepare it again as it was")
    picked = pick_device(device)
    listener(Note(f"data: {pack.name}, device: {picked.type}; members: {', '.join(part.name for part in parts)}"))
    return Workbench(pack, picked, "float32")


def _config(part: Part) -> Any:
    """Return the settings that a part was trained with, as they were recorded."""
    import yaml

    from chimera_cli.services.resume import recorded_config

    return yaml.safe_load(recorded_config(part.group).read_text(encoding="utf-8"))


def _source(parts: Sequence[Part], here: str, listener: Listener) -> dict[str, str]:
    """Return the hash of the source that made members and combination; several states are evidence for none of them."""
    sources = [*(str(part.group.facts.get("source_hash")) for part in parts), here]
    if len(set(sources)) == 1:
        return {"source_hash": here}
    listener(Note("the members were trained by other source code: this is no evidence for `slo check`", "warning"))
    return {"source_hash": content_hash(sources)}


# ---- one seed -------------------------------------------------------------------------------------------------------


def _combined(
    parts: Sequence[Part], seed: int, bench: Workbench, session: "SeedSession", hardware: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the result of a seed: its models in one file, judged on dev."""
    from chimera_cli.models.combination import load_model, save_combination
    from chimera_cli.models.dual_encoder import count_parameters
    from chimera_cli.services.inputs import dev_evaluation

    path = session.directory / _CHECKPOINT
    save_combination([part.checkpoint(seed) for part in parts], path)
    session.tell(Saved(str(path), "combination"))
    model = load_model(path, bench.device)
    best = dict(dev_evaluation(model, bench, session.tell)())
    session.tell(Evaluated(0, "dev", best))
    results = [part.result(seed) for part in parts]
    figures = dict.fromkeys(results[0]["figures"]) | _together([one["figures"] for one in results])
    if any(part.group.facts.get("hardware") != hardware for part in parts):
        figures = dict.fromkeys(figures)
    details = dict(count_parameters(model)) | {"best_step": None, "best_epoch": None, "best_dev": best}
    members = [
        {"run": part.name, "rsum": one["details"]["best_dev"].get("rsum")}
        for part, one in zip(parts, results, strict=True)
    ]
    return session.finish(figures, details | {"members": members, "device": bench.device.type})


def _together(figures: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """Return the figures of members that are trained one after another; None where one of them lacks it."""

    def known(name: str) -> list[float] | None:
        values = [one.get(name) for one in figures]
        return None if None in values else [float(value) for value in values if value is not None]

    together: dict[str, float | None] = {}
    for name in _SUMS:
        together[name] = None if (values := known(name)) is None else sum(values)
    for name in _PEAKS:
        together[name] = None if (values := known(name)) is None else max(values)
    rates = known("pairs_per_s")
    together["pairs_per_s"] = None if rates is None else 1 / sum(1 / rate for rate in rates)
    return together
