"""Training shows one cached view of an image at a time, never the mirrored one where a caption names a side."""

import numpy as np
import torch

from chimera_cli.training.augment import noisy_rows
from chimera_cli.training.batches import Place


def shown(views: int, may_flip: torch.Tensor) -> list[set[int]]:
    """Return which views of each of three images are shown in 60 epochs."""
    numbered = torch.arange(views).float().repeat(3, 1).unsqueeze(2)
    rows = noisy_rows(numbered, 0, 0.0, may_flip)
    seen: list[set[int]] = [set(), set(), set()]
    for epoch in range(60):
        for image, value in enumerate(rows(np.arange(3), Place(epoch, 0, 3))):
            seen[image].add(int(value))
    return seen


def test_all_views_are_shown_but_the_mirrored_one_of_an_image_with_sides() -> None:
    assert shown(4, torch.tensor([True, False, True])) == [{0, 1, 2, 3}, {0, 2, 3}, {0, 1, 2, 3}]
    assert shown(2, torch.tensor([True, False, True])) == [{0, 1}, {0}, {0, 1}]


def test_views_on_disk_are_not_read_to_the_end_without_noise() -> None:
    class Counting:
        """Views that refuse to be looked at as a whole."""

        shape = (3, 1, 2)
        device = torch.device("cpu")

        def __getitem__(self, index: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
            return torch.zeros(len(index[0]), 2)

    rows = noisy_rows(Counting(), 0, 0.0)  # type: ignore[arg-type]
    assert rows(np.array([2, 0]), Place(0, 0, 2)).shape == (2, 2)
