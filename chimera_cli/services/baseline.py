"""`chimera eval --baseline cca`: closed-form CCA on the same frozen features, beside what a run has learned."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chimera_cli.config import TrainConfig, load_config
from chimera_cli.errors import ChimeraError, UsageError
from chimera_cli.events import Listener, Progress, ignore
from chimera_cli.runs import (
    MADE_WITH,
    SCHEMA_VERSION,
    Group,
    list_groups,
    read_json,
    source_hash,
    utc_now,
    write_sealed_json,
)
from chimera_cli.services.eval import deliver, evaluate_group, measure, stored_evaluation
from chimera_cli.services.eval_subject import captions_of, count_look, open_subject
from chimera_cli.slo.baseline import METHODS, baseline_path
from chimera_cli.slo.evidence import pack_of

if TYPE_CHECKING:
    import torch

    from chimera_cli.data.pack import Pack
    from chimera_cli.evaluation.cca import Pairs, Tuned
    from chimera_cli.models.dual_encoder import DualEncoder


def evaluate_baseline(
    home: Path,
    run: str = "latest",
    split: str = "dev",
    data: str | None = None,
    device: str = "auto",
    resamples: int = 1000,
    recipe: Path | None = None,
    changes: Sequence[str] = (),
    listener: Listener = ignore,
) -> dict[str, Any]:
    """Return the evaluation of a run as `evaluate_group` does, with the baseline on the same features as `baseline`.

    The baseline learns from the train split and is tuned on dev, whatever `split` it is measured on; it is written
    into the group, and a look at test counts there. Evaluations of the run that still hold are taken as they are.
    With a `recipe` or `changes` of one, or without a finished run on the pack, the pack stands alone: `run` in the
    result is None and nothing is written, because nothing of a run is measured; `split` is then train or dev, since a
    look at test has to count somewhere. Raises UsageError and ChimeraError as `evaluate_group` does, and for features
    that can't be analysed.
    """
    name = None if recipe is not None or changes else _run_on(home, run, data)
    if name is None and (run != "latest"):
        raise UsageError(
            "--config and --set choose the features of a baseline without a run, and --run names one",
            "leave either out: a run's baseline is of the features that the run was trained on",
        )
    if name is None:
        return _alone(home, split, data, device, resamples, load_config(TrainConfig, recipe, changes), listener)
    subject = open_subject(home, name, split, data, device)
    group, pack, settings = subject.group, subject.pack, _recipe_of(subject.group)
    learned = stored_evaluation(subject, resamples)
    if learned is None:
        learned = evaluate_group(home, name, split, data, device, resamples, None, listener)
    else:
        learned |= {"test_looks": count_look(group, subject.split, listener)}
    model = _frozen(settings, subject.device)
    document = _measured(model, pack, subject.split, subject.device, resamples, listener)
    document |= {"group": group.name, "made_with": {key: group.facts.get(key) for key in MADE_WITH}}
    path = baseline_path(group, pack.name, subject.split)
    write_sealed_json(path, document)
    deliver(home, group, listener)
    return learned | {"baseline": read_json(path)}


def _run_on(home: Path, run: str, data: str | None) -> str | None:
    """Return the run to hold beside the baseline: for `latest` the last that finished on `data`; None without one."""
    if run != "latest":
        return run
    finished = [group for group in list_groups(home, "train") if group.status == "finished"]
    fitting = [group for group in finished if data in (None, pack_of(group).get("name"))]
    return max(fitting, key=lambda group: str(group.facts["finished_at"])).name if fitting else None


def _alone(
    home: Path,
    split: str,
    data: str | None,
    device: str,
    resamples: int,
    config: TrainConfig,
    listener: Listener,
) -> dict[str, Any]:
    """Return the baseline of a pack in the shape of an evaluation of no run."""
    from chimera_cli.data.pack import SPLITS, split_name
    from chimera_cli.runtime import pick_device
    from chimera_cli.services.session import need_pack

    name = split_name(split)
    if name not in SPLITS:
        raise UsageError(f"the split {name!r} can't be evaluated", f"the splits are {', '.join(SPLITS)}")
    if name == "test":
        raise UsageError(
            "there is no run to count a look at the test split with",
            "take --split dev, or name the run to put the baseline beside with --run",
        )
    pack = need_pack(home, data or config.data, listener)
    chosen = pick_device(device)
    document = _measured(_frozen(config, chosen), pack, name, chosen, resamples, listener)
    return {
        "schema_version": SCHEMA_VERSION,
        "run": None,
        "pack": document["pack"],
        "split": name,
        "seeds": [],
        "images": document["images"],
        "captions": document["captions"],
        "figures": document["figures"],
        "over_seeds": {},
        "chance": document["chance"],
        "by_seed": [],
        "test_looks": None,
        "baseline": document,
    }


# ---- features -------------------------------------------------------------------------------------------------------


def _recipe_of(group: Group) -> TrainConfig:
    """Return the settings a run was trained with. Raises ChimeraError where they are not recorded, or are several."""
    if group.combines:
        names = " or ".join(str(part.get("run")) for part in group.combines)
        raise ChimeraError(f"{group.name} has the features of several recipes", f"--run {names}")
    paths = [group.seed_dir(seed) / "config.yaml" for seed in group.seeds]
    found = next((path for path in paths if path.is_file()), None)
    if found is None:
        raise ChimeraError(
            f"{group.name} has recorded no config.yaml", "name the features yourself: --config FILE without --run"
        )
    return load_config(TrainConfig, found)


def _frozen(config: TrainConfig, device: "torch.device") -> "DualEncoder":
    """Return the pretrained towers of a recipe as they are before anything learns."""
    import torch

    from chimera_cli.models.dual_encoder import Architecture, build_dual_encoder
    from chimera_cli.models.weights import DEFAULT_IMAGE, DEFAULT_TEXT, TINY

    for key, weights, packaged in (
        ("image", config.image.weights, DEFAULT_IMAGE),
        ("text", config.text.weights, DEFAULT_TEXT),
    ):
        if weights == TINY:
            raise UsageError(
                f"{key}.weights: {TINY} starts from scratch and has no frozen features for a baseline",
                f"take a pretrained tower: --set {key}.weights={packaged}",
            )
    architecture = Architecture(
        image_weights=config.image.weights,
        image_size=config.image.image_size,
        image_locked=True,
        image_stages=config.image.stages,
        flipped_view=config.augmentation.flip,
        text_weights=config.text.weights,
        learn_layers=0,
        max_tokens=config.text.max_tokens,
        text_hidden_states=config.text.hidden_states,
        # The heads are never used.
        head="linear",
        hidden=1,
        dim=2,
        dropout=0.0,
        temperature=1.0,
    )
    model = build_dual_encoder(architecture).to(device)
    model.image_tower.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model


def _pairs(model: "DualEncoder", pack: "Pack", split: str, device: "torch.device", listener: Listener) -> "Pairs":
    """Return the features of a split: an image's are the mean over its views, as they are for a learned model."""
    import numpy as np

    from chimera_cli.evaluation.cca import Pairs, spread_out
    from chimera_cli.services.embeddings import locked_image_features, pooled_caption_features

    owner = captions_of(pack, split).image_positions
    images = locked_image_features(model, pack, split, device, listener).values
    texts = pooled_caption_features(model, pack, split, device, listener).values
    return Pairs(spread_out(images.mean(axis=1)), np.asarray(texts), owner)


# ---- the baseline ---------------------------------------------------------------------------------------------------


def _measured(
    model: "DualEncoder", pack: "Pack", split: str, device: "torch.device", resamples: int, listener: Listener
) -> dict[str, Any]:
    """Return the content of a baseline's file: figures as in an evaluation, and how it came about."""
    from chimera_cli.evaluation.cca import embed, project, tune
    from chimera_cli.runtime import Stopwatch

    # Once, and before the work: what is loaded does not change where somebody edits the files meanwhile.
    source = source_hash()
    train, dev = (_pairs(model, pack, name, device, listener) for name in ("train", "dev"))
    asked = {"train": train, "dev": dev}.get(split) or _pairs(model, pack, split, device, listener)
    watch = Stopwatch(device)
    watch.start()
    tuned = tune(train, dev, tell=lambda done, total: listener(Progress("CCA on dev", done, total, "settings")))
    seconds = watch.stop()
    found = embed(tuned.cca, project(tuned.cca, asked), tuned.settings.dim, tuned.settings.power)
    facts, _ranks = measure(found.images, found.texts, found.image_of_text, resamples)
    return {
        "schema_version": SCHEMA_VERSION,
        "baseline": "cca",
        "pack": {"name": pack.name, "fingerprint": pack.fingerprint},
        "split": split,
        **facts,
        **_how(tuned, model, train, dev),
        "seconds": seconds,
        "source_hash": source,
        "created_at": utc_now(),
    }


def _how(tuned: "Tuned", model: "DualEncoder", train: "Pairs", dev: "Pairs") -> dict[str, Any]:
    """Return what the baseline was made of: features, pairs to learn from, settings and how they were chosen."""
    from dataclasses import asdict

    shape = model.architecture
    looks = ("image_weights", "image_size", "image_stages", "flipped_view")
    features = (*looks, "text_weights", "max_tokens", "text_hidden_states")
    return {
        "features": {name: getattr(shape, name) for name in features}
        | {"image_width": train.images.shape[1], "text_width": train.texts.shape[1]},
        "learned_from": {"split": "train", "images": tuned.images_learned, "captions": len(train.texts)},
        "settings": asdict(tuned.settings),
        "chosen_on": {"split": "dev", "captions": len(dev.texts), "tries": tuned.tries, "rsum": tuned.rsum},
    }


def described(document: Mapping[str, Any]) -> str:
    """Return in one line what a baseline is: method, what it learned from, and the settings chosen on dev."""
    settings, learned = document["settings"], document["learned_from"]
    pairs = f"{learned['images']:,} images and {learned['captions']:,} captions"
    ridges = f"ridges {settings['image_ridge']:g} and {settings['text_ridge']:g}"
    chosen = f"{settings['dim']} directions, power {settings['power']:g}, {ridges}"
    return f"{METHODS[document['baseline']]} of {pairs}: {chosen}, the best of {document['chosen_on']['tries']} on dev"
