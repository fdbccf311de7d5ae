"""The toy data set: coloured shapes on plain ground, drawn and described by a seeded generator, integers only.

Every scene is one meaning (what is where, in which colour, size and texture, on which ground), no two scenes mean the
same, and each of a scene's five captions says all of its meaning in other words. Randomness is taken from the raw
64-bit output of PCG64, which numpy guarantees for good (NEP 19); its distributions and floating point are avoided, so
that pixels and captions are the same on every machine.
"""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from chimera_cli.data.pack import Caption, Item, Picture

COUNTS = {"train": 2_000, "dev": 300, "test": 300}
DEFAULT_SIZE = 96
LEAST_SIZE = 32
GENERATOR_VERSION = 1  # part of a pack's source digest: change it with anything that changes a pixel or a word
LICENCE = "Drawn and described by chimera; free of rights (CC0 1.0)."

Mask = NDArray[np.bool_]
Coordinates = NDArray[np.int64]

_COLOURS = {
    "red": (210, 40, 40),
    "green": (40, 160, 60),
    "blue": (50, 90, 220),
    "yellow": (235, 210, 50),
    "orange": (240, 135, 30),
    "purple": (140, 60, 180),
    "pink": (245, 140, 190),
    "turquoise": (60, 200, 205),
}
_GROUNDS = {
    "white": (244, 244, 244),
    "black": (16, 16, 16),
    "grey": (128, 128, 128),
    "brown": (104, 72, 48),
    "beige": (216, 204, 172),
}
_RADII = {"small": 11, "large": 20}  # percent of the image's side
_THIRDS = (22, 50, 78)  # where single objects stand, percent of the side
_BANDS = (25, 50, 75)  # where pairs stand across the direction of their relation
_PAIR = (27, 73)  # where the two of a pair stand along it
_TEXTURES = ("plain", "striped", "dotted", "checked")
_PLACES = (
    ("top left", "top", "top right"),
    ("left", "centre", "right"),
    ("bottom left", "bottom", "bottom right"),
)
_PAIR_PLACES = {"left of": ("top", "middle", "bottom"), "above": ("left side", "middle", "right side")}

_WORDS = {
    "circle": ("circle", "disc"),
    "ring": ("ring", "hoop"),
    "square": ("square", "box"),
    "diamond": ("diamond", "rhombus"),
    "triangle": ("triangle",),
    "cross": ("cross", "plus sign"),
    "star": ("star",),
    "crescent": ("crescent", "moon"),
    "small": ("small", "little", "tiny"),
    "large": ("large", "big", "huge"),
    "plain": ("plain", "solid", "unpatterned"),
    "striped": ("striped", "stripy"),
    "dotted": ("dotted", "spotted"),
    "checked": ("checked", "chequered"),
}
_WHERE = {
    "top left": ("in the top left corner", "at the upper left"),
    "top": ("at the top", "at the upper edge"),
    "top right": ("in the top right corner", "at the upper right"),
    "left": ("at the left edge", "on the left"),
    "centre": ("in the centre", "in the middle"),
    "right": ("at the right edge", "on the right"),
    "bottom left": ("in the bottom left corner", "at the lower left"),
    "bottom": ("at the bottom", "at the lower edge"),
    "bottom right": ("in the bottom right corner", "at the lower right"),
    "middle": ("across the middle", "through the centre"),
    "left side": ("along the left side", "on the left"),
    "right side": ("along the right side", "on the right"),
}
_SINGLE_SENTENCES = (
    "{a} {where} of a {ground} picture .",
    "On a {ground} background there is {a} {where} .",
    "{where} , {a} is drawn on {ground} ground .",
    "The {ground} image shows {a} , placed {where} .",
    "Somebody painted {a} {where} of a {ground} canvas .",
)
_PAIR_SENTENCES = {
    "left of": (
        "{a} to the left of {b} {where} of a {ground} picture .",
        "On a {ground} background {b} is right of {a} , both {where} .",
        "{where} , on {ground} ground : {a} on the left and {b} on the right .",
        "The {ground} image shows {b} with {a} on its left , {where} .",
        "Somebody painted {a} and , to its right , {b} {where} of a {ground} canvas .",
    ),
    "above": (
        "{a} above {b} {where} of a {ground} picture .",
        "On a {ground} background {b} is below {a} , both {where} .",
        "{where} , on {ground} ground : {a} at the top and {b} underneath .",
        "The {ground} image shows {b} with {a} over it , {where} .",
        "Somebody painted {a} and , beneath it , {b} {where} of a {ground} canvas .",
    ),
}


@dataclass(frozen=True)
class Thing:
    """One object: what is drawn, apart from where."""

    shape: str
    colour: str
    size: str
    texture: str


@dataclass(frozen=True)
class Scene:
    """A meaning. With one thing `relation` is "" and `place` one of nine; with two `place` is the pair's band.

    A pair is always told as `left of` or `above`, so that equal scenes are equal objects.
    """

    ground: str
    things: tuple[Thing, ...]
    relation: str
    place: str


class _Dice:
    """Integers from the raw stream of PCG64; the modulo's bias is below 2**-57 for the few faces used here."""

    def __init__(self, *entropy: int) -> None:
        self._bits = np.random.PCG64(np.random.SeedSequence(entropy))

    def below(self, faces: int) -> int:
        return int(self._bits.random_raw()) % faces

    def pick(self, options: tuple[str, ...]) -> str:
        return options[self.below(len(options))]

    def noise(self, count: int) -> NDArray[np.int16]:
        """Return `count` integers from -8 to 7."""
        raw = np.asarray(self._bits.random_raw(-(-count // 8)), dtype="<u8").view(np.uint8)[:count]
        return (raw >> 4).astype(np.int16) - 8


# ---- meanings and words ---------------------------------------------------------------------------------------------


def make_scenes(count: int, seed: int) -> list[Scene]:
    """Return `count` scenes of which no two mean the same, half of them (about) with one object, half with two."""
    dice = _Dice(seed, 0)
    scenes: dict[Scene, None] = {}
    while len(scenes) < count:
        scenes.setdefault(_draw_scene(dice))
    return list(scenes)


def describe(scene: Scene, index: int, seed: int, number: int) -> str:
    """Return the caption `index` (0-4) of the scene `number`: the whole meaning in that index's wording."""
    dice = _Dice(seed, 1, number, index)
    phrases = [_phrase(thing, dice) for thing in scene.things]
    sentences = _PAIR_SENTENCES[scene.relation] if scene.relation else _SINGLE_SENTENCES
    words = {"where": dice.pick(_WHERE[scene.place]), "ground": scene.ground} | dict(zip("ab", phrases, strict=False))
    text = sentences[index].format(**words)
    return text[0].upper() + text[1:]


def columns(scene: Scene) -> dict[str, str | int | None]:
    """Return the meaning as columns of the items table; those of a second object are None where there is none."""
    first, second = scene.things[0], scene.things[1] if len(scene.things) > 1 else None
    return {
        "objects": len(scene.things),
        "background": scene.ground,
        "position": scene.place,
        "relation": scene.relation or None,
        **vars(first),
        **{f"{name}_2": vars(second)[name] if second else None for name in vars(first)},
    }


def _draw_scene(dice: _Dice) -> Scene:
    ground = dice.pick(tuple(_GROUNDS))
    if dice.below(2) == 0:
        return Scene(ground, (_draw_thing(dice),), "", _PLACES[dice.below(3)][dice.below(3)])
    first = second = _draw_thing(dice)
    while (first.shape, first.colour) == (second.shape, second.colour):
        second = _draw_thing(dice)
    relation = dice.pick(tuple(_PAIR_PLACES))
    return Scene(ground, (first, second), relation, dice.pick(_PAIR_PLACES[relation]))


def _draw_thing(dice: _Dice) -> Thing:
    return Thing(dice.pick(tuple(_SHAPES)), dice.pick(tuple(_COLOURS)), dice.pick(tuple(_RADII)), dice.pick(_TEXTURES))


def _phrase(thing: Thing, dice: _Dice) -> str:
    size, texture, shape = (dice.pick(_WORDS[word]) for word in (thing.size, thing.texture, thing.shape))
    article = "an" if size[0] in "aeiou" else "a"
    return f"{article} {size} {texture} {thing.colour} {shape}"


# ---- pixels ---------------------------------------------------------------------------------------------------------


def draw(scene: Scene, size: int, seed: int, number: int) -> NDArray[np.uint8]:
    """Return the scene as (size, size, 3) uint8: places jittered by up to 2 %, a little noise over everything."""
    dice = _Dice(seed, 2, number)
    canvas = np.empty((size, size, 3), dtype=np.int16)
    canvas[:] = _GROUNDS[scene.ground]
    for thing, centre in zip(scene.things, _centres(scene), strict=True):
        shift = size * 2 // 100
        x, y = (size * percent // 100 + dice.below(2 * shift + 1) - shift for percent in centre)
        _paint(canvas, thing, x, y)
    canvas += dice.noise(canvas.size).reshape(canvas.shape)
    return canvas.clip(0, 255).astype(np.uint8)


def _centres(scene: Scene) -> list[tuple[int, int]]:
    """Return the centre (x, y) of each thing in percent of the side."""
    if scene.relation:
        band = _BANDS[_PAIR_PLACES[scene.relation].index(scene.place)]
        return [(along, band) if scene.relation == "left of" else (band, along) for along in _PAIR]
    row = next(row for row, places in enumerate(_PLACES) if scene.place in places)
    return [(_THIRDS[_PLACES[row].index(scene.place)], _THIRDS[row])]


def _paint(canvas: NDArray[np.int16], thing: Thing, x: int, y: int) -> None:
    size = canvas.shape[0]
    rows, across = _grid(size)
    dx, dy = across - x, rows - y
    mask = _SHAPES[thing.shape](dx, dy, size * _RADII[thing.size] // 100)
    bright = np.array(_COLOURS[thing.colour], dtype=np.int16)
    canvas[mask] = bright
    canvas[mask & _texture(thing.texture, dx, dy, max(size // 24, 2))] = bright * 2 // 5


@lru_cache(maxsize=4)
def _grid(size: int) -> tuple[Coordinates, Coordinates]:
    line = np.arange(size, dtype=np.int64)
    return line[:, None], line[None, :]


def _texture(name: str, dx: Coordinates, dy: Coordinates, period: int) -> Mask:
    """Return where the darker second tone goes."""
    if name == "plain":
        return np.zeros((1, 1), dtype=np.bool_)
    if name == "dotted":
        u, v = dx % (2 * period) - period, dy % (2 * period) - period
        return 3 * (u * u + v * v) <= 2 * period * period
    bands: Coordinates = (dx + dy) // period if name == "striped" else dx // period + dy // period
    mask: Mask = bands % 2 == 1
    return mask


def _circle(dx: Coordinates, dy: Coordinates, r: int) -> Mask:
    return dx * dx + dy * dy <= r * r


def _ring(dx: Coordinates, dy: Coordinates, r: int) -> Mask:
    return _circle(dx, dy, r) & ~_circle(dx, dy, r * 11 // 20)


def _square(dx: Coordinates, dy: Coordinates, r: int) -> Mask:
    return np.maximum(abs(dx), abs(dy)) <= r * 17 // 20


def _diamond(dx: Coordinates, dy: Coordinates, r: int) -> Mask:
    return abs(dx) + abs(dy) <= r


def _triangle(dx: Coordinates, dy: Coordinates, r: int) -> Mask:
    return (dy <= r * 3 // 4) & (2 * abs(dx) <= dy + r)


def _cross(dx: Coordinates, dy: Coordinates, r: int) -> Mask:
    bar = r * 3 // 10
    return ((abs(dx) <= bar) & (abs(dy) <= r)) | ((abs(dy) <= bar) & (abs(dx) <= r))


def _star(dx: Coordinates, dy: Coordinates, r: int) -> Mask:
    """Two equilateral triangles, one on its head; 4/7 stands for the tangent of 30 degrees."""
    upright = (2 * dy <= r) & (7 * abs(dx) <= 4 * (dy + r))
    return upright | ((-2 * dy <= r) & (7 * abs(dx) <= 4 * (r - dy)))


def _crescent(dx: Coordinates, dy: Coordinates, r: int) -> Mask:
    return _circle(dx, dy, r) & ~_circle(dx - r // 2, dy, r * 4 // 5)


_SHAPES: dict[str, Callable[[Coordinates, Coordinates, int], Mask]] = {
    "circle": _circle,
    "ring": _ring,
    "square": _square,
    "diamond": _diamond,
    "triangle": _triangle,
    "cross": _cross,
    "star": _star,
    "crescent": _crescent,
}


# ---- the data set ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Toy:
    """All scenes in the order of the splits, and their rows and captions; `draw_all` draws them."""

    scenes: tuple[Scene, ...]
    items: tuple[Item, ...]
    captions: tuple[Caption, ...]


def make_toy(counts: dict[str, int] | None = None, seed: int = 0) -> Toy:
    """Return the scenes, rows and captions of the data set; `counts` gives the number of scenes per split."""
    counts = counts or COUNTS
    scenes = make_scenes(sum(counts.values()), seed)
    splits = [split for split, count in counts.items() for _ in range(count)]
    items = tuple(
        Item(f"scene-{number:05d}", split, columns(scene))
        for number, (scene, split) in enumerate(zip(scenes, splits, strict=True))
    )
    captions = tuple(
        Caption(number, index, describe(scene, index, seed, number))
        for number, scene in enumerate(scenes)
        for index in range(len(_SINGLE_SENTENCES))
    )
    return Toy(tuple(scenes), items, captions)


def draw_all(toy: Toy, size: int, seed: int = 0) -> Iterator[Picture]:
    """Yield the scenes drawn, `size` pixels wide, in order."""
    for number, scene in enumerate(toy.scenes):
        pixels = draw(scene, size, seed, number)
        yield Picture(pixels, hashlib.sha256(pixels.tobytes()).hexdigest(), size, size)
