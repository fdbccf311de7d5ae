"""Flickr8k as people have it on disk: the layouts that are understood, and what is said of those that are not."""

import io
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from chimera_cli.data.sources.corpus import LARGEST_FILE_BYTES, Corpus
from chimera_cli.data.sources.flickr8k import GHOST, LISTS, TOKENS, open_flickr8k
from chimera_cli.errors import ChimeraError, UsageError
from chimera_cli.events import Event, Note

NAMES = {"train": ["b.jpg", "d.jpg"], "dev": ["a.jpg"], "test": ["c.jpg"], "unused": ["e.jpg"]}
ALL = [name for names in NAMES.values() for name in names]


def official(root: Path, images: str = "Flicker8k_Dataset", texts: str = "Flickr8k_text") -> Path:
    """Write five photos with two captions each in the official layout, the ghost's captions included."""
    write_images(root / images)
    (root / texts).mkdir(parents=True, exist_ok=True)
    lines = [f"{name}#{index}\tcaption {index} of  {name} ." for name in sorted(ALL) for index in (1, 0)]
    lines += [f"{GHOST}#{index}\tpeople waiting" for index in range(5)]
    (root / texts / TOKENS).write_text("\n".join(lines))
    write_lists(root / texts)
    return root


def kaggle(root: Path) -> Path:
    write_images(root / "Images")
    lines = ["image,caption"]
    for name in sorted(ALL):
        lines += [f"{name},caption 0 of {name} .", f'{name},"one, two and "" three "" of {name}"']
    (root / "captions.txt").write_text("\r\n".join(lines) + "\r\n")
    return root


def write_images(folder: Path) -> None:
    folder.mkdir(parents=True)
    for number, name in enumerate(ALL):
        (folder / name).write_bytes(jpeg(number))


def write_lists(folder: Path) -> None:
    for split, file in LISTS.items():
        (folder / file).write_text("\n".join(NAMES[split]))


def jpeg(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (12, 9), (value, 0, 0)).save(buffer, "JPEG")
    return buffer.getvalue()


def zipped(folder: Path, archive: Path, *extra: str) -> None:
    with zipfile.ZipFile(archive, "w") as file:
        for path in sorted(folder.rglob("*")):
            file.write(path, path.relative_to(folder.parent))
        for name in extra:
            file.writestr(name, "x")


def read(origin: Path, told: list[Event] | None = None) -> Corpus:
    with open_flickr8k(origin, (told if told is not None else []).append) as corpus:
        for item, read_photo in zip(corpus.items, corpus.reads, strict=True):
            assert read_photo().rstrip(b"\0") == jpeg(ALL.index(item.source_file))
        return corpus


def check(corpus: Corpus) -> None:
    assert [(item.source_file, item.split) for item in corpus.items] == [
        ("b.jpg", "train"),
        ("d.jpg", "train"),
        ("a.jpg", "dev"),
        ("c.jpg", "test"),
        ("e.jpg", "unused"),
    ]
    assert sorted((caption.image, caption.index) for caption in corpus.captions) == [
        (image, index) for image in range(5) for index in (0, 1)
    ]
    for caption in corpus.captions:
        assert caption.text.rstrip(" .").endswith(f"of {corpus.items[caption.image].source_file}")


def test_the_official_layout(tmp_path: Path) -> None:
    told: list[Event] = []
    corpus = read(official(tmp_path), told)
    check(corpus)
    assert corpus.counts == {"caption lines": 15, "usable images": 5, "train": 2, "dev": 1, "test": 1}
    notes = [event.message for event in told if isinstance(event, Note)]
    assert any(f"5 captions of {GHOST}" in note for note in notes)
    assert any("5 usable images (official: 8,091)" in note for note in notes)


@pytest.mark.parametrize(
    ("images", "texts", "origin"),
    [
        ("Flickr8k_Dataset", "Flickr8k_text", "."),
        ("Images", ".", "."),
        ("Flickr8k_Dataset/Flicker8k_Dataset", "Flickr8k_text", "."),
        ("Flicker8k_Dataset", "Flickr8k_text", "Flicker8k_Dataset"),
        ("Flicker8k_Dataset", ".", "Flicker8k_Dataset"),
        ("photos", "photos", "photos"),
    ],
)
def test_variants_of_the_official_layout(tmp_path: Path, images: str, texts: str, origin: str) -> None:
    check(read(official(tmp_path, images, texts) / origin))


def test_the_kaggle_layout_with_the_official_lists(tmp_path: Path) -> None:
    write_lists(kaggle(tmp_path))
    corpus = read(tmp_path)
    check(corpus)
    assert {caption.text for caption in corpus.captions} >= {'one, two and " three " of a.jpg', "caption 0 of e.jpg ."}


def test_the_kaggle_layout_without_lists_names_them_and_says_where_they_are(tmp_path: Path) -> None:
    with pytest.raises(ChimeraError) as caught:
        read(kaggle(tmp_path))
    assert all(name in caught.value.message for name in LISTS.values())
    assert "Flickr8k_text.zip" in caught.value.hint


def test_zip_files_in_a_folder_one_zip_file_and_texts_beside_a_zip_file(tmp_path: Path) -> None:
    plain = official(tmp_path / "plain")
    both = tmp_path / "both"
    both.mkdir()
    zipped(plain / "Flicker8k_Dataset", both / "Flickr8k_Dataset.zip", "__MACOSX/Flicker8k_Dataset/._a.jpg")
    zipped(plain / "Flickr8k_text", both / "Flickr8k_text.zip")
    check(read(both))
    check(read(both / "Flickr8k_Dataset.zip"))
    zipped(plain, tmp_path / "all.zip")
    check(read(tmp_path / "all.zip"))
    assert not [path for path in both.iterdir() if path.suffix != ".zip"]


def test_a_broken_zip_file_beside_a_whole_folder_does_no_harm(tmp_path: Path) -> None:
    (official(tmp_path) / "Flickr8k_Dataset.zip").write_bytes(b"half a download")
    check(read(tmp_path))


def test_the_digest_names_the_input(tmp_path: Path) -> None:
    corpus = read(official(tmp_path / "a"))
    shutil.copytree(tmp_path / "a", tmp_path / "b", copy_function=shutil.copy2)
    assert read(tmp_path / "b").digest == corpus.digest
    with (tmp_path / "b" / "Flicker8k_Dataset" / "a.jpg").open("ab") as file:
        file.write(b"\0")
    assert read(tmp_path / "b").digest != corpus.digest


def test_counts_of_a_download_must_be_the_official_ones(tmp_path: Path) -> None:
    with (
        pytest.raises(ChimeraError, match="not the whole of Flickr8k: 15 caption lines"),
        open_flickr8k(official(tmp_path), official_counts=True),
    ):
        pass


def edit(path: Path, change: Callable[[list[str]], list[str]]) -> None:
    path.write_text("\n".join(change(path.read_text().split("\n"))))


BROKEN = [
    (TOKENS, lambda lines: [lines[0], "no tab here", *lines[1:]], f"{TOKENS}:2: expected IMAGE#NUMBER"),
    (TOKENS, lambda lines: [*lines[:3], "a.jpg#x\ttext"], f"{TOKENS}:4: expected IMAGE#NUMBER"),
    (TOKENS, lambda lines: ["", "a.jpg#7\t  ", *lines], f"{TOKENS}:2: the caption is empty"),
    (TOKENS, lambda lines: ["zz.jpg#0\ttext", *lines], f"{TOKENS}:1: there is no image zz.jpg"),
    (TOKENS, lambda lines: [lines[0], *lines], f"{TOKENS}:2: caption 1 of a.jpg is there twice"),
    (TOKENS, lambda lines: lines[2:], f"{LISTS['dev']}:1: a.jpg has no caption"),
    (LISTS["train"], lambda lines: [*lines, "", "zz.jpg"], f"{LISTS['train']}:4: there is no image zz.jpg"),
    (LISTS["test"], lambda lines: [*lines, "a.jpg"], f"{LISTS['test']}:2: a.jpg is in the list of dev already"),
    (LISTS["dev"], lambda _lines: [], f"{LISTS['dev']} names no image"),
]


@pytest.mark.parametrize(("file", "change", "message"), BROKEN)
def test_broken_texts_are_named_by_file_and_line(
    tmp_path: Path, file: str, change: Callable[[list[str]], list[str]], message: str
) -> None:
    edit(official(tmp_path) / "Flickr8k_text" / file, change)
    with pytest.raises(ChimeraError) as caught:
        read(tmp_path)
    assert message in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize("line", ["a.jpg", "a.jpg,one,two", 'a.jpg,"open quote', ",text"])
def test_broken_lines_of_the_csv_are_named(tmp_path: Path, line: str) -> None:
    write_lists(kaggle(tmp_path))
    edit(tmp_path / "captions.txt", lambda lines: [*lines[:3], line, *lines[3:]])
    with pytest.raises(ChimeraError, match=r"captions\.txt:4: expected IMAGE,CAPTION"):
        read(tmp_path)


def test_a_line_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    path = official(tmp_path) / "Flickr8k_text" / TOKENS
    path.write_bytes(b"a.jpg#9\tfine\na.jpg#8\tcaf\xe9\n" + path.read_bytes())
    with pytest.raises(ChimeraError, match=r"token\.txt:2: the line is not UTF-8"):
        read(tmp_path)


def test_missing_and_empty_folders(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="nowhere does not exist"):
        read(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ChimeraError, match="empty is empty"):
        read(tmp_path / "empty")
    (tmp_path / "empty" / "notes.md").write_text("no photos")
    with pytest.raises(ChimeraError, match="holds no photos of Flickr8k"):
        read(tmp_path / "empty")
    write_images(tmp_path / "empty" / "Images")
    with pytest.raises(ChimeraError, match="holds no captions of Flickr8k"):
        read(tmp_path / "empty")


def test_a_file_that_is_no_zip_file(tmp_path: Path) -> None:
    (tmp_path / "Flickr8k_Dataset.zip").write_text("<html>not found</html>")
    for origin in (tmp_path, tmp_path / "Flickr8k_Dataset.zip"):
        with pytest.raises(ChimeraError, match=r"Flickr8k_Dataset\.zip is not a zip file"):
            read(origin)


@pytest.mark.parametrize("entry", ["../evil.jpg", "/etc/evil.jpg", "a/../../evil.jpg", "..\\evil.jpg", "C:\\evil.jpg"])
def test_entries_that_climb_out_of_a_zip_file_are_refused(tmp_path: Path, entry: str) -> None:
    plain = official(tmp_path / "plain")
    zipped(plain, tmp_path / "all.zip", entry)
    with pytest.raises(ChimeraError, match="climbs out of it"):
        read(tmp_path / "all.zip")


def test_a_damaged_member_is_an_unreadable_file(tmp_path: Path) -> None:
    plain = official(tmp_path / "plain")
    zipped(plain, tmp_path / "all.zip")
    content = bytearray((tmp_path / "all.zip").read_bytes())
    place = content.index(jpeg(0)[:60])
    content[place + 50] ^= 0xFF
    (tmp_path / "all.zip").write_bytes(content)
    with open_flickr8k(tmp_path / "all.zip") as corpus, pytest.raises(OSError, match="damaged in the archive"):
        [read() for read in corpus.reads]


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_zip_files_of_every_method_are_read(tmp_path: Path, method: int) -> None:
    plain = official(tmp_path / "plain")
    with zipfile.ZipFile(tmp_path / "all.zip", "w", method) as file:
        for path in sorted(plain.rglob("*.*")):
            file.write(path, path.relative_to(tmp_path))
    check(read(tmp_path / "all.zip"))


def test_photos_and_texts_of_gigabytes_are_refused_before_they_are_unpacked(tmp_path: Path) -> None:
    plain = official(tmp_path / "plain")
    zipped(plain, tmp_path / "all.zip")
    photo, texts = plain / "Flicker8k_Dataset" / "b.jpg", plain / "Flickr8k_text" / TOKENS
    with photo.open("r+b") as file:
        file.truncate(LARGEST_FILE_BYTES + 1)
    # A zip file's list of contents gives the size that counts: that of the first photo becomes 3 GB there.
    content = bytearray((tmp_path / "all.zip").read_bytes())
    entry = content.rindex(b"PK\1\2", 0, content.rindex(b"Flicker8k_Dataset/b.jpg"))
    content[entry + 24 : entry + 28] = (3_000_000_000).to_bytes(4, "little")
    (tmp_path / "all.zip").write_bytes(content)
    for origin, size in ((plain, "1.1"), (tmp_path / "all.zip", "3.0")):
        with open_flickr8k(origin) as corpus:
            with pytest.raises(OSError, match=f"{size} GB are no photo"):
                corpus.reads[0]()
            assert corpus.reads[1]() == jpeg(1)
    with texts.open("r+b") as file:
        file.truncate(300 << 20)
    with pytest.raises(ChimeraError, match=rf"{TOKENS} has 315 MB, far too much"):
        read(plain)


@pytest.mark.parametrize("stated", [1000, 9])
def test_a_member_that_states_a_wrong_size_unpacks_no_more_than_that(tmp_path: Path, stated: int) -> None:
    import tracemalloc

    plain = official(tmp_path / "plain")
    (plain / "Flicker8k_Dataset" / "b.jpg").write_bytes(bytes(100_000_000))
    with zipfile.ZipFile(tmp_path / "all.zip", "w", zipfile.ZIP_DEFLATED) as file:
        for path in sorted(plain.rglob("*.*")):
            file.write(path, path.relative_to(tmp_path))
    content = bytearray((tmp_path / "all.zip").read_bytes())
    entry = content.rindex(b"PK\1\2", 0, content.rindex(b"Flicker8k_Dataset/b.jpg"))
    content[entry + 24 : entry + 28] = stated.to_bytes(4, "little")
    (tmp_path / "all.zip").write_bytes(content)
    with open_flickr8k(tmp_path / "all.zip") as corpus:
        tracemalloc.start()
        with pytest.raises(OSError, match="damaged in the archive"):
            corpus.reads[0]()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 5_000_000


@pytest.mark.flickr8k
def test_the_real_set_has_the_official_counts(flickr8k: Path) -> None:
    with open_flickr8k(flickr8k, official_counts=True) as corpus:
        assert len(corpus.captions) == 40_455
        assert sum(item.split == "unused" for item in corpus.items) == 91
        for split, count in (("train", 6000), ("dev", 1000), ("test", 1000)):
            assert sum(item.split == split for item in corpus.items) == count
