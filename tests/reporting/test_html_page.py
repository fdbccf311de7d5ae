"""One file, no outside help, nothing foreign executed, the same bytes each time."""

import itertools
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chimera_cli.reporting import drawing
from chimera_cli.reporting.document import Code, Document, Mono, Paragraph, Section, Strong, table
from chimera_cli.reporting.facts import collect, loader_curves, read_curves
from chimera_cli.reporting.html import Headline, headlines, render
from chimera_cli.reporting.plots import Plot, draw
from chimera_cli.reporting.sections import build
from chimera_cli.reporting.verdicts import Limit, Verdict, Verdicts
from chimera_cli.runs import Group

VERDICTS = Verdicts(
    (
        Verdict("epoch", "10,000 pairs", "<= 3 h", "81 s", "pass", "here"),
        Verdict("vram", "memory", "<= 7.5", "–", "unmeasured", ""),
    ),
    ("Profile cpu.",),
    "chimera slo check",
    limits=(
        Limit("loader_images_per_s", "≥", 300.0),
        Limit("epoch_10k_pairs_s", "≤", 10800.0),
        Limit("vram_peak_gb", "≤", 7.5),
    ),
)
SVG = "{http://www.w3.org/2000/svg}"


class Page(HTMLParser):
    """Collects the tags, whatever refers to something outside, and the text of table cells."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.found: list[tuple[str, dict[str, str]]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.found.append((tag, {name: value or "" for name, value in attrs}))
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]

    def handle_data(self, data: str) -> None:
        self.text += data


def page(home: Path, group: Group) -> tuple[str, list[Plot]]:
    facts = collect(home, group)
    plots = draw(facts, read_curves(facts), loader_curves(facts), VERDICTS)
    return render(build(facts, VERDICTS), plots, headlines(facts, VERDICTS)), plots


def test_the_page_is_self_contained_and_foreign_markup_is_text(
    tmp_path: Path, new_train_group: Callable[..., Group], new_bench_groups: Callable[..., list[Group]]
) -> None:
    new_bench_groups(tmp_path)
    html, plots = page(tmp_path, new_train_group(tmp_path))
    parser = Page()
    parser.feed(html)
    assert [link for link in parser.links if not link.startswith("#")] == []
    assert not {"script", "link", "img", "b"} & set(parser.tags)
    assert "Testor <b>3000</b>" in parser.text
    assert parser.tags.count("svg") == len(plots) == 6
    assert '<span class="chip unmeasured">unmeasured</span>' in html
    assert "1 unmeasured, 1 pass" in parser.text


def test_plots_are_whole_scale_with_the_page_and_use_its_colours(
    tmp_path: Path, new_train_group: Callable[..., Group], evaluate: Callable[..., None]
) -> None:
    group = new_train_group(tmp_path)
    for seed in group.seeds:
        evaluate(group, seed, "test", 0.0)
    _, plots = page(tmp_path, group)
    assert [plot.section for plot in plots] == ["benchmarks"] * 2 + ["retrieval"] * 2 + ["ladder"] + ["memory"] * 2
    ids: list[str] = []
    for plot in plots:
        root = ElementTree.fromstring(plot.svg)
        assert "viewBox" in root.attrib
        assert not {"width", "height"} & set(root.attrib)
        assert set(re.findall(r"#[0-9a-f]{6}\b", plot.svg)) <= {"#ffffff", "#000000"}
        ids += re.findall(r'<clipPath id="([^"]+)"', plot.svg)
    assert len(ids) == len(set(ids))


def test_the_same_results_give_the_same_page(tmp_path: Path, new_train_group: Callable[..., Group]) -> None:
    group = new_train_group(tmp_path)
    assert page(tmp_path, group)[0] == page(tmp_path, group)[0]


def test_a_group_without_curves_or_evaluations_has_no_plots(
    tmp_path: Path, new_train_group: Callable[..., Group]
) -> None:
    group = new_train_group(tmp_path, seeds=(0,))
    for path in (group.seed_dir(0) / name for name in ("metrics.jsonl", "telemetry.jsonl")):
        path.unlink()
    (group.seed_dir(0) / "evaluations" / "flickr8k-dev.json").unlink()
    html, plots = page(tmp_path, group)
    assert plots == []
    assert "Not evaluated" in html


# ---- for those who can't see it -------------------------------------------------------------------------------------


def test_the_page_can_be_read_aloud(
    tmp_path: Path, new_train_group: Callable[..., Group], new_bench_groups: Callable[..., list[Group]]
) -> None:
    new_bench_groups(tmp_path)
    group = new_train_group(tmp_path)
    html, _ = page(tmp_path, group)
    parser = Page()
    parser.feed(html)
    found = {tag: [attributes for name, attributes in parser.found if name == tag] for tag in set(parser.tags)}
    assert found["html"] == [{"lang": "en"}]
    assert html.count("<title>") == 1
    assert all(one.get("scope") in ("col", "row") for one in found["th"])
    assert all(one.get("role") == "img" and one.get("aria-label") for one in found["svg"])
    (view,) = [one["content"] for one in found["meta"] if one.get("name") == "viewport"]
    assert view == "width=device-width, initial-scale=1", "a reader may zoom"
    ids = [attributes["id"] for _, attributes in parser.found if "id" in attributes]
    assert len(ids) == len(set(ids))
    targets = {attributes["href"].removeprefix("#") for name, attributes in parser.found if name == "a"}
    assert targets == {attributes["id"] for attributes in found["section"]}
    headings = [int(tag[1]) for tag in parser.tags if re.fullmatch("h[1-6]", tag)]
    assert headings == [1] + [2] * (len(headings) - 1)


def test_a_plot_says_in_words_what_it_shows(tmp_path: Path, new_train_group: Callable[..., Group]) -> None:
    _, plots = page(tmp_path, new_train_group(tmp_path))
    words = {plot.caption.split(" ")[0]: ElementTree.fromstring(plot.svg).attrib["aria-label"] for plot in plots}
    assert words["Batch"].startswith("Batch loss before each update, mean of 3 seeds. From 6.0")
    assert words["Recall"].endswith("i2t R@1 34.0 %, i2t R@5 64.0 %, i2t R@10 77.0 %, t2i R@1 26.0 %, t2i R@5 56.0 %, "
                                    "t2i R@10 70.0 %.")  # fmt: skip


def luminance(color: str) -> float:
    """Relative luminance of `#rrggbb`: WCAG 2.2, `dfn-relative-luminance`."""
    parts = [int(color[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def palettes() -> list[dict[str, str]]:
    """Return the colours of light, dark and print, with the full six digits."""
    css = (Path(drawing.__file__).with_name("page.css")).read_text(encoding="utf-8")
    blocks = re.findall(r":root \{(.*?)\}", css, re.DOTALL)
    colors = [dict(re.findall(r"--([\w-]+): (#[0-9a-f]+);", block)) for block in blocks]
    return [
        {
            name: value if len(value) == 7 else "#" + "".join(2 * digit for digit in value[1:])
            for name, value in one.items()
        }
        for one in colors
    ]


@pytest.mark.parametrize("place", range(3), ids=["light", "dark", "print"])
def test_text_and_lines_stand_out_from_what_is_behind_them(place: int) -> None:
    """WCAG 2.2 AA: 4.5 for text, 3 for what a drawing needs to be understood."""
    colors = palettes()[place]
    assert len(palettes()) == 3
    behind = [colors[name] for name in ("page", "card", "code")]
    for name, ground in itertools.product(("ink", "soft", "good", "bad", "open"), behind):
        assert contrast(colors[name], ground) >= 4.5, (name, ground)
    for name in ("limit", *(f"series-{index}" for index in range(6))):
        assert contrast(colors[name], colors["card"]) >= 3, name
    # Links take the first series' colour, and are text.
    assert contrast(colors["series-0"], colors["page"]) >= 4.5


def test_every_colour_of_a_drawing_is_one_of_the_page() -> None:
    assert {variable.removeprefix("--") for variable in drawing.VARIABLES.values()} <= set(palettes()[0])
    assert [set(one) for one in palettes()] == [set(palettes()[0])] * 3


# ---- what is drawn --------------------------------------------------------------------------------------------------


def texts(plot: Plot) -> list[str]:
    return [(element.text or "").strip() for element in ElementTree.fromstring(plot.svg).iter(f"{SVG}text")]


def test_limits_are_named_in_the_plots_they_belong_to(
    tmp_path: Path, new_train_group: Callable[..., Group], new_bench_groups: Callable[..., list[Group]]
) -> None:
    new_bench_groups(tmp_path)
    _, plots = page(tmp_path, new_train_group(tmp_path))
    found = {plot.caption.split(" ")[0]: texts(plot) for plot in plots if plot.section == "memory"}
    assert "law ≥ 0.926 pairs/s" in found["Training"], "10,000 pairs in 10,800 s"
    assert "law ≥ 300.0 images/s" in found["Data"]
    assert all("var(--limit)" in plot.svg for plot in plots if plot.section == "memory" and "RAM" not in plot.caption)


def test_vram_is_drawn_against_the_law_and_ram_against_the_machine(
    tmp_path: Path, new_train_group: Callable[..., Group]
) -> None:
    group = new_train_group(tmp_path, seeds=(0,))
    path = group.seed_dir(0) / "telemetry.jsonl"
    rows = [f'{{"elapsed_s": {n}, "ram_used_gb": 2.0, "ram_total_gb": 23.5}}\n' for n in range(3)]
    path.write_text("".join(rows))
    assert "machine has 23.50 GiB" in texts(page(tmp_path, group)[1][-1])
    path.write_text("".join(row.replace("2.0", '2.0, "vram_used_gb": 6.0') for row in rows))
    assert "law ≤ 7.50 GiB" in texts(page(tmp_path, group)[1][-1])


def test_curves_show_mean_and_spread_and_one_seed_alone_neither(
    tmp_path: Path, new_train_group: Callable[..., Group]
) -> None:
    three = texts(page(tmp_path, new_train_group(tmp_path))[1][0])
    assert {"mean of 3", "± 1 std", "single seeds"} <= set(three)
    one = texts(page(tmp_path, new_train_group(tmp_path, seeds=(4,)))[1][0])
    assert "seed 4" in one
    assert not {"mean of 3", "± 1 std", "single seeds"} & set(one)


def test_seeds_of_different_length_are_averaged_as_far_as_all_went(
    tmp_path: Path, new_train_group: Callable[..., Group]
) -> None:
    group = new_train_group(tmp_path, seeds=(0, 1))
    path = group.seed_dir(1) / "metrics.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:31]))
    label = ElementTree.fromstring(page(tmp_path, group)[1][0].svg).attrib["aria-label"]
    assert re.search(r"at update 28\.$", label), label


def test_similarities_are_drawn_where_seeds_have_them(
    tmp_path: Path, new_train_group: Callable[..., Group], evaluate: Callable[..., None]
) -> None:
    group = new_train_group(tmp_path)
    edges = [-1.0, -0.5, 0.0, 0.5, 1.0]
    for seed, unmatched in ((0, [0, 60, 40, 0]), (1, [0, 60, 36, 4]), (2, None)):
        more = (
            {}
            if unmatched is None
            else {"similarities": {"edges": edges, "matched": [0, 0, 5, 15], "unmatched": unmatched}}
        )
        evaluate(group, seed, "dev", 0.0, **more)
    (plot,) = [one for one in page(tmp_path, group)[1] if one.caption.startswith("Similarities")]
    # 10 of 40 matched pairs lie below 0.5, 30 evenly above: the middle is a third of the way from 0.5 to 1. Of the 200
    # unmatched ones 4 lie above 0.5, two thirds of them above the middle: 1.33 %.
    assert (
        plot.caption
        == "Similarities on flickr8k, dev. Half of the matched pairs lie above 0.67, and 1.3 % of the unmatched ones."
    )
    assert {"matched pairs", "unmatched pairs"} <= set(texts(plot))


@pytest.mark.parametrize(
    "broken",
    [
        None,
        {},
        {"edges": [0, 1], "matched": [1, 2], "unmatched": [3]},
        {"edges": [0, 1], "matched": [0], "unmatched": [0]},
    ],
)
def test_a_histogram_that_fits_nothing_is_left_out(
    tmp_path: Path, new_train_group: Callable[..., Group], evaluate: Callable[..., None], broken: object
) -> None:
    group = new_train_group(tmp_path, seeds=(0,))
    evaluate(group, 0, "dev", 0.0, similarities=broken)
    assert [plot for plot in page(tmp_path, group)[1] if plot.caption.startswith("Similarities")] == []


# ---- foreign text ---------------------------------------------------------------------------------------------------

SIGNS = st.sampled_from("ab<>&\"'/!-|`*_[]()#={}%\\ \n\t\x1b\x00\x7f\x9b;é\ud800\ufffe\u202e")
NASTY = st.text(SIGNS | st.characters(codec="utf-8"), max_size=40)
STEERING = set("\x00\x1b\x7f\x9b\ud800\ufffe\u202e")


def nasty_page(text: str) -> Page:
    grid = table((text, "x", "y"), [(text, Mono(text), (Strong(text), text))])
    document = Document(text, (Paragraph(text),), (Section("s", text, (grid, Code(text, "yaml"))),))
    parser = Page()
    parser.feed(render(document, [Plot("s", text, "<svg></svg>")], [Headline(text, text)], text))
    return parser


@settings(max_examples=30, deadline=None)
@given(text=NASTY)
def test_no_text_becomes_markup(text: str) -> None:
    plain = nasty_page("a")
    parser = nasty_page("a" + text + "a")
    assert parser.tags == plain.tags
    assert not set(parser.text) & STEERING
    assert [link for link in parser.links if not link.startswith("#")] == []
    assert all(not name.startswith("on") for _, attributes in parser.found for name in attributes)


def test_the_words_of_a_drawing_are_text() -> None:
    text = "".join(["a\"'><script>&amp;", *sorted(STEERING), "\n"])
    label = ElementTree.fromstring(drawing.svg(drawing.canvas("", "")[0], "salt", text)).attrib["aria-label"]
    assert label == "a\"'><script>&amp;" + " " * 8


def test_nothing_is_fetched_or_executed(tmp_path: Path, new_train_group: Callable[..., Group]) -> None:
    html, _ = page(tmp_path, new_train_group(tmp_path))
    outside = set(re.findall(r"[a-z]+://[^\s\"'<)]+", html))
    assert outside <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}, "names of XML, never fetched"
    assert not re.search(r"@import|url\((?!#)|<script|<link|<iframe|javascript:", html)
