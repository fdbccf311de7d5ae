"""Tables of images: every format, captions and splits from columns, and what is said of broken rows."""

import io
import json
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from source_files import Seen, jpeg, write_photos

from chimera_cli.data.pack_writer import SplitRule
from chimera_cli.data.sources.corpus import Corpus
from chimera_cli.data.sources.table import Columns, open_table
from chimera_cli.errors import ChimeraError, UsageError

NAMES = ("photos/a.jpg", "photos/b.jpg", "photos/c.jpg")
ROWS = [
    ("photos/a.jpg", "a one", "train", "x", 1),
    ("photos/b.jpg", "b one", "val", "y", 2),
    ("./photos/a.jpg", "a,  two", "train", "x", 1),
    ("photos/c.jpg", "", "", "z", 3),
]
HEADER = ("filepath", "title", "split", "category", "price")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_photos(tmp_path, NAMES)
    return tmp_path


def look(origin: Path, **options: Any) -> Seen:
    seen = Seen()
    return seen.look(open_table(origin, listener=seen.told.append, **options))


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def csv_table(path: Path, separator: str = ",") -> Path:
    import csv

    with path.open("w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file, delimiter=separator).writerows([HEADER, *ROWS])
    return path


def json_table(path: Path) -> Path:
    return write(path, "".join(json.dumps(dict(zip(HEADER, row, strict=True))) + "\n" for row in ROWS) + "\n")


def parquet_table(path: Path) -> Path:
    pq.write_table(pa.table(dict(zip(HEADER, map(list, zip(*ROWS, strict=True)), strict=True))), path)
    return path


TABLES: dict[str, Callable[[Path], Path]] = {
    "data.csv": csv_table,
    "semicolons.csv": lambda path: csv_table(path, ";"),
    "data.tsv": lambda path: csv_table(path, "\t"),
    "data.jsonl": json_table,
    "data.parquet": parquet_table,
}


@pytest.mark.parametrize("name", TABLES)
def test_every_format_says_the_same(folder: Path, name: str) -> None:
    seen = look(TABLES[name](folder / name))
    assert seen.photos == {name: jpeg(value) for value, name in enumerate(NAMES)}
    assert seen.captions == dict(zip(NAMES, (["a one", "a, two"], ["b one"], []), strict=True))
    assert seen.splits == dict(zip(NAMES, ("train", "dev", "unused"), strict=True))
    assert seen.columns["photos/b.jpg"] == {"category": "y", "price": 2}
    assert seen.corpus.split_rule is None
    assert "images from 'filepath', captions from 'title', splits from 'split'" in seen.notes
    assert "captions left out that are empty or only spaces: 1 (first: " in seen.notes
    assert "1 of 3 images have no caption" in seen.notes


def test_the_digest_is_the_same_wherever_the_table_lies(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    import shutil

    csv_table(folder / "data.csv")
    other = tmp_path_factory.mktemp("other") / "copy"
    shutil.copytree(folder, other, copy_function=shutil.copy2)
    assert look(other / "data.csv").corpus.digest == look(folder / "data.csv").corpus.digest


def test_columns_can_be_named_and_images_lie_elsewhere(folder: Path) -> None:
    path = write(folder / "set.csv", "where,caption,what,part\na.jpg,wrong,a dog,test\nb.jpg,wrong,a cat,train\n")
    seen = look(path, images=folder / "photos", columns=Columns("where", "what", "part"))
    assert seen.captions == {"a.jpg": ["a dog"], "b.jpg": ["a cat"]}
    assert seen.splits == {"a.jpg": "test", "b.jpg": "train"}
    assert seen.columns["a.jpg"] == {"caption": "wrong"}


def test_paths_may_be_absolute_or_lead_upwards(folder: Path) -> None:
    (folder / "tables").mkdir()
    path = write(folder / "tables" / "set.csv", f"image\n{folder / 'photos/a.jpg'}\n../photos/b.jpg\n")
    assert list(look(path).photos.values()) == [jpeg(0), jpeg(1)]


def test_numbers_of_a_csv_become_numbers_where_all_are(folder: Path) -> None:
    lines = ["image,whole,real,code,mixed,none,", "photos/a.jpg,-7,1.5,007,1,,q", "photos/b.jpg,,2e3,8,x,,r"]
    seen = look(write(folder / "set.csv", "\n".join(lines)))
    assert seen.columns["photos/a.jpg"] == {
        "whole": -7, "real": 1.5, "code": "007", "mixed": "1", "none": None, "column_7": "q",
    }  # fmt: skip
    assert seen.columns["photos/b.jpg"] == {
        "whole": None, "real": 2000.0, "code": "8", "mixed": "x", "none": None, "column_7": "r",
    }  # fmt: skip


def test_lists_of_captions_and_nested_columns_of_json_lines(folder: Path) -> None:
    rows = [
        {"image": "photos/a.jpg", "captions": ["one", "two"], "boxes": [[1, 2, 3, 4]]},
        {"image": "photos/b.jpg", "captions": [], "boxes": [], "late": 1},
        {"image": "photos/c.jpg", "captions": None},
    ]
    seen = look(write(folder / "set.jsonl", "\n".join(map(json.dumps, rows))))
    assert list(seen.captions.values()) == [["one", "two"], [], []]
    assert seen.columns["photos/a.jpg"]["boxes"] == [[1, 2, 3, 4]]
    assert seen.columns["photos/b.jpg"]["late"] == 1


def test_columns_of_json_lines_may_begin_late(folder: Path) -> None:
    rows: list[dict[str, Any]] = [{"image": "photos/a.jpg"}] * 1000
    rows += [{"image": name, "caption": f"of {name}", "n": 7} for name in NAMES[1:]]
    seen = look(write(folder / "set.jsonl", "\n".join(map(json.dumps, rows))))
    assert list(seen.captions.values()) == [[], ["of photos/b.jpg"], ["of photos/c.jpg"]]
    assert seen.columns["photos/c.jpg"] == {"n": 7}


def test_rows_with_keys_of_their_own_make_no_table_without_end(folder: Path) -> None:
    rows = [{"image": NAMES[0], "caption": f"{row}", f"key{row:04}": 1} for row in range(500)]
    seen = look(write(folder / "set.jsonl", "\n".join(map(json.dumps, rows))))
    assert list(seen.columns[NAMES[0]]) == [f"key{number:04}" for number in range(200)]
    assert "columns left out beyond the first 200: 300" in seen.notes


def test_a_table_without_a_split_beside_others_with_one(folder: Path) -> None:
    for name, photo_name in zip(("train-0", "test-0", "more"), NAMES, strict=True):
        pq.write_table(pa.table({"image": [photo_name]}), folder / f"{name}.parquet")
    with pytest.raises(UsageError, match=r"1 of 3 files name no split, the others do: .*more\.parquet"):
        look(folder)
    assert set(look(folder, rule=SplitRule(5, 0.2, 0)).splits.values()) == {""}
    for name, photo_name in zip(("train-0", "test-0", "more"), NAMES, strict=True):
        pq.write_table(pa.table({"image": [photo_name], "split": ["val"]}), folder / f"{name}.parquet")
    assert set(look(folder).splits.values()) == {"dev"}, "a column says more than names"
    csv_table(folder / "train.csv")
    for path in folder.glob("*.parquet"):
        path.unlink()
    csv_table(folder / "more.csv")
    with pytest.raises(UsageError, match="it is not clear which to read"):
        look(folder)


def test_without_a_split_column_splits_are_drawn(folder: Path) -> None:
    path = write(folder / "set.csv", "image,caption\nphotos/a.jpg,x\nphotos/b.jpg,y\n")
    seen = look(path)
    assert seen.corpus.split_rule == SplitRule(0, 0.1, 0.1)
    assert set(seen.splits.values()) == {""}
    assert "images are split by their content with seed 0 (80% train, 10% dev, 10% test)" in seen.notes
    drawn = look(csv_table(folder / "data.csv"), rule=SplitRule(3, 0.5, 0))
    assert drawn.corpus.split_rule == SplitRule(3, 0.5, 0)
    assert set(drawn.splits.values()) == {""}
    assert drawn.columns["photos/b.jpg"]["split"] == "val"
    with pytest.raises(UsageError, match="exclude each other"):
        look(folder / "data.csv", columns=Columns(split="split"), rule=SplitRule(3, 0.5, 0))


def test_absent_images_are_skipped_and_their_captions_with_them(folder: Path) -> None:
    rows = ["image,caption", "gone.jpg,x", "photos/a.jpg,y", "gone.jpg,z", ",w", "photos,v"]
    seen = look(write(folder / "set.csv", "\n".join(rows)))
    assert list(seen.photos) == ["photos/a.jpg"]
    assert [(skipped.source_file, skipped.reason) for skipped in seen.corpus.skipped] == [
        ("gone.jpg", "no such file"),
        ("set.csv:5", "the row names no image"),
        ("photos", "not a regular file"),
    ]


def test_the_first_row_of_an_image_wins_and_others_are_noted(folder: Path) -> None:
    rows = ["image,caption,category", "photos/a.jpg,x,cat", "photos/a.jpg,y,dog", "photos/a.jpg,z,cow"]
    seen = look(write(folder / "set.csv", "\n".join(rows)))
    assert seen.columns == {"photos/a.jpg": {"category": "cat"}}
    assert "values of 'category' left out that differ from those of the image's first row: 2 (first: " in seen.notes


def test_captions_of_megabytes_and_line_breaks_in_quotes(folder: Path) -> None:
    rows = ["image,caption", f"photos/a.jpg,{'word ' * 500_000}", 'photos/b.jpg,"a dog', 'runs"', "photos/c.jpg,z"]
    seen = look(write(folder / "set.csv", "\n".join(rows)))
    assert list(seen.captions.values()) == [[], ["a dog runs"], ["z"]]
    assert "captions left out that are longer than 10,000 characters: 1 (first: set.csv:2)" in seen.notes


BROKEN = [
    ("set.csv", b"image,caption\nphotos/a.jpg,caf\xe9\n", r"set\.csv:2: the line is not UTF-8"),
    ("set.csv", b'image,caption\nphotos/a.jpg,x\nphotos/b.jpg,"open\nand on\n', r"set\.csv:3: unexpected end of data"),
    ("set.csv", b"image,caption\n\nphotos/a.jpg,x,y\n", r"set\.csv:3: 3 fields, the header has 2"),
    ("set.csv", b"image,image\nphotos/a.jpg,x\n", r"set\.csv:1: the column 'image' is there twice"),
    ("set.csv", b"", r"set\.csv is empty"),
    ("set.csv", b"image,caption\n", r"set\.csv leads to no image"),
    ("set.csv", b"image,split\nphotos/a.jpg,train\nphotos/b.jpg,holdout\n", r"set\.csv:3: 'holdout' .*is no split"),
    ("set.csv", b"image,split\nphotos/a.jpg,train\nphotos/a.jpg,test\n", r"set\.csv:3: photos/a\.jpg is in test here"),
    ("set.csv", b"image\nhttps://host/a.jpg\n", r"set\.csv:2: 'https://host/a\.jpg' is an address"),
    ("set.jsonl", b'{"image": "photos/a.jpg"}\n\n{"image": "pho', r"set\.jsonl:3: not valid JSON"),
    ("set.jsonl", b'{"image": "photos/a.jpg"}\n7\n', r"set\.jsonl:2: not a JSON object"),
    ("set.jsonl", b'{"image": 7}\n', r"set\.jsonl:1: 'image' holds no path but int"),
    ("set.jsonl", b'{"image": "photos/a.jpg", "text": 7}\n', r"set\.jsonl:1: 'text' holds int and no text"),
    ("set.jsonl", b"[" * 100_000, r"set\.jsonl is one JSON list"),
    ("set.jsonl", b'{"image": ' + b"[" * 100_000, r"set\.jsonl:1: not valid JSON"),
    ("set.parquet", b"PAR1 and no more", r"set\.parquet is no Parquet file, or was cut off"),
]


@pytest.mark.parametrize(("name", "content", "message"), BROKEN)
def test_broken_tables_are_named_by_line(folder: Path, name: str, content: bytes, message: str) -> None:
    (folder / name).write_bytes(content)
    with pytest.raises(ChimeraError, match=message) as caught:
        look(folder / name)
    assert caught.value.hint


def test_columns_that_do_not_exist(folder: Path) -> None:
    path = csv_table(folder / "data.csv")
    for columns in (Columns(image="nope"), Columns(caption="nope"), Columns(split="nope")):
        with pytest.raises(UsageError, match=r"data\.csv has no column 'nope'") as caught:
            look(path, columns=columns)
        assert "filepath, title, split, category, price" in caught.value.hint
    with pytest.raises(UsageError, match="no column of a name known for images"):
        look(write(folder / "set.csv", "one,two\n1,2\n"))


def test_what_is_no_table(folder: Path) -> None:
    for name, message in (("gone.csv", "does not exist"), ("photos/a.jpg", "no kind of table"), ("photos", "no table")):
        with pytest.raises(UsageError, match=message):
            look(folder / name)
    csv_table(folder / "one.csv")
    assert len(look(folder).photos) == 3
    csv_table(folder / "two.csv")
    with pytest.raises(UsageError, match=r"holds one\.csv, two\.csv: it is not clear which to read"):
        look(folder)


# ---- images in the table --------------------------------------------------------------------------------------------


def photo(value: int, side: int = 64) -> bytes:
    """Return noise, so that a few hundred of them are too much to be small by compression."""
    buffer = io.BytesIO()
    pixels = np.random.default_rng(value).integers(0, 255, (side, side, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def test_a_folder_of_parquet_files_as_hugging_face_writes_them(folder: Path) -> None:
    for split, numbers in (("train", (0, 1, 2)), ("validation", (3,)), ("test", (4,))):
        images = [{"bytes": photo(number), "path": f"{number}.png"} for number in numbers]
        captions = [[f"{number} one", f"{number} two"] for number in numbers]
        table = pa.table({"image": images, "caption": captions, "label": list(numbers), "mask": [b"x"] * len(numbers)})
        (folder / "hf").mkdir(exist_ok=True)
        pq.write_table(table, folder / "hf" / f"{split}-00000-of-00001.parquet")
    seen = look(folder / "hf")
    assert seen.photos == {f"{number}.png": photo(number) for number in (4, 0, 1, 2, 3)}
    assert [seen.splits[f"{number}.png"] for number in range(5)] == ["train"] * 3 + ["dev", "test"]
    assert seen.captions["3.png"] == ["3 one", "3 two"]
    assert seen.columns["3.png"] == {"label": 3}
    assert "columns with bytes are left out: mask" in seen.notes


def test_plain_bytes_equal_names_and_empty_cells(folder: Path) -> None:
    pq.write_table(pa.table({"jpg": [photo(0), photo(1)]}), folder / "plain.parquet")
    assert look(folder / "plain.parquet").photos == {
        "plain.parquet row 1": photo(0),
        "plain.parquet row 2": photo(1),
    }
    cells = [{"bytes": photo(0), "path": "x"}, {"bytes": photo(1), "path": "x"}, {"bytes": None, "path": NAMES[1]}]
    pq.write_table(pa.table({"image": cells}), folder / "cells.parquet")
    assert look(folder / "cells.parquet").photos == {
        "x": photo(0),
        "cells.parquet row 2": photo(1),
        "photos/b.jpg": jpeg(1),
    }
    pq.write_table(pa.table({"image": [*cells, None]}), folder / "cells.parquet")
    with open_table(folder / "cells.parquet") as corpus, pytest.raises(OSError, match="the cell is empty"):
        corpus.reads[3]()


def test_images_of_a_table_are_read_in_any_order_and_by_threads(folder: Path) -> None:
    contents = [b"%d" % number * 50 for number in range(5000)]
    pq.write_table(pa.table({"image": contents}), folder / "many.parquet", row_group_size=700)
    with open_table(folder / "many.parquet") as corpus, ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda read: read(), corpus.reads)) == contents
        assert list(pool.map(lambda read: read(), corpus.reads)) == contents
        for number in (*random.Random(0).sample(range(5000), 20), 4999, 0):
            assert corpus.reads[number]() == contents[number]


def test_a_damaged_page_is_an_unreadable_image(folder: Path) -> None:
    path = folder / "set.parquet"
    pq.write_table(pa.table({"image": [photo(n) for n in range(20)]}), path, compression="gzip", use_dictionary=False)
    content = bytearray(path.read_bytes())
    content[200:2000] = bytes(1800)
    path.write_bytes(content)
    with open_table(path) as corpus, pytest.raises(OSError, match="damaged in the table"):
        corpus.reads[0]()


def test_times_in_nanoseconds_are_kept_to_the_microsecond(folder: Path) -> None:
    times = pa.array([1_700_000_000_123_456_789], pa.timestamp("ns"))
    pq.write_table(pa.table({"image": [NAMES[0]], "taken": times}), folder / "set.parquet")
    assert look(folder / "set.parquet").columns[NAMES[0]]["taken"].microsecond == 123_456


def test_what_a_table_holds_is_what_the_pack_takes(folder: Path) -> None:
    """Columns of every kind, broken text in a column and in a name: the writer takes all that a table lets through."""
    from chimera_cli.data.images import decode_all
    from chimera_cli.data.pack_writer import write_pack

    rows = [
        {
            "image": NAMES[0],
            "caption": "x",
            "mixed": 1,
            "empty": {},
            "deep": [{"a": 1}],
            "width": 5,
            "odd": "\ud800",
            "\ud801": 1,
        },
        {"image": NAMES[1], "caption": "\ud800", "mixed": "a", "empty": {}, "deep": [], "width": 6, "odd": None},
    ]
    path = write(folder / "set.jsonl", "\n".join(map(json.dumps, rows)))

    def pack(corpus: Corpus) -> Any:
        return write_pack(
            folder / "data",
            name="set",
            source="table",
            images=decode_all(corpus.reads, 16, "crop"),
            items=corpus.items,
            captions=corpus.captions,
            size=16,
            split_rule=corpus.split_rule,
        )

    with open_table(path) as corpus:
        made = pack(corpus)
    assert made.column("mixed") == ["1", "a"]
    assert made.column("deep") == [[{"a": 1}], []]
    assert made.column("source_width") == [5, 6]
    assert made.manifest["caption_count"] == 1
