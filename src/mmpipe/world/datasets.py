"""Makers of the demo's data sets, each in the file layout of a real one.

A maker writes one data set into an empty directory: ``maker(out, *, seed, **options)``. The same seed and options
write the same bytes.
"""

from __future__ import annotations

import base64
import csv
import io
import json
import random
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from PIL import Image

from mmpipe.world.pictures import ATTRIBUTES, PIXELS, Scene, scenes
from mmpipe.world.questions import ASKED_AS, LETTERS, SHORT_ANSWER, Choice, make_choice

INSTRUCTIONS = (
    "Describe the image concisely.",
    "Provide a brief description of the given image.",
    "Summarize the visual content of the image.",
    "Give a short and clear explanation of the subsequent image.",
)
"""How captions are asked for; four of the eleven phrasings of LLaVA's pretraining data."""

IMAGE_FOLDERS = {"coco/train2017": "{:012d}.jpg", "gqa/images": "{:07d}.jpg"}
"""Where the pictures of an instruction mixture lie, and how each source names its files."""

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

CATEGORIES = {
    "shape": ("attribute_recognition", "finegrained_perception (instance-level)"),
    "color": ("attribute_recognition", "finegrained_perception (instance-level)"),
    "count": ("object_localization", "finegrained_perception (instance-level)"),
    "side": ("spatial_relationship", "finegrained_perception (cross-instance)"),
    "size": ("attribute_comparison", "finegrained_perception (cross-instance)"),
    "background": ("image_scene", "coarse_perception"),
}
"""MMBench's category and l2-category for a question about each attribute."""

MMBENCH_COLUMNS = (
    ["index", "question", "hint", *LETTERS, "answer", "category", "image", "source", "l2-category"]
    + ["comment", "split"]
)  # fmt: skip
ROTATION = 1_000_000
"""Row ``index + k * ROTATION`` of an MMBench table asks question ``index`` with its options rotated ``k`` times."""


def captions(out: Path, *, seed: int, records: int = 3000) -> None:
    """Pictures with one caption each, laid out as LLaVA-Pretrain (``blip_laion_cc_sbu_558k``)."""
    rng = random.Random(seed)
    entries = []
    for number, scene in enumerate(islice(scenes(rng.getrandbits(32)), records)):
        name = f"{number // 1000:05d}/{number:09d}.jpg"
        _save_jpeg(scene.draw(), out / "images" / name)
        question = rng.choice(["{}\n<image>", "<image>\n{}"]).format(rng.choice(INSTRUCTIONS))
        entries.append(_entry(f"{number:09d}", name, [(question, scene.caption)]))
    _save_json(entries, out / "blip_laion_cc_sbu_558k.json")


def conversations(
    out: Path, *, seed: int, records: int = 4000, turns: int = 3, text_only: float = 0.1, letters: float = 0.7
) -> None:
    """Conversations about pictures, and some without one, laid out as LLaVA-1.5's ``llava_v1_5_mix665k``.

    Each record asks ``turns`` questions, a share ``letters`` of them as multiple choice and the others for a word;
    a share ``text_only`` of the records has no picture.
    """
    rng = random.Random(seed)
    pictured = scenes(rng.getrandbits(32))
    entries = []
    for number in range(records):
        if rng.random() < text_only:
            entries.append(_entry(f"text_{number}", None, [_word_turn(rng) for _ in range(turns)]))
            continue
        scene = next(pictured)
        folder, pattern = rng.choice(list(IMAGE_FOLDERS.items()))
        name = f"{folder}/{pattern.format(number)}"
        _save_jpeg(scene.draw(), out / name)
        asked = rng.sample(list(ATTRIBUTES), turns)
        dialogue = [_scene_turn(scene, attribute, letters, rng) for attribute in asked]
        entries.append(_entry(Path(name).stem, name, _pictured(dialogue)))
    _save_json(entries, out / "llava_v1_5_mix665k.json")


def digits(out: Path, *, seed: int, records: int = 500) -> None:
    """Handwritten digits (UCI ML hand-written digits, as shipped with scikit-learn), each asked in both forms."""
    from sklearn.datasets import load_digits

    rng = random.Random(seed)
    source = load_digits()
    entries = []
    for number in sorted(rng.sample(range(len(source.target)), records)):
        pixels = (source.images[number] * (255 / 16)).astype("uint8")
        name = f"images/{number:06d}.jpg"
        _save_jpeg(
            Image.fromarray(pixels).resize((PIXELS, PIXELS), Image.Resampling.BICUBIC).convert("RGB"),
            out / name,
        )
        question, answer = "What digit is written?", DIGITS[int(source.target[number])]
        choice = make_choice(question, answer, DIGITS, 4, rng)
        dialogue = [(f"{question}\n{SHORT_ANSWER}", answer), (choice.text, choice.letter)]
        rng.shuffle(dialogue)
        entries.append(_entry(f"{number:06d}", name, _pictured(dialogue)))
    _save_json(entries, out / "digits.json")


def mmbench(out: Path, *, seed: int, questions: int = 300) -> None:
    """Multiple-choice questions about held-out pictures: MMBench's dev table with all rotations (CircularEval)."""
    rng = random.Random(seed)
    rows: list[dict[str, Any]] = []
    for index, scene in enumerate(islice(scenes(rng.getrandbits(32), held_out=True), questions), start=100):
        attribute = list(ATTRIBUTES)[index % len(ATTRIBUTES)]
        rows += _circular_rows(index, scene, attribute, rng)
    rows.sort(key=lambda row: row["index"])
    with (out / "mmbench_dev_20230712.tsv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, MMBENCH_COLUMNS, delimiter="\t", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def _circular_rows(index: int, scene: Scene, attribute: str, rng: random.Random) -> Iterator[dict[str, Any]]:
    """The rows of one question: as many rotations as it has options."""
    choice = _choice(scene, attribute, rng)
    category, l2_category = CATEGORIES[attribute]
    picture = base64.b64encode(_jpeg(scene.draw())).decode("ascii")
    for turn in range(len(choice.options)):
        rotated = choice.rotated(turn)
        yield {
            "index": index + turn * ROTATION,
            "question": rotated.question,
            **dict(zip(LETTERS, rotated.options, strict=False)),
            "answer": rotated.letter,
            "category": category,
            "image": picture,
            "source": "made",
            "l2-category": l2_category,
            "split": "dev",
        }


def _choice(scene: Scene, attribute: str, rng: random.Random) -> Choice:
    """The question about ``attribute`` with as many options as it has values, at most four."""
    values = ATTRIBUTES[attribute]
    return make_choice(ASKED_AS[attribute], scene.value(attribute), values, min(4, len(values)), rng)


def _scene_turn(scene: Scene, attribute: str, letters: float, rng: random.Random) -> tuple[str, str]:
    """One question about a picture and its answer, a letter with probability ``letters``, else a word."""
    if rng.random() < letters:
        choice = _choice(scene, attribute, rng)
        return choice.text, choice.letter
    return f"{ASKED_AS[attribute]}\n{SHORT_ANSWER}", scene.value(attribute)


def _word_turn(rng: random.Random) -> tuple[str, str]:
    """A multiple-choice question that needs no picture."""
    attribute = rng.choice(list(ATTRIBUTES))
    values = ATTRIBUTES[attribute]
    answer = rng.choice(values)
    choice = make_choice(f"Which option says {answer}?", answer, values, min(4, len(values)), rng)
    return choice.text, choice.letter


def _pictured(dialogue: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """The dialogue with the picture's place marked in front of its first question."""
    (question, answer), *rest = dialogue
    return [(f"<image>\n{question}", answer), *rest]


def _entry(identity: str, image: str | None, dialogue: list[tuple[str, str]]) -> dict[str, Any]:
    """A record in LLaVA's JSON schema; without a picture it has no ``image``."""
    said = [
        turn
        for question, answer in dialogue
        for turn in ({"from": "human", "value": question}, {"from": "gpt", "value": answer})
    ]
    picture = {} if image is None else {"image": image}
    return {"id": identity, **picture, "conversations": said}


def _jpeg(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=90, subsampling=0)
    return buffer.getvalue()


def _save_jpeg(image: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(_jpeg(image))


def _save_json(entries: list[dict[str, Any]], path: Path) -> None:
    path.write_text(json.dumps(entries, indent=1) + "\n", encoding="utf-8")
