"""What training changed by itself stands in the report, seed by seed; broken files break nothing."""

from collections.abc import Callable
from pathlib import Path

from chimera_cli.reporting.facts import collect
from chimera_cli.reporting.markdown import render
from chimera_cli.reporting.sections import build
from chimera_cli.reporting.verdicts import Verdicts
from chimera_cli.runs import Group, append_json_line, read_json, write_sealed_json

HALF = {"step": 1200, "measure": "memory", "what": "micro_batch 4 in place of 8", "settings": {"micro_batch": 4}}
SMALLER = {"step": 3, "measure": "memory", "what": "images of 192 px", "settings": {"image.image_size": 192}}


def report(home: Path, group: Group) -> str:
    return render(build(collect(home, group), Verdicts((), (), "chimera slo check --run latest")))


def with_measures(group: Group, seed: int, measures: object) -> None:
    path = group.seed_dir(seed) / "result.json"
    result = read_json(path)
    write_sealed_json(path, result | {"details": dict(result["details"] or {}) | {"contingency": measures}})


def test_measures_stand_by_seed_and_a_changed_function_is_not_overlooked(
    tmp_path: Path, new_train_group: Callable[..., Group]
) -> None:
    group = new_train_group(tmp_path)
    assert "by itself" not in report(tmp_path, group)
    with_measures(group, 0, [HALF])
    # An unfinished seed has no result yet: its events tell.
    (group.seed_dir(2) / "result.json").unlink()
    append_json_line(group.seed_dir(2) / "events.jsonl", {"event": "contingency", "at": "now"} | SMALLER)
    lines = report(tmp_path, group).splitlines()
    start = lines.index("Contingency measures that training took by itself:")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[start + 4 : start + 6]]
    assert rows == [["0", "1,200", HALF["what"]], ["2", "3", "**Another function.** images of 192 px"]]


def test_what_an_edit_made_of_them_is_no_crash(tmp_path: Path, new_train_group: Callable[..., Group]) -> None:
    group = new_train_group(tmp_path)
    with_measures(group, 0, "much")
    with_measures(group, 1, [7, {"step": "soon", "settings": [], "what": "\x1b[2J <b>| a"}])
    (group.seed_dir(2) / "result.json").unlink()
    (group.seed_dir(2) / "events.jsonl").write_text("no json\n7\n", encoding="utf-8")
    assert "\x1b" not in report(tmp_path, group)
