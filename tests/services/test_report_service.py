"""`chimera report` from end to end: real verdicts, the page on disk, JSON, and a light start."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer

from chimera_cli.cli.report import report_command
from chimera_cli.errors import ChimeraError, UsageError
from chimera_cli.figures import RECALLS
from chimera_cli.runs import (
    Group,
    create_group,
    finish_group,
    read_json,
    update_group,
    utc_now,
    write_sealed_json,
    write_text,
)
from chimera_cli.services.report import report

HEAVY = ("torch", "timm", "transformers", "mlflow", "pandas", "scipy")
SLO = """
schema_version: 1
law: false
objectives:
  - id: epoch
    title: an epoch
    kind: train
    all_of: [{figure: epoch_10k_pairs_s, comparison: "<=", limit: 90}]
    measure: chimera train full
  - id: memory
    title: the card holds it
    kind: train
    profiles: [gpu]
    all_of: [{figure: vram_peak_gb, comparison: "<=", limit: 7.5}]
    measure: chimera train full
  - id: sanity
    title: proof of life
    kind: sanity
    all_of: [{figure: loss_drop, comparison: ">=", limit: 0.15}]
    measure: chimera train sanity --seed 0
"""


@pytest.fixture
def group(tmp_path: Path) -> Group:
    """A training run of two seeds on a CPU, evaluated on dev."""
    pack = {"name": "toy", "fingerprint": "f" * 64, "source": "toy"}
    hardware = {"device": "cpu", "cpu": "Testor", "cores": 2, "gpu": None}
    facts = {"command": "chimera train full --config x.yaml", "pack": pack, "source_hash": "5" * 64}
    group = create_group(tmp_path, "train", "x", (0, 1), facts | {"hardware": hardware})
    for seed in group.seeds:
        directory = group.seed_dir(seed)
        times = {"started_at": utc_now(), "finished_at": utc_now(), "status": "finished", "seed": seed}
        figures = {"epoch_10k_pairs_s": 80.0 + 20 * seed, "wall_s": 3.0, "vram_peak_gb": None}
        write_sealed_json(directory / "result.json", {**times, "kind": "train", "figures": figures, "details": {}})
        write_text(directory / "config.yaml", "batch: 2\n")
        recalls = dict.fromkeys(RECALLS, 0.5)
        counts = {"images": 300, "captions": 1500, "created_at": utc_now(), "checkpoint_step": 3}
        evaluation = {"pack": pack, "split": "dev", "seed": seed, **counts, "figures": recalls}
        write_sealed_json(directory / "evaluations" / "toy-dev.json", evaluation)
    return finish_group(group, "finished")


@pytest.fixture
def slo(tmp_path: Path) -> Path:
    path = tmp_path / "slo.yaml"
    path.write_text(SLO)
    return path


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """The command as the executable runs it, with CHIMERA_HOME set."""
    app = typer.Typer()
    app.command()(report_command)
    monkeypatch.setenv("CHIMERA_HOME", str(tmp_path))
    return lambda *words: app(list(words), standalone_mode=False)


def row_of(markdown: str, start: str) -> list[str]:
    (line,) = [line for line in markdown.splitlines() if line.startswith(f"| {start}")]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_verdicts_of_slo_check_stand_in_the_report(tmp_path: Path, group: Group, slo: Path) -> None:
    text = report(tmp_path, slo=slo).markdown
    assert text.splitlines()[2].startswith("> **Not the law.**")
    assert "Judged under profile cpu, because this run was made without a GPU." in text
    assert row_of(text, "`epoch`")[4] == "**fail**"
    unmeasured = row_of(text, "`sanity`")
    assert unmeasured[2:5] == ["–", "–", "**unmeasured**"]
    assert "run `chimera train sanity --seed 0`" in unmeasured[5]
    assert "`memory`" not in text


def test_the_profile_that_is_asked_for_is_used_without_excuse(tmp_path: Path, group: Group, slo: Path) -> None:
    text = report(tmp_path, profile="gpu", slo=slo).markdown
    assert row_of(text, "`memory`")[4] == "**unmeasured**"
    assert "Judged under" not in text


def test_a_run_on_a_gpu_is_judged_as_one(tmp_path: Path, group: Group, slo: Path) -> None:
    hardware = {"device": "cuda", "cpu": "Testor", "cores": 2, "gpu": "GTX 1080"}
    update_group(group, hardware=hardware)
    text = report(tmp_path, slo=slo).markdown
    assert row_of(text, "`memory`")[4] == "**unmeasured**"
    assert "GTX 1080; Testor, 2 cores" in text


def test_one_seed_alone_can_be_reported(tmp_path: Path, group: Group, slo: Path) -> None:
    made = report(tmp_path, f"{group.name}/seed-0", slo=slo)
    assert row_of(made.markdown, "`epoch`")[4] == "pass"
    assert made.facts["figures"]["epoch_10k_pairs_s"]["values"] == [80.0]


def test_only_training_runs_have_a_report(tmp_path: Path, group: Group, slo: Path) -> None:
    sanity = create_group(tmp_path, "sanity", "", (0,), {})
    with pytest.raises(UsageError, match="is a sanity run"):
        report(tmp_path, sanity.name, slo=slo)
    with pytest.raises(UsageError, match="no run is called"):
        report(tmp_path, "nothing", slo=slo)


def test_markdown_goes_to_stdout_unwrapped_and_the_page_to_its_file(
    tmp_path: Path, group: Group, slo: Path, command: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "pages" / "report.html"
    command("--slo", str(slo), "--html", str(page))
    out, err = capsys.readouterr()
    assert out == report(tmp_path, slo=slo).markdown
    assert str(page) in err
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")


def test_json_is_one_object_with_figures_by_name(
    group: Group, slo: Path, command: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    command("--slo", str(slo), "--json")
    made = json.loads(capsys.readouterr().out)
    assert made["figures"]["i2t_r1"]["mean"] == 0.5
    assert made["figures"]["wall_s"]["n"] == 2
    assert made["figures"]["vram_peak_gb"] is None
    assert made["slo"]["verdict"] == "fail"
    assert made["benchmarks"] == dict.fromkeys(("prepare", "loader", "encoders", "sanity", "retrieval"))
    assert made["update"] is None


def test_a_page_that_can_not_be_written_is_one_sentence(tmp_path: Path, group: Group, slo: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ChimeraError, match="can't be written"):
        report(tmp_path, slo=slo, html=tmp_path / "file" / "report.html")


def test_a_folder_in_place_of_the_page_is_refused_before_anything_is_written(
    tmp_path: Path, group: Group, slo: Path, readme: Path
) -> None:
    before = readme.read_bytes()
    with pytest.raises(UsageError, match="is a folder"):
        report(tmp_path, slo=slo, html=tmp_path, update=readme)
    assert readme.read_bytes() == before


def test_the_page_replaces_pages_alone(tmp_path: Path, group: Group, slo: Path, readme: Path) -> None:
    before = readme.read_bytes()
    with pytest.raises(UsageError, match=r"README\.md exists and is no HTML page"):
        report(tmp_path, slo=slo, html=readme)
    with pytest.raises(UsageError, match="--html and --update both name"):
        report(tmp_path, slo=slo, html=tmp_path / "." / "README.md", update=readme)
    with pytest.raises(UsageError, match="/dev/null is no file"):
        report(tmp_path, slo=slo, html=Path("/dev/null"))
    assert readme.read_bytes() == before
    for start in ("", "\ufeff\n<!DOCTYPE HTML>\nold"):
        page = tmp_path / "page.html"
        page.write_text(start)
        report(tmp_path, slo=slo, html=page)
        assert page.read_text().startswith("<!doctype html>")


def test_a_cut_result_heads_the_report(tmp_path: Path, group: Group, slo: Path) -> None:
    path = group.seed_dir(1) / "result.json"
    path.write_text(path.read_text()[:40])
    made = report(tmp_path, slo=slo)
    assert f"> **No evidence.** `{group.name}/seed-1/result.json` is not valid JSON" in made.markdown
    assert row_of(made.markdown, "`epoch`")[4] == "**unmeasured**"
    (problem,) = made.facts["seal_problems"]
    assert made.facts["seal_problems"][problem] == [f"{group.name}/seed-1/result.json"]


WRONG: tuple[Any, ...] = ("x", ["x", None], {"a": {"b": 1}}, -1, 1e15, True, None)


@pytest.mark.parametrize("wrong", WRONG, ids=repr)
@pytest.mark.parametrize("name", ["group.json", "seed-0/result.json", "seed-0/evaluations/toy-dev.json"])
def test_nothing_that_an_edit_leaves_behind_stops_the_report(
    tmp_path: Path, group: Group, slo: Path, name: str, wrong: Any
) -> None:
    """Each key of a file, and each below it, holds something else than it should."""
    path = group.path / name
    document = read_json(path)
    needed = {"schema_version", "kind", "status", "created_at", "finished_at", "seeds"} if name == "group.json" else ()
    for key, value in document.items():
        below = {inner: document | {key: value | {inner: wrong}} for inner in value} if isinstance(value, dict) else {}
        for edited in [*below.values(), *([] if key in needed else [document | {key: wrong}])]:
            write_sealed_json(path, {**edited, "schema_version": 1})
            json.dumps(report(tmp_path, group.name, slo=slo).facts, allow_nan=False)


def test_plots_leave_out_what_is_no_number(tmp_path: Path, group: Group, slo: Path) -> None:
    rows = ["[1]", '{"step": "a", "loss": 1}', '{"step": 1, "loss": NaN}', '{"step": 2, "loss": 1e400}', "5"]
    path = group.seed_dir(0) / "metrics.jsonl"
    path.write_text("".join(f"{row}\n" for row in [*rows, '{"step": 3, "loss": 2}', '{"step": 4, "loss": 1.5}']))
    evaluation = group.seed_dir(0) / "evaluations" / "toy-dev.json"
    histogram = {"edges": [0, 1], "matched": ["a"], "unmatched": [1]}
    write_sealed_json(evaluation, read_json(evaluation) | {"similarities": histogram, "intervals": {"i2t_r1": [1]}})
    page = tmp_path / "page.html"
    report(tmp_path, slo=slo, html=page)
    text = page.read_text()
    assert "From 2.00 at update 3 to 1.50 at update 4." in text
    assert "Similarities on" not in text


def test_markdown_is_made_without_heavy_libraries(tmp_path: Path, group: Group, slo: Path) -> None:
    code = (
        "import sys, json, typer; from chimera_cli.cli.report import report_command\n"
        "app = typer.Typer(); app.command()(report_command)\n"
        f"app(['--slo', {str(slo)!r}], standalone_mode=False)\n"
        f"print(json.dumps([name for name in {(*HEAVY, 'matplotlib', 'jinja2')!r} if name in sys.modules]))"
    )
    environment = os.environ | {"CHIMERA_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout.splitlines()[-1]) == []


# ---- --update -------------------------------------------------------------------------------------------------------


@pytest.fixture
def readme(tmp_path: Path) -> Path:
    path = tmp_path / "README.md"
    path.write_bytes(b"# Mine\r\n\r\n<!-- chimera:report -->\r\nold\r\n<!-- /chimera:report -->\r\n\xff \tend")
    path.chmod(0o640)
    return path


def test_update_refreshes_the_block_and_nothing_else(
    group: Group, slo: Path, readme: Path, command: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    command("--slo", str(slo), "--update", str(readme))
    assert capsys.readouterr().out == f"{readme}: the report is refreshed\n"
    content = readme.read_bytes()
    head, _, rest = content.partition(b"<!-- chimera:report -->\r\n")
    block, _, tail = rest.partition(b"<!-- /chimera:report -->")
    assert (head, tail) == (b"# Mine\r\n\r\n", b"\r\n\xff \tend")
    assert block.count(b"\n") == block.count(b"\r\n") > 5
    assert b"| toy, dev |" in block
    assert readme.stat().st_mode & 0o777 == 0o640

    before = readme.stat()
    command("--slo", str(slo), "--update", str(readme))
    assert capsys.readouterr().out == f"{readme}: the report was up to date already\n"
    assert readme.read_bytes() == content
    assert (readme.stat().st_ino, readme.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert [path.name for path in readme.parent.iterdir() if path.name.startswith(".README")] == []


def test_update_says_in_json_what_it_did(
    group: Group, slo: Path, readme: Path, command: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    command("--slo", str(slo), "--update", str(readme), "--json")
    assert json.loads(capsys.readouterr().out)["update"] == {"file": str(readme), "changed": True}


def test_update_writes_behind_a_link(tmp_path: Path, group: Group, slo: Path, readme: Path) -> None:
    link = tmp_path / "link.md"
    link.symlink_to(readme)
    assert report(tmp_path, slo=slo, update=link).changed
    assert link.is_symlink()
    assert b"| toy, dev |" in readme.read_bytes()


def test_update_without_markers_or_file_writes_nothing_at_all(tmp_path: Path, group: Group, slo: Path) -> None:
    plain, page = tmp_path / "plain.md", tmp_path / "page.html"
    plain.write_text("no markers\n")
    with pytest.raises(UsageError, match=r"plain\.md has no line <!-- chimera:report -->"):
        report(tmp_path, slo=slo, update=plain, html=page)
    with pytest.raises(UsageError, match=r"gone\.md does not exist"):
        report(tmp_path, slo=slo, update=tmp_path / "gone.md", html=page)
    with pytest.raises(UsageError, match="is no file"):
        report(tmp_path, slo=slo, update=tmp_path, html=page)
    assert plain.read_text() == "no markers\n"
    assert not page.exists()


# ---- the process ----------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only some systems have a disk that is always full")
def test_a_full_disk_behind_stdout_is_one_sentence(tmp_path: Path, group: Group, slo: Path) -> None:
    command = [str(Path(sys.executable).with_name("chimera")), "report", "--slo", str(slo)]
    environment = os.environ | {"CHIMERA_HOME": str(tmp_path), "COLUMNS": "200"}
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(command, env=environment, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60)
    assert done.returncode == 1
    first, hint = done.stderr.splitlines()
    assert first == "error: stdout can't be written: No space left on device"
    assert hint.startswith("hint:")


def test_a_reader_who_has_gone_is_no_error(tmp_path: Path, group: Group, slo: Path) -> None:
    """`chimera report | head -1`: more than a pipe holds is written to nobody."""
    (group.seed_dir(0) / "config.yaml").write_text("".join(f"key_{n}: {'x' * 100}\n" for n in range(2000)))
    command = [str(Path(sys.executable).with_name("chimera")), "report", "--slo", str(slo)]
    environment = os.environ | {"CHIMERA_HOME": str(tmp_path)}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.readline().startswith(b"# ")
    process.stdout.close()
    err = process.stderr.read()
    process.stderr.close()
    assert (process.wait(timeout=60), err) == (0, b"")
