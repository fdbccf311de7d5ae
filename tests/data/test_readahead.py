"""Reading ahead: the items stay what they are, the images of those to come are touched, and the threads end."""

import threading
from typing import Any

import numpy as np
from numpy.typing import NDArray

from chimera_cli.data.readahead import read_ahead

ORDER = [np.array([4, 1, 2]), np.array([0, 3]), np.array([5, 6, 7, 8])]


class Touched(np.ndarray):  # type: ignore[type-arg]
    """An array that notes which images were asked for."""

    seen: list[int]
    all_seen: threading.Event

    def __getitem__(self, index: Any) -> Any:
        self.seen.append(int(index))
        if len(self.seen) == len(self):
            self.all_seen.set()
        return np.asarray(self)[index]


def images() -> Touched:
    array: NDArray[np.uint8] = np.arange(9 * 12, dtype=np.uint8).reshape(9, 2, 2, 3)
    touched = array.view(Touched)
    touched.seen, touched.all_seen = [], threading.Event()
    return touched


def test_all_images_of_the_order_are_read_and_items_pass_unchanged() -> None:
    pack = images()
    items = read_ahead(iter("abc"), pack, iter(ORDER), threads=2)
    assert next(items) == "a"
    assert pack.all_seen.wait(60)
    assert list(items) == ["b", "c"]
    assert sorted(pack.seen) == list(range(9))


def test_no_more_than_the_depth_is_read_and_the_threads_end_with_the_iterator() -> None:
    pack = images()
    items = read_ahead(iter("abc"), pack, iter(ORDER), threads=1, depth=1)
    assert next(items) == "a"
    items.close()
    assert set(pack.seen) <= {4, 1, 2}
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("read-ahead")]


def test_an_endless_consumer_outlives_the_order() -> None:
    assert list(read_ahead(iter(range(7)), images(), iter(ORDER[:1]), threads=3)) == list(range(7))
