"""Sessions: what they compute is what the tower computes, the tower stays as it was, and a misfit is told."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn

from chimera_cli.models.image_tower import ImageTower, build_image_tower
from chimera_cli.models.sessions import (
    SessionError,
    caption_session,
    compare,
    compiled,
    image_session,
    session_backend,
    state_session,
)
from chimera_cli.models.text_tower import build_text_tower
from chimera_cli.models.weights import DEFAULT_IMAGE, DEFAULT_TEXT

needs_sessions = pytest.mark.skipif(session_backend() is None, reason="onnxruntime or onnx is not installed")


def relative(ours: Tensor, theirs: Tensor) -> float:
    return float(((ours - theirs).flatten(1).norm(dim=1) / theirs.flatten(1).norm(dim=1)).max())


@pytest.fixture(scope="module")
def lite0() -> ImageTower:
    return build_image_tower(DEFAULT_IMAGE).eval()


@needs_sessions
def test_an_image_session_computes_what_the_tower_does(lite0: ImageTower) -> None:
    torch.manual_seed(0)
    run = image_session(lite0, torch.randn(4, 3, 64, 64))
    pixels = torch.randn(5, 3, 64, 64).contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        assert relative(run(pixels), lite0(pixels)) < 1e-5
    alone = torch.cat([run(image) for image in torch.split(pixels, 1)])
    assert relative(alone, run(pixels)) < 1e-5
    with ThreadPoolExecutor(2) as pool:
        assert torch.equal(torch.cat(list(pool.map(run, torch.split(pixels, 1)))), alone)


@needs_sessions
@pytest.mark.parametrize("weights", ["tiny", DEFAULT_TEXT])
def test_a_caption_session_computes_captions_of_any_length(weights: str) -> None:
    tower = build_text_tower(weights).eval()
    torch.manual_seed(0)
    run = caption_session(tower, [torch.randint(1000, 9000, (tokens,)) for tokens in (4, 9)])
    # The exporter leaves a module in the mode that it thinks it found: with dropout the tower would be another.
    assert not any(module.training for module in tower.modules())
    for batch, tokens in ((1, 1), (1, 3), (3, 9), (2, 30)):
        ids = torch.randint(1000, 9000, (batch, tokens))
        given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        with torch.inference_mode():
            assert relative(run(given), tower(given)) < 1e-5


@needs_sessions
def test_a_state_session_computes_what_the_locked_layers_do() -> None:
    tower = build_text_tower("tiny")
    tower.learn_only(1)
    tower.train()
    run = state_session(tower, [torch.arange(1000, 1005)])
    assert tower.layers()[1].training
    assert not tower.layers()[0].training
    ids = torch.randint(1000, 9000, (3, 7))
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with torch.inference_mode():
        assert run(given).shape == (3, 7, 32)
        assert relative(run(given), tower.lower_states(given)) < 1e-5


class Looping(nn.Module):
    """A module whose result depends on its input in a way that no trace sees."""

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs * float(inputs.sum())


class Unknown(nn.Module):
    """A module that has no counterpart in ONNX."""

    def forward(self, inputs: Tensor) -> Tensor:
        return torch.special.bessel_j0(inputs)


@needs_sessions
def test_a_module_that_cannot_be_exported_is_told_in_one_line() -> None:
    with pytest.raises(SessionError, match="onnxruntime can't take this tower") as caught:
        compiled(Unknown().eval(), torch.ones(1, 2), ("batch",))
    assert "\n" not in str(caught.value)


@needs_sessions
def test_a_session_that_computes_something_else_is_refused() -> None:
    run = compiled(Looping().eval(), torch.ones(1, 2), ("batch",))
    given = torch.full((1, 2), 3.0)
    with pytest.raises(SessionError, match=r"is off by 6\.7e-01 on some images, 1e-03 is allowed"):
        compare(run(given), Looping()(given), "images")
    with pytest.raises(SessionError, match="onnxruntime can't run this tower"):
        run(torch.ones(1, 3))


@pytest.mark.parametrize(("error", "fits"), [(9e-4, True), (1.1e-3, False), (float("nan"), False)])
def test_every_vector_is_compared_by_its_own_length(error: float, fits: bool) -> None:
    theirs = torch.tensor([[100.0, 0.0], [0.0, 1.0]])
    ours = theirs + torch.tensor([[0.0, 0.0], [error, 0.0]])
    check: Callable[[], None] = lambda: compare(ours, theirs, "captions")  # noqa: E731
    if fits:
        check()
    else:
        with pytest.raises(SessionError, match="on some captions"):
            check()


def test_without_the_libraries_there_is_no_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    assert session_backend() is None
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    assert session_backend() is None
