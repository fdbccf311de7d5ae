"""Inference sessions: a locked tower compiled by ONNX Runtime, on a CPU several times as fast as PyTorch's own kernels.

ONNX Runtime folds normalisations into convolutions, fuses activations and lays tensors out for the vector units. It
computes in float32 whatever the processor offers beside it, and one session serves many threads at once. OpenVINO is
a fifth faster on images and as fast on captions, but twice the size, takes bfloat16 unless told otherwise, and sends
usage data from its first import on.
"""

import importlib.util
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from chimera_cli.models.image_tower import ImageTower
from chimera_cli.models.text_tower import TextTower
from chimera_cli.models.tokens import Tokens

# What a session may be off by: relative L2 distance of a vector to that of the same tower in PyTorch.
TOLERANCE = 1e-3


class SessionError(Exception):
    """A tower can't be compiled here, or its session computes something else; the message says which."""


def session_backend() -> str | None:
    """Return the name and version of what compiles towers on this machine, None where it is not installed."""
    if importlib.util.find_spec("onnx") is None:
        return None
    try:
        import onnxruntime
    except ImportError:
        return None
    return f"onnxruntime {onnxruntime.__version__}"


def image_session(tower: ImageTower, sample: Tensor) -> Callable[[Tensor], Tensor]:
    """Return what computes `tower(pixels)`, (batch, width) of normalised pixels (batch, 3, S, S), in one thread.

    `sample` are a few such pixels, by which the session is compared with the tower. Raises SessionError.
    """
    run = compiled(tower, sample[:1], ("batch",))
    compare(run(sample), _plainly(tower, sample), "images")
    return run


def map_session(tower: ImageTower, sample: Tensor) -> Callable[[Tensor], Tensor]:
    """Return what computes `tower.lower_maps(pixels)`, as `image_session` does features."""
    lower = _Lower(tower)
    run = compiled(lower, sample[:1], ("batch",))
    compare(run(sample), _plainly(lower, sample), "images")
    return run


class _Lower(nn.Module):
    """The locked blocks of an image tower: pixels (batch, 3, S, S) -> maps (batch, ...)."""

    def __init__(self, tower: ImageTower) -> None:
        super().__init__()
        self.tower = tower
        # The exporter puts all of a module back into the mode that it finds on its outside.
        self.training = tower.training

    def forward(self, pixels: Tensor) -> Tensor:
        """Return the maps after the last locked block."""
        return self.tower.lower_maps(pixels)


def caption_session(tower: TextTower, samples: Sequence[Tensor]) -> Callable[[Tokens], Tensor]:
    """Return what computes `tower(tokens)`, (batch, width), of captions of one length each batch, in one thread.

    `samples` are the `input_ids` of a few captions, (tokens,) each, by which the session is compared with the tower.
    Raises SessionError.
    """
    return _token_session(_Unpadded(tower, tower.forward), samples, 1)


def state_session(tower: TextTower, samples: Sequence[Tensor]) -> Callable[[Tokens], Tensor]:
    """Return what computes `tower.lower_states(tokens)`, (batch, tokens, width), as `caption_session` does features."""
    return _token_session(_Unpadded(tower, tower.lower_states), samples, 2)


def _token_session(
    unpadded: "_Unpadded", samples: Sequence[Tensor], varying_outputs: int
) -> Callable[[Tokens], Tensor]:
    run = compiled(unpadded, samples[0].repeat(2, 1), ("batch", "tokens"), varying_outputs)
    for row in (ids.unsqueeze(0) for ids in samples):
        compare(run(row), _plainly(unpadded, row), "captions")
    return lambda tokens: run(tokens["input_ids"])


class _Unpadded(nn.Module):
    """A text tower for captions of one length: `input_ids` (batch, tokens) -> what `encode` makes of them."""

    def __init__(self, tower: TextTower, encode: Callable[[Tokens], Tensor]) -> None:
        super().__init__()
        self.tower = tower
        self.encode = encode
        # As in `_Lower`.
        self.training = tower.training

    def forward(self, ids: Tensor) -> Tensor:
        """Return what is made of captions without padding."""
        return self.encode({"input_ids": ids, "attention_mask": torch.ones_like(ids)})


def compiled(
    module: nn.Module, example: Tensor, axes: Sequence[str], varying_outputs: int = 1
) -> Callable[[Tensor], Tensor]:
    """Return `module`, of one tensor, as a session that runs in the calling thread.

    Of its input the first `axes` may vary in length, of its output the first `varying_outputs` of these. Raises
    SessionError where the module can't be exported or loaded, and what is returned where it can't be run.
    """
    try:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        # Threads run sessions side by side, each on images or captions of its own: there is nothing to wait for.
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 3
        with TemporaryDirectory() as folder:
            path = Path(folder) / "tower.onnx"
            _export(module, example, axes, varying_outputs, path)
            session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        # Whatever a tower of any make brings up here, PyTorch can still compute it.
        raise SessionError(f"onnxruntime can't take this tower ({_first_line(error)})") from error

    def run(inputs: Tensor) -> Tensor:
        try:
            return torch.from_numpy(session.run(None, {"input": inputs.contiguous().numpy()})[0])
        except Exception as error:
            raise SessionError(f"onnxruntime can't run this tower ({_first_line(error)})") from error

    return run


def _export(module: nn.Module, example: Tensor, axes: Sequence[str], varying_outputs: int, path: Path) -> None:
    """Write `module` as ONNX."""
    varying = {"input": dict(enumerate(axes)), "output": dict(enumerate(axes[:varying_outputs]))}
    with warnings.catch_warnings(), torch.no_grad():
        # The exporter warns of its own deprecation, and the tracer of every shape that a tower looks at.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module, (example,), path, dynamo=False, input_names=["input"], output_names=["output"], dynamic_axes=varying
        )


def compare(ours: Tensor, theirs: Tensor, what: str, name: str = "onnxruntime") -> None:
    """Raise SessionError where a vector of `ours` (n, width) is not that of `theirs` to within the tolerance."""
    if ours.shape != theirs.shape:
        raise SessionError(f"{name} makes {tuple(ours.shape)} of some {what}, not {tuple(theirs.shape)}")
    distance = (ours - theirs).flatten(1).norm(dim=1) / theirs.flatten(1).norm(dim=1).clamp(min=1e-12)
    # Written so that a distance which is not a number is none that fits.
    if not bool((distance <= TOLERANCE).all()):
        raise SessionError(f"{name} is off by {distance.max():.1e} on some {what}, {TOLERANCE:.0e} is allowed")


def compare_text_parts(tower: TextTower, samples: Sequence[Tensor], device: torch.device) -> None:
    """Raise SessionError where the locked layers and then those that learn don't make what the whole tower makes.

    `samples` are the `input_ids` of a few captions, (tokens,) each.
    """

    def parts(tokens: dict[str, Tensor]) -> Tensor:
        features: Tensor = tower(tokens | {"states": tower.lower_states(tokens)})
        return features

    with _evaluated(tower):
        for row in (ids.unsqueeze(0).to(device) for ids in samples):
            tokens = {"input_ids": row, "attention_mask": torch.ones_like(row)}
            ours = _in_two(parts, tokens, "text tower")
            compare(ours, _plainly(tower, tokens), "captions", "the text tower in two parts")


def compare_image_parts(tower: ImageTower, sample: Tensor) -> None:
    """Raise SessionError where the locked blocks and then those that learn don't make what the whole tower makes.

    `sample` are a few normalised pixels (batch, 3, S, S).
    """
    with _evaluated(tower):
        ours = _in_two(lambda pixels: tower(tower.lower_maps(pixels)), sample, "image tower")
        compare(ours, _plainly(tower, sample), "images", "the image tower in two parts")


def _in_two(compute: Callable[[Any], Tensor], inputs: Any, tower: str) -> Tensor:
    try:
        with torch.inference_mode():
            return compute(inputs)
    except (AssertionError, AttributeError, IndexError, TypeError, ValueError, RuntimeError) as error:
        # Whatever a tower of another make stumbles over: it can still be computed whole.
        raise SessionError(f"this {tower} can't be computed in two parts ({_first_line(error)})") from error


@contextmanager
def _evaluated(tower: nn.Module) -> Iterator[None]:
    """Let a tower be without dropout for a while."""
    was_training = tower.training
    tower.eval()
    try:
        yield
    finally:
        tower.train(was_training)


def _plainly(module: nn.Module, inputs: Any) -> Tensor:
    with torch.inference_mode():
        outputs: Tensor = module(inputs)
    return outputs


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
