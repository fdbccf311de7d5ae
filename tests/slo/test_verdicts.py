"""Statistics over seeds, rounding and waivers: the rules of a verdict on evidence made by hand."""

from datetime import date
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chimera_cli.slo.evidence import Evidence
from chimera_cli.slo.objectives import Condition, Objective, Waiver
from chimera_cli.slo.verdicts import judge, worst_of

TODAY = date(2030, 1, 1)


def law(**changes: Any) -> Objective:
    condition = {"figure": "i2t_r10", "comparison": ">=", "limit": 0.25, "statistic": "mean"} | changes
    return Objective.model_validate(
        {"id": "one", "title": "one", "kind": "train", "all_of": [condition], "measure": "chimera train full"}
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
        (Evidence(None, missing="nothing there"), "waived", "fail"),
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
