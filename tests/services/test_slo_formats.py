"""The check in other formats: JUnit through an XML reader, annotations escaped exactly, nothing obeyed anywhere."""

import json
import re
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml
from made_runs import CPU, FLICKR, LAW, RECALL, SOURCE, TRAINED, add_evaluation, make_group, make_run
from markdown_it import MarkdownIt

from chimera_cli.runs import update_group
from chimera_cli.services.slo import check
from chimera_cli.services.slo_formats import FORMATS, as_github, as_json, as_junit, as_markdown

TODAY = date(2030, 1, 1)
NASTY = "a|`b`[red]x[/red]<script>&amp;\x1b[31m\x07\x9b2J%0A::error::\r\n::warning::\ud800\ufffe\u202e\u2069"


@pytest.fixture(autouse=True)
def source(monkeypatch: pytest.MonkeyPatch) -> None:
    """The runs made by hand are of the source code that checks them."""
    monkeypatch.setattr("chimera_cli.services.slo.source_hash", lambda: SOURCE)


def every_word(home: Path) -> dict[str, Any]:
    """Return a check with all five verdicts: pass, fail, inconclusive, unmeasured and waived."""
    group = make_run(home, epoch_10k_pairs_s=20000.0)
    for seed, value in enumerate((0.20, 0.25, 0.31)):
        add_evaluation(group, seed, figures=RECALL | {"i2t_r10": value})
    document = yaml.safe_load(LAW.read_text(encoding="utf-8"))
    law = next(one for one in document["objectives"] if one["id"] == "epoch")
    document["objectives"].append(law | {"id": "slow", "title": "slow <disk> & 100 %, worse: much"})
    document["waivers"] = [
        {"objective": "epoch", "owner": "an owner", "reason": "slow disk", "expires": date(2030, 1, 31)},
    ]
    path = home / "slo.yaml"
    path.write_text(yaml.safe_dump(document), encoding="utf-8")
    return check(home, slo_path=path, today=TODAY)


def test_all_five_words_are_there(tmp_path: Path) -> None:
    found = {one["id"]: one["verdict"] for one in every_word(tmp_path)["objectives"]}
    assert found == {
        "loader": "unmeasured", "sanity": "pass", "epoch": "waived", "vram": "unmeasured",
        "viability": "inconclusive", "slow": "fail",
    }  # fmt: skip


def test_the_json_has_its_keys_and_version(tmp_path: Path) -> None:
    result = json.loads(as_json(every_word(tmp_path)))
    assert result["schema_version"] == 1
    assert set(result) == {
        "schema_version", "run", "seeds", "pack", "slo", "law", "profile", "checked_on", "remarks", "left_out",
        "strict", "verdict", "exit_code", "figures", "objectives", "waivers", "ladder", "command",
    }  # fmt: skip
    assert set(result["objectives"][0]) == {
        "id", "title", "verdict", "reason", "law", "measured", "evidence", "measure", "conditions", "beside", "run",
        "files", "seeds", "waiver", "baseline",
    }  # fmt: skip
    assert set(result["objectives"][0]["conditions"][0]) == {
        "figure", "label", "comparison", "limit", "relative_to", "statistic", "target", "verdict", "reason", "value",
        "margin", "interval", "summary", "law", "measured", "interval_words", "sources",
    }  # fmt: skip


# ---- JUnit ----------------------------------------------------------------------------------------------------------


def test_junit_has_a_case_per_objective_and_counts_what_is_no_pass(tmp_path: Path) -> None:
    result = every_word(tmp_path)
    root = ElementTree.fromstring(as_junit(result).encode())
    (suite,) = root.iter("testsuite")
    counts = {"tests": "6", "failures": "1", "errors": "2", "skipped": "1"}
    for element in (root, suite):
        assert {name: element.get(name) for name in counts} == counts
    outcomes = {
        str(case.get("name")): [child.tag for child in case if child.tag != "properties"]
        for case in suite.iter("testcase")
    }
    assert outcomes == {
        "loader": ["error"], "sanity": ["system-out"], "epoch": ["skipped"], "vram": ["error"],
        "viability": ["system-out"], "slow": ["failure"],
    }  # fmt: skip
    failure = suite.find("testcase[@name='slow']/failure")
    assert failure is not None
    assert (failure.get("type"), failure.get("message")) == ("fail", "epoch_10k_pairs_s misses its limit")
    assert "evidence: runs/" in str(failure.text)
    doubt = suite.find("testcase[@name='viability']/system-out")
    assert doubt is not None
    assert str(doubt.text).startswith(
        "inconclusive: image to text R@10 25.3 ± 5.5 % (n=3), 95 % interval 11.7 to 39.0 %"
    )


def test_junit_carries_every_figure_with_its_spread_and_file(tmp_path: Path) -> None:
    result = every_word(tmp_path)
    root = ElementTree.fromstring(as_junit(result).encode())
    viability = root.find(".//testcase[@name='viability']/properties")
    assert viability is not None
    found = {str(one.get("name")): str(one.get("value")) for one in viability}
    assert float(found["i2t_r10.value"]) == pytest.approx(0.76 / 3)
    assert float(found["i2t_r10.std"]) == pytest.approx(0.0550757, abs=1e-7)
    assert (float(found["i2t_r10.low"]), float(found["i2t_r10.high"])) == pytest.approx((0.116516, 0.390150), abs=1e-6)
    assert (found["i2t_r10.n"], found["i2t_r10.limit"], found["run"]) == ("3", "0.25", result["run"])
    files = [one.get("value") for one in viability if one.get("name") == "file"]
    assert files == [f"runs/{result['run']}/seed-{seed}/evaluations/flickr8k-dev.json" for seed in range(3)]
    waiver = root.find(".//testcase[@name='epoch']/properties/property[@name='waiver']")
    assert waiver is not None
    assert waiver.get("value") == "epoch, by an owner: slow disk; until 2030-01-31 (30 days left); in force"


def test_a_strict_check_takes_a_doubt_for_an_error(tmp_path: Path) -> None:
    result = every_word(tmp_path) | {"strict": True}
    case = ElementTree.fromstring(as_junit(result).encode()).find(".//testcase[@name='viability']/error")
    assert case is not None
    assert case.get("type") == "inconclusive"
    assert "::error title=SLO viability%3A inconclusive::" in as_github(result)


# ---- GitHub and Markdown --------------------------------------------------------------------------------------------


def test_annotations_have_levels_and_are_escaped_as_the_runner_reads_them(tmp_path: Path) -> None:
    lines = as_github(every_word(tmp_path)).splitlines()
    heads = [line.partition("::")[2].partition("::")[0] for line in lines]
    assert heads == [
        "warning title=SLO waiver",
        "error title=SLO loader%3A unmeasured",
        "notice title=SLO sanity%3A pass",
        "warning title=SLO epoch%3A waived",
        "error title=SLO vram%3A unmeasured",
        "warning title=SLO viability%3A inconclusive",
        "error title=SLO slow%3A fail",
    ]
    slow = lines[-1].removeprefix("::error title=SLO slow%3A fail::").split("%0A")
    assert slow[0] == "slow <disk> & 100 %25, worse: much"
    assert slow[1] == (
        "fail: 10,000 pairs from cold 5 h 33 min ± 0.00 s (n=3), 95 %25 interval 5 h 33 min to 5 h 33 min, "
        "≤ 3 h 00 min (margin -2 h 33 min)"
    )
    assert slow[2] == "epoch_10k_pairs_s misses its limit"


def test_markdown_is_a_table_with_a_row_per_condition(tmp_path: Path) -> None:
    text = as_markdown(every_word(tmp_path))
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    assert rows[0] == ["law", "verdict", "figure", "measured", "95 % interval", "limit", "margin"]
    assert len(rows) == 2 + 1 + 3 + 1 + 1 + 4 + 1
    assert ["`viability`", "**inconclusive**", "image to text R@10", "25.3 ± 5.5 % (n=3)", "11.7 to 39.0 %",
            "≥ 25.0 %", "+0.3 %"] in rows  # fmt: skip
    assert "Waiver: epoch, by an owner: slow disk; until 2030-01-31 (30 days left); in force" in text


# ---- foreign text ---------------------------------------------------------------------------------------------------


def strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from strings(item)


def test_text_from_files_steers_nothing_that_shows_it(tmp_path: Path) -> None:
    group = make_group(tmp_path, "train", [TRAINED] * 3)
    update_group(group, pack=FLICKR | {"name": NASTY.replace("\ud800", "")}, hardware=CPU, command=f"x '{NASTY[:40]}'")
    result = check(tmp_path, slo_path=LAW, today=TODAY)
    result["remarks"] = [NASTY]
    result["objectives"][0] |= {"title": NASTY, "reason": NASTY, "evidence": NASTY}
    texts = {name: form(result) for name, form in FORMATS.items()}
    for text in texts.values():
        assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\ud800-\udfff]", text)
        text.encode("utf-8")
    # Escaped, not changed: who reads the JSON gets what the files hold.
    assert NASTY in set(strings(json.loads(texts["json"])))
    ElementTree.fromstring(texts["junit"].encode())
    assert all(re.match(r"::(error|warning|notice) title=[^:,]+::", line) for line in texts["github"].splitlines())
    html = MarkdownIt("commonmark", {"html": True}).enable("table").render(texts["markdown"])
    assert "<script" not in html
    assert html.count("&lt;script&gt;") == texts["markdown"].count("<script>")
