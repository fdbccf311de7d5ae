"""The short report between two markers: what it says, and that all around it stays byte for byte as it was."""

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chimera_cli.errors import UsageError
from chimera_cli.reporting.brief import BEGIN, END, brief, replace_block
from chimera_cli.reporting.facts import collect
from chimera_cli.reporting.markdown import render_blocks
from chimera_cli.reporting.verdicts import Verdict, Verdicts
from chimera_cli.runs import Group, update_group

BEGIN_BYTES, END_BYTES = BEGIN.encode(), END.encode()
VERDICTS = Verdicts(
    (
        Verdict("epoch", "10,000 pairs", "<= 3 h", "81 s", "pass", "here"),
        Verdict("", "", "and more", "80 s", "", ""),
        Verdict("sanity", "life", ">= 0.15", "–", "unmeasured", ""),
        Verdict("viability", "recall", ">= 25 %", "20 %", "fail", ""),
        Verdict("loader", "speed", ">= 300", "512", "pass", ""),
    ),
    ("profile cpu: peak VRAM allocated left out",),
    "chimera slo check",
    waivers=("viability waived by Ann: a|b, until 2030-01-31",),
)


def test_it_says_recall_verdicts_machine_and_command(
    tmp_path: Path, new_train_group: Callable[..., Group], evaluate: Callable[..., None]
) -> None:
    group = new_train_group(tmp_path)
    for seed in group.seeds[:2]:
        evaluate(group, seed, "test", 0.0)
    lines = render_blocks(brief(collect(tmp_path, group), VERDICTS)).splitlines()
    assert lines[0].startswith(f"Run `{group.name}`: 3 seeds (0, 1, 2) on the pack `flickr8k`, finished ")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| flickr8k")]
    assert rows == [
        [f"flickr8k, {split}", seeds, *(f"{share} ± {deviation} %" for share in shares), rsum]
        for split, seeds, shares, deviation, rsum in (
            ("dev", "3", ("34.0", "64.0", "77.0", "26.0", "56.0", "70.0"), "1.0", "3.270 ± 0.060"),
            ("test", "2", ("33.0", "63.0", "76.0", "25.0", "55.0", "69.0"), "0.0", "3.210 ± 0.000"),
        )
    ]
    assert (
        "Service level objectives: **1 fail** (`viability`); **1 unmeasured** (`sanity`); 2 pass (`epoch`, `loader`). "
        "Profile cpu: peak VRAM allocated left out. "
        "Waiver: viability waived by Ann: a\\|b, until 2030-01-31."
    ) in lines
    assert lines[-1] == (
        "Hardware: Testor \\<b>3000\\</b> \\| 2.5 GHz, 2 cores, no GPU. "
        "Command: `chimera train full --config configs/train/locked.yaml --seeds 0,1,2`"
    )


def test_a_run_that_was_not_evaluated_says_how(tmp_path: Path, new_train_group: Callable[..., Group]) -> None:
    group = new_train_group(tmp_path, seeds=(0,))
    (group.seed_dir(0) / "evaluations" / "flickr8k-dev.json").unlink()
    assert f"Not evaluated: run `chimera eval --run {group.name}`." in render_blocks(
        brief(collect(tmp_path, group), VERDICTS)
    )


def test_names_that_look_like_markers_do_not_end_the_block(
    tmp_path: Path, new_train_group: Callable[..., Group]
) -> None:
    group = update_group(new_train_group(tmp_path), command=f"x\n{END}\n", pack={"name": BEGIN, "fingerprint": "f"})
    block = render_blocks(brief(collect(tmp_path, group), VERDICTS))
    once = replace_block(f"{BEGIN}\n{END}\n".encode(), block, "x")
    assert replace_block(once, block, "x") == once


def test_only_the_block_changes() -> None:
    text = b"a\n  <!-- chimera:report -->  \nold\n\told\n\t<!-- /chimera:report -->\nz"
    assert replace_block(text, "new\nlines\n", "x") == (
        b"a\n  <!-- chimera:report -->  \n\nnew\nlines\n\n\t<!-- /chimera:report -->\nz"
    )


def test_the_block_takes_the_line_ends_of_the_file() -> None:
    text = b"a\r\n<!-- chimera:report -->\r\n<!-- /chimera:report -->"
    assert replace_block(text, "new\nlines\n", "x") == (
        b"a\r\n<!-- chimera:report -->\r\n\r\nnew\r\nlines\r\n\r\n<!-- /chimera:report -->"
    )


@settings(max_examples=60, deadline=None)
@given(before=st.binary(), inside=st.binary(), after=st.binary(), block=st.text(st.characters(codec="utf-8")))
def test_whatever_stands_around_stays_and_twice_is_once(before: bytes, inside: bytes, after: bytes, block: str) -> None:
    head, tail = before + b"\n" + BEGIN_BYTES + b"\n", END_BYTES + b"\n" + after
    once = replace_block(head + inside + b"\n" + tail, block, "x")
    assert once.startswith(head)
    assert once.endswith(tail)
    assert replace_block(once, block, "x") == once


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"a\n{END}\n", f"R has no line {BEGIN}"),
        (f"a\n{BEGIN}\n", f"R has no line {END}"),
        (f"speaks of `{BEGIN}` and `{END}`\n", f"R has no line {BEGIN}"),
        (f"{BEGIN}\n{END}\n\n{BEGIN}\n{END}\n", f"R has {BEGIN} more than once, on lines 1, 4"),
        (f"{BEGIN}\n{END}\n{END}\n", f"R has {END} more than once, on lines 2, 3"),
        (f"\n{END}\n{BEGIN}\n", f"R has {END} on line 2 above {BEGIN} on line 3"),
    ],
)
def test_markers_that_are_missing_double_or_reversed(text: str, message: str) -> None:
    with pytest.raises(UsageError) as raised:
        replace_block(text.encode(), "new\n", "R")
    assert raised.value.message == message
    assert BEGIN in str(raised.value.hint)
