"""WebDataset shards as img2dataset writes them, and what is said of damaged ones."""

import gzip
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from source_files import HOSTILE_SHARDS, Members, Seen, jpeg, write_tar

from chimera_cli.data.pack_writer import SplitRule
from chimera_cli.data.sources.shards import expand, open_shards
from chimera_cli.errors import ChimeraError, UsageError


def sample(number: int, caption: str | None = None, **fields: Any) -> Members:
    """Return the files of one sample in the layout of img2dataset."""
    caption = f"photo {number}" if caption is None else caption
    told = {"caption": caption, "url": f"u{number}", "width": 12, "height": 9, "status": "success"} | fields
    key = f"{number:09}"
    return [
        (f"{key}.jpg", jpeg(number)),
        (f"{key}.json", json.dumps(told).encode()),
        (f"{key}.txt", caption.encode()),
    ]


def shards(folder: Path, *names: str, each: int = 3) -> Path:
    """Write shards of three samples each, numbered on from shard to shard."""
    for place, name in enumerate(names or ("00000", "00001")):
        members = [member for number in range(each) for member in sample(each * place + number)]
        write_tar(folder / f"{name}.tar", members)
    return folder


def look(pattern: Path | str, **options: Any) -> Seen:
    seen = Seen()
    return seen.look(open_shards(str(pattern), seen.told.append, **options))


def test_shards_of_a_folder(tmp_path: Path) -> None:
    seen = look(shards(tmp_path / "set"))
    names = [f"0000{number // 3}/{number:09}.jpg" for number in range(6)]
    assert seen.photos == {name: jpeg(number) for number, name in enumerate(names)}
    assert seen.captions == {name: [f"photo {number}"] for number, name in enumerate(names)}
    assert seen.columns[names[4]] == {"url": "u4", "width": 12, "height": 9, "status": "success"}
    assert seen.corpus.split_rule == SplitRule(0, 0.1, 0.1)
    assert "the names of the shards say no split" in seen.notes


def test_the_digest_changes_with_a_shard_and_not_with_its_place(tmp_path: Path) -> None:
    import shutil

    shards(tmp_path / "set")
    first = look(tmp_path / "set").corpus.digest
    shutil.copytree(tmp_path / "set", tmp_path / "other", copy_function=shutil.copy2)
    assert look(tmp_path / "other").corpus.digest == first
    write_tar(tmp_path / "other" / "00001.tar", sample(9))
    assert look(tmp_path / "other").corpus.digest != first


@pytest.mark.parametrize(
    ("names", "splits"),
    [
        (("train/00000", "val/00000", "test/00000"), ["train", "dev", "test"]),
        (("train-00000", "validation-00000"), ["train", "dev"]),
        (("train-00000", "train-00001"), ["", ""]),
    ],
)
def test_splits_by_folder_or_beginning(tmp_path: Path, names: tuple[str, ...], splits: list[str]) -> None:
    seen = look(shards(tmp_path / "set", *names, each=1))
    assert sorted(seen.splits.values()) == sorted(splits)
    assert (seen.corpus.split_rule is None) == all(splits)
    drawn = look(tmp_path / "set", rule=SplitRule(5, 0.2, 0))
    assert set(drawn.splits.values()) == {""}
    assert drawn.corpus.split_rule == SplitRule(5, 0.2, 0)


def test_a_shard_without_a_split_beside_others_with_one(tmp_path: Path) -> None:
    shards(tmp_path / "set", "train-00000", "test-00000", "00001", each=1)
    with pytest.raises(UsageError, match=r"1 of 3 files name no split, the others do: .*00001\.tar"):
        look(tmp_path / "set")
    assert set(look(tmp_path / "set", rule=SplitRule(5, 0.2, 0)).splits.values()) == {""}


def test_patterns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards(tmp_path / "set", "00000", "00001", "00002", "x", each=1)
    monkeypatch.chdir(tmp_path)

    def stems(pattern: str) -> list[str]:
        return [path.stem for path in expand(pattern)]

    assert stems("set/{00000..00001}.tar") == ["00000", "00001"]
    assert stems(f"{tmp_path}/set/{{00002,x}}.tar") == ["00002", "x"]
    assert stems("set/0*.tar") == ["00000", "00001", "00002"]
    assert stems("{set,}/0000[12].tar") == ["00001", "00002"]
    assert stems("set/{0*,00000}.tar") == ["00000", "00001", "00002"]
    assert stems("set/x.tar") == ["x"]
    assert stems("set") == ["00000", "00001", "00002", "x"]
    for pattern, message in {
        "set/{00000..00004}.tar": r"set/00003\.tar does not exist \(of set/",
        "set/{00000..": "braces of .* are not balanced",
        "set/{0..100000}.tar": "more than 100,000 shards",
        "set/y*.tar": "holds no .tar file",
        "nowhere": "nowhere does not exist",
        "s3://bucket/0.tar": "is an address",
        "https:/host/0.tar": "is an address",
    }.items():
        with pytest.raises(UsageError, match=message):
            expand(pattern)


def test_compressed_shards_are_named_and_how_to_unpack_them(tmp_path: Path) -> None:
    shards(tmp_path / "set", "0")
    packed = gzip.compress((tmp_path / "set" / "0.tar").read_bytes())
    (tmp_path / "gz").mkdir()
    (tmp_path / "gz" / "0.tar.gz").write_bytes(packed)
    for origin in (tmp_path / "gz", tmp_path / "gz" / "0.tar.gz"):
        with pytest.raises(UsageError, match=r"0\.tar\.gz is compressed") as caught:
            look(origin)
        assert "gunzip 0.tar.gz" in caught.value.hint
    (tmp_path / "set" / "0.tar").write_bytes(packed)
    with pytest.raises(ChimeraError, match=r"0\.tar is compressed") as other:
        look(tmp_path / "set")
    assert "gunzip" in other.value.hint


def test_captions_come_from_the_text_else_from_the_json_file(tmp_path: Path) -> None:
    members = [
        ("./a.jpg", jpeg(0)), ("./a.json", b'{"caption": "json a", "tags": [1], "n": 1}'),
        ("./a.txt", "\ufefftext a".encode()),
        ("b.png", jpeg(1)), ("b.json", b'{"captions": ["one", "two"]}'),
        ("dir/c.x.webp", jpeg(2)), ("dir/c.WEBP", jpeg(3)),
        ("d.jpeg", jpeg(4)), ("d.json", b'{"caption": null, "captions": ["three", 4]}'),
    ]  # fmt: skip
    seen = look(write_tar(tmp_path / "0.tar", members))
    assert seen.captions == {
        "0/a.jpg": ["text a"], "0/b.png": ["one", "two"], "0/dir/c.webp": [], "0/d.jpeg": ["three"],
    }  # fmt: skip
    assert seen.photos["0/dir/c.webp"] == jpeg(3)
    assert seen.columns["0/a.jpg"] == {"n": 1}
    assert "that are no plain values are left out: tags" in seen.notes
    assert "captions left out that are no text: 1 (first: 0.tar: d)" in seen.notes


def test_what_is_wrong_with_single_samples_is_counted(tmp_path: Path) -> None:
    members = [
        ("a.jpg", jpeg(0)), ("a.txt", b"caf\xe9"),
        ("b.jpg", jpeg(1)), ("b.json", b'{"caption": "cut'),
        ("c.txt", b"no image"),
        ("d.jpg", jpeg(2)), ("d.png", jpeg(3)), ("d.txt", b"  "),
        ("e.jpg", jpeg(4)), ("e.txt", b"word " * 1_000_000),
        ("f.jpg", jpeg(5)), ("f.json", b" " * (2 << 20)),
        ("g.jpg", jpeg(6)), ("g.json", b"[1]"),
        ("README", b"x"),
    ]  # fmt: skip
    seen = look(write_tar(tmp_path / "0.tar", members))
    assert list(seen.photos) == [f"0/{key}.jpg" for key in "abdefg"]
    assert seen.photos["0/d.jpg"] == jpeg(2)
    assert not seen.corpus.captions
    assert [(skipped.source_file, skipped.reason) for skipped in seen.corpus.skipped] == [
        ("0/c", "the sample has no image")
    ]
    for note in (
        "captions left out that are not UTF-8: 1 (first: 0.tar: a)",
        "JSON files left out that hold no valid JSON object: 2 (first: 0.tar: b)",
        "further images of a sample left out: 1 (first: 0.tar: d)",
        "captions left out that are empty or only spaces: 1 (first: 0.tar: d)",
        "captions left out that are longer than 10,000 characters: 1 (first: 0.tar: e)",
        "JSON files left out that are larger than 1 MiB: 1 (first: 0.tar: f)",
        "files left out whose name is no key with an ending: 1 (first: 0.tar: README)",
    ):
        assert note in seen.notes


def test_a_shard_cut_off_anywhere_is_named(tmp_path: Path) -> None:
    """At every block: within data, within a header, between members, before and within the end mark."""
    whole = shards(tmp_path / "set", "0", each=2) / "0.tar"
    content = whole.read_bytes()
    with tarfile.open(whole) as archive:
        end = max(member.offset_data + member.size for member in archive)
    blocks = [*range(0, end + 512, 512), *range(100, end, 512)]
    for byte in blocks:
        whole.write_bytes(content[:byte])
        with pytest.raises(ChimeraError, match=r"0\.tar is (cut off or damaged|no tar file, or damaged)") as caught:
            look(whole)
        assert "byte" in caught.value.message
    whole.write_bytes(content[: end + 1024])
    assert len(look(whole).photos) == 2


def test_a_damaged_header_is_no_end_of_the_shard(tmp_path: Path) -> None:
    whole = shards(tmp_path / "set", "0") / "0.tar"
    content = bytearray(whole.read_bytes())
    with tarfile.open(whole) as archive:
        second = archive.getmember("000000001.jpg").offset
    content[second + 5] ^= 0xFF
    whole.write_bytes(content)
    with pytest.raises(ChimeraError, match=rf"after the member '000000000\.txt', at byte {second:,}"):
        look(whole)


@pytest.mark.parametrize("kind", HOSTILE_SHARDS)
def test_headers_made_to_do_harm_are_damage(tmp_path: Path, kind: str) -> None:
    (tmp_path / "0.tar").write_bytes(HOSTILE_SHARDS[kind]())
    with pytest.raises(ChimeraError, match=r"0\.tar is (no tar file, or damaged before|cut off or damaged)"):
        look(tmp_path / "0.tar")


def special(kind: bytes, link: str = "") -> Callable[[tarfile.TarInfo], None]:
    def change(info: tarfile.TarInfo) -> None:
        info.type, info.linkname, info.size = kind, link, 0

    return change


def named(name: str) -> Callable[[tarfile.TarInfo], None]:
    return lambda info: setattr(info, "name", name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (named("../a.jpg"), r"climbs out of it: '\.\./a\.jpg'"),
        (named("/etc/a.jpg"), "climbs out of it: '/etc/a.jpg'"),
        (named("x/../../a.jpg"), "climbs out of it"),
        (named("..\\a.jpg"), "climbs out of it"),
        (special(tarfile.SYMTYPE, "/etc/passwd"), "is a link: 'a.jpg'"),
        (special(tarfile.LNKTYPE, "b.jpg"), "is a link: 'a.jpg'"),
        (special(tarfile.CHRTYPE), "is a device or pipe: 'a.jpg'"),
        (special(tarfile.FIFOTYPE), "is a device or pipe: 'a.jpg'"),
    ],
)
def test_members_that_no_shard_should_hold(
    tmp_path: Path, change: Callable[[tarfile.TarInfo], None], message: str
) -> None:
    with tarfile.open(tmp_path / "0.tar", "w") as archive:
        info = tarfile.TarInfo("a.jpg")
        info.size = len(jpeg(0))
        change(info)
        archive.addfile(info, io.BytesIO(jpeg(0)))
    with pytest.raises(ChimeraError, match=message):
        look(tmp_path / "0.tar")


def test_folders_within_a_shard_do_no_harm(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "0.tar", "w") as archive:
        folder = tarfile.TarInfo("set")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
        info = tarfile.TarInfo("set/a.jpg")
        info.size = len(jpeg(0))
        archive.addfile(info, io.BytesIO(jpeg(0)))
    assert list(look(tmp_path / "0.tar").photos) == ["0/set/a.jpg"]


def test_keys_that_are_there_twice(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", [*sample(1), *sample(2), *sample(1)])
    with pytest.raises(ChimeraError, match=r"0\.tar has '000000001' twice, again at byte \d"):
        look(tmp_path / "0.tar")
    write_tar(tmp_path / "0.tar", [("a.jpg", b"x"), ("a.jpg", b"y")])
    with pytest.raises(ChimeraError, match=r"0\.tar has 'a\.jpg' twice"):
        look(tmp_path / "0.tar")


def test_a_shard_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    path = shards(tmp_path, "0") / "0.tar"
    with open_shards(str(path)) as corpus:
        path.write_bytes(path.read_bytes()[:600])
        with pytest.raises(OSError, match="cut off while it was read"):
            corpus.reads[0]()


def test_no_shard_stays_open(tmp_path: Path) -> None:
    def open_files() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    before = open_files()
    with open_shards(str(shards(tmp_path, *(f"{number:05}" for number in range(20)), each=1))) as corpus:
        contents = [read() for read in corpus.reads]
        assert open_files() == before
    assert contents == [jpeg(number) for number in range(20)]
