"""Training as open_clip does it, in a process of its own: `python -m chimera_cli.services.peer_training`.

Made of open_clip's own pieces: its model classes, transforms, CSV data set, loss, schedule and `train_one_epoch`, with
the same towers and weights, the same pairs in the same order and the same batch as ours. The first line on stdin is
the task, each further one asks for a lap; every answer is one line of JSON on stdout. Whatever goes wrong ends the
process with a traceback on stderr.
"""

import json
import math
import os
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# open_clip's default for a model that is no ViT (open_clip_train.params).
BETAS, EPSILON = (0.9, 0.999), 1e-8
_PRECISIONS = {"float32": "fp32", "bfloat16": "amp_bf16", "float16": "amp"}
_EVALUATED = 64

Answer = Callable[[dict[str, Any]], None]


@dataclass(frozen=True, slots=True)
class PeerTraining:
    """What the peer trains: the rows of `train_csv` are the captions of the train split, `owners` their images.

    `dev_images` and `dev_captions` are files and texts, `dev_owners` the position of each caption's image. `epoch`
    updates make an epoch of `total`.
    """

    train_csv: str
    owners: tuple[int, ...]
    dev_images: tuple[str, ...]
    dev_captions: tuple[str, ...]
    dev_owners: tuple[int, ...]
    image_weights: str
    image_size: int
    image_locked: bool
    text_weights: str
    learn_layers: int | None
    max_tokens: int
    head: str
    dim: int
    temperature: float
    batch: int
    total: int
    lr: float
    weight_decay: float
    warmup_share: float
    clip_norm: float
    seed: int
    device: str
    precision: str
    workers: int


@dataclass(frozen=True, slots=True)
class Trainer:
    """What a lap needs; `done` holds the number of updates made, the one thing that changes beside the model."""

    task: PeerTraining
    model: Any
    batches: Iterator[Any]
    loss: Any
    optimiser: "torch.optim.Optimizer"
    schedule: Callable[[int], object]
    scaler: Any
    arguments: Namespace
    tokenise: Callable[[list[str]], "Tensor"]
    dev_transform: Callable[[Any], "Tensor"]
    done: list[int] = field(default_factory=lambda: [0])


def main() -> None:
    """Build the peer of the task on stdin, then train lap after lap as asked, until stdin ends."""
    answer = _answers()
    task = task_of(sys.stdin.readline())
    with TemporaryDirectory(prefix="chimera-peer-") as folder:
        trainer = build_trainer(task, Path(folder))
    answer({"ready": True, "settings": settings_of(trainer)})
    for line in sys.stdin:
        wanted = json.loads(line)
        answer({"lap": run_lap(trainer, wanted["updates"], wanted["evaluate"], answer)})


def _answers() -> Answer:
    """Return what writes an answer; what the peer itself prints goes to stderr."""
    out = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def answer(value: dict[str, Any]) -> None:
        out.write(json.dumps(value) + "\n")
        out.flush()

    return answer


def as_json(task: PeerTraining) -> str:
    """Return the task as one line, as the process reads it."""
    return json.dumps(asdict(task))


def task_of(line: str) -> PeerTraining:
    """Return the task of a line that `as_json` wrote."""
    return PeerTraining(**json.loads(line))


# ---- a lap ----------------------------------------------------------------------------------------------------------


def run_lap(trainer: Trainer, updates: int, evaluate: bool, answer: Answer) -> dict[str, Any]:
    """Return pairs and seconds of so many updates by open_clip's `train_one_epoch`, and the dev figures after them.

    The seconds hold loading, augmentation, both towers, the loss and the optimiser; evaluating is timed by itself.
    """
    import resource

    from open_clip_train.train import train_one_epoch  # type: ignore[import-untyped]

    from chimera_cli.runtime import Stopwatch

    watch = Stopwatch(trainer.model.logit_scale.device)
    lap = _Lap(trainer.batches, updates, trainer.task.batch, answer)

    def schedule(_step: int) -> None:
        # open_clip counts from the epoch's length; laps may be shorter.
        trainer.schedule(trainer.done[0])
        trainer.done[0] += 1

    data = {"train": _data_info(lap)}
    watch.start()
    train_one_epoch(
        trainer.model, data, trainer.loss, 0, trainer.optimiser, trainer.scaler, schedule, None, trainer.arguments
    )
    row: dict[str, Any] = {"updates": updates, "seconds": watch.stop(), "pairs": lap.pairs, "figures": None}
    if evaluate:
        started_at = time.perf_counter()
        row |= {"figures": dev_figures(trainer), "evaluation_s": time.perf_counter() - started_at}
    return row | {"ram_peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}


def _data_info(lap: "_Lap") -> Any:
    from open_clip_train.data import DataInfo  # type: ignore[import-untyped]

    return DataInfo(lap)


class _Lap:
    """The next few batches of an endless loader, in the place of the loader of an epoch."""

    def __init__(self, batches: Iterator[Any], updates: int, batch: int, answer: Answer) -> None:
        self.num_batches = updates
        self.num_samples = updates * batch
        self.pairs = 0
        self._batches = batches
        self._answer = answer

    def __iter__(self) -> Iterator[Any]:
        started_at = time.perf_counter()
        for number in range(self.num_batches):
            images, texts = next(self._batches)
            yield images, texts
            self.pairs += len(images)
            self._answer({"done": number + 1, "pairs": self.pairs, "seconds": time.perf_counter() - started_at})


def dev_figures(trainer: Trainer) -> dict[str, float]:
    """Return the retrieval figures of the dev split with open_clip's evaluation transform and tokeniser."""
    import numpy as np
    import torch
    from PIL import Image

    from chimera_cli.evaluation.retrieval import retrieval_figures, retrieval_ranks

    task, model, device = trainer.task, trainer.model, trainer.model.logit_scale.device

    def pixels(paths: Sequence[str]) -> "Tensor":
        return torch.stack([trainer.dev_transform(Image.open(path)) for path in paths])

    def embed(encode: Any, items: Sequence[str], ready: Callable[[list[str]], "Tensor"]) -> Any:
        parts = [
            encode(ready(list(items[start : start + _EVALUATED])).to(device), normalize=True).float().cpu()
            for start in range(0, len(items), _EVALUATED)
        ]
        return torch.cat(parts).numpy()

    model.eval()
    with torch.inference_mode():
        images = embed(model.encode_image, task.dev_images, pixels)
        texts = embed(model.encode_text, task.dev_captions, trainer.tokenise)
    return dict(retrieval_figures(retrieval_ranks(images, texts, np.asarray(task.dev_owners))))


# ---- parts ----------------------------------------------------------------------------------------------------------


def build_trainer(task: PeerTraining, folder: Path) -> Trainer:
    """Return what trains: all of it from open_clip but the weights of the towers and the order of the pairs."""
    import torch
    from open_clip import image_transform
    from open_clip.loss import ClipLoss
    from open_clip_train.scheduler import cosine_lr  # type: ignore[import-untyped]

    from chimera_cli.runtime import seed_everything

    seed_everything(task.seed)
    model, tokenise, mean, std = build_model(task, folder)
    model.to(task.device)
    optimiser = _optimiser(model, task)
    looks = {"mean": mean, "std": std}
    transform = image_transform(task.image_size, is_train=True, **looks)
    return Trainer(
        task=task,
        model=model,
        batches=_batches(task, transform, tokenise),
        loss=ClipLoss(),
        optimiser=optimiser,
        schedule=cosine_lr(optimiser, task.lr, round(task.total * task.warmup_share), task.total),
        scaler=torch.amp.grad_scaler.GradScaler(task.device) if task.precision == "float16" else None,
        arguments=_arguments(task),
        tokenise=tokenise,
        dev_transform=image_transform(task.image_size, is_train=False, **looks),
    )


def build_model(task: PeerTraining, folder: Path) -> tuple[Any, Any, tuple[float, ...], tuple[float, ...]]:
    """Return open_clip's model with the weights of our towers, its tokeniser, and the image tower's mean and deviation.

    The text tower goes through `folder`, from which open_clip loads it as from a hub. What is locked is locked by
    open_clip: a locked tower runs in every step.
    """
    from open_clip.model import CLIPTextCfg, CLIPVisionCfg, CustomTextCLIP
    from open_clip.tokenizer import HFTokenizer

    from chimera_cli.models.image_tower import build_image_tower
    from chimera_cli.models.text_tower import build_text_tower
    from chimera_cli.models.weights import DEFAULT_TEXT, PACKAGED, TINY, require_packaged_file

    image_tower, text_tower = build_image_tower(task.image_weights), build_text_tower(task.text_weights)
    encoder: Any = text_tower.encoder
    encoder.save_pretrained(folder)
    kind = PACKAGED[task.image_weights].architecture if task.image_weights in PACKAGED else task.image_weights
    model = CustomTextCLIP(
        task.dim,
        CLIPVisionCfg(
            timm_model_name="test_efficientnet" if kind == TINY else kind,
            timm_proj=task.head,
            image_size=task.image_size,
        ),
        CLIPTextCfg(
            context_length=task.max_tokens,
            hf_model_name=str(folder),
            hf_proj_type=task.head,
            hf_pooler_type="mean_pooler",
        ),
        init_logit_scale=math.log(1 / task.temperature),
        output_dict=True,
    )
    visual: Any = model.visual
    visual.trunk.load_state_dict(image_tower.backbone.state_dict())
    if task.image_locked:
        model.lock_image_tower()
    if task.learn_layers is not None:
        model.lock_text_tower(task.learn_layers)
    name = DEFAULT_TEXT if task.text_weights == TINY else task.text_weights
    source = str(require_packaged_file(name).parent) if name in PACKAGED else name
    tokenise = HFTokenizer(source, context_length=task.max_tokens)
    return model.float(), tokenise, image_tower.mean, image_tower.std


def _optimiser(model: Any, task: PeerTraining) -> "torch.optim.Optimizer":
    """Return AdamW in the two groups of open_clip's training script: one rate for all that learns."""
    import torch

    def spared(name: str, parameter: "Tensor") -> bool:
        return parameter.ndim < 2 or any(part in name for part in ("bn", "ln", "bias", "logit_scale"))

    learning = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    groups = [
        {"params": [one for name, one in learning if spared(name, one)], "weight_decay": 0.0},
        {"params": [one for name, one in learning if not spared(name, one)], "weight_decay": task.weight_decay},
    ]
    return torch.optim.AdamW(groups, lr=task.lr, betas=BETAS, eps=EPSILON)


def _batches(task: PeerTraining, transform: Any, tokenise: Any) -> Iterator[Any]:
    """Return the endless batches of open_clip's CSV data set through torch's DataLoader, in our order."""
    from open_clip_train.data import CsvDataset
    from torch.utils.data import DataLoader

    data = CsvDataset(task.train_csv, transform, "filepath", "title", sep="\t", tokenizer=tokenise)
    loader: DataLoader[Any] = DataLoader(
        data,
        batch_sampler=_Order(task),
        num_workers=task.workers,
        pin_memory=task.device.startswith("cuda"),
        persistent_workers=task.workers > 0,
    )
    return iter(loader)


class _Order:
    """The rows of each batch without end: every image once an epoch with one of its captions, as ours are drawn."""

    def __init__(self, task: PeerTraining) -> None:
        self._task = task

    def __iter__(self) -> Iterator[list[int]]:
        import itertools

        import numpy as np

        from chimera_cli.training.batches import pair_order

        owners = np.asarray(self._task.owners)
        by_image = [np.flatnonzero(owners == image) for image in range(int(owners.max()) + 1)]
        for epoch in itertools.count():
            for _positions, rows in pair_order(by_image, self._task.batch, self._task.seed, epoch):
                yield rows.tolist()


def _arguments(task: PeerTraining) -> Namespace:
    """Return what `train_one_epoch` looks up of its script's arguments."""
    return Namespace(
        device=task.device,
        precision=_PRECISIONS[task.precision],
        distill=False,
        accum_freq=1,
        skip_scheduler=False,
        horovod=False,
        grad_clip_norm=task.clip_norm if task.clip_norm > 0 else None,
        log_every_n_steps=100,
        batch_size=task.batch,
        rank=0,
        local_rank=0,
        world_size=1,
        wandb=False,
    )


def settings_of(trainer: Trainer) -> dict[str, Any]:
    """Return what the peer runs with, for the result."""
    import torch

    task = trainer.task
    learning = sum(one.numel() for one in trainer.model.parameters() if one.requires_grad)
    return {
        "version": metadata.version("open_clip_torch"),
        "model": f"CustomTextCLIP, {task.head} heads",
        "loss": "ClipLoss",
        "transform": "its training transform: RandomResizedCrop 0.9 to 1, bicubic",
        "lr": task.lr,
        "weight_decay": task.weight_decay,
        "precision": _PRECISIONS[task.precision],
        "workers": task.workers,
        "threads": torch.get_num_threads(),
        "parameters_learning": learning,
    }


if __name__ == "__main__":
    main()
