"""What all sources share: captions that are left out, splits by name, columns of one kind, photos that are none."""

import os
from pathlib import Path

import pytest

from chimera_cli.data.sources.corpus import (
    LARGEST_FILE_BYTES,
    Draft,
    Photo,
    Tally,
    check_inside,
    find_photo,
    folders_with,
    printable,
    sift_caption,
    split_word,
    splits_by_name,
    uniform_columns,
)
from chimera_cli.errors import ChimeraError, UsageError


@pytest.mark.parametrize(
    ("text", "clean", "reason"),
    [
        (" a  dog\n runs ", "a dog runs", ""),
        ("a\0dog", "a dog", ""),
        ("\0 \t\u3000", "", "only spaces"),
        ("x" * 10_000, "x" * 10_000, ""),
        ("x" * 10_001, "", "longer than 10,000 characters"),
        ("half \ud83d a pair", "", "no valid Unicode"),
        ("whole \U0001f600", "whole \U0001f600", ""),
    ],
)
def test_captions_are_tidied_or_left_out_with_a_reason(text: str, clean: str, reason: str) -> None:
    kept, problem = sift_caption(text)
    assert kept == clean
    assert problem.endswith(reason)
    assert bool(problem) == bool(reason)


def test_names_that_utf8_can_not_hold_become_printable() -> None:
    assert printable("caf\udce9.jpg") == "caf?.jpg"
    assert printable("café.jpg") == "café.jpg"


def test_words_for_splits() -> None:
    words = {
        "train": ("train", " Training", "restval"),
        "dev": ("val", "valid", "VALIDATION", "dev"),
        "test": ("test",),
    }
    assert all(split_word(word) == split for split, those in words.items() for word in those)
    assert split_word("unknown") is None
    assert split_word("") is None


@pytest.mark.parametrize(
    ("names", "splits"),
    [
        (["train-00000.tar", "val-00000.tar"], ["train", "dev"]),
        (["train/0.tar", "train/1.tar", "test/0.tar"], ["train", "train", "test"]),
        (["train2017.tar", "validation_3.tar"], ["train", "dev"]),
        (["0.tar", "1.tar"], None),
        (["train-0.tar", "train-1.tar"], None),
        (["trainer-0.tar", "value-0.tar"], None),
    ],
)
def test_splits_by_the_names_of_files(tmp_path: Path, names: list[str], splits: list[str] | None) -> None:
    assert splits_by_name([tmp_path / "set" / name for name in names]) == splits


@pytest.mark.parametrize("unnamed", ["0.tar", "trainer-0.tar", "other/x.tar"])
def test_one_file_without_a_split_does_not_throw_away_those_of_the_others(tmp_path: Path, unnamed: str) -> None:
    paths = [tmp_path / "set" / name for name in ("train-0.tar", "test-0.tar", unnamed)]
    with pytest.raises(UsageError, match=rf"^1 of 3 files name no split, the others do: .*{unnamed}$") as caught:
        splits_by_name(paths)
    assert "--split-seed" in caught.value.hint


def test_folders_with_a_few_of_many_names_are_found(tmp_path: Path) -> None:
    """About a hundred names are tried at first; here none of them is there, and 1 of 5,000 is in each folder."""
    names = [f"{number}.jpg" for number in range(5000)]
    (tmp_path / "other").mkdir()
    for folder, name in (("a", "7.jpg"), ("b", "4321.jpg"), ("c/part", "13.jpg")):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / name).write_bytes(b"x")
    folders = [tmp_path / name for name in ("a", "other", "b", "gone", "c/part", "c")]
    assert folders_with(folders, names) == [tmp_path / "a", tmp_path / "b", tmp_path / "c/part"]
    assert folders_with(folders, [f"part/{name}" for name in names]) == [tmp_path / "c"]
    assert folders_with(folders, ["other", "x" * 300]) == []


def test_columns_become_of_one_kind() -> None:
    rows = [
        {"mixed": 1, "number": 1, "nested": {}, "huge": 1 << 80, "text": "a\udce9"},
        {"mixed": "x", "number": 2.5, "nested": {}, "huge": None, "text": "b"},
        {},
    ]
    left_out = Tally()
    assert uniform_columns(rows, left_out) == [
        {"mixed": "1", "number": 1, "nested": "{}", "huge": str(1 << 80), "text": "a?"},
        {"mixed": "x", "number": 2.5, "nested": "{}", "huge": None, "text": "b"},
        {},
    ]
    assert left_out.counts == {"columns with values of several kinds, kept as text": 4}


def test_too_many_columns_are_counted() -> None:
    rows = [{f"c{number:03}": number for number in range(205)}]
    left_out = Tally()
    assert list(uniform_columns(rows, left_out)[0]) == [f"c{number:03}" for number in range(200)]
    assert list(left_out.counts.values()) == [5]


def test_names_of_columns_that_utf8_can_not_hold_become_printable() -> None:
    first, second = "a\ud800", "a\udc00"
    rows = [{first: 1, "a?": 2, second: 3}, {second: 4}]
    left_out = Tally()
    columns = uniform_columns(rows, left_out)
    assert columns == [{"a?": 2, "a?_": 1, "a?__": 3}, {"a?__": 4}]
    left_out.add("captions", "0.tar: caf\udce9")
    assert left_out.first == {"captions": "0.tar: caf?"}


def test_what_is_no_photo_says_why(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"x")
    found = find_photo(str(tmp_path / "a.jpg"))
    assert isinstance(found, Photo)
    assert found.read() == b"x"
    assert find_photo(str(tmp_path / "b.jpg")) == "no such file"
    assert find_photo(str(tmp_path)) == "not a regular file"
    assert find_photo("a\0b") == "embedded null byte"
    assert find_photo("x" * 300) == "File name too long"
    os.mkfifo(tmp_path / "pipe.jpg")
    assert find_photo(str(tmp_path / "pipe.jpg")) == "not a regular file"
    with (tmp_path / "film.jpg").open("wb") as file:
        file.truncate(LARGEST_FILE_BYTES + 1)
    assert find_photo(str(tmp_path / "film.jpg")) == "1.1 GB are no photo"


@pytest.mark.parametrize("name", ["../a.jpg", "/etc/passwd", "a/../../b.jpg", "..\\a.jpg", "."])
def test_names_that_lead_out_are_refused(name: str) -> None:
    with pytest.raises(ChimeraError, match=r"list\.json: images\[3\].*leads out of the folder"):
        check_inside(name, "list.json: images[3]")


def test_a_corpus_without_photos_says_what_was_named(tmp_path: Path) -> None:
    draft = Draft()
    draft.skip("a.jpg", "no such file")
    with pytest.raises(ChimeraError, match=r"leads to no image \(of 1 named, the first is a\.jpg: no such file\)"):
        draft.finish(tmp_path, "")


def test_the_digest_knows_every_part() -> None:
    def digest(name: str = "a", split: str = "train", text: str = "x", stamp: int = 1, extra: int = 0) -> str:
        draft = Draft()
        draft.add_caption(draft.add_photo(name, split, Photo(bytes, (1, stamp)), {"c": extra}), text, "")
        return draft.finish(Path(), "").digest

    changed = [digest("b"), digest(split="dev"), digest(text="y"), digest(stamp=2), digest(extra=1)]
    assert len({digest(), *changed}) == 6
    assert digest() == digest()
