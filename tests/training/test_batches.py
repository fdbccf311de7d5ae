"""What the trainer is given: every image once per epoch, one of its own captions, decided by seed and epoch."""

import itertools
import threading
from collections.abc import Generator
from contextlib import closing
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from chimera_cli.data.augmentation import Augmentation
from chimera_cli.data.loader import epoch_order
from chimera_cli.training.augment import augmented_pixels, noisy_rows
from chimera_cli.training.batches import PairBatch, Place, _repeated, pair_batches, pair_order
from chimera_cli.training.optimiser import build_schedule

CAPTIONS = [np.arange(5 * image, 5 * image + 5) for image in range(103)]


def test_every_image_once_with_a_caption_of_its_own() -> None:
    pairs = list(pair_order(CAPTIONS, batch=25, seed=3, epoch=0))
    positions = np.concatenate([part for part, _ in pairs])
    rows = np.concatenate([rows for _, rows in pairs])
    assert sorted(positions) == list(range(103))
    assert (rows // 5 == positions).all()
    assert {len(part) for part, _ in pairs} <= {25, 26}


def test_seed_and_epoch_decide_and_both_matter() -> None:
    def rows(seed: int, epoch: int) -> list[int]:
        return np.concatenate([rows for _, rows in pair_order(CAPTIONS, 25, seed, epoch)]).tolist()

    assert rows(1, 0) == rows(1, 0)
    assert rows(1, 0) != rows(2, 0)
    assert rows(1, 0) != rows(1, 1)


def test_an_image_stands_in_its_batch_with_as_many_captions_as_asked() -> None:
    # The first image has but two captions: all of them are there before one is there again.
    captions = [np.array([0, 1]), *CAPTIONS[1:]]
    batches = list(pair_order(captions, batch=60, seed=3, epoch=0, captions_per_image=3))
    assert [len(rows) for _, rows in batches] == [63, 63, 63, 60, 60]
    seen: dict[int, list[int]] = {}
    for positions, rows in batches:
        assert (positions[0::3] == positions[1::3]).all()
        assert (positions[0::3] == positions[2::3]).all()
        for position, row in zip(positions.tolist(), rows.tolist(), strict=True):
            seen.setdefault(position, []).append(row)
    assert sorted(seen) == list(range(103))
    assert sorted(seen.pop(0)) in ([0, 0, 1], [0, 1, 1])
    for position, rows in seen.items():
        assert len(set(rows)) == 3
        assert {row // 5 for row in rows} == {position}


def test_all_captions_of_an_image_are_one_epoch() -> None:
    batches = pair_order(CAPTIONS, batch=100, seed=0, epoch=0, captions_per_image=5)
    assert sorted(int(row) for _, rows in batches for row in rows) == list(range(515))


def test_over_many_epochs_every_caption_is_drawn() -> None:
    seen = {int(row) for epoch in range(60) for _, rows in pair_order(CAPTIONS[:4], 4, 0, epoch) for row in rows}
    assert seen == set(range(20))


@pytest.mark.parametrize("each", [1, 3])
@pytest.mark.parametrize(("images", "batch", "world"), [(103, 25, 4), (103, 24, 5), (30, 7, 3), (8, 8, 2), (5, 8, 2)])
def test_processes_share_the_batches_of_one(images: int, batch: int, world: int, each: int) -> None:
    captions = CAPTIONS[:images]
    single = list(pair_order(captions, batch, seed=3, epoch=1, captions_per_image=each))
    shares = [
        list(pair_order(captions, batch, 3, 1, captions_per_image=each, rank=rank, world=world))
        for rank in range(world)
    ]
    for whole, *parts in zip(single, *shares, strict=True):
        pairs = {
            (int(position), int(row))
            for positions, rows in parts
            for position, row in zip(positions, rows, strict=True)
        }
        assert pairs == set(zip(whole[0].tolist(), whole[1].tolist(), strict=True))
        assert sum(len(positions) for positions, _ in parts) == len(whole[0])
        sizes = [len(positions) for positions, _ in parts]
        assert max(sizes) - min(sizes) <= each, "an image is for one process"
    for rank, share in enumerate(shares):
        mine = np.concatenate([positions for positions, _ in share])
        assert (mine == np.repeat(epoch_order(images, 3, 1)[rank::world], each)).all()
    with pytest.raises(ValueError, match="rank 4"):
        next(pair_order(captions, batch, 3, 1, rank=4, world=4))


# ---- the stream of batches ------------------------------------------------------------------------------------------

PIXELS = np.random.default_rng(0).integers(0, 256, (103, 24, 24, 3), dtype=np.uint8)
FEATURES = torch.randn(515, 1, 6, generator=torch.Generator().manual_seed(0))
CPU = torch.device("cpu")


def stream(**options: Any) -> Generator[PairBatch, None, None]:
    """Return batches of augmented pixels and noisy caption features: all that is random at once."""
    how = Augmentation(16, 0.3, flip=True, colour_jitter=0.2)
    return pair_batches(
        CAPTIONS,
        np.arange(103) // 2,
        augmented_pixels(PIXELS, np.arange(103), how, 7, CPU),
        noisy_rows(FEATURES, 7, 0.3, stream="texts"),
        batch=25,
        seed=7,
        device=CPU,
        **options,
    )


def take(n: int, **options: Any) -> list[PairBatch]:
    with closing(stream(**options)) as batches:
        return list(itertools.islice(batches, n))


def equal(a: PairBatch, b: PairBatch) -> bool:
    assert isinstance(a.text, torch.Tensor)
    assert isinstance(b.text, torch.Tensor)
    return (
        (a.epoch, a.number) == (b.epoch, b.number)
        and torch.equal(a.image, b.image)
        and torch.equal(a.text, b.text)
        and torch.equal(a.image_ids, b.image_ids)
    )


def test_an_endless_stream_counts_its_epochs_and_carries_image_ids() -> None:
    batches = pair_batches(
        CAPTIONS[:4],
        np.array([9, 9, 1, 2]),
        lambda positions, _place: torch.from_numpy(positions).float()[:, None],
        lambda rows, _place: torch.from_numpy(rows).float()[:, None],
        batch=2,
        seed=0,
        device=CPU,
    )
    first = [next(batches) for _ in range(4)]
    assert [(batch.epoch, batch.number) for batch in first] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    ids = {0: 9, 1: 9, 2: 1, 3: 2}
    for batch in first:
        assert [ids[int(p)] for p in batch.image[:, 0]] == batch.image_ids.tolist()


@pytest.mark.parametrize("prefetch", [0, 1, 3])
def test_the_sequence_goes_on_at_any_batch_bit_for_bit(prefetch: int) -> None:
    # Four batches an epoch; (0, 4) is where an epoch ends, that is where the next begins.
    whole = take(10)
    for start, skipped in (((0, 0), 0), ((0, 1), 1), ((0, 4), 4), ((1, 0), 4), ((1, 3), 7), ((2, 1), 9)):
        rest = take(10 - skipped, start=start, prefetch=prefetch)
        assert all(equal(a, b) for a, b in zip(rest, whole[skipped:], strict=True))
    assert not any(torch.equal(a.image[:24], b.image[:24]) for a, b in itertools.combinations(whole, 2))


def test_processes_see_what_one_process_sees() -> None:
    whole = take(5)
    shares = [take(5, rank=rank, world=3, prefetch=1) for rank in range(3)]
    done = 0
    for batch, *parts in zip(whole, *shares, strict=True):
        for rank, part in enumerate(parts):
            mine = slice((rank - done) % 3, None, 3)
            assert torch.equal(part.image, batch.image[mine])
            assert torch.equal(part.text, batch.text[mine])  # type: ignore[arg-type,index]
            assert torch.equal(part.image_ids, batch.image_ids[mine])
        done = 0 if batch.number == 3 else done + len(batch)


def test_the_next_batch_is_made_while_this_one_is_trained_on() -> None:
    made = threading.Event()

    def images(positions: np.ndarray, place: Place) -> torch.Tensor:
        if place.number == 1:
            made.set()
        return torch.zeros(len(positions), 1)

    batches = pair_batches(
        CAPTIONS,
        np.arange(103),
        images,
        lambda rows, _place: torch.zeros(len(rows), 1),
        batch=25,
        seed=0,
        device=CPU,
        prefetch=1,
    )
    with closing(batches):
        assert next(batches).number == 0
        assert made.wait(30)
    assert [thread.name for thread in threading.enumerate() if thread.name == "loader"] == []


def test_what_fails_ahead_is_raised_when_its_turn_comes() -> None:
    def images(positions: np.ndarray, place: Place) -> torch.Tensor:
        if place.number == 2:
            raise RuntimeError("the disk is gone")
        return torch.zeros(len(positions), 1)

    batches = pair_batches(
        CAPTIONS,
        np.arange(103),
        images,
        lambda rows, _place: torch.zeros(len(rows), 1),
        batch=25,
        seed=0,
        device=CPU,
        prefetch=1,
    )
    assert [next(batches).number, next(batches).number] == [0, 1]
    with pytest.raises(RuntimeError, match="the disk is gone"):
        next(batches)
    assert [thread.name for thread in threading.enumerate() if thread.name == "loader"] == []


def test_the_schedule_warms_up_and_ends_at_zero() -> None:
    optimiser = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = build_schedule(optimiser, updates=100, warmup_share=0.1)
    rates = []
    for _ in range(101):
        rates.append(optimiser.param_groups[0]["lr"])
        optimiser.step()
        schedule.step()
    assert rates[0] == pytest.approx(1 / 11)
    assert rates[10] == pytest.approx(1.0)
    assert max(rates) == pytest.approx(1.0)
    assert rates[55] == pytest.approx(0.5)
    assert rates[100] == pytest.approx(0.0, abs=1e-12)


def _features_of_each_pair(batch: PairBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what enters the heads, where the features are those of locked towers."""
    assert isinstance(batch.text, torch.Tensor)
    image, text = batch.image, batch.text
    if batch.mixtures is not None:
        image, text = (mixture.of(part) for mixture, part in zip(batch.mixtures, (image, text), strict=True))
    return image if batch.image_rows is None else image[batch.image_rows], text


# ---- captions that share an image -----------------------------------------------------------------------------------


@pytest.mark.parametrize("world", [1, 2])
def test_captions_of_an_image_share_one_view_of_it(world: int) -> None:
    views = torch.arange(103 * 4, dtype=torch.float32).view(103, 4, 1)
    rows = noisy_rows(views, 7, 0.0)
    shares = []
    for rank in range(world):
        batches = pair_batches(
            CAPTIONS, np.arange(103), rows, lambda rows, _place: torch.from_numpy(rows)[:, None], batch=30, seed=5,
            device=torch.device("cpu"), captions_per_image=3, rank=rank, world=world,
        )  # fmt: skip
        with closing(batches):
            shares.append(list(itertools.takewhile(lambda batch: batch.epoch == 0, batches)))
    seen: dict[int, float] = {}
    assert sum(len(batch.image) for batch in itertools.chain(*shares)) == 103, "by one process each"
    for batch in itertools.chain(*shares):
        assert len(batch.image) == len(set(batch.image_ids.tolist())), "no image is computed twice"
        shown = _features_of_each_pair(batch)[0][:, 0].tolist()
        for image, view in zip(batch.image_ids.tolist(), shown, strict=True):
            assert int(view) // 4 == image
            assert seen.setdefault(image, view) == view, "in every process the same"
    assert len(seen) == 103
    assert len({int(view) % 4 for view in seen.values()}) == 4, "views are drawn for each image"


def test_gradients_of_captions_that_share_an_image_are_summed_in_their_order() -> None:
    """Bit for bit, whatever the threads do: three numbers of unlike size have other sums in another order."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        generator = torch.Generator().manual_seed(0)
        rows = torch.arange(700).repeat_interleave(3)
        slopes = torch.randn(len(rows), 512, generator=generator) * 10.0 ** torch.randint(-3, 4, (len(rows), 1))
        first, second, third = slopes.view(700, 3, 512).unbind(1)
        for _ in range(5):
            features = torch.zeros(700, 512, requires_grad=True)
            _repeated(features, rows).backward(slopes)
            assert features.grad is not None
            assert torch.equal(features.grad, (first + second) + third)
    finally:
        torch.set_num_threads(before)


# ---- mixtures -------------------------------------------------------------------------------------------------------


def _mixed(captions_per_image: int, mixup: float, batch: int = 30, **settings: Any) -> list[PairBatch]:
    """Return the batches of one epoch whose features are one-hot: what they are made of can be read from them."""
    images, rows = torch.eye(103), torch.eye(515)
    batches = pair_batches(
        CAPTIONS,
        np.arange(103),
        lambda positions, _place: images[positions],
        lambda positions, _place: rows[positions],
        batch=batch,
        seed=5,
        device=torch.device("cpu"),
        captions_per_image=captions_per_image,
        mixup=mixup,
        **settings,
    )
    with closing(batches):
        return list(itertools.takewhile(lambda batch: batch.epoch == 0, batches))


@pytest.mark.parametrize("captions_per_image", [1, 3])
def test_a_mixture_has_two_images_and_a_caption_of_each_in_one_proportion(captions_per_image: int) -> None:
    plain, mixed = _mixed(captions_per_image, 0.0), _mixed(captions_per_image, 0.3)
    shares = []
    for before, after in zip(plain, mixed, strict=True):
        assert torch.equal(before.image_ids, after.image_ids), "the order stays"
        partners = []
        images, texts = _features_of_each_pair(after)
        moved = (images != _features_of_each_pair(before)[0]).any(dim=1)
        assert moved.sum() >= len(moved) / 2
        for own, image, text, changed in zip(before.image_ids.tolist(), images, texts, moved, strict=True):
            of_image = {int(at): image[at].item() for at in image.nonzero()[:, 0]}
            of_text = {int(at) // 5: text[at].item() for at in text.nonzero()[:, 0]}
            assert of_image == of_text, "captions in the proportion of their images"
            assert sum(of_image.values()) == pytest.approx(1.0)
            partners.append(tuple(sorted(of_image.items())))
            if changed:
                shares.append(of_image[own])
        # Equal ids are equal mixtures: the pairs of one image are each other's positives as before.
        assert len({(own, key) for own, key in zip(before.image_ids.tolist(), partners, strict=True)}) == len(
            set(before.image_ids.tolist())
        )
    assert len(set(shares)) == len(plain), "one proportion for a batch"


def test_proportions_are_drawn_from_the_beta_distribution() -> None:
    shares = [Place(0, number, 10).mixture(3, 0.3)[0] for number in range(500)]
    assert stats.kstest(shares, stats.beta(0.3, 0.3).cdf).pvalue > 0.05
    assert stats.kstest(shares, stats.beta(1, 1).cdf).pvalue < 1e-6, "the test can tell"


def _pairs_of(batch: PairBatch) -> torch.Tensor:
    return torch.cat(_features_of_each_pair(batch), dim=1)


def test_processes_mix_as_one_does_and_a_later_start_as_an_earlier() -> None:
    whole = _mixed(2, 0.3)
    shares = [_mixed(2, 0.3, rank=rank, world=2) for rank in range(2)]
    later = _mixed(2, 0.3, start=(0, 3))
    for number, batch in enumerate(whole):
        rows = torch.cat([_pairs_of(part[number]) for part in shares])
        assert sorted(rows.tolist()) == sorted(_pairs_of(batch).tolist())
        if number >= 3:
            assert torch.equal(later[number - 3].image, batch.image)
            assert torch.equal(later[number - 3].text, batch.text)  # type: ignore[arg-type]
