"""Training that begins with what another run has learned."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from chimera_cli.config import TrainConfig
from chimera_cli.errors import UsageError
from chimera_cli.events import Listener, Note
from chimera_cli.runs import resolve_run
from chimera_cli.services.resume import finished_result


@dataclass(frozen=True, slots=True)
class WarmStart:
    """The run that a training begins with, None for none, and its best checkpoints by the seeds that take them."""

    run: str | None = None
    checkpoints: Mapping[int, Path] = field(default_factory=dict)
    pack: Mapping[str, Any] = field(default_factory=dict)

    def facts(self) -> dict[str, Any]:
        """Return what group.json says of it: the run, the SHA-256 of each checkpoint, and the pack of that run."""
        from chimera_cli.models.weights import file_hash

        hashes = {str(seed): file_hash(path) for seed, path in self.checkpoints.items()}
        return {"run": self.run, "checkpoints": hashes, "pack": dict(self.pack)}


def warm_start(home: Path, config: TrainConfig, seeds: Sequence[int]) -> WarmStart:
    """Return what the seeds begin with, as `init_from` says.

    Raises UsageError where there is no such run, or where it has not finished one of the seeds.
    """
    if config.init_from is None:
        return WarmStart()
    group, only = resolve_run(home, config.init_from)
    if group.kind != "train":
        raise UsageError(f"{group.name} is a {group.kind} run, which leaves no model", "begin with one of train full")
    given = {seed: seed if only is None else only for seed in seeds}
    ready = [seed for seed in group.seeds if finished_result(group, seed) is not None]
    missing = [seed for seed in given.values() if seed not in ready]
    if missing:
        one = (
            f"--init-from {group.name}/seed-{ready[0]} takes one for all seeds" if ready else "finish it with --resume"
        )
        raise UsageError(f"{group.name} has finished no seed {missing[0]}", one)
    paths = {seed: group.seed_dir(own) / "checkpoints" / "best.safetensors" for seed, own in given.items()}
    return WarmStart(group.name if only is None else f"{group.name}/seed-{only}", paths, group.facts.get("pack") or {})


def tell_start(start: WarmStart, fingerprint: str, listener: Listener) -> None:
    """Tell what a training begins with, and where it has seen other images than those of this pack's train split."""
    if start.run is None:
        return
    listener(Note(f"begins with the weights of {start.run}"))
    if start.pack.get("fingerprint") != fingerprint:
        name = start.pack.get("name", "an unknown pack")
        listener(
            Note(
                f"{start.run} was trained on {name}: images of it that are in this dev or test split make figures"
                " better than they are",
                "warning",
            )
        )
