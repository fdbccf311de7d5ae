"""Markdown shows foreign text as it is: checked with an independent CommonMark parser."""

from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from chimera_cli.reporting.document import Code, Document, Mono, Paragraph, Section, Strong, table
from chimera_cli.reporting.markdown import escape, render

NASTY = "a|b *c* _d_ `e` <script>alert(1)</script> [f](g) &amp; ~~h~~ \\ i_j \x1b[31m\nk"
SHOWN = "a|b *c* _d_ `e` <script>alert(1)</script> [f](g) &amp; ~~h~~ \\ i_j  [31m k"


def parsed(markdown: str) -> MarkdownIt:
    return MarkdownIt("gfm-like", {"linkify": False}).parse(markdown)


def texts(markdown: str) -> list[str]:
    """Return the text of every inline block as a reader sees it; any other token than text is named."""
    found = []
    for token in parsed(markdown):
        if token.type == "inline":
            parts = [part.content if part.type in ("text", "code_inline", "text_special") else f"<{part.type}>"
                     for part in token.children or ()]  # fmt: skip
            found.append("".join(parts))
    return found


def test_nasty_text_is_shown_as_it_is_everywhere() -> None:
    grid = table((NASTY, "code"), [(NASTY, Mono(NASTY))], right=(0,))
    document = Document(NASTY, (Paragraph(NASTY),), (Section("s", NASTY, (grid,)),))
    assert texts(render(document)) == [SHOWN, SHOWN, SHOWN, SHOWN, "code", SHOWN, SHOWN]


def test_a_paragraph_never_begins_a_list_heading_or_quote() -> None:
    for start in ("# one", "- one", "+ one", "> one", "1. one", "12) one", "=== one"):
        assert texts(render(Document("t", (Paragraph(start),)))) == ["t", start]


def test_code_with_fences_inside_stays_one_block() -> None:
    text = "a: 1\n```\n# not a heading\n````\nb: 2"
    tokens = [token for token in parsed(render(Document("t", (Code(text, "yaml"),)))) if token.type == "fence"]
    assert [token.content for token in tokens] == [text + "\n"]


def test_names_and_comparisons_stay_readable() -> None:
    assert escape("loader_images_per_s >= 300, x < 4, R@10") == "loader_images_per_s >= 300, x < 4, R@10"


def test_tables_are_aligned_and_missing_rows_leave_no_table() -> None:
    grid = table(("name", "value"), [("a", "1"), (("b ", Strong("c")), "10")], right=(1,))
    assert render(Document("t", (grid, table(("x",), [])))).splitlines()[2:] == [
        "| name    |   value |",
        "|:--------|--------:|",
        "| a       |       1 |",
        "| b **c** |      10 |",
    ]


SIGNS = st.sampled_from("ab<>&\"'/!-+|`*_~[]()#={}\\ .1\n\t\x1b\x00\x7f\x9b;:@é\u2028\ud800\u202e")


@settings(max_examples=150, deadline=None)
@given(text=st.text(SIGNS, max_size=30))
def test_no_text_becomes_markup_links_or_another_cell(text: str) -> None:
    text = f"a{text}a"
    grid = table(("name", text, "z"), [(text, Mono(text), Strong(text)), ("b", "c", "d")])
    markdown = render(Document(text, (Paragraph(text),), (Section("s", text, (grid,)),)))
    tokens = parsed(markdown)
    kinds = [token.type for token in tokens if token.type.endswith("_open")]
    assert kinds[:3] == ["heading_open", "paragraph_open", "heading_open"]
    assert kinds.count("tr_open") == 3
    assert kinds.count("th_open") + kinds.count("td_open") == 9
    allowed = {"text", "code_inline", "text_special", "strong_open", "strong_close"}
    assert {part.type for token in tokens for part in token.children or ()} <= allowed
    assert not set(markdown) & set("\x00\x1b\x7f\x9b\t\ud800\u202e")
