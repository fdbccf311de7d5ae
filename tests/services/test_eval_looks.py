"""A trained model looked at: its errors on a page, images by words, classes from files, all on the toy scenes."""

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from support import Chimera

from chimera_cli.config import TrainConfig, load_config
from chimera_cli.data.pack import Caption, Item, Picture
from chimera_cli.data.pack_writer import write_pack
from chimera_cli.errors import ChimeraError, UsageError
from chimera_cli.events import Event, Note
from chimera_cli.runs import Group, latest_group, read_json, read_sealed_json
from chimera_cli.services.eval import evaluate_group
from chimera_cli.services.eval_classes import classify_images
from chimera_cli.services.eval_errors import error_page
from chimera_cli.services.eval_query import search_images
from chimera_cli.services.report import report
from chimera_cli.services.train import train_full

pytestmark = pytest.mark.usefixtures("lean")

COLOURS = ("red", "green", "blue", "yellow", "orange", "purple", "pink", "turquoise")
SCRATCH = (
    "data=toy", "image.weights=tiny", "image.locked=false", "image.image_size=32", "text.weights=tiny",
    "text.learn_layers=null", "heads.kind=linear", "heads.dim=64", "epochs=3", "batch=125",
    "optimiser.lr_image=3e-3", "optimiser.lr_text=3e-3",
)  # fmt: skip


@pytest.fixture(scope="module")
def trained(toy_pack_home: Path, tmp_path_factory: pytest.TempPathFactory, lean: None) -> Path:
    """A home with the toy pack and a small run of two seeds, trained on it. Read-only."""
    home = tmp_path_factory.mktemp("trained")
    shutil.copytree(toy_pack_home / "data", home / "data", ignore=shutil.ignore_patterns(".*"))
    train_full(home, load_config(TrainConfig, None, SCRATCH), (0, 1), "scratch", "chimera train full ...")
    return home


@pytest.fixture
def home(trained: Path, tmp_path: Path) -> Path:
    shutil.copytree(trained / "data", tmp_path / "home" / "data")
    shutil.copytree(trained / "runs", tmp_path / "home" / "runs")
    return tmp_path / "home"


def lines(path: Path, *words: str) -> Path:
    path.write_text("".join(f"{word}\n" for word in words), encoding="utf-8")
    return path


def truth(home: Path, column: str, split: str = "dev") -> dict[str, str]:
    from chimera_cli.data.pack import open_pack

    pack = open_pack(home / "data", "toy")
    files, values = pack.column("source_file"), pack.column(column)
    return {files[index]: values[index] for index in pack.split_indices(split).tolist()}


# ---- classes --------------------------------------------------------------------------------------------------------


def test_the_classes_of_the_toy_scenes_are_told_apart(home: Path, tmp_path: Path) -> None:
    classes = lines(tmp_path / "classes.txt", "white", "black", "grey", "brown", "beige", "violet")
    templates = lines(tmp_path / "templates.txt", "a {} picture .", "on a {} background")
    result = classify_images(home, classes, templates, "background", device="cpu", resamples=100)
    assert (result["images"], result["seeds"], len(result["by_class"])) == (300, [0, 1], 6)
    # Guessing finds one in six; colours of the ground are the first thing that any model learns.
    assert result["figures"]["zero_shot_top1"] > 0.5
    assert result["chance"]["zero_shot_top1"] == pytest.approx(1 / 6)
    assert result["by_class"][5] | {"class": "violet", "images": 0, "recall": None} == result["by_class"][5]
    by_class = {one["class"]: one for one in result["by_class"]}
    known = [one["recall"] for one in by_class.values() if one["recall"] is not None]
    assert result["figures"]["zero_shot_class_recall"] == pytest.approx(sum(known) / 5)
    found = sum(one["images"] * one["recall"] for one in by_class.values() if one["images"])
    assert result["figures"]["zero_shot_top1"] == pytest.approx(found / 300)
    group = latest_group(home)
    (path,) = (group.seed_dir(1) / "evaluations" / "zero-shot").glob("toy-dev-background-*.json")
    assert read_sealed_json(path) | result["by_seed"][1] == read_sealed_json(path)
    # Without labels the same model gives the same classes.
    guesses = classify_images(home, classes, templates, run=f"{group.name}/seed-0", device="cpu")["predictions"]
    right = truth(home, "background")
    share = sum(one["classes"][0]["class"] == right[one["file"]] for one in guesses) / 300
    assert share == pytest.approx(result["by_seed"][0]["figures"]["zero_shot_top1"], abs=0.005)


def test_the_report_shows_what_was_classified(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    classes = lines(tmp_path / "classes.txt", *COLOURS)
    sent: list[int] = []

    def deliver(_home: Path, group: Group, *_rest: Any) -> None:
        sent.append(len([*group.path.rglob("zero-shot/toy-dev-colour-*.json")]))

    monkeypatch.setattr("chimera_cli.services.eval.deliver", deliver)
    classify_images(home, classes, None, "colour", device="cpu", resamples=100)
    assert sent == [2]
    told = report(home).markdown
    assert "Zero-shot, toy, dev" in told
    assert re.search(r"zero-shot mean recall per class .*%.*n=2", told)
    (path,) = (latest_group(home).seed_dir(0) / "evaluations" / "zero-shot").glob("toy-dev-colour-*.json")
    path.write_text(path.read_text().replace('"images": 300', '"images": 3000'))
    edited = report(home).markdown
    assert path.name in edited
    assert "is left out" in edited


def test_a_pack_without_captions_is_classified(home: Path, tmp_path: Path) -> None:
    items = [Item(f"{i}.png", "dev", {"kind": ("red", "blue")[i % 2]}) for i in range(4)]
    pixels = [Image.new("RGB", (8, 8), ("red", "blue")[i % 2]) for i in range(4)]
    import numpy as np

    pictures = [Picture(np.asarray(one), str(i), 8, 8) for i, one in enumerate(pixels)]
    write_pack(home / "data", name="bare", source="table", images=pictures, items=items, size=8)
    result = classify_images(
        home, lines(tmp_path / "c", "red", "blue"), None, "kind", data="bare", device="cpu", resamples=100
    )
    assert result["figures"]["zero_shot_top5"] is None
    with pytest.raises(ChimeraError, match="has no captions"):
        error_page(home, tmp_path / "e.html", data="bare", device="cpu")


def test_labels_that_are_no_classes(home: Path, tmp_path: Path) -> None:
    few = lines(tmp_path / "few.txt", "red", "blue")
    with pytest.raises(ChimeraError, match=r"and \d more of the column colour of toy, dev, are not among the classes"):
        classify_images(home, few, None, "colour", device="cpu")
    with pytest.raises(ChimeraError, match="have no colour_2"):
        classify_images(home, few, None, "colour_2", device="cpu")
    with pytest.raises(UsageError, match="no column 'taste'"):
        classify_images(home, few, None, "taste", split="test", device="cpu")
    assert read_json(latest_group(home).path / "group.json")["test_looks"] == 0


# ---- search ---------------------------------------------------------------------------------------------------------


def test_words_find_the_images_that_they_describe(home: Path, tmp_path: Path) -> None:
    sheet = tmp_path / "sheet.png"
    result = search_images(home, "  a black \n picture ", top=10, sheet=sheet, device="cpu")
    right = truth(home, "background")
    assert result["query"] == "a black picture"
    assert sum(right[one["file"]] == "black" for one in result["images"]) >= 6
    scores = [one["score"] for one in result["images"]]
    assert scores == sorted(scores, reverse=True)
    for one in result["images"]:
        assert one["score"] == pytest.approx(sum(one["by_seed"]) / 2)
    with Image.open(sheet) as drawn:
        assert drawn.size == (6 * 210 + 10, 2 * 272 + 10)


def test_what_is_no_query(home: Path, tmp_path: Path) -> None:
    for query in ("", "  \n", "\u200b", "\x1b"):
        with pytest.raises(UsageError, match="the query is empty"):
            search_images(home, query, device="cpu")
    with pytest.raises(UsageError, match="not UTF-8"):
        search_images(home, "\udcff", device="cpu")
    with pytest.raises(UsageError, match="no ending of an image format"):
        search_images(home, "dogs", sheet=tmp_path / "sheet.txt", device="cpu")


def test_a_long_query_is_cut_with_a_notice(home: Path) -> None:
    told: list[Event] = []
    result = search_images(home, "ein roter Stern 赤い星 " * 200, top=1000, device="cpu", listener=told.append)
    assert len(result["images"]) == 300
    warnings = [event.message for event in told if isinstance(event, Note) and event.level == "warning"]
    assert [message for message in warnings if "longer than the" in message] == warnings
    assert len(warnings) == 1


# ---- errors ---------------------------------------------------------------------------------------------------------


class Images(HTMLParser):
    """Collects tags, text and where images come from."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.sources: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.sources += [value or "" for name, value in attrs if name == "src"]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_shows_the_worst_and_the_best_with_the_figures_of_eval(home: Path, tmp_path: Path) -> None:
    told: list[Event] = []
    result = error_page(home, tmp_path / "e.html", device="cpu", listener=told.append)
    group = latest_group(home)
    figures = evaluate_group(home, f"{group.name}/seed-0", device="cpu", resamples=100)["figures"]
    assert result["figures"] == pytest.approx(figures)
    assert result["seed"] == 0
    assert any(isinstance(event, Note) and "the page is of seed 0" in event.message for event in told)
    for key, gallery in (("t2i", 300), ("i2t", 1500)):
        worst, best = (result["cases"][key][kind] for kind in ("worst", "best"))
        assert (len(worst), len(best)) == (12, 6)
        ranks = [one["rank"] for one in worst]
        assert ranks == sorted(ranks, reverse=True)
        assert 1 <= max(one["rank"] for one in best) <= min(ranks) <= max(ranks) <= gallery
        for one in [*worst, *best]:
            own = [place for place, found in enumerate(one["found"], 1) if found["own"]]
            assert own[:1] == ([one["rank"]] if one["rank"] <= 5 else [])
    page = Images()
    page.feed((tmp_path / "e.html").read_text())
    assert page.sources
    assert all(source.startswith("data:image/jpeg;base64,") for source in page.sources)
    assert not page.tags & {"script", "link", "object"}
    assert result["cases"]["t2i"]["worst"][0]["captions"][0] in page.text


def test_text_of_a_pack_is_never_markup(home: Path, tmp_path: Path) -> None:
    import numpy as np

    foul = '<script>alert(1)</script>" onerror="x\x1b[2J'
    items = [Item(f"{foul}{i}", "dev") for i in range(3)]
    captions = [Caption(i, 0, f"{foul} {i}") for i in range(3)]
    pictures = [Picture(np.full((8, 8, 3), 60 * i, dtype=np.uint8), str(i), 8, 8) for i in range(3)]
    write_pack(home / "data", name="foul", source="t", images=pictures, items=items, captions=captions, size=8)
    result = error_page(home, tmp_path / "e.html", data="foul", device="cpu")
    # Of three images two are the worst, one is the best.
    assert [len(result["cases"]["t2i"][kind]) for kind in ("worst", "best")] == [2, 1]
    page = Images()
    page.feed((tmp_path / "e.html").read_text())
    assert "script" not in page.tags
    assert "<script>alert(1)</script>" in page.text
    assert "\x1b" not in (tmp_path / "e.html").read_text()


def test_every_look_at_test_is_counted(home: Path, tmp_path: Path) -> None:
    classes = lines(tmp_path / "classes.txt", "red", "blue")
    asked: dict[str, Any] = {"split": "test", "device": "cpu", "run": f"{latest_group(home).name}/seed-0"}
    assert search_images(home, "a star", **asked)["test_looks"] == 1
    assert error_page(home, tmp_path / "e.html", **asked)["test_looks"] == 2
    assert classify_images(home, classes, **asked)["test_looks"] == 3
    with pytest.raises(UsageError, match="is no HTML page"):
        error_page(home, lines(tmp_path / "notes.txt", "mine"), **asked)
    assert read_json(latest_group(home).path / "group.json")["test_looks"] == 3


def test_the_command(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CHIMERA_HOME", str(home))
    run_app(["eval", "--query", "a black picture", "--top", "3"])
    assert [len(line.split("\t")) for line in capsys.readouterr().out.splitlines()] == [2, 2, 2]
    classes = lines(tmp_path / "c", "red", "blue")
    run_app(["eval", "--classes", str(classes)])
    assert {line.split("\t")[1] for line in capsys.readouterr().out.splitlines()} <= {"red", "blue"}
    run_app(["eval", "--classes", str(lines(tmp_path / "all", *COLOURS)), "--labels", "colour"])
    told = capsys.readouterr().out
    assert "zero-shot mean recall per class" in told
    assert "mistaken most for" in told
    run_app(["eval", "--errors", str(tmp_path / "e.html"), "--json"])
    assert json.loads(capsys.readouterr().out)["page"] == str(tmp_path / "e.html")


def run_app(words: list[str]) -> None:
    from chimera_cli.cli.main import app

    app(words, standalone_mode=False)


def test_a_broken_file_is_one_sentence(tmp_path: Path, chimera: Chimera) -> None:
    templates, classes = lines(tmp_path / "t", "a {}", "a photo"), lines(tmp_path / "c", "red", "blue")
    done = chimera("eval", "--classes", str(classes), "--templates", str(templates))
    assert (done.code, done.out) == (1, "")
    assert "t:2 has no {}" in done.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--query", "a", "--errors", "e.html"), "--errors and --query are two commands"),
        (("--query", "a", "--zero-shot", "colour"), "--zero-shot and --query are two commands"),
        (("--sheet", "a.png"), "--sheet is only for --query"),
        (("--labels", "colour"), "--labels is only for --classes"),
    ],
)
def test_options_that_do_not_belong_together(words: tuple[str, ...], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        run_app(["eval", *words])
