"""Tables: numbers to the right, foreign text as text, words in their colour."""

import io

from rich.console import Console, RenderableType
from rich.text import Text

from chimera_cli.ui.tables import facts, result_table, word


def drawn(renderable: RenderableType) -> list[str]:
    console = Console(file=io.StringIO(), width=80, color_system=None)
    console.print(renderable)
    assert isinstance(console.file, io.StringIO)
    return [line.rstrip() for line in console.file.getvalue().splitlines()]


def test_columns_of_numbers_are_aligned_to_the_right() -> None:
    lines = drawn(result_table("recalls", ["run", "R@1", "time"], [["a", "3.1 %", "9 s"], ["bcd", "–", "1 min 10 s"]]))
    assert lines[0] == "recalls"
    assert lines[-2].endswith("9 s")
    assert lines[-1].endswith("1 min 10 s")
    assert lines[-2].index("9 s") > lines[-1].index("1 min")
    assert lines[-2].startswith("a  ")


def test_strings_are_shown_as_they_are() -> None:
    lines = drawn(result_table("", ["x"], [["[red]no markup[/nope] \x1b[31m"]]))
    assert lines[-1] == "[red]no markup[/nope]  [31m"
    assert drawn(facts("", [("key", "[bold]v")])) == ["key  [bold]v"]


def test_words_have_one_colour_everywhere() -> None:
    assert (word("pass").style, word("FAIL").style, word("other").style) == ("green", "bold red", "")
    assert isinstance(word("pass"), Text)
