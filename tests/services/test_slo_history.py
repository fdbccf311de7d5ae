"""Past runs before the law: what counts, what is left of the error budget, and how figures moved."""

from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import yaml

from chimera_cli.errors import UsageError
from chimera_cli.runs import Group, create_group, finish_group, update_group, write_sealed_json, write_text
from chimera_cli.services.slo_history import Budget, history

PACK = {"name": "photos", "fingerprint": "f", "source": "table"}
CPU = {"device": "cpu", "cpu": "a processor", "cores": 2, "gpu": None}
FACTS = {"command": "chimera train full --config c.yaml", "pack": PACK, "hardware": CPU, "source_hash": "s"}
LAW: dict[str, Any] = {
    "schema_version": 1,
    "law": False,
    "objectives": [
        {"id": "epoch", "title": "Fast", "kind": "train", "measure": "chimera train full",
         "all_of": [{"figure": "epoch_10k_pairs_s", "comparison": "<=", "limit": 100.0}]},
        {"id": "recall", "title": "Finds", "kind": "train", "split": "dev", "measure": "chimera eval",
         "all_of": [{"figure": "rsum", "comparison": ">=", "limit": 3.0, "statistic": "mean"}]},
        {"id": "sanity", "title": "Lives", "kind": "sanity", "measure": "chimera train sanity", "profiles": ["gpu"],
         "all_of": [{"figure": "loss_drop", "comparison": ">=", "limit": 0.15}]},
    ],
}  # fmt: skip


def make(home: Path, kind: str, figures: Sequence[dict[str, float]], **facts: Any) -> Group:
    group = create_group(home, kind, "", range(len(figures)), FACTS | facts)
    for seed, values in enumerate(figures):
        write_text(group.seed_dir(seed) / "config.yaml", "batch: 8\n")
        document = {"schema_version": 1, "status": "finished", "figures": values, "details": {}}
        write_sealed_json(group.seed_dir(seed) / "result.json", document)
    return finish_group(group, "finished")


def train(home: Path, epoch_s: float, rsum: Sequence[float], day: int, **facts: Any) -> Group:
    """Write a run of a day whose seeds have these recalls; without any it was not evaluated."""
    group = make(home, "train", [{"epoch_10k_pairs_s": epoch_s}] * max(1, len(rsum)), **facts)
    for seed, value in enumerate(rsum):
        document = {"schema_version": 1, "pack": group.facts["pack"], "split": "dev", "images": 9}
        path = group.seed_dir(seed) / "evaluations" / f"{group.facts['pack']['name']}-dev.json"
        write_sealed_json(path, document | {"figures": {"rsum": value}})
    return update_group(group, finished_at=f"2026-01-{day:02d}T00:00:00.000000+00:00")


@pytest.fixture
def law(tmp_path: Path) -> Path:
    path = tmp_path / "law.yaml"
    path.write_text(yaml.safe_dump(LAW))
    return path


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """Five runs, made in another order than they finished in: pass, breach, not evaluated, in doubt, pass."""
    for day, epoch_s, rsum in (
        (2, 120.0, (2.0, 2.2)), (1, 90.0, (3.52, 3.54)), (4, 70.0, (2.9, 3.3)), (3, 80.0, ()), (5, 60.0, (3.8, 3.9)),
    ):  # fmt: skip
        train(tmp_path, epoch_s, rsum, day)
    return tmp_path


def by_id(result: dict[str, Any], name: str) -> dict[str, Any]:
    return next(one for one in result["objectives"] if one["id"] == name)


# ---- what counts ----------------------------------------------------------------------------------------------------


def test_verdicts_pass_rate_and_trend_by_hand(home: Path, law: Path) -> None:
    result = history(home, slo_path=law, profile="cpu", budget=0.5)
    assert [run["finished_at"][8:10] for run in result["runs"]] == ["01", "02", "03", "04", "05"]
    epoch, recall = by_id(result, "epoch"), by_id(result, "recall")
    assert epoch["verdicts"] == ["pass", "fail", "pass", "pass", "pass"]
    assert recall["verdicts"] == ["pass", "fail", "unmeasured", "inconclusive", "pass"]
    # The run that was not evaluated is no event; the one in doubt is met in the mean.
    assert (recall["met"], recall["missed"], recall["unmeasured"], recall["measured"]) == (3, 1, 1, 4)
    assert recall["pass_rate"] == 0.75
    # Half of four may miss, one did: one of two is left.
    assert recall["budget"] == {"share": 0.5, "allowed": 2.0, "remaining": 1.0, "remaining_share": 0.5}
    (trend,) = epoch["figures"]
    assert trend["values"] == [90.0, 120.0, 80.0, 70.0, 60.0]
    assert (trend["first"], trend["last"], trend["change"], trend["direction"]) == (90.0, 60.0, -30.0, "better")
    (moved,) = recall["figures"]
    assert moved["values"] == pytest.approx([3.53, 2.1, None, 3.1, 3.85])
    assert moved["change"] == pytest.approx(0.32)
    assert result["figures"] == {"epoch_10k_pairs_s": 60.0, "rsum": pytest.approx(3.85)}
    assert result["runs"][2]["objectives"]["recall"]["reason"].endswith("was not evaluated on dev")
    assert result["remarks"][0].startswith("not the law")


def test_the_last_runs_alone_and_no_miss_allowed(home: Path, law: Path) -> None:
    result = history(home, last=2, slo_path=law, profile="cpu")
    assert [run["finished_at"][8:10] for run in result["runs"]] == ["04", "05"]
    whole = by_id(history(home, slo_path=law, profile="cpu"), "epoch")
    assert whole["budget"] == {"share": 0.0, "allowed": 0.0, "remaining": -1.0, "remaining_share": None}


@pytest.mark.parametrize(
    ("budget", "rate", "allowed", "remaining", "share"),
    [
        (Budget(0.1, 20, 0), 1.0, 2.0, 2.0, 1.0),
        (Budget(0.1, 19, 1), 0.95, 2.0, 1.0, 0.5),
        (Budget(0.1, 17, 3), 0.85, 2.0, -1.0, -0.5),
        (Budget(0.1, 2, 1), 2 / 3, 0.3, -0.7, -0.7 / 0.3),
        (Budget(0.0, 3, 0), 1.0, 0.0, 0.0, None),
        (Budget(0.1, 0, 0), None, 0.0, 0.0, None),
    ],
)
def test_error_budgets_by_hand(
    budget: Budget, rate: float | None, allowed: float, remaining: float, share: float | None
) -> None:
    assert budget.pass_rate == (None if rate is None else pytest.approx(rate))
    assert (budget.allowed, budget.remaining) == pytest.approx((allowed, remaining))
    assert budget.remaining_share == (None if share is None else pytest.approx(share))


def test_a_waived_breach_still_spends_the_budget(home: Path, law: Path) -> None:
    waiver = {"objective": "epoch", "owner": "ada", "reason": "new disk is on its way", "expires": "2026-03-01"}
    law.write_text(yaml.safe_dump(LAW | {"waivers": [waiver]}))
    epoch = by_id(history(home, slo_path=law, profile="cpu", today=date(2026, 2, 1)), "epoch")
    assert epoch["verdicts"][1] == "waived"
    assert (epoch["met"], epoch["missed"]) == (4, 1)


def test_one_proof_of_life_for_all_runs_is_counted_as_one_measurement(home: Path, law: Path) -> None:
    make(home, "sanity", [{"loss_drop": 1.0}])
    result = history(home, slo_path=law)
    sanity = by_id(result, "sanity")
    assert (sanity["met"], sanity["evidence_runs"]) == (5, 1)
    assert by_id(result, "epoch")["evidence_runs"] == 5
    assert sanity["figures"][0]["direction"] == "unchanged"


def test_runs_at_work_or_broken_off_and_other_packs_are_left_out(home: Path, law: Path) -> None:
    create_group(home, "train", "", [0], FACTS)
    finish_group(create_group(home, "train", "", [0], FACTS), "failed")
    train(home, 99.0, (), 6, pack=PACK | {"name": "drawings"})
    assert len(history(home, slo_path=law, profile="cpu")["runs"]) == 6
    alone = history(home, slo_path=law, profile="cpu", data="drawings")
    assert [run["pack"] for run in alone["runs"]] == ["drawings"]
    assert by_id(alone, "epoch")["figures"][0]["change"] is None


def test_a_damaged_run_hides_no_other(home: Path, law: Path) -> None:
    newest = history(home, slo_path=law, profile="cpu")["runs"][-1]["run"]
    (home / "runs" / newest / "seed-0" / "result.json").write_text('{"schema_ver')
    result = history(home, slo_path=law, profile="cpu")
    assert by_id(result, "epoch")["verdicts"] == ["pass", "fail", "pass", "pass", "unmeasured"]
    assert "not valid JSON" in result["runs"][-1]["objectives"]["epoch"]["reason"]


def test_no_run_a_wrong_profile_or_file_is_a_usage_error(home: Path, law: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no finished train run on drawings") as raised:
        history(home, slo_path=law, data="drawings")
    assert raised.value.hint == "there are runs on photos"
    with pytest.raises(UsageError, match="no finished train run below"):
        history(tmp_path / "empty", slo_path=law)
    with pytest.raises(UsageError, match="no profile 'tpu'"):
        history(home, slo_path=law, profile="tpu")
    with pytest.raises(UsageError, match=r"absent.yaml does not exist"):
        history(home, slo_path=tmp_path / "absent.yaml")


# ---- the process ----------------------------------------------------------------------------------------------------


def test_the_command_prints_verdicts_budget_and_reasons(chimera: Any, home: Path, law: Path) -> None:
    options = ("--slo", str(law), "--profile", "cpu", "--budget", "0.5")
    done = chimera("slo", "history", *options, home=home)
    assert (done.code, done.err) == (0, "")
    assert done.out.startswith("not the law")
    assert "✓✗·~✓" in done.out
    assert "3 of 4, 75 %" in done.out
    assert "1 run, 50 %" in done.out
    assert "-30.0 s" in done.out
    as_json = chimera("slo", "history", *options, "--last", "1", "--json", home=home).json()
    assert len(as_json["runs"]) == 1
    for arguments in (("--last", "0"), ("--budget", "1.5"), ("--data", "[red]none\x1b[31m")):
        wrong = chimera("slo", "history", *options, *arguments, home=home)
        assert (wrong.code, wrong.out) == (2, "")
        assert "Traceback" not in wrong.err
        assert "\x1b" not in wrong.err
