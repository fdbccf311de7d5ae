"""Groups on disk: names, `latest`, prefixes, atomic writes, cut files, counted looks."""

import json
import os
import threading
from pathlib import Path

import pytest

from chimera_cli.errors import ChimeraError, UsageError
from chimera_cli.runs import (
    SEAL,
    Group,
    append_json_line,
    content_hash,
    count_test_look,
    create_group,
    finish_group,
    home,
    latest_group,
    list_groups,
    read_json,
    read_json_lines,
    read_sealed_json,
    resolve_run,
    seal_problem,
    source_hash,
    update_group,
    write_json,
    write_sealed_json,
    write_text,
)


def finished(home: Path, label: str, at: str, kind: str = "train") -> Group:
    """Make a group that finished at `at`."""
    return update_group(create_group(home, kind, label, [0, 1], {}), status="finished", finished_at=at)


# ---- files ----------------------------------------------------------------------------------------------------------


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "result.json"
    write_json(path, {"a": 1})

    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ChimeraError, match=r"result\.json can't be written: No space left") as caught:
        write_json(path, {"a": 2})
    assert "free some space" in caught.value.hint
    assert (read_json(path), [entry.name for entry in tmp_path.iterdir()]) == ({"a": 1}, ["result.json"])


def test_a_value_json_cannot_hold_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"a": float("nan")})
    assert read_json(path) == {"a": 1}


def test_a_file_in_the_place_of_a_folder_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("", encoding="utf-8")
    with pytest.raises(ChimeraError, match="can't be written"):
        create_group(tmp_path, "train", "a", [0], {})
    with pytest.raises(ChimeraError, match="can't be written"):
        append_json_line(tmp_path / "absent" / "a.jsonl", {"a": 1})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"a": 1, "b"', "is not valid JSON"),
        ("", "is not valid JSON"),
        ("[1, 2]", "holds no JSON object"),
        ('{"schema_version": 99}', "has schema version 99"),
        ('{"schema_version": "x"}', "has schema version x"),
    ],
)
def test_broken_json_is_named(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "group.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ChimeraError, match=words) as caught:
        read_json(path)
    assert str(path) in caught.value.message


def test_json_that_is_no_text_or_not_there_is_named(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    with pytest.raises(ChimeraError, match="does not exist"):
        read_json(path)
    path.write_bytes(b'{"a": "\xff"}')
    with pytest.raises(ChimeraError, match="is not valid JSON"):
        read_json(path)


def test_lines_come_back_as_written_whatever_signs_they_hold(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    # All of these end a line for str.splitlines and none of them for JSON lines.
    rows = [{"note": f"a{sign}b"} for sign in ("\n", "\r", "\x0b", "\x0c", "\x1c", "\x85", "\u2028", "\u2029", "é")]
    for row in rows:
        append_json_line(path, row)
    assert read_json_lines(path) == rows
    assert read_json_lines(tmp_path / "absent.jsonl") == []


def test_a_last_line_cut_anywhere_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    append_json_line(path, {"step": 1})
    append_json_line(path, {"note": "é→"})
    whole = path.read_bytes()
    first = whole.index(b"\n") + 1
    for end in range(first, len(whole) - 1):
        path.write_bytes(whole[:end])
        rows = read_json_lines(path)
        assert rows in ([{"step": 1}], [{"step": 1}, {"note": "é→"}])
        assert len(rows) == 1 or end == len(whole) - 1


def test_a_broken_line_in_the_middle_is_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step"\n{"step": 3}\n', encoding="utf-8")
    with pytest.raises(ChimeraError, match=r"metrics\.jsonl:2 is not valid JSON"):
        read_json_lines(path)


def test_a_seal_holds_for_the_content_and_not_for_its_layout(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    value = {"numbers": {10: 0.1, 9: -0.0, 2: 1e-300}, "text": "é\u2028\x1b", "list": [None, True, []], SEAL: "stale"}
    write_sealed_json(path, value)
    written = read_sealed_json(path)
    assert written["numbers"] == {"10": 0.1, "9": -0.0, "2": 1e-300}
    path.write_text(json.dumps(written, indent=None, sort_keys=True), encoding="utf-8")
    assert read_sealed_json(path) == written
    # Sealing what was read changes nothing.
    write_sealed_json(path, written)
    assert read_sealed_json(path) == written


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"a": 2}, "was edited after it was written"),
        ({"b": None}, "was edited after it was written"),
        ({SEAL: "0" * 64}, "was edited after it was written"),
        ({SEAL: 5}, "was edited after it was written"),
        ({SEAL: None}, "has no seal"),
    ],
)
def test_a_broken_or_missing_seal_is_told(tmp_path: Path, change: dict[str, object], words: str) -> None:
    path = tmp_path / "result.json"
    write_sealed_json(path, {"a": 1})
    document = read_sealed_json(path)
    assert seal_problem(document) is None
    write_json(path, document | change)
    assert words in str(seal_problem(read_json(path)))
    with pytest.raises(ChimeraError, match=words) as caught:
        read_sealed_json(path)
    assert str(path) in caught.value.message


def test_every_change_of_a_group_is_sealed_but_never_one_by_hand(tmp_path: Path) -> None:
    group = create_group(tmp_path, "train", "a", [0], {"hardware": {"cores": 2}})
    path = group.path / "group.json"
    for change in (lambda: update_group(group, extra=1), lambda: count_test_look(group)):
        change()
        assert seal_problem(read_json(path)) is None
    write_json(path, read_json(path) | {"hardware": {"cores": 8}})
    finished = finish_group(group, "finished")
    assert (finished.status, "was edited" in str(seal_problem(finished.facts))) == ("finished", True)
    assert finished.facts == read_json(path)


# ---- groups ---------------------------------------------------------------------------------------------------------


def test_a_new_group_is_running_and_has_a_folder_per_seed(tmp_path: Path) -> None:
    group = create_group(tmp_path, "train", "locked v2!", [3, 5], {"command": "chimera train full"})
    facts = read_json(group.path / "group.json")
    assert group.name.startswith("train-locked-v2-")
    assert (facts["kind"], facts["status"], facts["seeds"], facts["finished_at"]) == ("train", "running", [3, 5], None)
    assert (facts["command"], facts["test_looks"], facts["pid"]) == ("chimera train full", 0, os.getpid())
    assert sorted(path.name for path in group.path.iterdir()) == ["group.json", "seed-3", "seed-5"]


def test_groups_made_in_the_same_second_have_different_names(tmp_path: Path) -> None:
    names = [create_group(tmp_path, "train", "a", [0], {}).name for _ in range(4)]
    assert len(set(names)) == 4
    assert {group.name for group in list_groups(tmp_path)} == set(names)


def test_latest_is_decided_by_group_json_and_never_by_file_times(tmp_path: Path) -> None:
    old = finished(tmp_path, "old", "2030-01-01T00:00:00.000000+00:00")
    new = finished(tmp_path, "new", "2030-01-02T00:00:00.000000+00:00")
    create_group(tmp_path, "train", "running", [0], {})
    finish_group(create_group(tmp_path, "train", "failed", [0], {}), "failed")
    finished(tmp_path, "sanity", "2030-01-03T00:00:00.000000+00:00", "sanity")
    os.utime(old.path / "group.json", (4e9, 4e9))
    os.utime(old.path, (4e9, 4e9))
    assert latest_group(tmp_path).name == new.name
    assert resolve_run(tmp_path, "latest")[0].name == new.name


def test_without_a_finished_run_latest_says_what_there_is_and_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no finished train run") as caught:
        latest_group(tmp_path)
    assert "chimera train full" in caught.value.hint
    group = finish_group(create_group(tmp_path, "train", "a", [0], {}), "interrupted")
    with pytest.raises(UsageError, match=f"{group.name}, is interrupted"):
        latest_group(tmp_path)


def test_runs_are_named_by_prefix_path_and_seed(tmp_path: Path) -> None:
    first = finished(tmp_path, "alpha", "2030-01-01")
    finished(tmp_path, "beta", "2030-01-02")
    for name in (first.name, "train-al", f"runs/{first.name}/", f"{first.name}/"):
        assert resolve_run(tmp_path, name) == (first, None)
    assert resolve_run(tmp_path, f"runs/{first.name}/seed-1/") == (first, 1)
    with pytest.raises(UsageError, match="fits 2 runs"):
        resolve_run(tmp_path, "train-")
    with pytest.raises(UsageError, match="has no 'seed-7'") as caught:
        resolve_run(tmp_path, f"{first.name}/seed-7")
    assert caught.value.hint == "its seeds are seed-0, seed-1"
    for name in ("gamma", "", "../../etc"):
        with pytest.raises(UsageError):
            resolve_run(tmp_path, name)


def test_a_name_that_begins_another_means_itself(tmp_path: Path) -> None:
    names = [create_group(tmp_path, "train", "same", [0], {}).name for _ in range(2)]
    short = min(names, key=len)
    assert resolve_run(tmp_path, short)[0].name == short


@pytest.mark.parametrize("text", ["{}", '{"kind": "train"', '{"kind": "train", "seeds": 3}'])
def test_a_broken_group_hides_no_other_and_is_explained_when_named(tmp_path: Path, text: str) -> None:
    whole = finished(tmp_path, "whole", "2030-01-01")
    write_text(tmp_path / "runs" / "train-broken" / "group.json", text)
    assert list_groups(tmp_path) == [whole]
    assert latest_group(tmp_path) == whole
    with pytest.raises(ChimeraError, match=r"train-broken/group\.json"):
        resolve_run(tmp_path, "train-broken")


def test_a_folder_without_group_json_is_no_group(tmp_path: Path) -> None:
    (tmp_path / "runs" / "something").mkdir(parents=True)
    (tmp_path / "runs" / "file.txt").write_text("", encoding="utf-8")
    assert list_groups(tmp_path) == []


def test_results_come_in_the_order_of_the_seeds(tmp_path: Path) -> None:
    group = create_group(tmp_path, "train", "a", [2, 0, 1], {})
    for seed in (0, 2):
        write_json(group.seed_dir(seed) / "result.json", {"seed": seed})
    assert [result["seed"] for result in group.results()] == [2, 0]


def test_looks_at_the_test_split_are_counted_one_by_one(tmp_path: Path) -> None:
    group = create_group(tmp_path, "train", "a", [0], {})
    threads = [threading.Thread(target=count_test_look, args=(group,)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    update_group(group, status="finished")
    assert read_json(group.path / "group.json")["test_looks"] == 8
    assert count_test_look(group) == 9


# ---- identity -------------------------------------------------------------------------------------------------------


def test_home_is_the_variable_or_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHIMERA_HOME", str(tmp_path / "there"))
    assert home() == tmp_path / "there"
    monkeypatch.setenv("CHIMERA_HOME", "")
    monkeypatch.chdir(tmp_path)
    assert home() == tmp_path


def test_hashes_follow_content_alone() -> None:
    assert content_hash({"a": 1, "b": [2]}) == content_hash(json.loads('{"b": [2], "a": 1}'))
    assert content_hash({"a": 1}) != content_hash({"a": 2})
    assert source_hash() == source_hash()
    assert len(source_hash()) == 64


def test_json_that_is_nested_too_deeply_is_no_crash(tmp_path: Path) -> None:
    path = tmp_path / "deep.json"
    path.write_text('{"a": ' + "[" * 100_000, encoding="utf-8")
    with pytest.raises(ChimeraError, match="is not valid JSON"):
        read_json(path)
