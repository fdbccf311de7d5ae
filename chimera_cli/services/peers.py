"""`chimera bench loader --against`: the loaders of others on the same images, measured in turn with ours."""

import difflib
import importlib.util
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from chimera_cli.errors import ChimeraError, UsageError
from chimera_cli.events import Listener, Note, Progress
from chimera_cli.services.bench_prepare import median_ratio
from chimera_cli.services.peer_ours import BARE, EQUAL, GATHER, SHARDS, Lap, file_stages, our_contestants

if TYPE_CHECKING:
    from chimera_cli.data.pack import Pack
    from chimera_cli.services.bench_loader import LoaderSetting
    from chimera_cli.services.peer_files import Photos
    from chimera_cli.services.peer_loaders import PeerTask

# Peer -> the modules it needs. Without the extra `peers` some are missing.
PEERS: Mapping[str, tuple[str, ...]] = {
    "open_clip": ("open_clip", "open_clip_train", "webdataset", "braceexpand", "pandas", "torchvision"),
    "pillow": ("torchvision",),
    "webdataset": ("webdataset", "torchvision"),
}
INSTALL = "pip install 'chimera-cli[peers]'"
ROUNDS = 3
# Importing torch and open_clip, starting workers and their first batches may take this long on a slow disk.
_START_S = 180
# A Unix socket's path has at most 107 bytes (unix(7)); those of workers are some 31 longer than their TMPDIR.
_LONGEST_TMPDIR = 70


@dataclass(frozen=True, slots=True)
class Against:
    """Which peers are measured, on how many images, as large as in the pack or as published, for how long each."""

    names: tuple[str, ...]
    images: int = 2000
    original_size: bool = False
    seconds: float = 15.0


def parse_against(text: str | None, *, images: int, original_size: bool, seconds: float) -> Against | None:
    """Return what `--against` asks for; None where it is not given. Raises UsageError for what can't be meant."""
    if text is None:
        if original_size:
            raise UsageError("--original-size says which files peers read", "name them: --against pillow,open_clip")
        return None
    return Against(parse_peers(text), images, original_size, seconds)


def parse_peers(text: str) -> tuple[str, ...]:
    """Return the peers in `pillow,open_clip`, each once. Raises UsageError for a name that is none."""
    names = tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    for name in names:
        if name not in PEERS:
            near = difflib.get_close_matches(name.lower().replace("-", "_"), PEERS, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}?" if near else f"the peers are {', '.join(PEERS)}"
            raise UsageError(f"--against: there is no peer {name!r}", hint)
    if not names:
        raise UsageError("--against names no peer", f"the peers are {', '.join(PEERS)}")
    return names


def need_peers(names: Sequence[str]) -> None:
    """Raise UsageError where a peer is not installed, naming what is."""
    for name in names:
        missing = [module for module in PEERS[name] if importlib.util.find_spec(module) is None]
        if missing:
            raise UsageError(f"--against {name}: {', '.join(missing)} can't be imported", INSTALL)


def measure_against(pack: "Pack", setting: "LoaderSetting", against: Against, tell: Listener) -> dict[str, Any]:
    """Return `peers` and `against`: throughput of each peer and of ours on the same images, and their ratios.

    All take turns for some rounds; a ratio is the median of the rounds' own ratios, since what else the machine does
    in a round hits everybody in it. A peer that fails is reported as failed, and the others go on. The files that
    peers read are deleted in the end.
    """
    from chimera_cli.services.peer_files import write_csv, write_photos, write_shards

    indices = pack.split_indices("train")[: against.images]
    with TemporaryDirectory(prefix="chimera-peers-") as folder:
        try:
            photos = write_photos(pack.images, indices.tolist(), Path(folder), against.original_size, tell)
            table = write_csv(photos) if "open_clip" in against.names else None
            shards = write_shards(photos, tell) if "webdataset" in against.names else []
        except OSError as error:
            raise ChimeraError(
                f"{folder} can't be written: {error.strerror or error}", "set TMPDIR to a folder with some free space"
            ) from error
        stages = file_stages(photos, pack, setting, tell)
        contestants = our_contestants(pack, indices, setting, photos, shards, against.seconds / ROUNDS)
        for name in against.names:
            task = peer_task(name, photos, table, shards, setting, against)
            contestants[name] = partial(run_peer, task, Path(folder))
        laps = _take_turns(contestants, tell)
    return summarise(laps, against.names) | {"against": _facts(laps, photos, against) | {"file_stages": stages}}


def _take_turns(contestants: Mapping[str, Callable[[], Lap]], tell: Listener) -> dict[str, list[Lap]]:
    """Return the laps of each contestant; one that fails takes no further turn."""
    laps: dict[str, list[Lap]] = {name: [] for name in contestants}
    turns = [name for _ in range(ROUNDS) for name in contestants]
    for done, name in enumerate(turns):
        if laps[name] and laps[name][-1].failed:
            continue
        tell(Progress(f"against, {name}", done, len(turns), "turns"))
        laps[name].append(contestants[name]())
        if failed := laps[name][-1].failed:
            tell(Note(f"{name} failed: {failed}", "warning"))
    tell(Progress("against", len(turns), len(turns), "turns"))
    return laps


# ---- peers ----------------------------------------------------------------------------------------------------------


def peer_task(
    name: str,
    photos: "Photos",
    table: Path | None,
    shards: Sequence[Path],
    setting: "LoaderSetting",
    against: Against,
) -> "PeerTask":
    """Return what a peer is asked to do, with the files that it reads."""
    from chimera_cli.services.peer_loaders import PeerTask

    return PeerTask(
        name=name,
        paths=tuple(map(str, photos.paths)) if name == "pillow" else (),
        csv=str(table) if name == "open_clip" else None,
        shards=tuple(map(str, shards)) if name == "webdataset" else (),
        batch=setting.batch,
        image_size=setting.image_size,
        crop_scale=setting.crop_scale,
        flip=setting.flip,
        mean=setting.mean,
        std=setting.std,
        seconds=against.seconds / ROUNDS,
    )


def run_peer(task: "PeerTask", folder: Path) -> Lap:
    """Return the lap of a peer in a process group of its own, which is gone when this returns or raises.

    What it can't tidy up when it is ended lies in `folder`, where the name is not too long for that.
    """
    from chimera_cli.services.peer_loaders import as_json

    process = subprocess.Popen(
        [sys.executable, "-m", "chimera_cli.services.peer_loaders"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | ({"TMPDIR": str(folder)} if len(os.fsencode(folder)) <= _LONGEST_TMPDIR else {}),
        text=True,
        errors="replace",
        # Ctrl-C is for this process alone: it ends the whole group.
        start_new_session=True,
    )
    limit = _START_S + 4 * task.seconds
    try:
        out, err = process.communicate(as_json(task), timeout=limit)
    except subprocess.TimeoutExpired:
        return Lap(None, f"no result within {limit:.0f} s")
    finally:
        _end(process)
    return _lap(process.returncode, out, err)


def _end(process: "subprocess.Popen[str]") -> None:
    """End a process and all that it started."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for pipe in (process.stdin, process.stdout, process.stderr):
        if pipe is not None:
            with suppress(OSError, ValueError):
                pipe.close()


def _lap(code: int, out: str, err: str) -> Lap:
    try:
        result = json.loads(out.strip().splitlines()[-1])
        return Lap(result["images"] / result["seconds"], None, result["settings"])
    except (IndexError, KeyError, TypeError, ValueError):
        lines = [line for line in err.splitlines() if line.strip()]
        return Lap(None, lines[-1].strip() if lines else f"ended with code {code} and said nothing")


# ---- figures --------------------------------------------------------------------------------------------------------


def summarise(laps: Mapping[str, Sequence[Lap]], names: Sequence[str]) -> dict[str, Any]:
    """Return `peers`: a row for each name, its figures None where it failed."""
    return {"peers": [_row(name, laps) for name in names]}


def _row(name: str, laps: Mapping[str, Sequence[Lap]]) -> dict[str, Any]:
    own = laps[name]
    failed = next((lap.failed for lap in own if lap.failed), None)
    row: dict[str, Any] = {"name": name, "failed": failed, "settings": dict(own[0].settings or {})}
    ratios = {"ratio_equal_output": EQUAL, "ratio_gather": GATHER}
    # Only webdataset reads what our stream of shards reads.
    ratios |= {"ratio_shards": SHARDS} if name == "webdataset" else {}
    if failed:
        return row | dict.fromkeys(("images_per_s", "spread", "rounds", *ratios))
    rates = _rates(own)
    return row | _throughput(own) | {key: median_ratio(_rates(laps[ours]), rates) for key, ours in ratios.items()}


def _throughput(laps: Sequence[Lap]) -> dict[str, Any]:
    """Return the median of the rounds, the lowest and highest, and all of them."""
    rates = _rates(laps)
    return {"images_per_s": median(rates), "spread": [min(rates), max(rates)], "rounds": rates}


def _rates(laps: Sequence[Lap]) -> list[float]:
    return [lap.images_per_s for lap in laps if lap.images_per_s is not None]


def _facts(laps: Mapping[str, Sequence[Lap]], photos: "Photos", against: Against) -> dict[str, Any]:
    import torch

    from chimera_cli.services.peer_loaders import WORKERS

    return {
        "images": len(photos.paths),
        "original_size": against.original_size,
        "width": photos.width,
        "height": photos.height,
        "mean_kb": photos.mean_kb,
        "jpeg_quality": photos.quality,
        "seconds": against.seconds,
        "rounds": ROUNDS,
        "peer_workers": WORKERS,
        "torch_threads": torch.get_num_threads(),
        "ours": [{"name": name} | _throughput(laps[name]) for name in (GATHER, EQUAL, SHARDS) if name in laps],
        "files_ceiling": {"name": "decode, resize and hash on one thread"} | _throughput(laps[BARE]),
    }
