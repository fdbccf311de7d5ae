"""Captions as text."""

import pytest

from chimera_cli.data.captions import mentions_side, tidy, word_count


def test_white_space_is_tidied() -> None:
    assert tidy("  two \t dogs\u00a0run .\r\n") == "two dogs run ."
    assert tidy(" \t\n") == ""


def test_punctuation_is_no_word() -> None:
    assert word_count("A man 's dog , a black-and-white one , runs .") == 8
    assert word_count(" . ") == 0


@pytest.mark.parametrize(
    ("text", "sided"),
    [
        ("The dog on the LEFT jumps .", True),
        ("a right-handed batter", True),
        ("a lefthanded batter", True),
        ("turning counter-clockwise", True),
        ("the rightmost girl", True),
        ("a bright light", False),
        ("leftovers on a plate", False),
        ("two dogs run", False),
    ],
)
def test_words_that_a_mirror_makes_untrue(text: str, sided: bool) -> None:
    assert mentions_side(text) is sided
