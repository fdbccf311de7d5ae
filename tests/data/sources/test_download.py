"""Downloads against a real server that cuts connections, ignores ranges, and refuses."""

import re
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from chimera_cli.data.sources.download import download
from chimera_cli.errors import ChimeraError
from chimera_cli.events import Event, Note, Progress

CONTENT = np.random.default_rng(0).integers(0, 256, 3_000_000, dtype=np.uint8).tobytes()


class Server:
    """Serves CONTENT; `cuts` are the bytes after which each of the first answers breaks off."""

    def __init__(self) -> None:
        self.ranges = True
        self.cuts: list[int] = []
        self.status = 200
        self.asked: list[str | None] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.answer(self)

            def log_message(self, *_: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/archive.zip"

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        asked = handler.headers.get("Range")
        self.asked.append(asked)
        start = int(re.fullmatch(r"bytes=(\d+)-", asked)[1]) if asked and self.ranges else 0  # type: ignore[index]
        if start >= len(CONTENT):
            handler.send_response(416)
            handler.send_header("Content-Range", f"bytes */{len(CONTENT)}")
            handler.send_header("Content-Length", "0")
            handler.end_headers()
            return
        handler.send_response(206 if start else self.status)
        handler.send_header("Content-Length", str(len(CONTENT) - start))
        if start:
            handler.send_header("Content-Range", f"bytes {start}-{len(CONTENT) - 1}/{len(CONTENT)}")
        handler.end_headers()
        cut = self.cuts.pop(0) if self.cuts else len(CONTENT)
        handler.wfile.write(CONTENT[start : start + cut])


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    made = Server()
    thread = threading.Thread(target=made.http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield made
    made.http.shutdown()
    thread.join()
    made.http.server_close()


def test_a_download_in_one_go(tmp_path: Path, server: Server) -> None:
    told: list[Event] = []
    target = download(server.url, tmp_path / "deep" / "archive.zip", told.append)
    assert target.read_bytes() == CONTENT
    assert told[-1] == Progress("downloading", 2, 2, "MiB")
    assert not list(target.parent.glob("*.part"))
    download(server.url, target)
    assert server.asked == [None]


def test_a_broken_connection_is_resumed(tmp_path: Path, server: Server) -> None:
    told: list[Event] = []
    server.cuts = [1_500_000, 700_000]
    assert download(server.url, tmp_path / "archive.zip", told.append).read_bytes() == CONTENT
    starts = [int(asked[6:-1]) for asked in server.asked if asked]
    assert len(starts) == 2
    assert 0 < starts[0] < starts[1]
    assert sum(isinstance(event, Note) for event in told) == 2


def test_a_later_call_goes_on_from_the_part(tmp_path: Path, server: Server) -> None:
    (tmp_path / "archive.zip.part").write_bytes(CONTENT[:1_000_000])
    assert download(server.url, tmp_path / "archive.zip").read_bytes() == CONTENT
    assert server.asked == ["bytes=1000000-"]


def test_a_server_that_ignores_the_range_starts_anew(tmp_path: Path, server: Server) -> None:
    server.ranges = False
    (tmp_path / "archive.zip.part").write_bytes(b"x" * 1_000_000)
    assert download(server.url, tmp_path / "archive.zip").read_bytes() == CONTENT


def test_a_part_that_is_whole_is_taken_and_one_that_is_too_long_is_not(tmp_path: Path, server: Server) -> None:
    (tmp_path / "archive.zip.part").write_bytes(CONTENT)
    assert download(server.url, tmp_path / "archive.zip").read_bytes() == CONTENT
    assert len(server.asked) == 1
    (tmp_path / "other.zip.part").write_bytes(CONTENT + b"more")
    assert download(server.url, tmp_path / "other.zip").read_bytes() == CONTENT


def test_a_connection_that_never_gets_on_is_given_up(tmp_path: Path, server: Server) -> None:
    server.cuts = [0] * 20
    (tmp_path / "archive.zip.part").write_bytes(CONTENT[:10])
    with pytest.raises(ChimeraError, match="broke off 5 times without progress") as caught:
        download(server.url, tmp_path / "archive.zip")
    assert "--from" in caught.value.hint
    assert not (tmp_path / "archive.zip").exists()
    assert (tmp_path / "archive.zip.part").read_bytes() == CONTENT[:10]


def test_a_refusal_is_one_sentence(tmp_path: Path, server: Server) -> None:
    server.status = 404
    with pytest.raises(ChimeraError, match="answers 404 Not Found") as caught:
        download(server.url, tmp_path / "archive.zip")
    assert "--from" in caught.value.hint
    assert not list(tmp_path.glob("*.part"))


def test_no_network_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "*")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound and never listening: nobody answers on this port
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/archive.zip"
        with pytest.raises(ChimeraError, match="can't be reached: Connection refused") as caught:
            download(url, tmp_path / "archive.zip")
    assert "--from FOLDER" in caught.value.hint
