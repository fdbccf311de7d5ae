"""Files of classes and templates: what is read, and the one sentence for what can't be."""

from pathlib import Path

import pytest

from chimera_cli.errors import ChimeraError
from chimera_cli.evaluation.prompt_files import read_classes, read_templates


def write(tmp_path: Path, content: bytes) -> Path:
    path = tmp_path / "list.txt"
    path.write_bytes(content)
    return path


def test_lines_are_taken_as_they_stand(tmp_path: Path) -> None:
    content = b"\xef\xbb\xbfgolden retriever \r\n\r\n# no comment\r\n{curly}\r\n\xc3\xa9toile"
    assert read_classes(write(tmp_path, content)) == ("golden retriever", "# no comment", "{curly}", "étoile")
    assert read_templates(write(tmp_path, b"a {} of {one}.\n{}\n")) == ("a {} of {one}.", "{}")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "list.txt is empty"),
        (b" \n\n", "list.txt is empty"),
        (b"cat\ndog\n\ncat \n", "list.txt:4 has the class 'cat' of line 1 again"),
        (b"cat\n\xff\xfe\n", "list.txt:2 is not UTF-8"),
        (b"cat\n", "names one class only"),
    ],
)
def test_what_no_classes_can_be_read_from(tmp_path: Path, content: bytes, message: str) -> None:
    with pytest.raises(ChimeraError, match=message) as raised:
        read_classes(write(tmp_path, content))
    assert raised.value.hint


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a {}\na photo\n", r"list.txt:2 has no \{\}"),
        (b"{} and {}\n", r"list.txt:1 has 2 \{\}"),
        (b"a {}\na {}\n", r"list.txt:2 has the template 'a \{\}' of line 1 again"),
        (b"", "list.txt is empty"),
    ],
)
def test_what_is_no_template(tmp_path: Path, content: bytes, message: str) -> None:
    with pytest.raises(ChimeraError, match=message) as raised:
        read_templates(write(tmp_path, content))
    assert raised.value.hint


def test_files_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(ChimeraError, match="does not exist"):
        read_classes(tmp_path / "absent.txt")
    with pytest.raises(ChimeraError, match="is a folder"):
        read_templates(tmp_path)
