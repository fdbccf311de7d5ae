"""Files with one class or one prompt template per line."""

from pathlib import Path

from chimera_cli.errors import ChimeraError, UsageError

PLACE = "{}"


def read_classes(path: Path) -> tuple[str, ...]:
    """Return the class names of a file, one per line, as they stand there.

    Raises ChimeraError where it can't be read, is no UTF-8, is empty, or names a class twice; UsageError for one class
    alone.
    """
    names = tuple(_lines(path, "class"))
    if len(names) < 2:
        raise UsageError(f"{path} names one class only", "a choice needs two classes, each on a line of its own")
    return names


def read_templates(path: Path) -> tuple[str, ...]:
    """Return the prompt templates of a file, one per line, each with `{}` once where the class name goes.

    Raises ChimeraError where the file can't be read, is no UTF-8, is empty, or a line is no template or there twice.
    """
    lines = _lines(path, "template")
    for text, number in lines.items():
        if text.count(PLACE) != 1:
            many = "no" if PLACE not in text else str(text.count(PLACE))
            raise ChimeraError(
                f"{path}:{number} has {many} {PLACE}",
                f"the class name goes where {PLACE} stands, once: a photo of a {{}}.",
            )
    return tuple(lines)


def _lines(path: Path, what: str) -> dict[str, int]:
    """Return what stands on each line that is not blank, with the number of the line (from 1)."""
    found: dict[str, int] = {}
    for number, line in enumerate(_text(path).split("\n"), 1):
        text = " ".join(line.split())
        if not text:
            continue
        if text in found:
            raise ChimeraError(
                f"{path}:{number} has the {what} {text!r} of line {found[text]} again", "remove one of the two lines"
            )
        found[text] = number
    if not found:
        raise ChimeraError(f"{path} is empty", f"write one {what} per line")
    return found


def _text(path: Path) -> str:
    try:
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise UsageError(f"{path} does not exist", "name a text file") from error
    except IsADirectoryError as error:
        raise UsageError(f"{path} is a folder", "name a text file") from error
    except OSError as error:
        raise ChimeraError(f"{path} can't be read: {error.strerror}", "check the file's permissions") from error
    try:
        # Editors on Windows begin UTF-8 files with a mark.
        return content.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise ChimeraError(f"{path}:{line} is not UTF-8", "save the file as UTF-8 text") from error
