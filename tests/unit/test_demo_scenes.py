"""Images show what their scenes say, and held-out combinations never occur in training."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import islice, product

import numpy as np
import pytest
from scipy import ndimage

from mmpipe.demo.scenes import ATTRIBUTES, BACKGROUNDS, COLORS, COUNTS, PIXELS, Scene, scenes
from mmpipe.errors import DataError

COMBINATIONS = [
    Scene(**dict(zip(ATTRIBUTES, values, strict=True)), variation=0) for values in product(*ATTRIBUTES.values())
]


def read(scene: Scene) -> dict[str, str]:
    """What the pixels show, found without a look at the scene: color, background, count and side."""
    pixels = np.asarray(scene.draw(), dtype=float)
    background = pixels[0, 0]
    drawn = np.abs(pixels - background).sum(axis=2) > 60
    solid = ndimage.binary_erosion(drawn)
    _, count = ndimage.label(drawn)
    row, column = ndimage.center_of_mass(drawn)
    distances = {"top": row, "left": column, "bottom": PIXELS - row, "right": PIXELS - column}

    def nearest(named: dict[str, tuple[int, int, int]], value: np.ndarray) -> str:
        return min(named, key=lambda name: float(np.abs(value - named[name]).sum()))

    return {
        "color": nearest(COLORS, pixels[solid].mean(axis=0)),
        "background": nearest(BACKGROUNDS, background),
        "count": COUNTS[count - 1],
        "side": min(distances, key=lambda side: distances[side]),
    }


def test_images_match_their_scenes() -> None:
    for scene in islice(scenes(3), 300):
        assert read(scene) == {name: scene.value(name) for name in ("color", "background", "count", "side")}


def test_large_shapes_cover_more_than_small_ones() -> None:
    def covered(scene: Scene) -> int:
        pixels = np.asarray(scene.draw(), dtype=float)
        return int((np.abs(pixels - pixels[0, 0]).sum(axis=2) > 60).sum())

    for scene in islice(scenes(4), 50):
        assert covered(replace(scene, size="large")) > 1.5 * covered(replace(scene, size="small"))


def test_every_shape_has_an_outline_of_its_own() -> None:
    scene = next(scenes(5))
    drawings = {replace(scene, shape=shape).draw().tobytes() for shape in ATTRIBUTES["shape"]}
    assert len(drawings) == len(ATTRIBUTES["shape"])


def test_a_scene_determines_its_image() -> None:
    scene = next(scenes(0))
    assert scene.draw().tobytes() == scene.draw().tobytes()
    assert scene.draw().tobytes() != replace(scene, variation=scene.variation + 1).draw().tobytes()
    assert scene.draw().size == (PIXELS, PIXELS)


def test_the_same_seed_gives_the_same_scenes() -> None:
    assert list(islice(scenes(7), 20)) == list(islice(scenes(7), 20))
    assert list(islice(scenes(7), 20)) != list(islice(scenes(8), 20))


def test_streams_keep_to_their_side() -> None:
    assert not any(scene.held_out for scene in islice(scenes(1), 500))
    assert all(scene.held_out for scene in islice(scenes(1, held_out=True), 500))


def test_one_combination_in_four_is_held_out_whatever_the_value_asked_for() -> None:
    for name, values in ATTRIBUTES.items():
        held_out = Counter(scene.value(name) for scene in COMBINATIONS if scene.held_out)
        total = Counter(scene.value(name) for scene in COMBINATIONS)
        assert {value: held_out[value] / total[value] for value in values} == dict.fromkeys(values, 0.25)


def test_captions_are_grammatical() -> None:
    scene = Scene("cross", "red", "one", "left", "small", "white", 0)
    assert scene.caption == "one small red cross at the left of a white background"
    assert replace(scene, count="two").caption.startswith("two small red crosses at")
    assert replace(scene, count="three", shape="circle").caption.startswith("three small red circles at")


def test_a_scene_refuses_values_it_cannot_draw() -> None:
    with pytest.raises(DataError, match="no color 'mauve'; choose one of red"):
        Scene("cross", "mauve", "one", "left", "small", "white", 0)
