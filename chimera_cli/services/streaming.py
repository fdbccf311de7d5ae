"""Training from WebDataset shards: pairs come from the stream, evaluation and its figures from the pack beside it."""

from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from chimera_cli.config import TrainConfig
from chimera_cli.errors import ChimeraError
from chimera_cli.events import Listener, Note
from chimera_cli.services.inputs import Workbench

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from chimera_cli.data.pack import Pack
    from chimera_cli.data.streaming import ShardSet, StreamBatch
    from chimera_cli.models.dual_encoder import DualEncoder
    from chimera_cli.models.tokens import Tokens
    from chimera_cli.training.batches import PairBatch

# Images that a locked tower takes at a time: its first layers hold ten times what the pixels do.
_PIECE = 32


@dataclass(frozen=True, slots=True)
class Stream:
    """The shards of a config, opened and counted once for all seeds of a group.

    `excluded` are the SHA-256 of the pack's dev and test images, which must not be trained on. `left_out` is filled
    while a seed trains: the most samples that an epoch left out, by reason.
    """

    shards: "ShardSet"
    excluded: frozenset[str]
    left_out: dict[str, int] = field(default_factory=dict)

    def updates_per_epoch(self, batch: int) -> int:
        """Return how many updates show every sample about once."""
        from chimera_cli.data.streaming import batches_per_epoch

        return batches_per_epoch(self.shards.samples, batch)

    def facts(self) -> dict[str, Any]:
        """Return what identifies the stream in group.json."""
        shards = self.shards
        return {
            "pattern": shards.pattern,
            "shards": len(shards.shards),
            "samples": shards.samples,
            "bytes": shards.bytes,
            "digest": shards.digest,
        }


def open_stream(config: TrainConfig, pack: "Pack", listener: Listener) -> Stream | None:
    """Return the stream that a config asks for, None where it asks for none.

    Raises UsageError for a pattern that finds nothing, ChimeraError for damaged shards and for fewer samples than a
    batch.
    """
    from chimera_cli.data.streaming import open_shards

    if config.stream is None:
        return None
    shards = open_shards(config.stream, listener)
    if shards.samples < config.batch:
        raise ChimeraError(
            f"batch {config.batch} is larger than the {shards.samples} samples of the stream {config.stream}",
            f"--set batch={max(2, shards.samples // 2)}",
        )
    listener(Note(f"stream: {shards.samples:,} samples in {len(shards.shards):,} shards; dev is that of {pack.name}"))
    if config.image.locked:
        listener(Note("the image tower is locked, but a stream has no cache: features are computed for every batch"))
    rows = zip(pack.column("sha256"), pack.column("split"), strict=True)
    return Stream(shards, frozenset(sha256 for sha256, split in rows if split in ("dev", "test")))


def warm_dev(model: "DualEncoder", bench: Workbench, tell: Listener) -> None:
    """Make the cached features of locked towers for dev, so that no evaluation has to."""
    from chimera_cli.services.embeddings import locked_image_features, pooled_caption_features

    if model.architecture.image_locked:
        locked_image_features(model, bench.pack, "dev", bench.device, tell)
    if model.architecture.learn_layers == 0:
        pooled_caption_features(model, bench.pack, "dev", bench.device, tell)


def stream_pairs(
    stream: Stream,
    bench: Workbench,
    model: "DualEncoder",
    config: TrainConfig,
    seed: int,
    tell: Listener,
    start: tuple[int, int] = (0, 0),
    threads: int | None = None,
) -> "Generator[PairBatch, None, None]":
    """Yield the pairs of the stream without end, decoded by `threads` (None: one per core) as the pack's images were.

    The threads end with it.

    They begin at `start`, (epoch, number in the epoch), with what an uninterrupted stream has there, bit for bit: the
    batches of that epoch before it are read and decoded again, those of earlier epochs are not.
    """
    import torch

    from chimera_cli.data.streaming import StreamState, stream_batches
    from chimera_cli.training.batches import PairBatch

    stream.left_out.clear()
    pack, device = bench.pack, bench.device
    images, texts = _images(model, config, seed, device), _texts(model, device)
    batches = stream_batches(
        stream.shards,
        config.batch,
        pack.size,
        pack.manifest["fit"],
        seed,
        start=StreamState(start[0]),
        buffer=config.stream_buffer,
        threads=threads,
        max_bad=config.stream_max_bad,
        excluded=stream.excluded,
        listener=tell,
    )
    with closing(batches):
        for batch in batches:
            for reason, number in batch.left_out.items():
                stream.left_out[reason] = max(number, stream.left_out.get(reason, 0))
            if (batch.epoch, batch.number) < start:
                continue
            ids = torch.from_numpy(batch.image_ids).to(device)
            yield PairBatch(batch.epoch, images(batch), texts(batch), ids, batch.number)


def _images(
    model: "DualEncoder", config: TrainConfig, seed: int, device: "torch.device"
) -> "Callable[[StreamBatch], Tensor]":
    """Return what gives the images of a batch: augmented pixels, or the features of a locked tower without gradient."""
    import torch

    from chimera_cli.data.augmentation import Augmentation, augment
    from chimera_cli.data.captions import mentions_side
    from chimera_cli.training.batches import Place

    tower = model.image_tower
    how = Augmentation(
        size=model.architecture.image_size,
        crop_scale=config.augmentation.crop_scale,
        flip=model.architecture.flipped_view,
        colour_jitter=config.augmentation.colour_jitter,
        mean=tower.mean,
        std=tower.std,
    )

    def pixels(batch: "StreamBatch") -> "Tensor":
        generator = Place(batch.epoch, batch.number, len(batch)).generator(seed, "images")
        # The caption that is shown decides: what the others say is not told beside this image.
        may_flip = ~torch.tensor([mentions_side(caption) for caption in batch.captions])
        return augment(batch.pixels, how, generator, device, may_flip)

    def features(batch: "StreamBatch") -> "Tensor":
        tower.eval()  # the loop sets the model to training: a locked tower is what it is when features are cached
        with torch.no_grad():
            return torch.cat([tower(piece) for piece in torch.split(pixels(batch), _PIECE)]).float()

    return features if model.architecture.image_locked else pixels


def _texts(model: "DualEncoder", device: "torch.device") -> "Callable[[StreamBatch], Tensor | Tokens]":
    """Return what gives the captions of a batch: tokens, or the features of a locked tower without gradient."""
    import torch

    def tokens(batch: "StreamBatch") -> "Tokens":
        encoded = model.tokenise(batch.captions)
        return {name: tensor.to(device, non_blocking=True) for name, tensor in encoded.items()}

    def features(batch: "StreamBatch") -> "Tensor":
        model.text_tower.eval()
        with torch.no_grad():
            pooled: Tensor = model.text_tower(tokens(batch))
        return pooled.float()

    return features if model.architecture.learn_layers == 0 else tokens
