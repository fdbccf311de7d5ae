"""MLflow as a listener: a worker thread brings what the run folder holds to the tracking store; training never waits.

The run folder is the truth. Events only wake the worker; it reads metrics.jsonl, telemetry.jsonl and the finished
files beside them, sends what the store has not got yet and notes how far it came in `mlflow.json`. Whatever could not
be sent therefore waits in the run folder, and `sync` is the same delivery once more: nothing is lost, nothing doubled.

The thread leaves the talking to a child process of low priority. MLflow's import alone costs seconds of processor and
300 MB, which would count as the training's own in `pairs_per_s` and `ram_peak_gb`; and a child can be stopped.

A group is one MLflow run, its seeds are nested runs. A seed's metrics carry the names of metrics.jsonl; beside them
`result/<figure>`, `best/<split>/<figure>` (the best checkpoint, evaluated) and `system/<reading>`. Contingency measures
are counted in `contingency/measures` at their steps, and tags say what was done. Files up to `ARTIFACT_LIMIT` go along,
so the heads of a locked recipe do; an ensemble of them and whole towers stay in the run folder.
"""

import contextlib
import fcntl
import functools
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import IO, Any, Literal

import yaml

from chimera_cli import runs
from chimera_cli.errors import ChimeraError
from chimera_cli.events import Event, Listener, Note, RunFinished, RunStarted, Saved, ignore
from chimera_cli.runs import Group

LEDGER = "mlflow.json"
ARTIFACT_LIMIT = 32 * 2**20  # bytes
_BATCH = 1000  # metrics in one request; the limit of MLflow's REST API
_PAUSE_S = 2.0  # between two deliveries while training runs
_RETRY_S = 60.0  # after a failed one
_SYSTEM_S = 2.0  # one telemetry reading per this many seconds; the whole series is an artifact
_STATUS = {"finished": "FINISHED", "failed": "FAILED", "interrupted": "KILLED"}
# Files that still grow or change while a seed is learning; they are sent once it is over.
_AT_THE_END = (
    "metrics.jsonl",
    "telemetry.jsonl",
    runs.EVENTS,
    "config-begun.yaml",
    "checkpoints/best.json",
    "checkpoints/best.safetensors",
)


@dataclass(frozen=True, slots=True)
class Delivered:
    """How many runs were made in the store, and how many metric values and files were sent."""

    runs: int = 0
    metrics: int = 0
    artifacts: int = 0

    def __add__(self, other: "Delivered") -> "Delivered":
        return Delivered(self.runs + other.runs, self.metrics + other.metrics, self.artifacts + other.artifacts)


@dataclass(frozen=True, slots=True)
class _Store:
    """A connected MLflow store; `key` is its name in the ledgers: `default`, or the URI without credentials."""

    client: Any
    key: str
    artifacts: str | None


@dataclass(slots=True)
class _News:
    """What the run tells of itself before its result files do: `ended` and `endings` are MLflow's words for it."""

    live: bool = False
    ended: str = "KILLED"
    started: dict[int, str] = field(default_factory=dict)
    learning: set[int] = field(default_factory=set)
    endings: dict[int, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Memory:
    """What one process remembers between deliveries; the ledgers on disk hold what must outlive it."""

    known: dict[str, bool] = field(default_factory=dict)
    offsets: dict[Path, int] = field(default_factory=dict)
    clocks: dict[Path, tuple[float, float]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Signals:
    """How the training thread talks to the worker; `trouble` holds its last failure, `courier` its child, if any."""

    wake: threading.Event = field(default_factory=threading.Event)
    closing: threading.Event = field(default_factory=threading.Event)
    documents: threading.Event = field(default_factory=threading.Event)
    trouble: list[str] = field(default_factory=list)
    courier: "list[subprocess.Popen[str]]" = field(default_factory=list)


# ---- what training and `runs sync` call -----------------------------------------------------------------------------


@contextlib.contextmanager
def track(home: Path, group: Group, announce: Listener = ignore, patience_s: float | None = None) -> Iterator[Listener]:
    """Yield a listener that delivers `group` to MLflow from a worker thread while its seeds run.

    Leaving the block sends the rest and waits for it `patience_s` at most (default: 10 for a server, 30 for the local
    store, which takes seconds to create). What is not sent by then stays in the run folder and `announce` hears a
    warning that names `chimera runs sync`. Files must be written before their event is told.
    """
    news, signals = _News(live=True), _Signals()
    worker = threading.Thread(target=_work, args=(home, group.path, news, signals), name="mlflow", daemon=True)
    worker.start()
    try:
        yield functools.partial(_hear, news, signals)
        news.ended = "FINISHED"
    except Exception:
        news.ended = "FAILED"
        raise
    finally:
        local = not is_server(tracking_uri(home))
        in_time = _close(worker, signals, (30.0 if local else 10.0) if patience_s is None else patience_s)
        trouble = "".join(signals.trouble[-1:]) if in_time else "it takes too long to answer"
        if trouble:
            where, remedy = _public(tracking_uri(home)), f"`chimera runs sync {group.name}` delivers what is missing"
            announce(Note(f"MLflow at {where} has not got everything: {trouble}; {remedy}", "warning"))


def sync(home: Path, group: Group) -> Delivered:
    """Deliver what MLflow has not got yet of `group` and return what was sent.

    Raises ChimeraError where the store can't be reached, or while the group's own process still delivers.
    """
    claim = _claim(group.path)
    if claim is None:
        raise ChimeraError(f"{group.name} is being delivered by another process", "wait until that process is done")
    with claim:
        try:
            return _deliver(_connect(home), group.path, _News(), _Memory(), documents=True)
        except ChimeraError:
            raise
        except Exception as error:
            raise ChimeraError(
                f"MLflow at {_public(tracking_uri(home))} did not take {group.name}: {_reason(error)}",
                "nothing is lost: start the server or correct MLFLOW_TRACKING_URI, then type the command again",
            ) from error


def tracking_uri(home: Path) -> str:
    """Return where MLflow writes: `MLFLOW_TRACKING_URI`, else the SQLite file below `home`."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{home / 'mlflow.db'}"


def is_server(uri: str) -> bool:
    """Return whether `uri` names a server, which decides by itself where artifacts lie."""
    return re.match(r"https?://|databricks", uri) is not None


# ---- the worker and its child ---------------------------------------------------------------------------------------


def _hear(news: _News, signals: _Signals, event: Event) -> None:
    """Note who is learning; wake the worker for what is rare, let it find steps and readings at its next turn."""
    if isinstance(event, RunStarted):
        news.started.setdefault(event.seed, runs.utc_now())
        news.learning.add(event.seed)
        news.endings.pop(event.seed, None)
    elif isinstance(event, RunFinished):
        news.learning.discard(event.seed)
        news.endings[event.seed] = _STATUS[event.status]
    if isinstance(event, RunStarted | RunFinished | Saved):
        signals.documents.set()
        signals.wake.set()


def _close(worker: threading.Thread, signals: _Signals, patience_s: float) -> bool:
    """Return whether the worker got everything done within `patience_s`; its child is stopped where it did not."""
    signals.closing.set()
    signals.wake.set()
    try:
        worker.join(patience_s)
        return not worker.is_alive()
    finally:
        while worker.is_alive():
            # Looked at anew each time: the worker may be about to start one.
            for courier in tuple(signals.courier):
                courier.kill()
            worker.join(0.05)


def _work(home: Path, path: Path, news: _News, signals: _Signals) -> None:
    """Have the group delivered every few seconds until told to close; after a failure keep silent for a while."""
    quiet_until, last = 0.0, False
    while not last:
        signals.wake.wait(_PAUSE_S)
        signals.wake.clear()
        last = signals.closing.is_set()
        if time.monotonic() < quiet_until:
            continue
        documents = signals.documents.is_set() or last
        signals.documents.clear()
        order = {"live": not last, "ended": news.ended, "documents": documents, "learning": list(news.learning)}
        trouble = _ask(home, path, signals, order | {"started": dict(news.started), "endings": dict(news.endings)})
        signals.trouble.clear()
        if trouble:
            signals.trouble.append(trouble)
            signals.documents.set()
            quiet_until = time.monotonic() + _RETRY_S
    for courier in signals.courier:
        courier.communicate()


def _ask(home: Path, path: Path, signals: _Signals, order: Mapping[str, Any]) -> str:
    """Return why the child could not carry out `order`, nothing where it did; a child that ended is replaced."""
    answer, reason = "", "the process that talks to it ended"
    try:
        if not signals.courier:
            signals.courier.append(_start_courier(home, path))
        courier = signals.courier[0]
        # Both are pipes, see _start_courier.
        assert courier.stdin is not None
        assert courier.stdout is not None
        courier.stdin.write(json.dumps(order) + "\n")
        courier.stdin.flush()
        answer = courier.stdout.readline()
    except OSError as error:
        reason = _reason(error)
    if answer:
        return str(json.loads(answer)["trouble"])
    for courier in signals.courier:
        courier.communicate()
    signals.courier.clear()
    return reason


def _start_courier(home: Path, path: Path) -> "subprocess.Popen[str]":
    """Return a child that carries out orders; in a session of its own, so that Ctrl-C does not reach it."""
    package = str(Path(__file__).parents[1])
    search = os.pathsep.join([package, *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.Popen(
        [sys.executable, "-m", "chimera_cli.tracking", str(home), str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
        env=os.environ | {"PYTHONPATH": search, "OMP_NUM_THREADS": "1"},
    )


def _serve(home: Path, path: Path) -> None:
    """Carry out the worker's orders, one JSON line each, and answer each in one line, until there are no more."""
    os.nice(10)
    # Whatever MLflow prints must not be taken for an answer.
    answers, sys.stdout = sys.stdout, sys.stderr
    store: _Store | None = None
    claim: IO[str] | None = None
    memory = _Memory()
    for line in sys.stdin:
        order = json.loads(line)
        seeds = {name: {int(seed): value for seed, value in order[name].items()} for name in ("started", "endings")}
        news = _News(order["live"], order["ended"], learning=set(order["learning"]), **seeds)
        trouble = ""
        try:
            claim = claim or _claim(path)
            if claim is None:
                raise ChimeraError("another process is delivering it")
            store = store or _connect(home)
            _deliver(store, path, news, memory, documents=order["documents"])
        except Exception as error:  # noqa: BLE001 - whatever MLflow raises, the run goes on and sync mends it
            # Files are read from their start again; the ledgers' markers keep their lines from doubling.
            memory = _Memory()
            trouble = _reason(error)
        answers.write(json.dumps({"trouble": trouble}) + "\n")
        answers.flush()


def _claim(path: Path) -> IO[str] | None:
    """Return an open file that holds the right to deliver the group in `path`, None where another process has it."""
    try:
        file = (path / ".mlflow.lock").open("a")
    except OSError as error:
        raise runs.cannot_write(path / ".mlflow.lock", error) from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    return file


def _connect(home: Path) -> _Store:
    """Return the store that `tracking_uri` names; the import alone takes seconds, a new SQLite file some more."""
    quiet = {
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "DO_NOT_TRACK": "true",
        "MLFLOW_LOGGING_LEVEL": "ERROR",
    }
    for name, value in quiet.items():
        os.environ.setdefault(name, value)
    from mlflow import MlflowClient

    uri = tracking_uri(home)
    key = _public(uri) if os.environ.get("MLFLOW_TRACKING_URI") else "default"
    location = None if is_server(uri) else (home / "mlartifacts").as_uri()
    return _Store(MlflowClient(tracking_uri=uri), key, location)


# ---- one delivery ---------------------------------------------------------------------------------------------------


def _deliver(store: _Store, path: Path, news: _News, memory: _Memory, documents: bool) -> Delivered:
    """Send what is new in the group folder `path`: rows always, finished files, figures and status if `documents`."""
    group = Group(path, runs.read_json(path / "group.json"))
    # A group that was taken up again has another process, and is the same run in the store.
    pid = group.facts.get("first_pid", group.facts.get("pid"))
    identity = f"{group.kind} {group.facts['created_at']} {pid}"
    parent, made = _ensure_run(store, path, group.name, identity, _group_tags(group), group, news, memory, None)
    total = Delivered(runs=made)
    if parent is None:
        return total
    for seed in group.seeds:
        directory = group.seed_dir(seed)
        if not _has_begun(directory):
            continue
        tags = _group_tags(group) | {"chimera.seed": str(seed)} | _git_tags(directory)
        child, made = _ensure_run(
            store, directory, f"seed-{seed}", f"{identity} {seed}", tags, group, news, memory, parent["run_id"]
        )
        if child is None:
            continue
        sent = _send_events(store, directory, child, memory) + _send_rows(store, directory, child, memory)
        if documents:
            over = not (news.live and seed in news.learning)
            sent += _send_documents(store, directory, child, over)
            _send_status(store, directory, child, _seed_status(group, seed, news), _moment(directory, "finished_at"))
        total += sent + Delivered(runs=made)
    if documents:
        total += _send_documents(store, path, parent, over=False)
        _send_status(store, path, parent, _group_status(group, news), group.facts.get("finished_at"))
    return total


def _has_begun(directory: Path) -> bool:
    return any((directory / name).exists() for name in ("config.yaml", "metrics.jsonl", "result.json", LEDGER))


def _ensure_run(
    store: _Store,
    directory: Path,
    name: str,
    identity: str,
    tags: Mapping[str, str],
    group: Group,
    news: _News,
    memory: _Memory,
    parent_id: str | None,
) -> tuple[dict[str, Any] | None, int]:
    """Return the ledger of the run in `directory` and whether it was made now; None where someone deleted the run.

    A run is looked up by its identity before one is made: a request that timed out may have been carried out.
    """
    ledger = _read_ledger(directory, store.key)
    run_id = ledger.get("run_id")
    if run_id is not None and (state := _state(store, run_id, memory)) != "unknown":
        return (ledger if state == "active" else None), 0
    seed = None if parent_id is None else int(directory.name.removeprefix("seed-"))
    started_at = _moment(directory, "started_at") or news.started.get(-1 if seed is None else seed)
    started_at = started_at or str(group.facts["created_at"])
    experiment = _experiment(store, f"chimera-{group.kind}")
    found = store.client.search_runs([experiment], filter_string=f"tags.`chimera.id` = '{identity}'", max_results=1)
    if found:
        run = found[0]
    else:
        all_tags = {"chimera.id": identity} | dict(tags) | ({"mlflow.parentRunId": parent_id} if parent_id else {})
        run = store.client.create_run(experiment, start_time=_milliseconds(started_at), tags=all_tags, run_name=name)
        params = _group_params(group) if seed is None else _seed_params(directory, seed)
        for chunk in _chunks(list(params.items()), 100):
            store.client.log_batch(run.info.run_id, params=[_param(key, value) for key, value in chunk])
    ledger = {"run_id": run.info.run_id, "parent_run_id": parent_id, "started_at": started_at, "status": "RUNNING"}
    ledger |= {"step": -1, "evaluated_step": -1, "telemetry": -1, "files": {}}
    _write_ledger(directory, store.key, ledger)
    memory.known[run.info.run_id] = True
    return ledger, 0 if found else 1


def _state(store: _Store, run_id: str, memory: _Memory) -> Literal["active", "deleted", "unknown"]:
    """Return what the store knows of a run; asked once per process. `unknown`: the store was thrown away."""
    from mlflow.exceptions import MlflowException

    if run_id not in memory.known:
        try:
            memory.known[run_id] = store.client.get_run(run_id).info.lifecycle_stage == "active"
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return "unknown"
    return "active" if memory.known[run_id] else "deleted"


def _experiment(store: _Store, name: str) -> str:
    from mlflow.exceptions import MlflowException

    found = store.client.get_experiment_by_name(name)
    if found is None:
        try:
            # The tag opens MLflow's pages on model training; without it they open on chat traces.
            tags = {"mlflow.experimentKind": "custom_model_development"}
            return str(store.client.create_experiment(name, artifact_location=store.artifacts, tags=tags))
        except MlflowException:
            # Another process may have made it in between; a second look decides.
            found = store.client.get_experiment_by_name(name)
            if found is None:
                raise
    return str(found.experiment_id)


# ---- rows -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Row:
    """The metrics (name, value) of one line; once they are sent, `ledger[marker]` becomes `place`."""

    marker: str
    place: int
    timestamp_ms: int
    metrics: tuple[tuple[str, float], ...]


def _send_rows(store: _Store, directory: Path, ledger: dict[str, Any], memory: _Memory) -> Delivered:
    """Send the lines of metrics.jsonl and telemetry.jsonl beyond the ledger's markers, in batches."""
    from mlflow.entities import Metric

    rows = [*_metric_rows(directory, ledger, memory), *_telemetry_rows(directory, ledger, memory)]
    sent = 0
    while rows:
        batch: list[Any] = []
        while rows and (not batch or len(batch) + len(rows[0].metrics) <= _BATCH):
            row = rows.pop(0)
            batch += [Metric(name, value, row.timestamp_ms, row.place) for name, value in row.metrics]
            ledger[row.marker] = max(ledger[row.marker], row.place)
        store.client.log_batch(ledger["run_id"], metrics=batch)
        _write_ledger(directory, store.key, ledger)
        sent += len(batch)
    return Delivered(metrics=sent)


def _send_events(store: _Store, directory: Path, ledger: dict[str, Any], memory: _Memory) -> Delivered:
    """Send the contingency measures that the store has not got; where one took training back, newer steps are sent."""
    from mlflow.entities import Metric, RunTag

    rows = runs.read_json_lines(directory / runs.EVENTS)
    known = min(ledger.get("events", 0), len(rows))
    if known != ledger.get("events", 0):
        # A resume has cut them back to its checkpoint: those that come next are new ones.
        ledger["events"] = known
        _write_ledger(directory, store.key, ledger)
    if known == len(rows):
        return Delivered()
    metrics, tags = [], {"chimera.contingency": str(len(rows))}
    for number, row in enumerate(rows[known:], known + 1):
        metrics.append(Metric("contingency/measures", number, _milliseconds(row["at"]), int(row["step"])))
        tags[f"chimera.contingency.{number}"] = f"update {row['step']}: {row['what']}"[:5000]
        if (side := (row.get("settings") or {}).get("image.image_size")) is not None:
            # A parameter can't be changed: it stays what the seed was begun with.
            tags["chimera.image_size"] = str(side)
        if row.get("back_to") is not None:
            # What was learned from there on is gone: its steps are made again, and are others.
            last = int(row["back_to"]) - 1
            ledger |= {name: min(ledger[name], last) for name in ("step", "evaluated_step")}
            # The file was cut: the place reached in it means nothing any more.
            for places in (memory.offsets, memory.clocks):
                places.pop(directory / "metrics.jsonl", None)
    store.client.log_batch(ledger["run_id"], metrics=metrics, tags=[RunTag(*tag) for tag in tags.items()])
    ledger["events"] = len(rows)
    _write_ledger(directory, store.key, ledger)
    return Delivered(metrics=len(metrics))


def _metric_rows(directory: Path, ledger: Mapping[str, Any], memory: _Memory) -> list[_Row]:
    """Return the new lines of metrics.jsonl. After a resume lines repeat steps; only steps beyond the marker count."""
    path = directory / "metrics.jsonl"
    base_ms = _milliseconds(ledger["started_at"])
    rows = []
    for line in _tail(path, memory):
        # An evaluation has a line of its own, with names such as `dev/i2t_r1` and without a clock.
        marker = "evaluated_step" if any("/" in name for name in line) else "step"
        elapsed_s = float(line.get("elapsed_s") or memory.clocks.get(path, (0.0, 0.0))[1])
        memory.clocks[path] = (0.0, elapsed_s)
        if int(line["step"]) > ledger[marker]:
            metrics = _numbers(line, leave_out=("step", "elapsed_s"))
            rows.append(_Row(marker, int(line["step"]), base_ms + round(1000 * elapsed_s), metrics))
    return rows


def _telemetry_rows(directory: Path, ledger: Mapping[str, Any], memory: _Memory) -> list[_Row]:
    """Return one reading per `_SYSTEM_S` seconds, numbered by those intervals; a resumed run's clock goes on."""
    path = directory / "telemetry.jsonl"
    base_ms = _milliseconds(ledger["started_at"])
    rows: list[_Row] = []
    newest = ledger["telemetry"]
    for line in _tail(path, memory):
        before_s, last_s = memory.clocks.get(path, (0.0, 0.0))
        now_s = float(line["elapsed_s"])
        before_s += last_s if now_s < last_s else 0.0
        memory.clocks[path] = (before_s, now_s)
        interval = int((before_s + now_s) // _SYSTEM_S)
        if interval > newest:
            newest = interval
            metrics = tuple((f"system/{name}", value) for name, value in _numbers(line, leave_out=("elapsed_s",)))
            rows.append(_Row("telemetry", interval, base_ms + round(1000 * (before_s + now_s)), metrics))
    return rows


def _tail(path: Path, memory: _Memory) -> list[dict[str, Any]]:
    """Return the complete lines of `path` that were not returned before; a line still being written waits."""
    if not path.exists():
        return []
    with path.open("rb") as file:
        offset = memory.offsets.get(path, 0)
        if file.seek(0, os.SEEK_END) < offset:
            offset = 0
        file.seek(offset)
        whole, _, _ = file.read().rpartition(b"\n")
    memory.offsets[path] = offset + len(whole) + bool(whole)
    return [json.loads(line) for line in whole.splitlines() if line.strip()]


def _numbers(values: Mapping[str, Any], leave_out: Sequence[str] = ()) -> tuple[tuple[str, float], ...]:
    """Return the measured ones of `values`; a missing figure is left out, never sent as 0."""
    return tuple(
        (name, float(value))
        for name, value in values.items()
        if name not in leave_out and isinstance(value, int | float) and not isinstance(value, bool)
    )


# ---- files, figures, status -----------------------------------------------------------------------------------------


def _send_documents(store: _Store, directory: Path, ledger: dict[str, Any], over: bool) -> Delivered:
    """Send files that are new or changed, and the figures in them; those that grow only when the seed is `over`."""
    from mlflow.entities import Metric

    total = Delivered()
    for path in _documents(directory, over):
        name = path.relative_to(directory).as_posix()
        status = path.stat()
        signature = f"{status.st_size}:{status.st_mtime_ns}"
        if ledger["files"].get(name) == signature or status.st_size > ARTIFACT_LIMIT:
            continue
        figures, step, moment = _figures_in(path)
        if figures:
            metrics = [Metric(key, value, _milliseconds(moment), step) for key, value in figures]
            store.client.log_batch(ledger["run_id"], metrics=metrics)
        folder = path.parent.relative_to(directory).as_posix()
        store.client.log_artifact(ledger["run_id"], str(path), None if folder == "." else folder)
        ledger["files"][name] = signature
        _write_ledger(directory, store.key, ledger)
        total += Delivered(metrics=len(figures), artifacts=1)
    return total


def _documents(directory: Path, over: bool) -> list[Path]:
    names = ["config.yaml", "environment.json", "result.json", *(_AT_THE_END if over else ())]
    paths = [directory / name for name in names]
    return [path for path in paths if path.is_file()] + sorted((directory / "evaluations").rglob("*.json"))


def _figures_in(path: Path) -> tuple[tuple[tuple[str, float], ...], int, str]:
    """Return the figures of a result or an evaluation as MLflow names them, their step and when they were made."""
    if path.name == "result.json":
        result = runs.read_json(path)
        return _prefixed("result", result["figures"]), 0, str(result["finished_at"])
    if path.parent.name not in ("evaluations", "baselines"):
        return (), 0, ""
    evaluation = runs.read_json(path)
    figures = dict(evaluation["figures"])
    # Over seeds a figure is a summary; the mean keeps the name and the deviation stands beside it.
    for name, value in evaluation["figures"].items():
        if isinstance(value, dict):
            figures |= {name: value.get("mean"), f"{name}_std": value.get("std")}
    step = int(evaluation.get("checkpoint_step") or 0)
    # A closed-form baseline stands beside the model's own figures, not in their place.
    whose = evaluation.get("baseline") or "best"
    return _prefixed(f"{whose}/{evaluation['split']}", figures), step, str(evaluation["created_at"])


def _prefixed(prefix: str, figures: Mapping[str, Any]) -> tuple[tuple[str, float], ...]:
    return tuple((f"{prefix}/{name}", value) for name, value in _numbers(figures))


def _send_status(store: _Store, directory: Path, ledger: dict[str, Any], status: str, moment: str | None) -> None:
    """Make the run's status in the store `status`; a resumed one runs again."""
    if ledger["status"] == status:
        return
    if status == "RUNNING":
        store.client.update_run(ledger["run_id"], status=status)
    else:
        store.client.set_terminated(ledger["run_id"], status, _milliseconds(moment or runs.utc_now()))
    ledger["status"] = status
    _write_ledger(directory, store.key, ledger)


def _seed_status(group: Group, seed: int, news: _News) -> str:
    path = group.seed_dir(seed) / "result.json"
    if news.live and seed in news.learning:
        return "RUNNING"
    if seed in news.endings:
        return news.endings[seed]
    if path.exists():
        return _STATUS[runs.read_json(path)["status"]]
    return _group_status(group, news)


def _group_status(group: Group, news: _News) -> str:
    """Return the group's status; one that is still `running` when its process delivers no more has ended as told."""
    return "RUNNING" if news.live else _STATUS.get(group.status, news.ended)


# ---- words ----------------------------------------------------------------------------------------------------------


def _group_tags(group: Group) -> dict[str, str]:
    """Return what both the group and its seeds are labelled with; the `mlflow.` ones fill columns of its UI."""
    facts = group.facts
    hardware = facts.get("hardware") or {}
    tags = {
        "chimera.kind": group.kind,
        "chimera.group": group.name,
        "chimera.device": hardware.get("gpu") or hardware.get("cpu"),
        "chimera.pack": (facts.get("pack") or {}).get("name"),
        "chimera.command": facts.get("command"),
        "mlflow.source.name": "chimera",
        "mlflow.source.type": "LOCAL",
        "mlflow.user": os.environ.get("USER"),
    }
    return {name: str(value) for name, value in tags.items() if value}


def _git_tags(directory: Path) -> dict[str, str]:
    path = directory / "environment.json"
    commit = runs.read_json(path).get("git_commit") if path.exists() else None
    return {"mlflow.source.git.commit": str(commit)} if commit else {}


def _group_params(group: Group) -> dict[str, Any]:
    facts = group.facts
    pack = facts.get("pack") or {}
    return {
        "recipe": facts.get("label"),
        "seeds": ",".join(str(seed) for seed in group.seeds),
        "pack": pack.get("name"),
        "pack_fingerprint": pack.get("fingerprint"),
        "config_hash": facts.get("config_hash"),
        "source_hash": facts.get("source_hash"),
        "chimera_version": facts.get("chimera_version"),
    }


def _seed_params(directory: Path, seed: int) -> dict[str, Any]:
    path = directory / "config.yaml"
    config = yaml.safe_load(path.read_text(encoding="utf-8")) if path.exists() else {}
    return {"seed": seed} | dict(_flattened(config or {}))


def _flattened(values: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flattened(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _param(name: str, value: Any) -> Any:
    from mlflow.entities import Param

    return Param(name, str(value)[:6000])


def _chunks(values: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    return (values[start : start + size] for start in range(0, len(values), size))


def _read_ledger(directory: Path, key: str) -> dict[str, Any]:
    path = directory / LEDGER
    return dict(runs.read_json(path)["stores"].get(key, {})) if path.exists() else {}


def _write_ledger(directory: Path, key: str, ledger: Mapping[str, Any]) -> None:
    path = directory / LEDGER
    stores = runs.read_json(path)["stores"] if path.exists() else {}
    runs.write_json(path, {"schema_version": runs.SCHEMA_VERSION, "stores": stores | {key: dict(ledger)}})


def _moment(directory: Path, name: str) -> str | None:
    path = directory / "result.json"
    value = runs.read_json(path).get(name) if path.exists() else None
    return None if value is None else str(value)


def _milliseconds(moment: str) -> int:
    return round(1000 * datetime.fromisoformat(moment).timestamp())


def _public(uri: str) -> str:
    """Return `uri` without user name and password."""
    return re.sub(r"//[^/@]*@", "//", uri)


def _reason(error: BaseException) -> str:
    """Return the first line of an error, which may hold a whole HTTP exchange."""
    text = str(error).strip().splitlines()
    return _public(text[0][:200]) if text else type(error).__name__


if __name__ == "__main__":
    _serve(Path(sys.argv[1]), Path(sys.argv[2]))
