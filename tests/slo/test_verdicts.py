"""Statistics over seeds, rounding and waivers: the rules of a verdict on evidence made by hand."""

from datetime import date
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chimera_cli.slo.evidence import Evidence
from chimera_cli.slo.objectives import Condition, Objective, Waiver
from chimera_cli.slo.verdicts import judge, worst_of
from chimera_cli.slo.words import interval_words, sources, waiver_facts

TODAY = date(2030, 1, 1)


def law(**changes: Any) -> Objective:
    condition = {"figure": "i2t_r10", "comparison": ">=", "limit": 0.25, "statistic": "mean"} | changes
    return Objective.model_validate(
        {"id": "one", "title": "one", "kind": "train", "all_of": [condition], "measure": "chimera train full"}
        | {"seeds_at_least": 2 if condition["statistic"] == "bound95" else 1}
    )


def seen(*values: float | None, **more: tuple[float | None, ...]) -> Evidence:
    return Evidence(None, ("a file",), tuple(range(len(values))), {"i2t_r10": values, **more})


def word(evidence: Evidence, **changes: Any) -> str:
    return judge(law(**changes), evidence, None, TODAY).word


def test_the_mean_passes_only_with_its_interval() -> None:
    # Half width of the 95 % interval of three values: 4.3027 * std / sqrt(3).
    assert word(seen(0.30, 0.31, 0.32)) == "pass"  # 0.31 - 0.0248
    assert word(seen(0.20, 0.25, 0.31)) == "inconclusive"
    assert word(seen(0.20, 0.25, 0.29)) == "fail"  # the mean itself misses
    assert word(seen(0.26)) == "pass"  # one value has no interval
    assert word(seen(0.24)) == "fail"


def test_an_interval_without_spread_lies_on_its_mean() -> None:
    assert word(seen(0.25, 0.25, 0.25)) == "pass"
    assert word(seen(0.25, 0.25, 0.25), statistic="bound95") == "pass"
    assert word(seen(0.25, 0.25, 0.25), comparison=">") == "fail"
    assert word(seen(0.24, 0.25, 0.26)) == "inconclusive"  # the mean is on the limit, its interval is not


def test_each_statistic_judges_its_own_number() -> None:
    # mean 2, std 1, 95 % interval 2 -+ 4.3027 / sqrt(3) = -0.4841 to 4.4841
    times = Evidence(None, ("a", "b", "c"), (4, 5, 6), {"wall_s": (1.0, 2.0, 3.0)})
    expected = {"mean": (2.0, "inconclusive"), "worst": (3.0, "pass"), "bound95": (4.4841, "fail")}
    for statistic, (value, verdict) in expected.items():
        objective = law(figure="wall_s", comparison="<=", limit=3, statistic=statistic)
        finding = judge(objective, times, None, TODAY).findings[0]
        assert (finding.value, finding.word) == (pytest.approx(value, abs=1e-4), verdict)
        assert finding.margin == pytest.approx(3 - value, abs=1e-4)
        assert finding.interval == pytest.approx((-0.4841, 4.4841), abs=1e-4)
        assert interval_words(finding) == "-0.48 to 4.48 s"
        assert sources(times, "wall_s") == []
    alone = judge(law(), seen(0.3), None, TODAY).findings[0]
    assert (alone.word, alone.interval, interval_words(alone)) == ("pass", None, "–")


def test_worst_and_bound_look_at_the_pessimistic_end() -> None:
    assert word(seen(0.24, 0.40, 0.40), statistic="worst") == "fail"
    assert word(seen(0.25, 0.40, 0.40), statistic="worst") == "pass"
    assert word(seen(0.30, 0.31, 0.32), statistic="bound95") == "pass"
    assert word(seen(0.20, 0.25, 0.31), statistic="bound95") == "fail"
    assert word(seen(0.30), statistic="bound95") == "unmeasured"
    down = {"figure": "wall_s", "comparison": "<=", "limit": 10}
    times = Evidence(None, ("a file",), (0, 1, 2), {"wall_s": (9.0, 9.5, 10.5)})
    assert word(times, **down, statistic="worst") == "fail"
    assert word(times, **down, statistic="mean") == "inconclusive"


def test_rounding_alone_breaches_nothing() -> None:
    assert sum((0.1, 0.2)) > 0.3
    assert word(seen(0.1 + 0.2), comparison=">=", limit=0.3) == "pass"
    drop = Evidence(None, ("a file",), (0,), {"loss_drop": (3.6 - 3.45,)})
    assert word(drop, figure="loss_drop", limit=0.15) == "pass"
    assert word(drop, figure="loss_drop", limit=0.15, comparison=">") == "fail"
    assert word(seen(0.25 - 1e-6)) == "fail"


def test_a_relative_limit_is_held_seed_by_seed() -> None:
    changes = {"figure": "loss_tail_mean", "comparison": "<=", "relative_to": "chance_loss", "limit": -0.15}
    figures = {"loss_tail_mean": (3.0, 3.9), "chance_loss": (3.4, 4.1)}
    evidence = Evidence(None, ("a file",), (0, 1), figures)
    verdict = judge(law(**changes, statistic="worst"), evidence, None, TODAY)
    assert verdict.word == "pass"
    assert verdict.findings[0].margin == pytest.approx(0.05)  # 4.1 - 0.15 - 3.9
    far = Evidence(None, ("a file",), (0, 1), figures | {"chance_loss": (3.4, 4.0)})
    assert word(far, **changes, statistic="worst") == "fail"
    assert word(Evidence(None, ("a file",), (0,), {"loss_tail_mean": (3.0,)}), **changes) == "unmeasured"


def test_one_missing_seed_leaves_a_figure_unmeasured() -> None:
    assert word(seen(0.9, None, 0.9)) == "unmeasured"
    assert word(Evidence(None, missing="nothing there")) == "unmeasured"


@pytest.mark.parametrize(
    ("words", "worst"),
    [(["pass", "inconclusive"], "inconclusive"), (["unmeasured", "fail", "pass"], "fail"), ([], "unmeasured")],
)
def test_the_gravest_word_wins(words: list[Any], worst: str) -> None:
    assert worst_of(words) == worst


@pytest.mark.parametrize(
    ("evidence", "in_force", "expired"),
    [
        (seen(0.1), "waived", "fail"),
        # Missing evidence never reads as a pass: nobody can answer for what is not known.
        (Evidence(None, missing="nothing there"), "unmeasured", "fail"),
        (seen(0.9, None), "unmeasured", "fail"),
        (seen(0.20, 0.25, 0.31), "waived", "fail"),
        (seen(0.9), "pass", "pass"),
    ],
)
def test_waivers_excuse_for_a_while(evidence: Evidence, in_force: str, expired: str) -> None:
    waiver = Waiver(objective="one", owner="an owner", reason="a reason", expires=TODAY)
    held = judge(law(), evidence, waiver, TODAY)
    assert held.word == in_force
    assert "an owner: a reason" in held.reason
    assert judge(law(), evidence, waiver, date(2030, 1, 2)).word == expired


def two(**bound: Any) -> tuple[Objective, Waiver]:
    """An objective with two conditions, R@10 >= 0.25 and R@1 >= 0.05, and a waiver of it."""
    conditions = [
        {"figure": figure, "comparison": ">=", "limit": limit, "statistic": "mean"}
        for figure, limit in (("i2t_r10", 0.25), ("i2t_r1", 0.05))
    ]
    objective = {"id": "one", "title": "one", "kind": "train", "all_of": conditions, "measure": "chimera train full"}
    waiver = {"objective": "one", "owner": "an owner", "reason": "a reason", "expires": TODAY, **bound}
    return Objective.model_validate(objective), Waiver.model_validate(waiver)


@pytest.mark.parametrize(
    ("r10", "r1", "bound", "word", "state"),
    [
        (0.20, 0.06, None, "waived", "in force"),
        (0.20, 0.06, {"i2t_r10": 0.2}, "waived", "in force"),
        (0.19, 0.06, {"i2t_r10": 0.2}, "fail", "beyond its bound"),
        (0.22, 0.04, {"i2t_r10": 0.2}, "fail", "beyond its bound"),
        (0.22, 0.04, {"i2t_r10": 0.2, "i2t_r1": 0.03}, "waived", "in force"),
        (0.26, 0.06, {"i2t_r10": 0.2}, "pass", "not needed"),
        (0.22, None, {"i2t_r10": 0.2}, "unmeasured", "no evidence"),
        (0.19, None, {"i2t_r10": 0.2}, "fail", "beyond its bound"),
    ],
)
def test_a_bounded_waiver_holds_down_to_its_bound(
    r10: float, r1: float | None, bound: dict[str, float] | None, word: str, state: str
) -> None:
    objective, waiver = two(bound=bound)
    evidence = Evidence(None, ("a file",), (0,), {"i2t_r10": (r10,), "i2t_r1": (r1,)})
    found = judge(objective, evidence, waiver, TODAY)
    assert (found.word, found.waiver_state) == (word, state)


def test_what_a_waiver_does_is_told_with_owner_reason_date_days_and_bound() -> None:
    objective, waiver = two(bound={"i2t_r10": 0.2, "i2t_r1": 0.03})
    evidence = Evidence(None, ("a file",), (0,), {"i2t_r10": (0.19,), "i2t_r1": (0.06,)})
    early = date(2029, 12, 20)
    beyond = judge(objective, evidence, waiver, early)
    uncovered = "does not cover image to text R@10 beyond 20.0 %"
    assert beyond.reason == f"fail (i2t_r10 misses its limit); the waiver by an owner: a reason {uncovered}"
    assert waiver_facts(waiver, beyond, early) == {
        "objective": "one", "owner": "an owner", "reason": "a reason", "expires": "2030-01-01", "days_left": 12,
        "bound": {"i2t_r10": 0.2, "i2t_r1": 0.03}, "state": "beyond its bound",
        "words": "one, by an owner: a reason; until 2030-01-01 (12 days left), no worse than "
        "image to text R@10 20.0 %, image to text R@1 3.0 %; beyond its bound",
    }  # fmt: skip
    days = {date(2029, 12, 31): "1 day left", TODAY: "the last day", date(2030, 1, 2): "yesterday",
            date(2030, 1, 4): "3 days ago"}  # fmt: skip
    for today, words in days.items():
        assert f"({words})" in waiver_facts(waiver, judge(objective, evidence, waiver, today), today)["words"]
    expired = judge(objective, evidence, waiver, date(2030, 1, 2))
    assert expired.reason.endswith("the waiver by an owner: a reason expired on 2030-01-01")
    assert waiver_facts(waiver, None, TODAY)["state"] == "not judged under this profile"


@given(
    st.lists(st.floats(0, 1), min_size=1, max_size=6),
    st.sampled_from(["mean", "worst", "bound95"]),
    st.floats(0.001, 0.5),
)
def test_better_figures_never_make_a_verdict_worse(values: list[float], statistic: str, gain: float) -> None:
    order = ["pass", "inconclusive", "unmeasured", "fail"]
    before = word(seen(*values), statistic=statistic)
    after = word(seen(*(value + gain for value in values)), statistic=statistic)
    assert order.index(after) <= order.index(before)


def test_conditions_that_reward_the_worse_side_are_refused() -> None:
    with pytest.raises(ValueError, match="worse side"):
        Condition(figure="vram_peak_gb", comparison=">=", limit=7.5)
