"""Several runs as one model: whose mean it is, what it takes, what the other commands make of it, what is refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from numpy.typing import NDArray

from chimera_cli.cli.main import app
from chimera_cli.config import TrainConfig, load_config
from chimera_cli.data.pack import open_pack
from chimera_cli.errors import ChimeraError, UsageError
from chimera_cli.events import Event, Note
from chimera_cli.models.weights import file_hash
from chimera_cli.runs import Group, list_groups, resolve_run, update_group, write_sealed_json
from chimera_cli.services.baseline import evaluate_baseline
from chimera_cli.services.combine import combine
from chimera_cli.services.embeddings import embed_split, embed_texts
from chimera_cli.services.eval import evaluate_group
from chimera_cli.services.eval_query import search_images
from chimera_cli.services.report import report
from chimera_cli.services.resume import resumable_group
from chimera_cli.services.slo import check
from chimera_cli.services.slo_explain import explain_objective
from chimera_cli.services.slo_plan import plan
from chimera_cli.services.train import train_full

pytestmark = pytest.mark.usefixtures("lean")

CPU = torch.device("cpu")
RECIPE = (
    "data=small", "image.weights=tiny", "image.locked=false", "image.image_size=32", "text.weights=tiny",
    "text.learn_layers=null", "heads.kind=linear", "heads.dim=16", "epochs=4", "batch=60",
    "optimiser.lr_image=3e-3", "optimiser.lr_text=3e-3",
)  # fmt: skip


def run(home: Path, name: str) -> Group:
    return resolve_run(home, f"train-{name}")[0]


def checkpoint(home: Path, name: str, seed: int) -> Path:
    return run(home, name).seed_dir(seed) / "checkpoints" / "best.safetensors"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, small_pack_home: Path, lean: None) -> Path:
    """A home with two runs of seeds 0 and 1, one of seed 0 alone, and the first two together."""
    home = tmp_path_factory.mktemp("combine")
    (home / "data").mkdir()
    (home / "data" / "small").symlink_to(small_pack_home / "data" / "small")
    for label, changes, seeds in (
        ("wide", (), (0, 1)),
        ("narrow", ("heads.dim=8", "text.max_tokens=6", "image.image_size=40"), (0, 1)),
        ("lonely", ("epochs=1",), (0,)),
    ):
        train_full(
            home, load_config(TrainConfig, None, [*RECIPE, *changes]), seeds, label, f"chimera train full --{label}"
        )
    combine(home, ["train-wide", "train-narrow"], "both", "cpu", "chimera train combine train-wide train-narrow")
    return home


def embedded(home: Path, name: str, seed: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    return embed_split(run(home, name).seed_dir(seed), open_pack(home / "data", "small"), "dev", CPU)


def test_the_similarity_is_the_mean_of_the_members_and_decides_recall(home: Path) -> None:
    both = run(home, "both")
    image, text = embedded(home, "both", 1)
    alone = [embedded(home, name, 1) for name in ("wide", "narrow")]
    assert (image.shape, text.shape) == ((60, 24), (300, 24))
    assert np.allclose(np.linalg.norm(image, axis=1), 1, atol=1e-6)
    similarity = (alone[0][0] @ alone[0][1].T + alone[1][0] @ alone[1][1].T) / 2
    assert np.allclose(image @ text.T, similarity, atol=1e-6)
    assert np.abs(similarity - alone[0][0] @ alone[0][1].T).max() > 0.01, "the members are of different minds"
    owner = open_pack(home / "data", "small").captions("dev").image_positions
    own = similarity[owner, np.arange(300)]
    found = ((similarity > own).sum(axis=0) < 10).mean()
    assert both.results()[1]["details"]["best_dev"]["t2i_r10"] == pytest.approx(found)
    sentences = open_pack(home / "data", "small").captions("dev").texts[:9]
    assert np.allclose(embed_texts(both.seed_dir(1), sentences, CPU), text[:9], atol=1e-5)


def test_what_it_took_is_what_its_members_take_one_after_another(home: Path) -> None:
    together, *alone = ([one["figures"] for one in run(home, name).results()] for name in ("both", "wide", "narrow"))
    for seed in (0, 1):
        wide, narrow = (one[seed] for one in alone)
        assert together[seed]["wall_s"] == pytest.approx(wide["wall_s"] + narrow["wall_s"])
        assert together[seed]["ram_peak_gb"] >= max(wide["ram_peak_gb"], narrow["ram_peak_gb"])
        # As many pairs through both of them.
        seconds = 1000 / wide["pairs_per_s"] + 1000 / narrow["pairs_per_s"]
        assert together[seed]["pairs_per_s"] == pytest.approx(1000 / seconds)
        assert together[seed]["loss_last"] is None
    details = [run(home, name).results()[0]["details"] for name in ("both", "wide", "narrow")]
    assert details[0]["parameters_total"] == details[1]["parameters_total"] + details[2]["parameters_total"]


def test_the_run_says_of_what_it_is_made(home: Path) -> None:
    both, wide, narrow = (run(home, name) for name in ("both", "wide", "narrow"))
    assert [part["run"] for part in both.facts["combines"]] == [wide.name, narrow.name]
    assert both.facts["combines"][1]["checkpoints"]["1"] == file_hash(checkpoint(home, "narrow", 1))
    assert both.facts["source_hash"] == wide.facts["source_hash"]
    assert (both.kind, both.status, both.seeds) == ("train", "finished", (0, 1))
    settings = yaml.safe_load((both.seed_dir(0) / "config.yaml").read_text())["members"]
    assert [(one["run"], one["heads"]["dim"]) for one in settings.values()] == [(wide.name, 16), (narrow.name, 8)]


def test_the_other_commands_take_it_as_any_run(home: Path) -> None:
    name = run(home, "both").name
    figures = evaluate_group(home, name, device="cpu", resamples=100)["figures"]
    best = [one["details"]["best_dev"]["rsum"] for one in run(home, "both").results()]
    assert figures["rsum"] == pytest.approx(sum(best) / 2)
    told = report(home, name).markdown
    members = (run(home, "wide").name, run(home, "narrow").name)
    assert f"It is the mean of `{members[0]}`, `{members[1]}`. Times are those of one training after another." in told
    assert "chimera train full --wide\nchimera train full --narrow\nchimera train combine train-wide" in told
    judged = check(home, name, profile="cpu")
    assert judged["run"] == name
    hours = [one["figures"]["epoch_10k_pairs_s"] for one in run(home, "both").results()]
    assert judged["figures"]["epoch_10k_pairs_s"] == max(hours), "the worst seed counts"
    heard: list[Event] = []
    found = search_images(home, "a red circle on the grass with a dog", name, device="cpu", listener=heard.append)
    assert len(found["images"]) == 12
    assert [event.message for event in heard if isinstance(event, Note)] == [
        "the query is longer than the 6 tokens that the model reads: what comes after them is left out"
    ]


def test_what_the_law_asks_for_is_asked_of_the_members(home: Path, tmp_path: Path) -> None:
    name = run(home, "both").name
    evaluate_group(home, name, device="cpu", resamples=100)
    breached = plan(home, name, law(tmp_path, t2i_r10=0.999), "cpu")
    assert (breached["step"], breached["command"], breached["action"]) == ("contingency", None, None)
    assert breached["do"] == (
        f"{name} was combined: take a step with its members (`chimera slo plan --run MEMBER`), and combine these again."
    )
    told = explain_objective(home, "viability", name, law(tmp_path, t2i_r10=0.999), "cpu")
    assert [one["command"] for one in told["contingency"]] == [None]
    few = plan(home, name, law(tmp_path, t2i_r10=0.001, seeds=5), "cpu")
    words = "Train its members with one state of the source and 5 seeds, and combine these again."
    assert (few["step"], few["command"], few["do"]) == ("measure", None, words)


def law(folder: Path, t2i_r10: float, seeds: int = 1) -> Path:
    """A law with one objective, and one step where it is missed."""
    path = folder / "slo.yaml"
    path.write_text(
        yaml.safe_dump(
            {
                "schema_version": 1,
                "law": False,
                "objectives": [
                    {
                        "id": "viability",
                        "title": "retrieval",
                        "profiles": ["gpu", "cpu"],
                        "kind": "train",
                        "split": "dev",
                        "seeds_at_least": seeds,
                        "all_of": [{"figure": "t2i_r10", "comparison": ">=", "limit": t2i_r10}],
                        "measure": "chimera eval --run {run} --split dev",
                        "actions": [{"id": "longer", "do": "Train longer.", "set": {"epochs": 9}}],
                    }
                ],
            }
        )
    )
    return path


def test_seeds_of_one_run_make_one_model(home: Path) -> None:
    name = run(home, "wide").name
    result = combine(home, [f"{name}/seed-1", f"{name}/seed-0"], "seeds", "cpu")
    group = resolve_run(home, result["group"])[0]
    assert (group.seeds, result["members"]) == ((1,), [f"{name}/seed-1", f"{name}/seed-0"])
    assert group.facts["combines"][1]["checkpoints"] == {"1": file_hash(checkpoint(home, "wide", 0))}
    image, text = embedded(home, "seeds", 1)
    parts = [embedded(home, "wide", seed) for seed in (0, 1)]
    assert np.allclose(image @ text.T, sum(one @ other.T for one, other in parts) / 2, atol=1e-6)


def test_steps_that_a_member_took_by_itself_are_told(home: Path) -> None:
    lonely = run(home, "lonely")
    path, settings = lonely.seed_dir(0) / "result.json", lonely.seed_dir(0) / "config.yaml"
    before, begun = path.read_text(), settings.read_text()
    row = {"step": 1, "measure": "smaller", "what": "images of 32 px", "settings": {"image.image_size": 32}}
    result = json.loads(before)
    write_sealed_json(path, result | {"details": result["details"] | {"contingency": [row]}})
    (lonely.seed_dir(0) / "config-begun.yaml").write_text(begun.replace("image_size: 32", "image_size: 64"))
    name = combine(home, ["train-lonely/seed-0", "train-wide/seed-1"], "helped", "cpu")["group"]
    assert "**Another function.** images of 32 px" in report(home, name).markdown
    settings = yaml.safe_load((run(home, "helped").seed_dir(0) / "config.yaml").read_text())["members"]
    assert settings["0"]["image"]["image_size"] == 32, "as it was trained at last"
    path.write_text(before)
    (lonely.seed_dir(0) / "config-begun.yaml").unlink()


def test_what_members_learned_from_besides_is_told(home: Path) -> None:
    lonely = run(home, "lonely")
    other = {"name": "elsewhere", "fingerprint": "other"}
    changed = update_group(lonely, init_from={"run": "train-x", "packs": [other]}, stream={"pattern": "a.tar"})
    path = lonely.seed_dir(0) / "result.json"
    before = path.read_text()
    made = json.loads(before)["made_with"] | {"stream": {"pattern": "a.tar"}}
    write_sealed_json(path, json.loads(before) | {"made_with": made})
    heard: list[Event] = []
    name = combine(home, ["train-lonely/seed-0", "train-wide/seed-0"], "tales", "cpu", listener=heard.append)["group"]
    assert any("has learned from elsewhere: images of it" in e.message for e in heard if isinstance(e, Note))
    told = report(home, name).markdown
    assert f"`{changed.name}/seed-0` began with the weights of `train-x`, which has learned from elsewhere." in told
    assert f"`{changed.name}/seed-0` learned from the stream `a.tar`." in told
    update_group(lonely, init_from=None, stream=None)
    path.write_text(before)


def test_members_of_other_source_or_of_another_machine_are_no_evidence(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: list[Event] = []
    monkeypatch.setattr("chimera_cli.services.provenance.source_hash", lambda: "later")
    monkeypatch.setattr("chimera_cli.services.provenance.hardware", lambda _: {"device": "cpu", "cpu": "other"})
    result = combine(home, ["train-wide", "train-narrow"], "mixed", "cpu", listener=heard.append)
    hashes = {run(home, name).facts["source_hash"] for name in ("wide", "mixed")}
    assert len(hashes) == 2
    assert "later" not in hashes
    told = [event.message for event in heard if isinstance(event, Note) and event.level == "warning"]
    assert ["no evidence" in told[0], "are left out" in told[1], len(told)] == [True, True, 2]
    assert "Times are those" not in report(home, result["group"]).markdown
    judged = plan(home, result["group"], profile="cpu")
    assert "train combine" not in str(judged["command"])
    assert result["figures"]["wall_s"] is None
    assert result["figures"]["rsum"] > 0


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["train-wide"], "one run is nothing to combine"),
        (["train-wide", "train-wide"], r"train-wide-\S+ is named twice"),
        (["train-wide", "train-narrow/seed-0"], "runs and seeds of runs are mixed"),
        (["train-wide", "train-lonely"], r"train-lonely\S+ has finished seed 0, train-wide\S+ seeds 0, 1$"),
        (["train-wide", "nothing"], "there is no training run 'nothing' with a finished seed"),
        (["train-wide/seed-0", "train-lonely/seed-3"], "has no 'seed-3'"),
    ],
)
def test_what_can_not_be_combined_is_named_and_nothing_is_made(home: Path, names: list[str], words: str) -> None:
    before = len(list_groups(home))
    with pytest.raises(UsageError, match=words):
        combine(home, names, "x", "cpu")
    assert len(list_groups(home)) == before


def test_other_packs_and_lost_checkpoints_are_refused(home: Path) -> None:
    before = len(list_groups(home))
    lonely = run(home, "lonely")
    names = ["train-wide/seed-0", "train-lonely/seed-0"]
    update_group(lonely, pack={**lonely.facts["pack"], "name": "large", "fingerprint": "other"})
    with pytest.raises(ChimeraError, match=r"were trained on different packs \(small and large\)"):
        combine(home, names, "x", "cpu")
    update_group(lonely, pack=lonely.facts["pack"])
    facts = lonely.path / "group.json"
    sealed = facts.read_text()
    facts.write_text(sealed.replace('"cores": ', '"cores": 1'))
    with pytest.raises(ChimeraError, match=r"group\.json was edited"):
        combine(home, names, "x", "cpu")
    facts.write_text(sealed)
    path = checkpoint(home, "lonely", 0)
    aside = path.rename(path.with_suffix(".aside"))
    with pytest.raises(ChimeraError, match=r"best\.safetensors is gone"):
        combine(home, names, "x", "cpu")
    aside.rename(path)
    assert len(list_groups(home)) == before


def test_a_combination_is_neither_a_member_nor_trained_on_nor_a_recipe(home: Path) -> None:
    name = run(home, "both").name
    with pytest.raises(UsageError, match="is a combination itself") as refused:
        combine(home, ["train-wide", name], "again", "cpu")
    members = [run(home, one).name for one in ("wide", "narrow")]
    assert str(refused.value.hint).endswith(": " + " ".join(members))
    changes = load_config(TrainConfig, None, [*RECIPE, f"init_from={name}"])
    with pytest.raises(ChimeraError, match="is a combination of 2 models"):
        train_full(home, changes, (0,), "begun", "x")
    # One that was interrupted is no training to go on with.
    update_group(run(home, "both"), status="interrupted")
    with pytest.raises(UsageError, match="there is no training run to go on with"):
        resumable_group(home, "latest")
    with pytest.raises(UsageError, match="was combined, not trained") as again:
        resumable_group(home, name)
    assert again.value.hint == f"`chimera train combine {' '.join(members)}` does it again"
    update_group(run(home, "both"), status="finished")
    with pytest.raises(ChimeraError, match=r"has the features of several recipes") as caught:
        evaluate_baseline(home, name, split="test", device="cpu")
    assert run(home, "both").facts["test_looks"] == 0, "it is refused before anybody looks"
    assert caught.value.hint == f"--run {members[0]} or {members[1]}"


def test_the_command_prints_the_figures_of_the_new_run(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CHIMERA_HOME", str(home))
    words = ["train", "combine", "train-wide", "train-narrow", "--label", "told", "--device", "cpu"]
    app([*words, "--json"], standalone_mode=False)
    printed: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert printed["group"] == run(home, "told").name
    assert printed["figures"]["rsum"] == pytest.approx(
        sum(one["details"]["best_dev"]["rsum"] for one in run(home, "both").results()) / 2
    )
    app(["runs", "show", printed["group"]], standalone_mode=False)
    shown = capsys.readouterr().out
    assert [line.split()[1] for line in shown.splitlines() if line.startswith("member")] == printed["members"]
    app(words, standalone_mode=False)
    printed_words = capsys.readouterr()
    assert f"{run(home, 'narrow').name}" in printed_words.out
    assert "seed 0 finished\n" in printed_words.err, "its members' hours are not what anybody waited for"
