"""Ranks on disk: they come back as they were, and a file that is another one is noticed."""

from pathlib import Path

import numpy as np
import pytest

from chimera_cli.errors import ChimeraError
from chimera_cli.evaluation.rank_files import read_ranks, write_ranks
from chimera_cli.evaluation.retrieval import Ranks

RANKS = Ranks(np.array([1, 0, 300_000]), np.array([2, 1, 5, 9]), np.array([2, 2, 0, 2]))


def test_ranks_come_back_and_the_same_ranks_make_the_same_file(tmp_path: Path) -> None:
    path = tmp_path / "new" / "p-dev.ranks.npz"
    digest = write_ranks(path, RANKS)
    again = read_ranks(path, digest, "")
    for name in ("i2t", "t2i", "image_of_text"):
        assert getattr(again, name).tolist() == getattr(RANKS, name).tolist()
        assert getattr(again, name).dtype == np.int64
    assert write_ranks(path, RANKS) == digest
    assert [one.name for one in path.parent.iterdir()] == [path.name]


def test_another_or_no_file_names_the_command_that_makes_it_anew(tmp_path: Path) -> None:
    path = tmp_path / "p-dev.ranks.npz"
    digest = write_ranks(path, RANKS)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ChimeraError, match="is not the file that its evaluation was written with") as raised:
        read_ranks(path, digest, "chimera eval --run x")
    assert raised.value.hint == "evaluate again: chimera eval --run x"
    path.unlink()
    with pytest.raises(ChimeraError, match="does not exist"):
        read_ranks(path, digest, "chimera eval --run x")


def test_a_folder_that_can_not_be_written_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ChimeraError, match="can't be written"):
        write_ranks(tmp_path / "file" / "p-dev.ranks.npz", RANKS)
