"""What many tests share: a home with the toy pack, made once, and the real entry point as a process."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
from support import FLICKR8K, REPOSITORY, Chimera, Done

# As `chimera` itself does, before any test loads torch.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


@pytest.fixture(scope="session")
def toy_pack_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with the toy pack alone. Read-only: tests that write take `toy_home`."""
    from chimera_cli.services.data import prepare

    home = tmp_path_factory.mktemp("toy-home")
    prepare("toy", home=home)
    return home


@pytest.fixture
def toy_home(toy_pack_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fresh home that sees the toy pack and may be written to; `CHIMERA_HOME` points there."""
    home = tmp_path / "home"
    (home / "data").mkdir(parents=True)
    shutil.copytree(toy_pack_home / "data" / "toy", home / "data" / "toy", copy_function=os.link)
    monkeypatch.setenv("CHIMERA_HOME", str(home))
    return home


@pytest.fixture(scope="session")
def small_pack_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with a pack `small` of 240/60/60 toy scenes of 32 pixels, for tests that run the pretrained towers."""
    from chimera_cli.data.pack_writer import write_pack
    from chimera_cli.data.sources.toy import draw_all, make_toy

    home = tmp_path_factory.mktemp("small-home")
    toy = make_toy({"train": 240, "dev": 60, "test": 60})
    write_pack(
        home / "data",
        name="small",
        source="toy",
        images=draw_all(toy, 32),
        items=toy.items,
        captions=toy.captions,
        size=32,
    )
    return home


@pytest.fixture
def small_home(small_pack_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fresh home that sees the small pack and may be written to; `CHIMERA_HOME` points there."""
    home = tmp_path / "home"
    (home / "data").mkdir(parents=True)
    shutil.copytree(small_pack_home / "data" / "small", home / "data" / "small", copy_function=os.link)
    monkeypatch.setenv("CHIMERA_HOME", str(home))
    return home


@pytest.fixture(scope="module")
def lean() -> Iterator[None]:
    """Leave out of this process what takes seconds and has tests of its own: MLflow, and the compiling of towers.

    Processes that a test starts have both.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("chimera_cli.tracking.track", lambda *_: nullcontext(lambda _event: None))
        patch.setattr("chimera_cli.models.sessions.session_backend", lambda: None)
        yield


@pytest.fixture
def chimera(tmp_path: Path) -> Chimera:
    """Run `chimera ARGUMENTS` as a process and return what came of it."""

    def run(*arguments: str, home: Path | None = None, cwd: Path = REPOSITORY, **variables: str) -> Done:
        environment = (
            os.environ | {"CHIMERA_HOME": str(home or tmp_path), "COLUMNS": "120", "NO_COLOR": "1"} | variables
        )
        executable = Path(sys.executable).with_name("chimera")
        done = subprocess.run(
            [str(executable), *arguments],
            cwd=cwd,
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        return Done(done.returncode, done.stdout, done.stderr)

    return run


@pytest.fixture(scope="session")
def flickr8k() -> Path:
    """The folder of the real data set; tests that need it skip visibly where it is absent."""
    if not FLICKR8K.is_dir():
        pytest.skip("the real Flickr8k is not at ../shared/flickr8k")
    return FLICKR8K
