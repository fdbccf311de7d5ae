"""Order and batches: exact permutations, exact pixels, and no thread that outlives its batches."""

import mmap
import subprocess
import sys
import threading
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from chimera_cli.data import loader
from chimera_cli.data.loader import ahead, empty_buffer, epoch_order, gather, image_batches, to_device

IMAGES = np.arange(23 * 2 * 2 * 3, dtype=np.uint8).reshape(23, 2, 2, 3)
CPU = torch.device("cpu")


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


def test_buffers_start_on_a_page() -> None:
    for shape in ((3, 5, 5, 3), (1, 1, 1, 3), (0, 4, 4, 3)):
        buffer = empty_buffer(shape)
        assert buffer.shape == shape
        assert buffer.dtype == np.uint8
        assert buffer.ctypes.data % mmap.PAGESIZE == 0 or not buffer.size
        buffer[:] = 7


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_gather_copies_into_the_front_of_the_buffer(threads: int) -> None:
    buffer = np.zeros((4, 2, 2, 3), dtype=np.uint8)
    part = gather(IMAGES, np.array([5, 0, 22]), buffer, threads)
    assert part.base is buffer
    assert (part == IMAGES[[5, 0, 22]]).all()
    assert not buffer[3].any()
    for wrong in ([23], [-1]):
        with pytest.raises(IndexError):
            gather(IMAGES, np.array(wrong), buffer, threads)


@pytest.mark.parametrize(("batch", "prefetch", "threads"), [(1, 2, 1), (5, 0, 2), (5, 2, 2), (23, 3, 1), (50, 2, 1)])
def test_batches_are_the_images_in_order(batch: int, prefetch: int, threads: int) -> None:
    indices = epoch_order(23, 0, 0)
    # A batch is valid until the next one: whoever keeps it copies it.
    batches = [part.copy() for part in image_batches(IMAGES, indices, batch, prefetch, threads=threads)]
    assert [len(part) for part in batches] == [batch] * (23 // batch) + ([23 % batch] if 23 % batch else [])
    assert (np.concatenate(batches) == IMAGES[indices]).all()
    assert loader_threads() == []


def test_batches_begin_anywhere() -> None:
    indices = epoch_order(23, 0, 0)
    whole = [part.copy() for part in image_batches(IMAGES, indices, 5)]
    for start in range(7):
        rest = [part.copy() for part in image_batches(IMAGES, indices, 5, start=start, pinned=True)]
        assert len(rest) == max(0, 5 - start)
        assert all((a == b).all() for a, b in zip(rest, whole[start:], strict=True))
    for wrong, word in (({"batch": 0}, "not positive"), ({"batch": 1, "start": -1}, "negative")):
        with pytest.raises(ValueError, match=word):
            next(image_batches(IMAGES, indices, **wrong))


def test_no_images_are_no_batches() -> None:
    assert list(image_batches(IMAGES, np.array([], dtype=np.int64), 4)) == []


def test_a_batch_stays_as_it_is_until_the_next_is_asked_for() -> None:
    stream = image_batches(IMAGES, np.arange(23), 2)
    for start, part in zip(range(0, 22, 2), stream, strict=False):
        threading.Event().wait(0.002)  # long enough for the thread to fill every buffer that it may fill
        assert (part == IMAGES[start : start + 2]).all()
    stream.close()


def test_the_thread_ends_with_a_consumer_that_stops_or_raises() -> None:
    stream = image_batches(IMAGES, np.arange(23), 2)
    next(stream)
    assert len(loader_threads()) == 1
    stream.close()
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


class Counted:
    """Counts 0, 1, 2 ... and knows how many it has given, and whether it was closed."""

    def __init__(self) -> None:
        self.made = 0
        self.closed = False

    def items(self) -> Iterator[int]:
        try:
            while True:
                self.made += 1
                yield self.made - 1
        finally:
            self.closed = True


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_no_more_is_made_ahead_than_asked_for(depth: int) -> None:
    counted = Counted()
    stream = ahead(counted.items(), depth)
    assert counted.made == 0
    for asked in range(1, 5):
        assert next(stream) == asked - 1
        for _ in range(200):
            if counted.made == asked + depth:
                break
            threading.Event().wait(0.005)
        assert counted.made == asked + depth
    threading.Event().wait(0.01)
    assert counted.made == 4 + depth
    stream.close()
    assert counted.closed or depth == 0
    assert loader_threads() == []


def test_a_process_ends_while_a_thread_makes_items() -> None:
    code = """
import torch
from chimera_cli.data.loader import ahead
def items():
    while True:
        yield torch.rand(1000, 1000) @ torch.rand(1000, 1000)
stream = ahead(items(), 2)
next(stream)
print("done")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")


def test_a_buffer_waits_for_its_copy_to_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for the GPU: the copy of a batch ends only when somebody waits for its event."""
    waited: list[int] = []

    class Copy:
        def __init__(self, pixels: np.ndarray) -> None:
            self.pixels, self.before = pixels, pixels.copy()

        def synchronize(self) -> None:
            # What the copy reads is still what was yielded: nothing has been gathered into the buffer yet.
            assert (self.pixels == self.before).all()
            waited.append(int(self.before[0, 0, 0, 0]))

    for start, part in enumerate(image_batches(IMAGES, np.arange(23), 2, prefetch=1)):
        assert part[0, 0, 0, 0] == 24 * start % 256
        monkeypatch.setitem(loader._copies, part.ctypes.data, Copy(part))  # type: ignore[arg-type]
    # One after the other as their buffers come round again, the last two when the iterator ends.
    assert sorted(waited) == sorted(24 * start % 256 for start in range(12))
    assert loader._copies == {}


def test_on_the_cpu_a_tensor_shares_the_batch() -> None:
    batch = IMAGES[:3].copy()
    assert to_device(batch, CPU).numpy().ctypes.data == batch.ctypes.data
    batch.flags.writeable = False
    assert (to_device(batch, CPU).numpy() == batch).all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_batches_arrive_whole() -> None:
    device = torch.device("cuda")
    images = np.random.default_rng(0).integers(0, 256, (200, 64, 64, 3), dtype=np.uint8)
    batches = [to_device(part, device) for part in image_batches(images, np.arange(200), 16, pinned=True)]
    assert (torch.cat(batches).cpu().numpy() == images).all()
    assert loader._copies == {}


def loader_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "loader"]
