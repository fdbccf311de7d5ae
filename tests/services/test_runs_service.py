"""`chimera runs`: what stands in the list, what one run shows, and that it starts without heavy libraries."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from chimera_cli.cli.runs import age, app
from chimera_cli.errors import UsageError
from chimera_cli.runs import Group, create_group, finish_group, update_group, utc_now, write_json
from chimera_cli.services.runs import list_runs, show_run, status_of, sync_runs

HEAVY = ("torch", "timm", "transformers", "mlflow", "pandas", "scipy")


def new_group(home: Path, kind: str = "train", seeds: tuple[int, ...] = (0, 1)) -> Group:
    facts = {"command": "chimera x", "pack": {"name": "toy", "fingerprint": "f", "source": "toy"}}
    return create_group(home, kind, "", seeds, facts)


def result(group: Group, seed: int, figures: dict[str, float | None], **details: Any) -> None:
    facts = {"schema_version": 1, "kind": group.kind, "seed": seed, "status": "finished", "started_at": utc_now()}
    path = group.seed_dir(seed) / "result.json"
    write_json(path, facts | {"finished_at": utc_now(), "figures": figures, "details": details})


def test_the_list_is_newest_first_with_the_figure_of_each_kind(tmp_path: Path) -> None:
    train, sanity = new_group(tmp_path), new_group(tmp_path, "sanity", (0,))
    result(train, 0, {"wall_s": 1.0}, best_dev={"rsum": 3.0})
    result(train, 1, {"wall_s": 1.0}, best_dev={"rsum": 3.5})
    result(sanity, 0, {"loss_drop": None})
    finish_group(train, "finished")
    rows = list_runs(tmp_path)["runs"]
    assert [row["name"] for row in rows] == [sanity.name, train.name]
    assert rows[0]["headline"] == {"figure": "loss_drop", "value": None}
    assert rows[1]["headline"] == {"figure": "rsum", "value": 3.25}
    assert [row["status"] for row in rows] == ["running", "finished"]
    assert rows[1]["pack"] == "toy"


def test_a_mean_over_fewer_seeds_than_have_results_is_never_shown(tmp_path: Path) -> None:
    group = new_group(tmp_path)
    result(group, 0, {}, best_dev={"rsum": 3.0})
    result(group, 1, {}, best_dev={})
    assert list_runs(tmp_path)["runs"][0]["headline"]["value"] is None


def test_a_running_group_whose_process_is_gone_has_died(tmp_path: Path) -> None:
    group = new_group(tmp_path)
    assert status_of(group) == "running"
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    gone = update_group(group, pid=process.pid)
    assert status_of(gone) == "died"
    assert status_of(update_group(gone, pid=None)) == "died"
    assert status_of(finish_group(gone, "failed")) == "failed"


def test_show_gives_figures_by_seed_and_over_them(tmp_path: Path) -> None:
    group = new_group(tmp_path)
    result(group, 0, {"wall_s": 1.0, "vram_peak_gb": None})
    result(group, 1, {"wall_s": 3.0, "vram_peak_gb": None})
    summary = {"n": 2, "mean": 0.5, "std": 0.1, "low": 0.0, "high": 1.0, "values": [0.4, 0.6]}
    evaluation = {"schema_version": 1, "pack": "toy", "split": "dev", "figures": {"i2t_r1": summary}}
    write_json(group.path / "evaluations" / "toy-dev.json", evaluation)
    shown = show_run(tmp_path, group.name)
    assert shown["figures"]["wall_s"]["mean"] == 2.0
    assert shown["figures"]["vram_peak_gb"] is None
    assert shown["by_seed"] == {
        "0": {"wall_s": 1.0, "vram_peak_gb": None},
        "1": {"wall_s": 3.0, "vram_peak_gb": None},
    }
    assert shown["evaluations"] == [{"pack": "toy", "split": "dev", "figures": {"i2t_r1": summary}}]
    assert list(show_run(tmp_path, f"{group.name}/seed-1")["by_seed"]) == ["1"]
    with pytest.raises(UsageError, match="no run is called"):
        show_run(tmp_path, "nothing")


def test_nothing_to_deliver_is_said(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="nothing to deliver"):
        sync_runs(tmp_path)


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0 s"), (59.9, "59 s"), (60, "1 min"), (7300, "2 h"), (90000, "1 d")]
)
def test_age_is_told_in_its_largest_unit(seconds: float, text: str) -> None:
    assert age(seconds) == text


def test_names_with_markup_are_shown_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    group = new_group(tmp_path)
    update_group(group, pack={"name": "[red]toy", "fingerprint": "f", "source": "toy"})
    monkeypatch.setenv("CHIMERA_HOME", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "200")
    for words in (["list"], ["show", group.name]):
        app(words, standalone_mode=False)
        assert "[red]toy" in capsys.readouterr().out


def test_list_and_show_start_without_heavy_libraries(tmp_path: Path) -> None:
    group = new_group(tmp_path)
    result(group, 0, {"wall_s": 1.0}, best_dev={"rsum": 3.0})
    code = (
        "import sys, json; from chimera_cli.cli.runs import app\n"
        "app(['list', '--json'], standalone_mode=False)\n"
        f"app(['show', {group.name!r}], standalone_mode=False)\n"
        f"print(json.dumps([name for name in {HEAVY!r} if name in sys.modules]))"
    )
    environment = os.environ | {"CHIMERA_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert json.loads(lines[-1]) == []
    assert group.name in done.stdout
