"""What an evaluation looks at: the seeds of a run, a split of a pack, a device; and how looks at test are counted."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chimera_cli.errors import ChimeraError, UsageError
from chimera_cli.events import Listener, Note
from chimera_cli.runs import Group, count_test_look, looks_at_test, read_json, resolve_run

if TYPE_CHECKING:
    import torch

    from chimera_cli.data.pack import CaptionTable, Pack
    from chimera_cli.models.combination import Encoder
    from chimera_cli.models.dual_encoder import DualEncoder


@dataclass(frozen=True, slots=True)
class Subject:
    """Finished seeds of a training run, and the split of the pack that they are asked about."""

    group: Group
    seeds: tuple[int, ...]
    pack: "Pack"
    split: str
    device: "torch.device"

    @property
    def facts(self) -> dict[str, Any]:
        """Return run, pack and split as every result of an evaluation names them."""
        return {
            "run": self.group.name,
            "pack": {"name": self.pack.name, "fingerprint": self.pack.fingerprint},
            "split": self.split,
        }


def open_subject(home: Path, run: str, split: str, data: str | None, device: str) -> Subject:
    """Return what `run`, `split` and `data` name; `data` None is the pack that the run was trained on.

    Raises UsageError for a run, pack or split that is not there, ChimeraError for a seed that is not finished.
    """
    from chimera_cli.data.pack import SPLITS, open_pack, split_name
    from chimera_cli.runtime import pick_device

    group, seed = resolve_run(home, run)
    if group.kind != "train":
        raise UsageError(f"{group.name} is a {group.kind} run", "`chimera eval` takes a train run")
    seeds = group.seeds if seed is None else (seed,)
    _need_finished(group, seeds)
    name = split_name(split)
    if name not in SPLITS:
        raise UsageError(f"the split {name!r} can't be evaluated", f"the splits are {', '.join(SPLITS)}")
    pack = open_pack(home / "data", data or _trained_on(group))
    return Subject(group, seeds, pack, name, pick_device(device))


def _need_finished(group: Group, seeds: Sequence[int]) -> None:
    """Refuse seeds that are still at work or never came to their end: their best checkpoint may yet change."""
    if group.status == "finished":
        return
    for seed in seeds:
        result = group.seed_dir(seed) / "result.json"
        if not result.exists() or read_json(result).get("status") != "finished":
            wait = "wait until it has finished; `chimera runs list` shows whether it is still alive"
            hint = wait if group.status == "running" else "train it again"
            raise ChimeraError(f"seed {seed} of {group.name} is not finished: the run is {group.status}", hint)


def _trained_on(group: Group) -> str:
    pack = group.facts.get("pack")
    if not isinstance(pack, Mapping) or "name" not in pack:
        raise ChimeraError(f"{group.path / 'group.json'} names no pack", "say which one with --data")
    return str(pack["name"])


def captions_of(pack: "Pack", split: str) -> "CaptionTable":
    """Return the captions of a split. Raises ChimeraError where it has none."""
    table = pack.captions(split)
    if not len(table):
        raise ChimeraError(f"the {split} split of {pack.name} has no captions", "retrieval needs images with captions")
    return table


def count_look(group: Group, split: str, listener: Listener) -> int:
    """Return how often the test split was looked at with this run, this time included; the listener is told."""
    if split != "test":
        return looks_at_test(group.facts)
    looks = count_test_look(group)
    times = "once" if looks == 1 else f"{looks} times"
    message = f"the test split has now been looked at {times} with {group.name}; choose nothing by what it shows"
    listener(Note(message, "warning"))
    return looks


def best_model(subject: Subject, seed: int) -> "Encoder":
    """Return the best checkpoint of a seed as a model. Raises ChimeraError where it is missing or damaged."""
    from chimera_cli.models.combination import load_model

    return load_model(subject.group.seed_dir(seed) / "checkpoints" / "best.safetensors", subject.device)


def tell_of_length(model: "Encoder", texts: Sequence[str], what: str, listener: Listener) -> None:
    """Say so where the model, or a member of it, does not read all of a text; `what` names one of them."""
    from chimera_cli.models.combination import members_of

    cut, most = max((_cut(one, texts), one.architecture.max_tokens) for one in members_of(model))
    if cut:
        which = f"the {what} is" if len(texts) == 1 else f"{cut} of {len(texts)} {what}s are"
        message = f"{which} longer than the {most} tokens that the model reads: what comes after them is left out"
        listener(Note(message, "warning"))


def _cut(model: "DualEncoder", texts: Sequence[str]) -> int:
    """Return how many texts have more tokens than a model reads."""
    most = model.architecture.max_tokens
    return int((model.text_tower.token_table(texts, most + 1).lengths > most).sum())
