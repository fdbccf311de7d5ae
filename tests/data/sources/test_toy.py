"""The toy set: the same on every machine, no two scenes alike in meaning, captions that say it all."""

import hashlib
from itertools import product

import numpy as np
import pytest

from chimera_cli.data.sources.toy import COUNTS, Scene, Thing, Toy, columns, draw, draw_all, make_scenes, make_toy


@pytest.fixture(scope="module")
def toy() -> Toy:
    return make_toy()


def test_pixels_and_captions_are_pinned(toy: Toy) -> None:
    digest = hashlib.sha256()
    for picture in draw_all(toy, 96):
        digest.update(picture.pixels.tobytes())
    assert digest.hexdigest() == "99e8beeea01ea1de67c182726ec4643944b90fced5b089d32ce1c9ef60ca3499"
    texts = "\n".join(caption.text for caption in toy.captions)
    assert (
        hashlib.sha256(texts.encode()).hexdigest() == "be00da737ed7ea64e2f9ec38b07d0eec4db3f5fb98f1fa9a2efd201efd61a982"
    )


def test_counts_and_order(toy: Toy) -> None:
    assert COUNTS == {"train": 2000, "dev": 300, "test": 300}
    assert [item.split for item in toy.items] == ["train"] * 2000 + ["dev"] * 300 + ["test"] * 300
    assert len(toy.captions) == 5 * 2600
    pairs = sum(len(scene.things) == 2 for scene in toy.scenes)
    assert 1200 < pairs < 1400


def test_no_two_scenes_mean_the_same(toy: Toy) -> None:
    assert len({tuple(columns(scene).items()) for scene in toy.scenes}) == 2600


def test_no_two_captions_of_different_scenes_are_the_same(toy: Toy) -> None:
    owners: dict[str, set[int]] = {}
    for caption in toy.captions:
        owners.setdefault(caption.text, set()).add(caption.image)
    assert all(len(images) == 1 for images in owners.values())
    assert len(owners) == len(toy.captions)


def test_every_caption_names_colours_and_background(toy: Toy) -> None:
    for caption in toy.captions:
        scene = toy.scenes[caption.image]
        assert {scene.ground, *(thing.colour for thing in scene.things)} <= set(caption.text.lower().split())


def test_another_seed_is_another_set() -> None:
    assert make_scenes(50, 0) != make_scenes(50, 1)
    assert make_scenes(50, 0) == make_scenes(100, 0)[:50]


@pytest.mark.parametrize("size", [32, 96, 224])
def test_things_are_where_the_scene_says(size: int) -> None:
    thing = Thing("circle", "red", "large", "plain")
    half = slice(0, size // 2), slice(size // 2, size)
    for (row, vertical), (column, horizontal) in product(enumerate(("top", "bottom")), enumerate(("left", "right"))):
        pixels = draw(Scene("black", (thing,), "", f"{vertical} {horizontal}"), size, 0, 0)
        red = pixels[..., 0] > 128
        assert red.sum() > 0
        assert red[half[row], half[column]].sum() == red.sum()
    small = draw(Scene("black", (Thing("circle", "red", "small", "plain"),), "", "centre"), size, 0, 0)
    assert 0 < (small[..., 0] > 128).sum() < red.sum() / 2


def test_pairs_stand_in_their_relation() -> None:
    red, blue = Thing("square", "red", "small", "plain"), Thing("square", "blue", "large", "plain")
    for relation, axis in (("left of", 1), ("above", 0)):
        pixels = draw(Scene("black", (red, blue), relation, "middle"), 96, 0, 0).astype(int)
        places = [np.argwhere(pixels[..., channel] > 150)[:, axis].mean() for channel in (0, 2)]
        assert places[0] < 40
        assert places[1] > 56


def test_every_shape_and_texture_looks_different() -> None:
    looks = {
        draw(Scene("black", (Thing(shape, "red", size, texture),), "", "centre"), 96, 0, 0).tobytes()
        for shape in ("circle", "ring", "square", "diamond", "triangle", "cross", "star", "crescent")
        for size in ("small", "large")
        for texture in ("plain", "striped", "dotted", "checked")
    }
    assert len(looks) == 8 * 2 * 4
