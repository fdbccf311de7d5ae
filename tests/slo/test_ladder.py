"""The ladder against the published percentages, and where a run stands on it."""

import pytest

from chimera_cli.figures import RECALLS
from chimera_cli.slo.ladder import LADDER, comparable, gaps, next_rung


def test_rungs_are_as_published() -> None:
    percent = {
        rung.id: [round(100 * rung.figures[name], 4) for name in RECALLS if name in rung.figures] for rung in LADDER
    }
    assert percent == {
        "chance": [0.1, 0.5, 1.0, 0.1, 0.5, 1.0],
        "law": [5.0, 25.0, 5.0, 25.0],
        "cca": [22.6, 48.8, 61.2, 19.1, 45.3, 60.4],
        "mini-clip": [23.4, 50.8, 64.2, 17.3, 43.1, 56.9],
        "clip": [68.2, 88.4, 94.6, 51.1, 77.9, 86.4],
    }


def test_the_next_rung_is_the_lowest_not_reached_in_every_figure() -> None:
    def standing(value: float) -> str | None:
        rung = next_rung(dict.fromkeys(RECALLS, value))
        return None if rung is None else rung.id

    assert [standing(value) for value in (0.0, 0.02, 0.3, 0.65, 0.9, 0.99)] == [
        "chance", "law", "cca", "clip", "clip", None,
    ]  # fmt: skip
    # A figure that was not measured reaches nothing.
    missing = next_rung({"i2t_r1": 1.0})
    assert missing is not None
    assert missing.id == "chance"


def test_gaps_are_signed_and_only_where_the_rung_has_a_figure() -> None:
    law = next(rung for rung in LADDER if rung.id == "law")
    assert gaps(law, {"i2t_r1": 0.06, "i2t_r5": 0.5, "i2t_r10": 0.2}) == pytest.approx(
        {"i2t_r1": 0.01, "i2t_r10": -0.05}
    )


@pytest.mark.parametrize(
    ("where", "may"),
    [(("flickr8k", "test", 1000), True), (("flickr8k", "dev", 1000), False), (("toy", "test", 1000), False),
     (("flickr8k", "test", 100), False)],
)  # fmt: skip
def test_only_the_whole_test_split_of_flickr8k_compares(where: tuple[str, str, int], may: bool) -> None:
    assert comparable(*where) is may
