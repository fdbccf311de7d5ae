"""Configs: every wrong key at once, types, `--set`, seeds; everything a person can type wrong is one sentence."""

from pathlib import Path

import pytest
from pydantic import BaseModel

from chimera_cli.config import SanityConfig, TrainConfig, load_config, parse_seeds, read_yaml, validate
from chimera_cli.errors import ExitCode, UsageError


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def refused(path: Path | None, *changes: str) -> UsageError:
    with pytest.raises(UsageError) as caught:
        load_config(TrainConfig, path, changes)
    assert caught.value.exit_code == ExitCode.USAGE
    return caught.value


def test_all_errors_of_a_file_come_at_once_with_paths_and_near_names(tmp_path: Path) -> None:
    text = "epochs: many\noptimiser:\n  lr_head: 1e-3\nheads:\n  dropout: 1.5\nbatchsize: 5\n"
    error = refused(path := written(tmp_path, text))
    assert str(path) in error.message
    assert "epochs: input should be a valid integer" in error.message
    assert "not 'many'" in error.message
    assert "optimiser.lr_head is an unknown key (did you mean lr_heads?)" in error.message
    assert "heads.dropout: input should be less than 1, not 1.5" in error.message
    assert "batchsize is an unknown key" in error.message
    assert "the keys of optimiser are lr_heads" in error.hint


@pytest.mark.parametrize("text", ["3e-4", "0.0003", "'3e-4'", "3.0e-4"])
def test_numbers_that_yaml_reads_as_text_are_numbers(tmp_path: Path, text: str) -> None:
    config = load_config(TrainConfig, written(tmp_path, f"optimiser:\n  lr_heads: {text}\n"))
    assert config.optimiser.lr_heads == 3e-4
    assert load_config(TrainConfig, None, [f"optimiser.lr_heads={text}"]).optimiser.lr_heads == 3e-4


def test_set_changes_single_keys_and_leaves_the_file_alone(tmp_path: Path) -> None:
    path = written(tmp_path, "epochs: 3\nheads:\n  hidden: 64\n  dim: 32\n")
    changes = ["heads.dim=16", "epochs=7", "text.learn_layers=null", "image.locked=false", "data=toy"]
    config = load_config(TrainConfig, path, changes)
    assert (config.heads.hidden, config.heads.dim, config.epochs, config.data) == (64, 16, 7, "toy")
    assert (config.text.learn_layers, config.image.locked) == (None, False)
    assert load_config(TrainConfig, path).heads.dim == 32
    assert load_config(SanityConfig, None) == SanityConfig()


@pytest.mark.parametrize("change", ["epochs", "=3", " =3"])
def test_set_without_key_or_value_is_refused(change: str) -> None:
    assert "is not key=value" in refused(None, change).message


def test_set_names_unknown_keys_and_broken_values() -> None:
    assert "heads.dims is an unknown key (did you mean dim?)" in refused(None, "heads.dims=3").message
    assert "not YAML" in refused(None, "data=[a").message
    assert "image: input should be a valid dictionary" in refused(None, "image=3").message


@pytest.mark.parametrize("change", ["batch.size=3", "data.name=toy", "epochs.more.still=1"])
def test_set_below_a_key_that_holds_no_keys_is_refused(tmp_path: Path, change: str) -> None:
    assert "has no keys" in refused(written(tmp_path, "batch: 500\ndata: toy\nepochs: 3\n"), change).message


@pytest.mark.parametrize("value", [".inf", ".nan", "-.inf", "inf", "nan"])
def test_rates_are_finite(value: str) -> None:
    assert "optimiser.lr_heads" in refused(None, f"optimiser.lr_heads={value}").message


def test_unknown_keys_in_lists_get_near_names_too() -> None:
    class Entry(BaseModel, extra="forbid"):
        figure: str = ""

    class Entries(BaseModel, extra="forbid"):
        all_of: tuple[Entry, ...] = ()

    with pytest.raises(UsageError, match=r"all_of\.0\.figur is an unknown key \(did you mean figure\?\)") as caught:
        validate(Entries, {"all_of": [{"figur": "a"}]}, "a file")
    assert caught.value.hint == "the keys of all_of.0 are figure"


def test_settings_that_contradict_each_other_are_refused() -> None:
    assert "image.locked: false" in refused(None, "augmentation.crop_scale=0.5").message
    load_config(TrainConfig, None, ["augmentation.crop_scale=0.5", "image.locked=false"])


def test_configs_are_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        TrainConfig().epochs = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("text", "words"),
    [("a: [1", ":1 is not valid YAML"), ("- 1\n- 2\n", "holds no keys"), ("just text", "holds no keys")],
)
def test_files_that_are_no_config_are_refused(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        read_yaml(written(tmp_path, text))


def test_absent_files_binary_files_and_folders_are_refused(tmp_path: Path) -> None:
    written(tmp_path, "epochs: 3\n")
    with pytest.raises(UsageError, match="does not exist") as caught:
        read_yaml(tmp_path / "recipes.yaml")
    assert caught.value.hint == "did you mean recipe.yaml?"
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\x81")
    with pytest.raises(UsageError, match="can't be read"):
        read_yaml(tmp_path / "binary.yaml")
    with pytest.raises(UsageError, match="can't be read"):
        read_yaml(tmp_path)


def test_an_empty_file_is_the_defaults(tmp_path: Path) -> None:
    assert load_config(TrainConfig, written(tmp_path, "# nothing\n")) == TrainConfig()


def test_seeds() -> None:
    assert parse_seeds("0,1,2") == (0, 1, 2)
    assert parse_seeds("7") == (7,)
    for text in ("a,b", "", "1,,2", "1;2", "0,1.5"):
        with pytest.raises(UsageError, match="not a list of whole numbers"):
            parse_seeds(text)
    for text in ("1,1", "-1,0", "18446744073709551616"):
        with pytest.raises(UsageError, match="twice, or one outside 0 to"):
            parse_seeds(text)


def test_one_changed_key_of_a_section_keeps_the_others() -> None:
    config = load_config(SanityConfig, None, ["image.image_size=64", "text.max_tokens=16", "optimiser.lr_text=2e-4"])
    assert not config.image.locked
    assert config.text.learn_layers is None
    assert config.optimiser.lr_image == SanityConfig().optimiser.lr_image


def test_the_proof_of_life_refuses_a_locked_tower() -> None:
    with pytest.raises(UsageError, match="of both towers"):
        load_config(SanityConfig, None, ["image.locked=true"])


def test_what_the_yaml_parser_itself_trips_over_is_told_in_a_sentence() -> None:
    with pytest.raises(UsageError, match="not YAML"):
        load_config(SanityConfig, None, ["data=2024-13-45"])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("batch: 1\nepochs: 2\nbatch: 3\n", ":3 has the key 'batch' again, it is in line 1 already"),
        ("a:\n  - {b: 1, b: 2}\n", ":2 has the key 'b' again, it is in line 2 already"),
        ('a: 1\n"a": 2\n', ":2 has the key 'a' again"),
        ("1: a\n0x1: b\n", ":2 has the key '0x1' again"),
        ("a: &x {b: 1}\nc: {<<: *x, <<: *x}\n", ":2 has the key '<<' again"),
        ("? {a: 1, a: 2}\n: 3\n", " is not valid YAML"),
        ("a: " + "[" * 3000, "nested too deeply|not valid YAML"),
    ],
)
def test_a_key_that_is_there_twice_is_refused_with_its_line(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        read_yaml(written(tmp_path, text))


def test_what_a_merge_brings_may_be_overridden_and_aliases_may_repeat(tmp_path: Path) -> None:
    text = "base: &b {x: 1, y: 2}\none: {<<: *b, y: 3}\ntwo: *b\nlist: [*b, *b]\n"
    base = {"x": 1, "y": 2}
    assert read_yaml(written(tmp_path, text)) == {
        "base": base, "one": {"x": 1, "y": 3}, "two": base, "list": [base, base],
    }  # fmt: skip
