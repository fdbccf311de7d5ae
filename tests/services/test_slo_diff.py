"""Two runs on the same queries: what differs by hand, what is refused, and that nothing is written or counted."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from numpy.typing import NDArray
from scipy import stats

from chimera_cli.errors import ChimeraError, ExitCode, UsageError
from chimera_cli.evaluation.rank_files import write_ranks
from chimera_cli.evaluation.retrieval import Ranks, retrieval_figures
from chimera_cli.figures import RECALLS
from chimera_cli.runs import Group, create_group, finish_group, read_json, write_json, write_sealed_json, write_text
from chimera_cli.services.slo_diff import diff, exit_code

IMAGES = 120
OWNER = np.repeat(np.arange(IMAGES), 1 + np.arange(IMAGES) % 3)
PACK = {"name": "photos", "fingerprint": "f" * 64, "source": "table"}


def ranks_of(median: float, seed: int) -> Ranks:
    """Draw ranks around a median; what is hard for one run is hard for another."""
    hard = np.random.default_rng(99).normal(size=IMAGES)
    own = np.random.default_rng(seed).normal(size=(2, len(OWNER)))
    i2t = np.maximum(1, np.round(median * np.exp(hard + 0.4 * own[0, :IMAGES])))
    t2i = np.maximum(1, np.round(median * np.exp(hard[OWNER] + 0.4 * own[1])))
    return Ranks(i2t.astype(np.int64), t2i.astype(np.int64), OWNER)


def evaluate(folder: Path, ranks: Ranks, pack: dict[str, Any], split: str = "dev", **changes: Any) -> Path:
    """Write an evaluation as `chimera eval` does."""
    name = f"{pack['name']}-{split}"
    stored = {"file": f"{name}.ranks.npz", "sha256": write_ranks(folder / f"{name}.ranks.npz", ranks)}
    document = {"schema_version": 1, "pack": pack, "split": split, "images": IMAGES, "captions": len(OWNER)}
    path = folder / f"{name}.json"
    write_sealed_json(path, document | {"figures": retrieval_figures(ranks), "ranks": stored} | changes)
    return path


def make_run(
    home: Path, ranks: Sequence[Ranks], pack: dict[str, Any] = PACK, label: str = "x", **settings: Any
) -> Group:
    facts = {"pack": pack, "hardware": {"device": "cpu"}, "source_hash": "s"}
    group = create_group(home, "train", label, range(len(ranks)), facts)
    for seed, one in enumerate(ranks):
        config = {"optimiser": {"lr": 0.1, "decay": 0.0} | settings, "batch": 8}
        write_text(group.seed_dir(seed) / "config.yaml", yaml.safe_dump(config))
        evaluate(group.seed_dir(seed) / "evaluations", one, pack)
    return finish_group(group, "finished")


def tree(home: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in home.rglob("*") if path.is_file()}


# ---- figures --------------------------------------------------------------------------------------------------------


def test_points_are_means_over_seeds_and_intervals_scipys(tmp_path: Path) -> None:
    a, b = make_run(tmp_path, [ranks_of(8, 1)], label="a"), make_run(tmp_path, [ranks_of(6, 2)], label="b")
    before = tree(tmp_path)
    result = diff(tmp_path, a.name, b.name)
    assert tree(tmp_path) == before, "nothing is written and no look is counted"
    assert (result["images"], result["captions"], result["split"]) == (IMAGES, len(OWNER), "dev")
    assert set(result["changes"]) == {*RECALLS, "rsum"}
    figures = [retrieval_figures(one) for one in (ranks_of(8, 1), ranks_of(6, 2))]
    for name, one in result["changes"].items():
        assert (one["a"], one["b"]) == pytest.approx((figures[0][name], figures[1][name]))
        assert one["absolute"] == result["figures"][name] == pytest.approx(one["b"] - one["a"])
        assert one["relative"] == pytest.approx(one["b"] / one["a"] - 1)
        assert one["smallest_effect"] == pytest.approx(2.8016 * one["standard_error"], rel=1e-4)
        assert one["significant"] == (one["absolute_interval"][0] > 0 or one["absolute_interval"][1] < 0)
    found = [np.bincount(OWNER, weights=one.t2i <= 5) for one in (ranks_of(8, 1), ranks_of(6, 2))]

    def change(x: NDArray, y: NDArray, captions: NDArray, axis: int) -> NDArray:
        return (y.sum(axis) - x.sum(axis)) / captions.sum(axis)

    data = (*found, np.bincount(OWNER))
    reference = stats.bootstrap(data, change, paired=True, vectorized=True, method="percentile", rng=0)
    ours = result["changes"]["t2i_r5"]
    assert ours["absolute_interval"] == pytest.approx(tuple(reference.confidence_interval), abs=0.006)
    assert ours["standard_error"] == pytest.approx(reference.standard_error, rel=0.05)


def test_several_seeds_are_averaged_and_their_spread_widens_the_intervals(tmp_path: Path) -> None:
    even = [ranks_of(8, 1)] * 3
    spread = [ranks_of(5, 1), ranks_of(8, 1), ranks_of(13, 1)]
    names = [make_run(tmp_path, ranks, label=label).name for label, ranks in (("e", even), ("s", spread))]
    alike, apart = diff(tmp_path, names[0], names[0]), diff(tmp_path, names[0], names[1])
    for name in RECALLS:
        values = [retrieval_figures(one)[name] for one in spread]
        assert apart["changes"][name]["b"] == pytest.approx(np.mean(values))
        assert apart["changes"][name]["b_over_seeds"]["std"] == pytest.approx(np.std(values, ddof=1))
        # Three seeds that spread by s can't say more of their mean than s / sqrt(3).
        assert apart["changes"][name]["standard_error"] > 0.97 * np.std(values, ddof=1) / np.sqrt(3)
        assert alike["changes"][name]["standard_error"] == 0
    assert alike["verdict"] == "no difference"
    assert apart["remarks"] == []


def test_words_and_exit_code_for_better_worse_and_no_difference(tmp_path: Path) -> None:
    first, same, better = (
        make_run(tmp_path, [ranks_of(median, seed), ranks_of(median, seed + 1)], label=label).name
        for label, median, seed in (("a", 8, 1), ("b", 8, 11), ("c", 4, 21))
    )
    up, down, level = diff(tmp_path, first, better), diff(tmp_path, better, first), diff(tmp_path, first, same)
    assert (up["verdict"], down["verdict"], level["verdict"]) == ("better", "worse", "no difference")
    assert (up["worse"], level["worse"]) == ([], [])
    assert set(down["worse"]) == set(RECALLS)
    assert up["changes"]["rsum"]["p_value"] < 0.001 < 0.05 < level["changes"]["rsum"]["p_value"]
    assert up["figures"]["rsum"] == pytest.approx(-down["figures"]["rsum"])
    assert [exit_code(one, True) for one in (up, down, level)] == [ExitCode.OK, ExitCode.BREACHED, ExitCode.OK]
    assert exit_code(down, False) == ExitCode.OK


def test_what_differs_between_the_runs_is_told(tmp_path: Path) -> None:
    a = make_run(tmp_path, [ranks_of(8, 1)] * 2, label="a")
    b = make_run(tmp_path, [ranks_of(8, 2)] * 2, label="b", lr=0.2, momentum="[red]high[/]")
    write_sealed_json(b.path / "group.json", {**read_json(b.path / "group.json"), "source_hash": "t"})
    result = diff(tmp_path, a.name, f"{b.name}/seed-1")
    assert result["settings"] == [
        {"key": "optimiser.lr", "a": 0.1, "b": 0.2},
        {"key": "optimiser.momentum", "a": "not set", "b": "[red]high[/]"},
    ]
    assert result["b"] == {
        "run": f"{b.name}/seed-1", "seeds": [1], "files": [f"runs/{b.name}/seed-1/evaluations/photos-dev.json"]
    }  # fmt: skip
    assert [remark.split()[0] for remark in result["remarks"]] == [f"{b.name}/seed-1", b.name]
    assert "one seed" in result["remarks"][0]
    assert "another state of the source code" in result["remarks"][1]


# ---- refusals -------------------------------------------------------------------------------------------------------


def test_runs_without_queries_in_common_are_refused_naming_both(tmp_path: Path) -> None:
    a = make_run(tmp_path, [ranks_of(8, 1)], label="a")
    b = make_run(tmp_path, [ranks_of(8, 1)], PACK | {"name": "drawings"}, label="b")
    with pytest.raises(UsageError, match=f"{a.name} was trained on photos, {b.name} on drawings") as raised:
        diff(tmp_path, a.name, b.name)
    assert "--data" in (raised.value.hint or "")
    # Evaluated on one pack after all, they can be compared there.
    with pytest.raises(ChimeraError, match=f"seed 0 of {b.name} was not evaluated on photos, dev") as raised:
        diff(tmp_path, a.name, b.name, data="photos")
    assert f"chimera eval --run {b.name} --split dev --data photos" in (raised.value.hint or "")
    evaluate(b.seed_dir(0) / "evaluations", ranks_of(9, 3), PACK)
    assert diff(tmp_path, a.name, b.name, data="photos")["pack"]["name"] == "photos"


def test_another_content_of_the_pack_is_refused_naming_both(tmp_path: Path) -> None:
    a = make_run(tmp_path, [ranks_of(8, 1)], label="a")
    b = make_run(tmp_path, [ranks_of(8, 1)], PACK | {"fingerprint": "e" * 64}, label="b")
    with pytest.raises(UsageError, match=f"{a.name} was evaluated on f{{12}}, seed 0 of {b.name} on e{{12}}"):
        diff(tmp_path, a.name, b.name)


def test_evaluations_that_prove_nothing_are_refused_with_a_command(tmp_path: Path) -> None:
    a = make_run(tmp_path, [ranks_of(8, 1)], label="a")
    path = a.seed_dir(0) / "evaluations" / "photos-dev.json"
    document = read_json(path)

    def refusal(words: str) -> str:
        with pytest.raises(ChimeraError, match=words) as raised:
            diff(tmp_path, a.name, a.name)
        return raised.value.hint or ""

    again = f"chimera eval --run {a.name} --split dev"
    write_sealed_json(path, {key: value for key, value in document.items() if key != "ranks"})
    assert again in refusal("without the ranks of its queries")
    write_json(path, document | {"images": 3})
    assert refusal("was edited after it was written")
    write_sealed_json(path, document | {"split": "test"})
    assert refusal("says that it is of the split test")
    write_sealed_json(path, document | {"group": "train-other"})
    assert again in refusal(f"the evaluation of seed 0 of {a.name} is that of a seed of train-other")
    write_sealed_json(path, document | {"made_with": {"pack": PACK, "source_hash": "t"}})
    assert again in refusal("is of a run made with another state of the source code")
    write_sealed_json(path, document)
    (path.parent / "photos-dev.ranks.npz").write_bytes(b"something else")
    assert again in refusal("is not the file that its evaluation was written with")
    path.unlink()
    assert again in refusal("was not evaluated on photos, dev")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"split": "holdout"}, "there is no split 'holdout'"),
        ({"b": "absent"}, "no run is called 'absent'"),
        ({"data": "../photos"}, "can't be the name of a pack"),
    ],
)
def test_words_that_mean_nothing_are_usage_errors(tmp_path: Path, arguments: dict[str, str], words: str) -> None:
    make_run(tmp_path, [ranks_of(8, 1)])
    with pytest.raises(UsageError, match=words):
        diff(tmp_path, **({"a": "latest", "b": "latest"} | arguments))


def test_runs_of_another_kind_are_refused(tmp_path: Path) -> None:
    make_run(tmp_path, [ranks_of(8, 1)])
    other = finish_group(create_group(tmp_path, "sanity", "", [0], {"pack": PACK}), "finished")
    with pytest.raises(UsageError, match="is a sanity run"):
        diff(tmp_path, "latest", other.name)


# ---- the process ----------------------------------------------------------------------------------------------------


def test_the_command_prints_words_figures_and_its_exit_code(chimera: Any, tmp_path: Path) -> None:
    a = make_run(tmp_path, [ranks_of(4, 1)] * 2, label="a")
    b = make_run(tmp_path, [ranks_of(8, 2)] * 2, label="b", note="\x1b[31m[bold]<b>&")
    done = chimera("slo", "diff", a.name, b.name)
    assert (done.code, done.err) == (0, "")
    assert "\x1b" not in done.out
    assert "[bold]<b>&" in done.out
    assert "B against A on the same 120 images of photos, dev" in done.out
    assert "rsum: B is worse than A by" in done.out
    assert "smallest effect" in done.out
    again = chimera("slo", "diff", a.name, b.name, "--fail-on-regression", "--json", "--split", "validation")
    assert again.code == 3
    assert again.json()["worse"]
    level = chimera("slo", "diff", a.name, a.name, "--fail-on-regression")
    assert level.code == 0
    assert "no difference that 120 images could show" in level.out
    missing = chimera("slo", "diff", a.name, b.name, "--split", "test")
    assert (missing.code, missing.out) == (1, "")
    assert "hint" in missing.err
    assert "Traceback" not in missing.err


def test_the_comparison_starts_without_heavy_libraries(tmp_path: Path) -> None:
    make_run(tmp_path, [ranks_of(4, 1)])
    heavy = ("torch", "timm", "transformers", "mlflow", "pandas", "scipy", "pyarrow")
    script = (
        "import sys\nfrom chimera_cli.__main__ import main\n"
        "sys.argv = ['chimera', 'slo', 'diff', 'latest', 'latest']\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        f"print([name for name in {heavy!r} if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"CHIMERA_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr.splitlines()[-1] == "[]"
