"""The loaders of others, each in a process of its own: `python -m chimera_cli.services.peer_loaders`.

Their workers are forked, which is safe only from a process without other threads. The result is one line of JSON on
stdout; whatever goes wrong ends the process with a traceback on stderr.
"""

import itertools
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import Any

WORKERS = 2
# What torch's DataLoader keeps ready for each worker.
_PREFETCHED = 2


@dataclass(frozen=True, slots=True)
class PeerTask:
    """What a peer is asked: which files it reads and what it makes of them, for at least `seconds` after a warm-up."""

    name: str
    paths: tuple[str, ...]
    csv: str | None
    shards: tuple[str, ...]
    batch: int
    image_size: int
    crop_scale: float
    flip: bool
    mean: tuple[float, ...]
    std: tuple[float, ...]
    seconds: float
    workers: int = WORKERS


@dataclass(frozen=True, slots=True)
class PeerLoader:
    """A loader ready to be timed: batches of images (batch, 3, S, S) without end, and what it is in words."""

    batches: Iterator[Any]
    settings: Mapping[str, Any]


class PhotoFiles:
    """A map-style data set as tutorials write it: open a file, transform it."""

    def __init__(self, paths: tuple[str, ...], transform: Callable[[Any], Any]) -> None:
        self.paths = paths
        self.transform = transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Any:
        """Return one image (3, S, S)."""
        from PIL import Image

        with Image.open(self.paths[index]) as image:
            return self.transform(image.convert("RGB"))


def main() -> None:
    """Measure the peer of the task on stdin and print its result."""
    task = PeerTask(**json.load(sys.stdin))
    loader = LOADERS[task.name](task)
    result = measure(loader.batches, task) | {"settings": dict(loader.settings)}
    sys.stdout.write(json.dumps(result) + "\n")


def measure(batches: Iterator[Any], task: PeerTask) -> dict[str, Any]:
    """Return images and seconds of a window that begins after the start of the workers and all they had ready.

    Workers hand in their batches in turn: the window holds a whole number of turns.
    """
    turn = max(1, task.workers)
    for _ in itertools.islice(batches, turn * (_PREFETCHED + 1)):
        pass
    images, count = 0, 0
    started_at = time.perf_counter()
    while (elapsed := time.perf_counter() - started_at) < task.seconds or count % turn:
        images += len(next(batches))
        count += 1
    return {"images": images, "seconds": elapsed}


def open_clip_loader(task: PeerTask) -> PeerLoader:
    """Return open_clip's CSV data set with its own training transform, cropping as the task says."""
    import open_clip
    from open_clip_train.data import CsvDataset  # type: ignore[import-untyped]

    transform = open_clip.image_transform(
        task.image_size, is_train=True, mean=task.mean, std=task.std, aug_cfg={"scale": (task.crop_scale, 1.0)}
    )
    data = CsvDataset(task.csv, transform, "filepath", "title", sep="\t", tokenizer=_no_tokens)
    settings = _settings(task, "open_clip_torch", "CSV data set, RandomResizedCrop bicubic, no flip")
    return PeerLoader((images for images, _tokens in _endless(data, task)), settings)


def pillow_loader(task: PeerTask) -> PeerLoader:
    """Return the loader of tutorials: Pillow opens each file, torchvision transforms it."""
    words = f"Pillow and torchvision, {_transform_words(task)}"
    return PeerLoader(_endless(PhotoFiles(task.paths, _transform(task)), task), _settings(task, "pillow", words))


def webdataset_loader(task: PeerTask) -> PeerLoader:
    """Return webdataset's pipeline over tar shards: shuffled, decoded with Pillow, transformed by torchvision."""
    import webdataset as wds

    data = wds.WebDataset(list(task.shards), resampled=True, shardshuffle=False)
    data = data.shuffle(200).decode("pilrgb").to_tuple("jpg", "txt").map_tuple(_transform(task), str)
    data = data.batched(task.batch)
    loader = wds.WebLoader(data, batch_size=None, num_workers=task.workers, persistent_workers=task.workers > 0)
    words = f"tar shards, {_transform_words(task)}"
    return PeerLoader((images for images, _texts in loader), _settings(task, "webdataset", words))


LOADERS: Mapping[str, Callable[[PeerTask], PeerLoader]] = {
    "open_clip": open_clip_loader,
    "pillow": pillow_loader,
    "webdataset": webdataset_loader,
}


def _endless(data: Any, task: PeerTask) -> Iterator[Any]:
    """Return the batches of torch's DataLoader over a map-style data set, drawn at random without end."""
    from torch.utils.data import DataLoader, RandomSampler

    # With replacement: an epoch of a small set would end every few seconds, and the workers stand still.
    sampler = RandomSampler(data, replacement=True, num_samples=1 << 40)
    keep = task.workers > 0
    loader: Iterable[Any] = DataLoader(
        data, task.batch, sampler=sampler, num_workers=task.workers, drop_last=True, persistent_workers=keep
    )
    return iter(loader)


def _no_tokens(_texts: Any) -> Any:
    """Return room for the tokens of one text: text is not what is measured."""
    import torch

    return torch.zeros((1, 77), dtype=torch.int64)


def _transform(task: PeerTask) -> Callable[[Any], Any]:
    from torchvision import transforms

    crop = transforms.RandomResizedCrop(
        task.image_size, scale=(task.crop_scale, 1.0), interpolation=transforms.InterpolationMode.BICUBIC
    )
    flip = [transforms.RandomHorizontalFlip()] if task.flip else []
    composed: Callable[[Any], Any] = transforms.Compose(
        [crop, *flip, transforms.ToTensor(), transforms.Normalize(task.mean, task.std)]
    )
    return composed


def _transform_words(task: PeerTask) -> str:
    return f"RandomResizedCrop bicubic, {'flip' if task.flip else 'no flip'}"


def _settings(task: PeerTask, distribution: str, words: str) -> dict[str, Any]:
    return {
        "loader": words,
        "workers": task.workers,
        "batch": task.batch,
        "crop_scale": task.crop_scale,
        "version": metadata.version(distribution),
    }


def as_json(task: PeerTask) -> str:
    """Return the task as the process reads it from stdin."""
    return json.dumps(asdict(task))


if __name__ == "__main__":
    main()
