"""Training that begins with what another run has learned."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chimera_cli.config import TrainConfig
from chimera_cli.errors import ChimeraError, UsageError
from chimera_cli.events import Listener, Note
from chimera_cli.runs import Group, list_groups, resolve_run
from chimera_cli.services.resume import finished_result

if TYPE_CHECKING:
    from chimera_cli.models.dual_encoder import Architecture


@dataclass(frozen=True, slots=True)
class WarmStart:
    """The run that a training begins with, None for none, and its best checkpoints by the seeds that take them.

    `packs` are those that its weights were trained on, also by the run that it began with itself: name and fingerprint.
    """

    run: str | None = None
    checkpoints: Mapping[int, Path] = field(default_factory=dict)
    packs: tuple[Mapping[str, Any], ...] = ()

    def facts(self) -> dict[str, Any]:
        """Return what group.json says of it: the run, the SHA-256 of each checkpoint, and the packs."""
        from chimera_cli.models.weights import file_hash

        hashes = {str(seed): file_hash(path) for seed, path in self.checkpoints.items()}
        return {"run": self.run, "checkpoints": hashes, "packs": [dict(pack) for pack in self.packs]}


def warm_start(home: Path, config: TrainConfig, seeds: Sequence[int]) -> WarmStart:
    """Return what the seeds begin with, as `init_from` says; of several runs that begin so it is the newest.

    Raises UsageError where there is no such run with a finished seed, or where it has not finished one of `seeds`, and
    ChimeraError where a checkpoint of it is gone.
    """
    if config.init_from is None:
        return WarmStart()
    hint = "train it first, or name another: --init-from RUN; `chimera runs list` shows what there is"
    group, only = finished_run(home, config.init_from, hint)
    given = {seed: seed if only is None else only for seed in seeds}
    ready = finished_seeds(group)
    missing = [seed for seed in given.values() if seed not in ready]
    if missing:
        one = f"--init-from {group.name}/seed-{ready[0]} takes one for all seeds"
        raise UsageError(f"{group.name} has finished no seed {missing[0]}", one)
    paths = {seed: group.seed_dir(own) / "checkpoints" / "best.safetensors" for seed, own in given.items()}
    gone = [path for path in paths.values() if not path.is_file()]
    if gone:
        raise ChimeraError(f"{gone[0]} is gone, which training begins with", "restore it, or begin with another run")
    earlier = (group.facts.get("init_from") or {}).get("packs", [])
    packs = tuple(pack for pack in (group.facts.get("pack"), *earlier) if isinstance(pack, Mapping))
    return WarmStart(group.name if only is None else f"{group.name}/seed-{only}", paths, packs)


def finished_run(home: Path, name: str, hint: str) -> tuple[Group, int | None]:
    """Return the training run that `name` means, of those with a finished seed, and the seed where it names one.

    Of several runs that begin so it is the newest that was not combined. Raises UsageError with `hint` where there is
    none.
    """
    groups = list_groups(home, "train")
    begun = name.removeprefix("runs/").partition("/")[0]
    trained = [group for group in groups if not group.combines]
    if begun == "latest":
        return resolve_run(home, name, groups=trained)
    exact = [group for group in groups if group.name == begun]
    fitting = exact or [group for group in trained if begun and group.name.startswith(begun)]
    # The newest first: what is broken in another run says nothing against the one that is meant.
    found = next((group for group in fitting if finished_seeds(group)), None)
    if found is None:
        raise UsageError(f"there is no training run {begun!r} with a finished seed", hint)
    return resolve_run(home, name, groups=[found])


def finished_seeds(group: Group) -> list[int]:
    """Return the seeds of a training run that have a result."""
    return [seed for seed in group.seeds if finished_result(group, seed) is not None]


def refuse_unfit_start(start: WarmStart, architecture: "Architecture") -> None:
    """Raise, before anything is made, where a checkpoint does not fit the model that is to begin with it."""
    from chimera_cli.models.checkpoint import fitting_state
    from chimera_cli.models.dual_encoder import build_dual_encoder

    if start.checkpoints:
        model = build_dual_encoder(architecture, pretrained=False)
        for path in sorted(set(start.checkpoints.values())):
            fitting_state(model, path)


def tell_start(start: WarmStart, fingerprint: str, listener: Listener) -> None:
    """Tell what a training begins with, and where that has seen other images than those of this pack's train split."""
    if start.run is None:
        return
    listener(Note(f"begins with the weights of {start.run}"))
    others = [str(pack.get("name")) for pack in start.packs if pack.get("fingerprint") != fingerprint]
    if others:
        words = "images of it that are in this dev or test split make figures better than they are"
        listener(Note(f"{start.run} has learned from {', '.join(others)}: {words}", "warning"))
