"""A peer that trains in a process of its own: it works while it is asked to and stands still otherwise."""

import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from tempfile import TemporaryFile
from typing import IO, Any

from chimera_cli.events import Listener, Note, Progress
from chimera_cli.services.peer_training import PeerTraining, as_json

# Importing torch and open_clip and building the model on a slow disk, and the slowest update that is waited for.
_START_S = 300.0
_SILENCE_S = 3600.0


class PeerFailedError(Exception):
    """The peer's process ended or said nothing for long; the message is the last line of what went wrong."""


@dataclass(frozen=True, slots=True)
class PeerLap:
    """Some updates of the peer in a row; `stopped` before all were made. `figures` of dev after them, where asked."""

    updates: int
    pairs: int
    seconds: float
    stopped: bool = False
    figures: Mapping[str, float] | None = None
    evaluation_s: float | None = None
    ram_peak_gb: float | None = None


@dataclass(frozen=True, slots=True)
class RunningPeer:
    """The peer's process; `failed` says why there is none, `settings` what it runs with."""

    process: "subprocess.Popen[str]"
    answers: "queue.Queue[str | None]"
    errors: IO[bytes]
    tell: Listener
    settings: Mapping[str, Any] | None = None
    failed: str | None = None

    def lap(self, updates: int, *, evaluate: bool, limit_s: float | None = None) -> PeerLap:
        """Return the next `updates` of the peer, cut short once they have taken `limit_s`. Raises PeerFailedError.

        After a lap that was cut short there is no next one.
        """
        if self.failed:
            raise PeerFailedError(self.failed)
        self._signal(signal.SIGCONT)
        self._ask({"updates": updates, "evaluate": evaluate})
        while "lap" not in (answer := self.answer(_SILENCE_S)):
            self.tell(Progress("open_clip", answer["done"], updates, "updates"))
            if limit_s is not None and answer["seconds"] >= limit_s and answer["done"] < updates:
                self._signal(signal.SIGSTOP)
                return PeerLap(answer["done"], answer["pairs"], answer["seconds"], stopped=True)
        # Its workers would load ahead and take the cores from ours.
        self._signal(signal.SIGSTOP)
        return PeerLap(**answer["lap"])

    def answer(self, limit_s: float) -> dict[str, Any]:
        """Return the next answer. Raises PeerFailedError where none comes."""
        try:
            line = self.answers.get(timeout=limit_s)
        except queue.Empty:
            raise PeerFailedError(f"said nothing for {limit_s:.0f} s") from None
        if line is None:
            raise PeerFailedError(self._last_words())
        value: dict[str, Any] = json.loads(line)
        return value

    def _ask(self, wanted: Mapping[str, Any]) -> None:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(wanted) + "\n")
            self.process.stdin.flush()
        except OSError:
            raise PeerFailedError(self._last_words()) from None

    def _signal(self, number: signal.Signals) -> None:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, number)

    def _last_words(self) -> str:
        code = self.process.wait()
        self.errors.seek(0)
        lines = [line for line in self.errors.read().decode(errors="replace").splitlines() if line.strip()]
        return lines[-1].strip() if lines else f"ended with code {code} and said nothing"

    def end(self) -> None:
        """End the process and all that it started, stopped or not."""
        self._signal(signal.SIGKILL)
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with suppress(OSError, ValueError):
                    pipe.close()


@contextmanager
def running_peer(task: PeerTraining, tell: Listener) -> Iterator[RunningPeer]:
    """Yield the peer ready for its first lap, or as one that failed; its processes are gone in the end."""
    tell(Note("starting open_clip"))
    with TemporaryFile() as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "chimera_cli.services.peer_training"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            # Its workers are forked after its tokeniser has run: threads of that would not survive.
            env=os.environ | {"TOKENIZERS_PARALLELISM": "false"},
            text=True,
            # A group that can be stopped and ended as a whole. It stays in this session: should this process die,
            # the system ends a stopped group that nobody is left to wake.
            process_group=0,
        )
        answers: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=_read, args=(process, answers), name="peer", daemon=True).start()
        peer = RunningPeer(process, answers, errors, tell)
        try:
            yield _started(peer, task)
        finally:
            peer.end()


def _started(peer: RunningPeer, task: PeerTraining) -> RunningPeer:
    settings, failed = None, None
    try:
        assert peer.process.stdin is not None
        with suppress(OSError):
            peer.process.stdin.write(as_json(task) + "\n")
            peer.process.stdin.flush()
        settings = peer.answer(_START_S)["settings"]
    except PeerFailedError as error:
        failed = str(error)
        peer.tell(Note(f"open_clip failed: {failed}", "warning"))
    return replace(peer, settings=settings, failed=failed)


def _read(process: "subprocess.Popen[str]", answers: "queue.Queue[str | None]") -> None:
    """Put every line into the queue, None at the end."""
    assert process.stdout is not None
    with suppress(ValueError, OSError):
        for line in process.stdout:
            answers.put(line)
    answers.put(None)
