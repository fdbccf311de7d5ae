"""The benchmark of preparing: what it takes, what it compares, and that nothing but its group stays."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from chimera_cli.data.pack import open_pack
from chimera_cli.errors import ChimeraError, UsageError
from chimera_cli.events import Event, Progress
from chimera_cli.figures import FIGURES
from chimera_cli.runs import latest_group, read_json
from chimera_cli.services import bench_prepare as module
from chimera_cli.services.bench_prepare import (
    PrepareSetting,
    Rates,
    bare_loops,
    bench_prepare,
    draw_photos,
    find_photos,
    measure,
    median_ratio,
    prepare,
    working_folder,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder with five small images and a text, two of them in a folder of their own."""
    photos = tmp_path / "photos"
    (photos / "more").mkdir(parents=True)
    for number, name in enumerate(("b.jpg", "a.PNG", "more/c.jpeg", "more/d.jpg", "z.png")):
        Image.new("RGB", (60, 40), (40 * number, 9, 9)).save(photos / name)
    (photos / "readme.txt").write_text("no photo")
    return photos


def test_the_first_photos_by_name_are_taken(folder: Path) -> None:
    assert [path.name for path in find_photos(folder, 4)] == ["a.PNG", "b.jpg", "c.jpeg", "d.jpg"]
    assert len(find_photos(folder, 100)) == 5
    (folder / "none").mkdir()
    with pytest.raises(ChimeraError, match="holds no JPEG or PNG"):
        find_photos(folder / "none", 4)


def test_drawn_photos_have_the_size_of_photos(tmp_path: Path) -> None:
    photos = draw_photos(tmp_path, 35)
    contents = [photo.read_bytes() for photo in photos]
    assert len(set(contents)) == 32
    assert np.mean([len(content) for content in contents]) == pytest.approx(137_000, rel=0.1)
    with Image.open(photos[34]) as image:
        assert (image.format, image.size) == ("JPEG", (500, 375))


def test_preparing_is_what_the_command_does(folder: Path, tmp_path: Path) -> None:
    setting = PrepareSetting(3, 16, "crop", str(folder))
    prepare(find_photos(folder, 3), tmp_path, setting, "auto")
    pack = open_pack(tmp_path / "packs", "auto")
    assert pack.column("source_file") == ["a.PNG", "b.jpg", "c.jpeg"]
    assert pack.manifest["decoders"] == {"pillow": 1, "simplejpeg": 2}
    prepare(find_photos(folder, 3), tmp_path, setting, "pillow")
    assert open_pack(tmp_path / "packs", "pillow").manifest["decoders"] == {"pillow": 3}


def test_ratios_are_taken_within_rounds() -> None:
    # The machine was three times as slow in the second round: no ratio shows it.
    assert median_ratio((600, 200, 600), (300, 100, 200)) == 2
    assert Rates("x", (600, 200, 400)).facts() == {
        "name": "x", "images_per_s": 400, "std": 200, "rounds": [600, 200, 400],
    }  # fmt: skip
    assert Rates("x", (5.0,)).facts()["std"] is None


def test_all_ways_are_measured_in_turn(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    monkeypatch.setattr(module, "prepare", lambda _photos, _folder, _setting, decoder: order.append(decoder))
    monkeypatch.setattr(module, "bare_loops", lambda photos, _setting, n: order.append(f"{len(photos)} on {n}"))
    monkeypatch.setattr("chimera_cli.runtime.cpu_cores", lambda: 3)
    details = measure(tmp_path, folder, PrepareSetting(4, 16, "crop", str(folder)), lambda _event: None, rounds=2)
    assert order == ["auto", "4 on 1", "4 on 3", "pillow"] * 3
    best = [3 * rate for rate in details["bare"]["rounds"]]
    assert details["ceiling"]["images_per_s"] == pytest.approx(np.median(best))
    assert details["ceiling"]["share_reached"] == pytest.approx(median_ratio(details["prepare"]["rounds"], best))
    assert details["images"] == 4


def test_a_group_with_its_evidence_is_all_that_stays(folder: Path, tmp_path: Path) -> None:
    told: list[Event] = []
    home = tmp_path / "home"
    result = bench_prepare(
        home, origin=folder, images=5, size=16, fit="pad", command="chimera x", original_size=False,
        listener=told.append,
    )  # fmt: skip
    group = latest_group(home, "bench-prepare")
    assert (group.name, group.status) == (result["group"], "finished")
    assert set(result["figures"]) <= set(FIGURES)
    assert result["figures"]["prepare_images_per_s"] == result["details"]["prepare"]["images_per_s"] > 0
    assert read_json(group.seed_dir(0) / "result.json")["details"]["photos"] == str(folder)
    assert [path.name for path in home.iterdir()] == ["runs"]
    assert any(isinstance(event, Progress) and event.done == event.total for event in told)


def test_drawn_photos_go_with_the_run(folder: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    result = bench_prepare(
        home, origin=folder, images=2, size=32, fit="crop", command="chimera x", original_size=True
    )  # fmt: skip
    assert result["details"]["photos"] == "drawn, 500 x 375"
    assert result["details"]["images"] == 2
    assert [path.name for path in home.iterdir()] == ["runs"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"images": 0}, "--images 0"),
        ({"size": 2000}, "--size 2000"),
        ({"origin": Path("nowhere")}, "nowhere is not a folder"),
    ],
)
def test_words_that_can_not_be_meant(tmp_path: Path, words: dict[str, object], message: str) -> None:
    options = {"origin": None, "images": 1, "size": 16, "fit": "crop", "command": "x", "original_size": False} | words
    with pytest.raises(UsageError, match=message) as caught:
        bench_prepare(tmp_path, **options)  # type: ignore[arg-type]
    assert caught.value.hint
    assert not list(tmp_path.iterdir())


def test_photos_that_can_not_be_read_end_in_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_bytes(b"no photo")
    with pytest.raises(ChimeraError, match=r"1 of 1 images can't be read.*a\.jpg"):
        bench_prepare(
            tmp_path / "home", origin=tmp_path / "photos", images=1, size=16, fit="crop", command="chimera x",
            original_size=False,
        )  # fmt: skip
    assert latest_status(tmp_path / "home") == "failed"


def test_a_photo_that_can_not_be_opened_is_left_out_everywhere(folder: Path, tmp_path: Path) -> None:
    photos = [*find_photos(folder, 3), folder / "vanished.jpg"]
    setting = PrepareSetting(4, 16, "crop", str(folder))
    prepare(photos, tmp_path, setting, "auto")
    assert len(open_pack(tmp_path / "packs", "auto")) == 3
    bare_loops(photos, setting, 2)


def test_no_error_of_the_work_is_blamed_on_its_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="elsewhere"), working_folder(tmp_path):
        raise FileNotFoundError("elsewhere")
    assert not list(tmp_path.iterdir())
    with pytest.raises(ChimeraError, match="absent can't be written"), working_folder(tmp_path / "absent"):
        pass


def latest_status(home: Path) -> str:
    (group,) = (home / "runs").iterdir()
    return str(read_json(group / "group.json")["status"])
