"""Order and batches: exact permutations, exact pixels, and no thread that outlives its batches."""

import threading

import numpy as np
import pytest

from chimera_cli.data.loader import epoch_order, gather, image_batches

IMAGES = np.arange(23 * 2 * 2 * 3, dtype=np.uint8).reshape(23, 2, 2, 3)


def test_an_epoch_is_a_permutation_that_seed_and_epoch_fix() -> None:
    order = epoch_order(100, 3, 7)
    assert order.dtype == np.int64
    assert sorted(order.tolist()) == list(range(100))
    assert (order == epoch_order(100, 3, 7)).all()
    assert (order != epoch_order(100, 3, 8)).any()
    assert (order != epoch_order(100, 4, 7)).any()
    assert epoch_order(8, 0, 0).tolist() == [2, 4, 3, 6, 5, 0, 1, 7]


def test_ranks_share_an_epoch_and_make_the_same_batches() -> None:
    whole = epoch_order(103, 0, 1)
    shares = [epoch_order(103, 0, 1, rank, 4) for rank in range(4)]
    assert sorted(np.concatenate(shares).tolist()) == list(range(103))
    assert {len(share) for share in shares} == {25, 26}
    second = np.concatenate([share[5:10] for share in shares])
    assert sorted(second.tolist()) == sorted(whole[20:40].tolist())
    with pytest.raises(ValueError, match="rank 4"):
        epoch_order(10, 0, 0, 4, 4)


def test_gather_copies_into_the_front_of_the_buffer() -> None:
    buffer = np.zeros((4, 2, 2, 3), dtype=np.uint8)
    part = gather(IMAGES, np.array([5, 0, 22]), buffer)
    assert part.base is buffer
    assert (part == IMAGES[[5, 0, 22]]).all()
    assert not buffer[3].any()
    for wrong in ([23], [-1]):
        with pytest.raises(IndexError):
            gather(IMAGES, np.array(wrong), buffer)


@pytest.mark.parametrize(("batch", "prefetch"), [(1, 2), (5, 0), (5, 2), (23, 3), (50, 2)])
def test_batches_are_the_images_in_order(batch: int, prefetch: int) -> None:
    indices = epoch_order(23, 0, 0)
    # A batch is valid until the next one: whoever keeps it copies it.
    batches = [part.copy() for part in image_batches(IMAGES, indices, batch, prefetch)]
    assert [len(part) for part in batches] == [batch] * (23 // batch) + ([23 % batch] if 23 % batch else [])
    assert (np.concatenate(batches) == IMAGES[indices]).all()
    assert loader_threads() == []


def test_no_images_are_no_batches() -> None:
    assert list(image_batches(IMAGES, np.array([], dtype=np.int64), 4)) == []


def test_a_batch_stays_as_it_is_until_the_next_is_asked_for() -> None:
    stream = image_batches(IMAGES, np.arange(23), 2)
    for start, part in zip(range(0, 22, 2), stream, strict=False):
        threading.Event().wait(0.002)  # long enough for the thread to fill every buffer that it may fill
        assert (part == IMAGES[start : start + 2]).all()
    stream.close()  # type: ignore[attr-defined]


def test_the_thread_ends_with_a_consumer_that_stops_or_raises() -> None:
    stream = image_batches(IMAGES, np.arange(23), 2)
    next(stream)
    assert len(loader_threads()) == 1
    stream.close()  # type: ignore[attr-defined]
    assert loader_threads() == []

    def consume() -> None:
        for _ in image_batches(IMAGES, np.arange(23), 2):
            raise RuntimeError("the consumer fails")

    with pytest.raises(RuntimeError, match="the consumer fails"):
        consume()
    assert loader_threads() == []


def test_what_fails_in_the_thread_is_raised_here() -> None:
    with pytest.raises(IndexError, match=r"0\.\.22"):
        list(image_batches(IMAGES, np.array([0, 1, 99]), 2))
    assert loader_threads() == []


def loader_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "loader"]
