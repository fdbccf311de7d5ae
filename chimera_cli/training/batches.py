"""From a pack to batches of pairs: captions of every image each epoch, in an order that seed and epoch alone decide."""

import itertools
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from chimera_cli.data.loader import ahead, epoch_order
from chimera_cli.models.dual_encoder import DualEncoder
from chimera_cli.models.tokens import Tokens

Indices = NDArray[np.int64]

# Words of the seed: 0 (or none) is the order of an epoch, 1 the choice of captions.
_STREAMS = {"images": 2, "texts": 3, "mixtures": 4}


@dataclass(frozen=True, slots=True)
class Mixture:
    """How features are mixed before the heads: row k of what comes out has a `share` of row own[k], else other[k]."""

    share: float
    own: Tensor
    other: Tensor

    def of(self, features: Tensor) -> Tensor:
        """Return (len(own), width) of features (rows, width)."""
        return features[self.other].lerp_(features[self.own], self.share)

    def part(self, which: Tensor | slice) -> tuple[Tensor, "Mixture"]:
        """Return the rows that some of the mixed ones are made of, and how they are made of these rows alone."""
        own, other = self.own[which], self.other[which]
        needed, rows = torch.unique(torch.cat([own, other]), return_inverse=True)
        return needed, Mixture(self.share, rows[: len(own)], rows[len(own) :])


@dataclass(frozen=True, slots=True)
class PairBatch:
    """`image`: pooled features (batch, width) of a locked tower, normalised pixels (batch, 3, S, S), or maps of them.

    Maps (batch, ...) are what the locked blocks of a tower make of pixels; `text`: pooled features (batch, width) of a
    locked tower, or tokens. `image_ids`: (batch,), equal for equal images. Where pairs share an image, `image` holds it
    once and `image_rows`, (batch,), says where; None where each pair has a row of its own. What the towers make of both
    is mixed where `mixtures`, those of images and of texts, say how; `image_rows` then counts mixed images.
    `number` counts the batches of the epoch from 0. `whole` is the number of pairs over all processes, 0 where there is
    but one.
    """

    epoch: int
    image: Tensor
    text: Tensor | Tokens
    image_ids: Tensor
    number: int = 0
    whole: int = 0
    image_rows: Tensor | None = None
    mixtures: tuple[Mixture, Mixture] | None = None

    def __len__(self) -> int:
        return len(self.image_ids)


@dataclass(frozen=True, slots=True)
class Place:
    """Where a batch stands in training: all its randomness comes from the seed and from here.

    Over all processes the batch has `whole` pairs, or images, of which `part` are meant, such as a process's share.
    """

    epoch: int
    number: int
    whole: int
    part: slice | Indices = field(default_factory=lambda: slice(None))

    def generator(self, seed: int, stream: Literal["images", "texts"]) -> torch.Generator:
        """Return the random numbers of this batch: the same whenever, and by whichever process, it is made."""
        return torch.Generator().manual_seed(int(self._words(seed, stream).generate_state(1, np.uint64)[0]))

    def indices(self) -> Indices:
        """Return the numbers, from 0 to `whole` - 1, of those that are meant."""
        return np.arange(self.whole)[self.part]

    def images(self, captions_per_image: int) -> tuple["Place", Indices]:
        """Return the place of the images that this place's pairs show, and for each of its pairs which one it shows."""
        shown, rows = np.unique(self.indices() // captions_per_image, return_inverse=True)
        return replace(self, whole=self.whole // captions_per_image, part=shown), rows

    def mixture(self, seed: int, beta: float) -> tuple[float, Indices]:
        """Return the share (0-1) that each keeps of itself, from Beta(beta, beta), and who gives the rest, (whole,)."""
        random = np.random.default_rng(self._words(seed, "mixtures"))
        others = random.permutation(self.whole)
        return random.beta(beta, beta), others

    def _words(self, seed: int, stream: str) -> np.random.SeedSequence:
        return np.random.SeedSequence([seed, self.epoch, _STREAMS[stream], self.number])


def pair_order(
    captions_by_image: list[Indices],
    batch: int,
    seed: int,
    epoch: int,
    *,
    captions_per_image: int = 1,
    rank: int = 0,
    world: int = 1,
) -> Iterator[tuple[Indices, Indices]]:
    """Yield (image positions, caption rows) of one epoch: every image once, with one of its captions at random.

    With `captions_per_image` k an image stands k times in a row in its batch, each time with another caption as long as
    it has so many. The batches are as even as can be, so that no tail of one or two pairs makes a step of its own.
    `batch` counts the pairs of all `world` processes: together their batches are those of a single process, pair by
    pair, and the images of a process in an epoch are `epoch_order(n, seed, epoch, rank, world)`.
    """
    for place, positions, rows in _places(captions_by_image, batch, seed, epoch, captions_per_image, rank, world):
        yield positions[place.part], rows[place.part]


def _places(
    captions_by_image: list[Indices],
    batch: int,
    seed: int,
    epoch: int,
    captions_per_image: int,
    rank: int,
    world: int,
) -> Iterator[tuple[Place, Indices, Indices]]:
    """Yield where each batch of an epoch stands, with the positions and caption rows of all processes.

    The processes share out the images of a batch: all pairs of an image are for one of them.
    """
    if not 0 <= rank < world:
        raise ValueError(f"rank {rank} is not in 0..{world - 1}")
    order = epoch_order(len(captions_by_image), seed, epoch)
    choices = np.random.default_rng(np.random.SeedSequence([seed, epoch, 1]))
    count = max(1, round(len(order) * captions_per_image / batch))
    done = 0
    for number, positions in enumerate(np.array_split(order, count)):
        rows = np.concatenate(
            [_drawn(captions_by_image[position], captions_per_image, choices) for position in positions]
        )
        images = np.arange((rank - done) % world, len(positions), world)
        part = (captions_per_image * images[:, None] + np.arange(captions_per_image)).ravel()
        yield Place(epoch, number, len(rows), part), np.repeat(positions, captions_per_image), rows
        done += len(positions)


def _drawn(captions: Indices, count: int, choices: np.random.Generator) -> Indices:
    """Return `count` of an image's captions at random, none twice before each was there once."""
    if count == 1:
        return captions[[choices.integers(len(captions))]]
    return np.resize(choices.permutation(captions), count)


def pair_batches(
    captions_by_image: list[Indices],
    image_ids: Indices,
    images: Callable[[Indices, Place], Tensor],
    texts: Callable[[Indices, Place], Tensor | Tokens],
    *,
    batch: int,
    seed: int,
    device: torch.device,
    start: tuple[int, int] = (0, 0),
    prefetch: int = 0,
    captions_per_image: int = 1,
    mixup: float = 0.0,
    rank: int = 0,
    world: int = 1,
) -> Generator[PairBatch, None, None]:
    """Yield batches without end, epoch after epoch, from the batch of number `start[1]` in epoch `start[0]` on.

    `images` gives the images at positions, `texts` the captions of rows, both told where these stand in the batch;
    `image_ids` is (images,). What comes from `start` on equals what an uninterrupted sequence has there, bit for bit.
    `prefetch` batches are made by a thread while the consumer computes: it changes no value. A batch is then valid
    until the next one is asked for. `batch`, `captions_per_image`, `rank` and `world` as in `pair_order`.

    An image is in its batch once, however many of its captions are there: these share one view of it.

    With `mixup` above 0 a pair is mixed with another of its batch: what enters the heads, image and text in the same
    proportion, drawn for each batch from Beta(mixup, mixup), and all captions of an image with those of one and the
    same other; `image_ids` says of which image the first part is.
    Source: FuseMix (Vouitsis et al. 2024, Data-Efficient Multimodal Fusion on a Single GPU).
    """
    count = captions_per_image

    def made() -> Iterator[PairBatch]:
        for epoch in itertools.count(start[0]):
            places = _places(captions_by_image, batch, seed, epoch, count, rank, world)
            for place, positions, rows in itertools.islice(places, start[1] if epoch == start[0] else 0, None):
                pairs, (shown, of_pairs) = place.indices(), place.images(count)
                mixtures = None
                if mixup:
                    share, others = shown.mixture(seed, mixup)
                    other_pairs = (count * others[:, None] + np.arange(count)).ravel()
                    shown, of_images = _mixed(shown, others, share, device)
                    place, of_texts = _mixed(place, other_pairs, share, device)
                    mixtures = of_images, of_texts
                yield PairBatch(
                    epoch,
                    images(positions[::count][shown.part], shown),
                    texts(rows[place.part], place),
                    torch.from_numpy(image_ids[positions[pairs]]).to(device),
                    place.number,
                    place.whole,
                    torch.from_numpy(of_pairs).to(device) if count > 1 else None,
                    mixtures,
                )

    yield from ahead(made(), prefetch)


def _mixed(place: Place, others: Indices, share: float, device: torch.device) -> tuple[Place, Mixture]:
    """Return where all stand that go into the mixtures of a place with the `others` (whole,), and these mixtures."""
    own = place.indices()
    needed = np.union1d(own, others[own])
    rows = (torch.from_numpy(np.searchsorted(needed, each)).to(device) for each in (own, others[own]))
    return replace(place, part=needed), Mixture(share, *rows)


def embed_pairs(model: DualEncoder, batch: PairBatch) -> tuple[Tensor, Tensor]:
    """Return image_features and text_features, both (batch, dim) and L2-normalised."""
    image = batch.image if batch.image.ndim == 2 else model.image_tower(batch.image)
    text = batch.text if isinstance(batch.text, Tensor) else model.text_tower(batch.text)
    if batch.mixtures is not None:
        of_images, of_texts = batch.mixtures
        image, text = of_images.of(image), of_texts.of(text)
    image = model.project_image(image)
    return image if batch.image_rows is None else _repeated(image, batch.image_rows), model.project_text(text)


def _repeated(features: Tensor, rows: Tensor) -> Tensor:
    """Return some rows of features, some of them several times, so that their gradients are summed in a fixed order.

    On a CPU the gradient of indexing adds in whatever order its threads come, on a GPU that of `index_select` does.
    """
    return features.index_select(0, rows) if features.device.type == "cpu" else features[rows]
