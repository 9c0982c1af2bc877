"""Small synthetic images of shapes, each with a complete description, and multiple-choice questions about them.

A :class:`Scene` holds all attributes of its image: one to three equal shapes of one color and size
lie along one side of a plain background. One combination of attributes in six is *held out*: benchmarks draw only
from those, training data only from the others, so that no benchmark image can have been seen in training.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

from PIL import Image, ImageDraw

from mmpipe.errors import DataError

PIXELS = 48
"""Width and height of an image."""

SHAPES = ("circle", "square", "triangle", "cross")
COLORS = {"red": (215, 45, 40), "green": (40, 155, 60), "blue": (40, 75, 205), "yellow": (240, 210, 45)}
COUNTS = ("one", "two", "three")
SIDES = ("left", "right", "top", "bottom")
SIZES = {"small": 4.0, "large": 6.4}
"""Radius of the shapes in pixels."""
BACKGROUNDS = {"white": (240, 240, 240), "gray": (140, 140, 140), "black": (20, 20, 20)}

ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "shape": SHAPES,
    "color": tuple(COLORS),
    "count": COUNTS,
    "side": SIDES,
    "size": tuple(SIZES),
    "background": tuple(BACKGROUNDS),
}
"""The attributes of an image that are asked about, and their possible values."""

SHORT_ANSWER = "Answer the question using a single word or phrase."
"""Ends every question to be answered by a word (LLaVA-1.5, section 3.2 and table 7)."""
LETTER_ANSWER = "Answer with the option's letter from the given choices directly."
"""Ends every multiple-choice question (LLaVA-1.5, table 7)."""
LETTERS = "ABCD"
QUESTIONS = {
    "shape": "What shape is drawn?",
    "color": "What color is drawn?",
    "count": "How many shapes are drawn?",
    "side": "On which side is it drawn?",
    "size": "What size is drawn?",
    "background": "What color is the background?",
}
"""The question about each attribute of a scene."""

_HELD_OUT_ONE_IN = 4
_CELLS = 3
"""Shapes lie near the centers of a grid of this many rows and columns, one shape in a cell."""
_JITTER = 1.0
"""How far a shape may lie from the center of its cell in each direction, in pixels."""
_OVERSAMPLING = 4
"""Shapes are drawn this much larger and averaged down, which smooths their edges."""


@dataclass(frozen=True)
class Scene:
    """The attributes of one image. ``variation`` seeds the exact positions and shades, which no question is about."""

    shape: str
    color: str
    count: str
    side: str
    size: str
    background: str
    variation: int

    def __post_init__(self) -> None:
        for attribute, values in ATTRIBUTES.items():
            if self.value(attribute) not in values:
                choices = ", ".join(values)
                raise DataError(f"a scene has no {attribute} {self.value(attribute)!r}; choose one of {choices}")

    def value(self, attribute: str) -> str:
        """The answer to a question about ``attribute``, one of :data:`ATTRIBUTES`."""
        return str(getattr(self, attribute))

    @property
    def held_out(self) -> bool:
        """Whether this combination of attributes is reserved for benchmarks. The sum of all value indices, modulo six:
        every value, and every combination of five attributes with at least one color left free, occurs on both
        sides."""
        total = sum(values.index(self.value(attribute)) for attribute, values in ATTRIBUTES.items())
        return total % _HELD_OUT_ONE_IN == 0

    @property
    def caption(self) -> str:
        """One sentence with every attribute."""
        plural = "" if self.count == "one" else "es" if self.shape == "cross" else "s"
        noun = f"{self.count} {self.size} {self.color} {self.shape}{plural}"
        return f"{noun} at the {self.side} of a {self.background} background"

    def draw(self) -> Image.Image:
        """The image, RGB, :data:`PIXELS` square."""
        rng = random.Random(self.variation)
        image = Image.new("RGB", (PIXELS * _OVERSAMPLING,) * 2, _shade(BACKGROUNDS[self.background], 12, rng))
        canvas = ImageDraw.Draw(image)
        fill = _shade(COLORS[self.color], 18, rng)
        for x, y in self._centers(rng):
            _draw_shape(canvas, self.shape, x, y, SIZES[self.size] + rng.uniform(-0.4, 0.4), fill)
        return image.reduce(_OVERSAMPLING)

    def _centers(self, rng: random.Random) -> list[tuple[float, float]]:
        """Centers (x, y) of the shapes in pixels: cells along the scene's side, the middle one for a single shape."""
        edge = 0 if self.side in ("left", "top") else _CELLS - 1
        places = [1] if self.count == "one" else rng.sample(range(_CELLS), COUNTS.index(self.count) + 1)
        cells = [(edge, place) if self.side in ("left", "right") else (place, edge) for place in places]
        width = PIXELS / _CELLS
        jitter = partial(rng.uniform, -_JITTER, _JITTER)
        return [((column + 0.5) * width + jitter(), (row + 0.5) * width + jitter()) for column, row in cells]


def scenes(seed: int, *, held_out: bool = False) -> Iterator[Scene]:
    """Endless random scenes, all held out or none of them; the same seed gives the same scenes."""
    rng = random.Random(seed)
    while True:
        values = {attribute: rng.choice(values) for attribute, values in ATTRIBUTES.items()}
        scene = Scene(**values, variation=rng.getrandbits(32))
        if scene.held_out == held_out:
            yield scene


def _shade(color: tuple[int, int, int], spread: int, rng: random.Random) -> tuple[int, int, int]:
    """A color near ``color``: each channel moved by at most ``spread``."""
    red, green, blue = (min(255, max(0, channel + rng.randint(-spread, spread))) for channel in color)
    return red, green, blue


def _draw_shape(
    canvas: ImageDraw.ImageDraw, shape: str, x: float, y: float, radius: float, fill: tuple[int, int, int]
) -> None:
    """Draw one shape centered at (x, y); all in pixels of the finished image."""
    x, y, radius = x * _OVERSAMPLING, y * _OVERSAMPLING, radius * _OVERSAMPLING

    def box(half_width: float, half_height: float) -> tuple[float, float, float, float]:
        return (x - half_width, y - half_height, x + half_width, y + half_height)

    match shape:
        case "circle":
            canvas.ellipse(box(radius, radius), fill=fill)
        case "square":
            canvas.rectangle(box(radius * 0.9, radius * 0.9), fill=fill)
        case "triangle":
            corners = [(math.pi * (i * 2 / 3 - 1 / 2)) for i in range(3)]
            points = [(x + 1.2 * radius * math.cos(a), y + 1.2 * radius * math.sin(a)) for a in corners]
            canvas.polygon(points, fill=fill)
        case "cross":
            canvas.rectangle(box(radius, radius * 0.33), fill=fill)
            canvas.rectangle(box(radius * 0.33, radius), fill=fill)
        case _:
            raise DataError(f"no drawing for the shape {shape!r}; known: {', '.join(SHAPES)}")


@dataclass(frozen=True)
class Choice:
    """A multiple-choice question: ``options`` in the order of their letters, and the text of the right one."""

    question: str
    options: tuple[str, ...]
    answer: str

    def __post_init__(self) -> None:
        if self.answer not in self.options or not 2 <= len(self.options) <= len(LETTERS):
            raise DataError(
                f"{self.question!r}: {self.answer!r} must be one of two to four options, not {self.options}"
            )

    @property
    def letter(self) -> str:
        """The letter of the right option."""
        return LETTERS[self.options.index(self.answer)]

    @property
    def text(self) -> str:
        """The question and its options, one a line."""
        lines = [f"{letter}. {option}" for letter, option in zip(LETTERS, self.options, strict=False)]
        return "\n".join([self.question, *lines])

    def rotated(self, by: int) -> Choice:
        """The same question with its options moved ``by`` places towards the front, the first ones to the end."""
        return Choice(self.question, self.options[by:] + self.options[:by], self.answer)


def ask(attribute: str, answer: str, rng: random.Random) -> Choice:
    """A question about an attribute with all its values as options, in their usual order from a random one on. One
    fixed circular order leaves as many arrangements as there are options, which a small model learns in a minute; free
    shuffling takes it far longer. CircularEval asks exactly these arrangements."""
    values = ATTRIBUTES[attribute]
    start = rng.randrange(len(values))
    return Choice(QUESTIONS[attribute], values[start:] + values[:start], answer)
