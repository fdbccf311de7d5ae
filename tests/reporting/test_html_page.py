"""One file, no outside help, nothing foreign executed, the same bytes each time."""

import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

from chimera_cli.reporting.facts import collect, read_curves
from chimera_cli.reporting.html import headlines, render
from chimera_cli.reporting.plots import Plot, draw
from chimera_cli.reporting.sections import Verdict, Verdicts, build
from chimera_cli.runs import Group

VERDICTS = Verdicts(
    (
        Verdict("epoch", "10,000 pairs", "<= 3 h", "81 s", "pass", "here"),
        Verdict("vram", "memory", "<= 7.5", "–", "unmeasured", ""),
    ),
    ("Profile cpu.",),
    "chimera slo check",
)


class Page(HTMLParser):
    """Collects the tags, whatever refers to something outside, and the text of table cells."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]

    def handle_data(self, data: str) -> None:
        self.text += data


def page(home: Path, group: Group) -> tuple[str, list[Plot]]:
    facts = collect(home, group)
    plots = draw(facts, read_curves(facts))
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
    assert parser.tags.count("svg") == len(plots) == 5
    assert '<span class="chip unmeasured">unmeasured</span>' in html
    assert "1 pass, 1 unmeasured" in parser.text


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
