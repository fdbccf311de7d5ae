"""The table of figures: names as the design fixes them, values as people read them."""

import pytest

from chimera_cli.figures import FIGURES, RECALLS, RETRIEVAL, format_seconds, format_spread, format_value, near_names

FIXED = (
    "loader_images_per_s", "gpu_util_mean", "loss_first", "loss_last", "loss_drop", "loss_tail_mean", "wall_s",
    "pairs_per_s", "epoch_10k_pairs_s", "vram_peak_gb", "ram_peak_gb", "i2t_r1", "i2t_r5", "i2t_r10", "i2t_medr",
    "t2i_r1", "t2i_r5", "t2i_r10", "t2i_medr", "rsum",
)  # fmt: skip


def test_every_fixed_name_is_there_once() -> None:
    assert set(FIXED) <= set(FIGURES)
    assert all(name == figure.name for name, figure in FIGURES.items())
    assert len({figure.label for figure in FIGURES.values()}) == len(FIGURES)
    assert set(RECALLS) < set(RETRIEVAL) <= set(FIGURES)


@pytest.mark.parametrize(
    ("names", "better"),
    [
        (("loader_images_per_s", "gpu_util_mean", "loss_drop", "rsum", *RECALLS), "higher"),
        (("wall_s", "epoch_10k_pairs_s", "vram_peak_gb", "ram_peak_gb", "loss_tail_mean", "i2t_medr"), "lower"),
    ],
)
def test_the_better_side_decides_which_end_is_pessimistic(names: tuple[str, ...], better: str) -> None:
    assert {FIGURES[name].better for name in names} == {better}


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("i2t_r1", 0.4166, "41.7 %"),
        ("gpu_util_mean", 1.0, "100.0 %"),
        ("vram_peak_gb", 6.123, "6.12 GiB"),
        ("loss_drop", 0.15, "0.15"),
        ("i2t_medr", 3.0, "3.0"),
        ("rsum", 3.0441, "3.044"),
        ("loader_images_per_s", 12345.6, "12,346 images/s"),
        ("loader_images_per_s", 300.0, "300.0 images/s"),
        ("wall_s", 123.4, "2 min 03 s"),
        ("i2t_r1", None, "–"),
        ("i2t_r1", 0.0, "0.0 %"),
    ],
)
def test_values_read_well_and_zero_is_not_missing(name: str, value: float | None, text: str) -> None:
    assert format_value(name, value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4249, "0.42 s"), (12.34, "12.3 s"), (60, "1 min 00 s"), (119.6, "2 min 00 s"), (3599.7, "1 h 00 min"),
     (10800, "3 h 00 min"), (7384, "2 h 03 min")],
)  # fmt: skip
def test_durations(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


def test_spreads_say_their_n() -> None:
    assert format_spread("i2t_r1", 0.304, 0.0123, 3) == "30.4 ± 1.2 % (n=3)"
    assert format_spread("i2t_r1", 0.304, None, 1) == "30.4 % (n=1)"
    assert format_spread("i2t_r1", None, None, 0) == "–"


def test_near_names_help_with_typing_errors() -> None:
    assert near_names("gpu_util")[0] == "gpu_util_mean"
    assert near_names("i2t_r11")[0] in ("i2t_r1", "i2t_r10")
    assert near_names("zzz") == []
