"""Groups and runs on disk: where they lie, who is latest, and writes of which no reader ever sees half."""

import contextlib
import difflib
import fcntl
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from chimera_cli.errors import ChimeraError, UsageError

SCHEMA_VERSION = 1
# The key that holds the hash of a file's other content.
SEAL = "sha256"
# What a result repeats of its group, so that one put into the folder of another group is noticed.
MADE_WITH = ("pack", "stream", "config_hash", "source_hash", "hardware")
# What a seed changed by itself while it was trained, one line each.
EVENTS = "events.jsonl"
Status = Literal["running", "finished", "failed", "interrupted"]


# ---- places ---------------------------------------------------------------------------------------------------------


def home() -> Path:
    """Return the folder below which everything is written: `CHIMERA_HOME`, else the current folder."""
    return Path(os.environ.get("CHIMERA_HOME") or ".").expanduser().resolve()


def runs_dir(home: Path) -> Path:
    """Return the folder of all groups."""
    return home / "runs"


def utc_now() -> str:
    """Return the moment as ISO 8601 in UTC with microseconds, which sorts as text."""
    return datetime.now(UTC).isoformat(timespec="microseconds")


# ---- files ----------------------------------------------------------------------------------------------------------


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Replace `path` by `value` as JSON in one step, synced to disk. Raises ChimeraError where it can't be written."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def write_sealed_json(path: Path, value: Mapping[str, Any]) -> None:
    """Replace `path` by `value` as JSON with a seal: `sha256` over the rest of it, so that an edit by hand shows.

    The seal guards against slips, not against somebody who computes it anew. Raises ChimeraError as `write_json` does.
    """
    # As it will be read back: keys that are numbers become text, and sort differently.
    content = {key: item for key, item in json.loads(json.dumps(value)).items() if key != SEAL}
    write_json(path, content | {SEAL: content_hash(content)})


def read_sealed_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in `path`, seal included. Raises ChimeraError as `read_json`, and for a broken seal."""
    value = read_json(path)
    problem = seal_problem(value)
    if problem:
        raise ChimeraError(f"{path} {problem}", "make it anew; a file that was changed proves nothing")
    return value


def seal_problem(document: Mapping[str, Any]) -> str | None:
    """Return what is wrong with the seal of a document that was read, to follow its name; None where it holds."""
    seal = document.get(SEAL)
    if seal is None:
        return "was written by an older chimera or edited (it has no seal)"
    if seal != content_hash({key: item for key, item in document.items() if key != SEAL}):
        return "was edited after it was written (its hash no longer matches)"
    return None


def write_text(path: Path, text: str) -> None:
    """Replace `path` by `text` in one step, synced to disk. Raises ChimeraError where it can't be written."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise cannot_write(path, error) from error


def json_line(value: Mapping[str, Any]) -> str:
    """Return `value` as one line of a JSON-lines file."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False) + "\n"


def append_json_line(path: Path, value: Mapping[str, Any]) -> None:
    """Append `value` as one JSON line and flush it. Raises ChimeraError where it can't be written."""
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(json_line(value))
    except OSError as error:
        raise cannot_write(path, error) from error


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in `path`. Raises ChimeraError when it is missing, cut off, or from a newer schema."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ChimeraError(f"{path} does not exist", "`chimera runs list` shows what has been run") from error
    except OSError as error:
        raise ChimeraError(f"{path} can't be read: {error.strerror}", "check the file's permissions") from error
    except (ValueError, RecursionError) as error:
        # RecursionError: thousands of brackets within each other.
        raise ChimeraError(
            f"{path} is not valid JSON: {error}", "the file was cut off or edited; run it again"
        ) from error
    if not isinstance(value, dict):
        raise ChimeraError(f"{path} holds no JSON object", "the file was edited; run it again")
    version = value.get("schema_version", SCHEMA_VERSION)
    if not isinstance(version, int) or version > SCHEMA_VERSION:
        raise ChimeraError(
            f"{path} has schema version {version}, this chimera reads up to {SCHEMA_VERSION}", "update chimera"
        )
    return value


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a JSON-lines file ([] without one), leaving out a last line that a crash cut short."""
    if not path.exists():
        return []
    # Not splitlines, which also breaks at U+2028 and others that JSON leaves as they are; and a crash may cut a letter.
    lines = path.read_text(encoding="utf-8", errors="replace").removesuffix("\n").split("\n")
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except (ValueError, RecursionError) as error:
            if number < len(lines):
                raise ChimeraError(f"{path}:{number} is not valid JSON", "the file was edited; run it again") from error
    return rows


def cannot_write(path: Path, error: OSError) -> ChimeraError:
    """Return the one sentence for a file that can't be written: full disk, no permission, anything else."""
    hints = {
        28: "free some space or set CHIMERA_HOME to another disk",
        13: "set CHIMERA_HOME to a folder you may write",
    }
    hint = hints.get(error.errno or 0, "set CHIMERA_HOME to a folder that can be written")
    return ChimeraError(f"{path} can't be written: {error.strerror or error}", hint)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on `path` (made if need be); a second process waits until the first lets go."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a")
    except OSError as error:
        raise cannot_write(path, error) from error
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


# ---- groups ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Group:
    """One command's work on one or more seeds: `facts` is the content of its group.json."""

    path: Path
    facts: Mapping[str, Any]

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def kind(self) -> str:
        return str(self.facts["kind"])

    @property
    def status(self) -> str:
        return str(self.facts["status"])

    @property
    def seeds(self) -> tuple[int, ...]:
        return tuple(self.facts["seeds"])

    @property
    def combines(self) -> tuple[Mapping[str, Any], ...]:
        """What group.json says of the runs that this one is the mean of, () where it was trained itself."""
        parts = self.facts.get("combines")
        return tuple(part for part in parts if isinstance(part, Mapping)) if isinstance(parts, list) else ()

    def seed_dir(self, seed: int) -> Path:
        """Return the folder of one seed, whether it exists or not."""
        return self.path / f"seed-{seed}"

    def results(self) -> list[dict[str, Any]]:
        """Return the result.json of every seed that has one, in the order of the seeds."""
        paths = [self.seed_dir(seed) / "result.json" for seed in self.seeds]
        return [read_json(path) for path in paths if path.exists()]


def create_group(home: Path, kind: str, label: str, seeds: Sequence[int], facts: Mapping[str, Any]) -> Group:
    """Make `runs/<kind>-<label>-<UTC time>/` with its group.json (status `running`) and one folder per seed.

    `facts` are added to group.json: pack, config and source hashes, hardware, command. Two groups begun in the same
    second get different names. Raises ChimeraError where the folder can't be written.
    """
    stamp = time.strftime("%Y%m%d-%H%M%S", time.gmtime())
    clean = re.sub(r"[^A-Za-z0-9_.]+", "-", label).strip("-.")
    base = "-".join(part for part in (kind, clean, stamp) if part)
    for suffix in ("", *(f"-{number}" for number in range(2, 1000))):
        path = runs_dir(home) / (base + suffix)
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            raise cannot_write(path, error) from error
        break
    else:
        raise ChimeraError(f"{path} and 999 names beside it are taken", "wait a second and try again")
    group = Group(
        path,
        {"schema_version": SCHEMA_VERSION, "kind": kind, "label": label, "status": "running", "created_at": utc_now()}
        | {"finished_at": None, "seeds": list(seeds), "pid": os.getpid(), "test_looks": 0}
        | dict(facts),
    )
    try:
        for seed in seeds:
            group.seed_dir(seed).mkdir()
        write_sealed_json(path / "group.json", group.facts)
    except (OSError, ChimeraError) as error:
        shutil.rmtree(path, ignore_errors=True)
        raise (error if isinstance(error, ChimeraError) else cannot_write(path, error)) from error
    return group


def update_group(group: Group, **changes: Any) -> Group:
    """Return the group with `changes` written into group.json, read anew under a lock so that none is lost."""
    with locked(group.path / ".lock"):
        return Group(group.path, _rewrite(group.path / "group.json", lambda _: changes))


def _rewrite(path: Path, changes: Callable[[dict[str, Any]], dict[str, Any]]) -> dict[str, Any]:
    """Write `changes` of what `path` holds into it and return the whole; a broken seal stays broken.

    Sealing it anew would turn an edit by hand into a fact.
    """
    before = read_json(path)
    facts = before | changes(before)
    if seal_problem(before):
        write_json(path, facts)
    else:
        write_sealed_json(path, facts)
    return read_json(path)


def finish_group(group: Group, status: Status) -> Group:
    """Return the group marked as over."""
    return update_group(group, status=status, finished_at=utc_now())


def count_test_look(group: Group) -> int:
    """Count one more look at the test split in group.json and return how many there have been."""
    with locked(group.path / ".lock"):
        facts = _rewrite(group.path / "group.json", lambda before: {"test_looks": looks_at_test(before) + 1})
    return looks_at_test(facts)


def looks_at_test(facts: Mapping[str, Any]) -> int:
    """Return how often the test split was looked at, from the facts of a group; 0 where an edit left no number."""
    looks = facts.get("test_looks")
    return looks if type(looks) is int else 0


def list_groups(home: Path, kind: str | None = None) -> list[Group]:
    """Return all groups with a readable group.json, the newest first by its `created_at`.

    A folder whose group.json is cut off or was edited into something else is passed over: one broken run must not hide
    all others. Naming it in `resolve_run` says what is wrong with it.
    """
    folder = runs_dir(home)
    if not folder.is_dir():
        return []
    groups = []
    for path in folder.iterdir():
        if not (path / "group.json").is_file():
            continue
        try:
            group = _read_group(path)
        except ChimeraError:
            continue
        if kind is None or group.kind == kind:
            groups.append(group)
    return sorted(groups, key=lambda group: (str(group.facts["created_at"]), group.name), reverse=True)


def _read_group(path: Path) -> Group:
    """Return the group in a folder. Raises ChimeraError where its group.json is cut off or lacks what every one has."""
    facts = read_json(path / "group.json")
    lacking = sorted({"kind", "status", "created_at", "finished_at", "seeds"} - set(facts))
    if lacking or not _are_seeds(facts["seeds"]):
        what = f"lacks {', '.join(lacking)}" if lacking else "holds no list of seeds"
        raise ChimeraError(f"{path / 'group.json'} {what}", "the file was edited; restore it or delete the folder")
    return Group(path, facts)


def resolve_run(
    home: Path, name: str, kind: str = "train", groups: Sequence[Group] | None = None
) -> tuple[Group, int | None]:
    """Return the group that `name` means, and the seed when it names one (`GROUP/seed-1`).

    `latest` is the finished group of `kind` that finished last; anything else is a group or a unique prefix of one.
    `groups` are those of `list_groups`, where they have been read already. Raises UsageError naming what there is when
    nothing or more than one group fits.
    """
    known = list_groups(home) if groups is None else groups
    wanted, _, rest = name.strip("/").removeprefix("runs/").partition("/")
    group = _latest(home, kind, known) if wanted == "latest" else _by_prefix(home, wanted, known)
    if not rest:
        return group, None
    match = re.fullmatch(r"seed-(\d+)", rest)
    if match is None or int(match[1]) not in group.seeds:
        seeds = ", ".join(f"seed-{seed}" for seed in group.seeds)
        raise UsageError(f"{group.name} has no {rest!r}", f"its seeds are {seeds}")
    return group, int(match[1])


def latest_group(home: Path, kind: str = "train") -> Group:
    """Return the finished group of `kind` with the newest `finished_at`. Raises UsageError when there is none."""
    return _latest(home, kind, list_groups(home, kind))


def _latest(home: Path, kind: str, groups: Sequence[Group]) -> Group:
    started = [group for group in groups if group.kind == kind]
    finished = [group for group in started if group.status == "finished"]
    if not finished:
        detail = f"; the newest, {started[0].name}, is {started[0].status}" if started else ""
        raise UsageError(f"there is no finished {kind} run below {runs_dir(home)}{detail}", _how_to_make(kind))
    return max(finished, key=lambda group: str(group.facts["finished_at"]))


def _by_prefix(home: Path, prefix: str, groups: Sequence[Group]) -> Group:
    if prefix and (runs_dir(home) / prefix / "group.json").is_file():
        _read_group(runs_dir(home) / prefix)
    exact = [group for group in groups if group.name == prefix]
    fitting = exact or [group for group in groups if prefix and group.name.startswith(prefix)]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        raise UsageError(
            f"{prefix!r} fits {len(fitting)} runs: {', '.join(g.name for g in fitting[:4])}", "type more of the name"
        )
    near = difflib.get_close_matches(prefix, [group.name for group in groups], n=3, cutoff=0.3)
    hint = f"did you mean {', '.join(near)}?" if near else "`chimera runs list` shows what has been run"
    raise UsageError(f"no run is called {prefix!r} below {runs_dir(home)}", hint)


def _are_seeds(value: Any) -> bool:
    return isinstance(value, list) and all(type(seed) is int and 0 <= seed < 2**63 for seed in value)


def _how_to_make(kind: str) -> str:
    commands = {
        "train": "run `chimera train full --config configs/train/locked.yaml --seeds 0,1,2`",
        "sanity": "run `chimera train sanity --seed 0`",
        "bench-loader": "run `chimera bench loader`",
        "bench-encoders": "run `chimera bench encoders`",
        "bench-prepare": "run `chimera bench prepare`",
        "bench-retrieval": "run `chimera bench retrieval`",
        "bench-speedrun": "run `chimera bench speedrun`",
        "bench-train": "run `chimera bench train --against open_clip`",
    }
    return commands.get(kind, "`chimera runs list` shows what has been run")


# ---- identity -------------------------------------------------------------------------------------------------------


def source_hash(*parts: str) -> str:
    """Return the SHA-256 over the package's Python files, by path and content: what the figures were made with.

    `parts` names files and folders of the package, such as `models`; without any it is all of it.

    Not the git commit: a change of the README makes no evidence stale, an uncommitted change of the code does.
    """
    package = Path(__file__).parent
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        name = path.relative_to(package).as_posix()
        if parts and not any(name == part or name.startswith(f"{part}/") for part in parts):
            continue
        digest.update(name.encode() + b"\0")
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def content_hash(value: Any) -> str:
    """Return the SHA-256 of `value` as canonical JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":"), default=str).encode()).hexdigest()
