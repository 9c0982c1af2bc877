"""Makers of the demo's synthetic data sets, each in the file layout of a real one.

A maker writes one data set into an empty directory: ``maker(out, *, seed, **options)``. The same seed and options
write the same bytes.
"""

from __future__ import annotations

import base64
import csv
import json
import random
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from mmpipe.data.images import encode_image
from mmpipe.demo.scenes import (
    ATTRIBUTES,
    LETTER_ANSWER,
    LETTERS,
    PIXELS,
    QUESTIONS,
    SHORT_ANSWER,
    Choice,
    Scene,
    ask,
    scenes,
)

if TYPE_CHECKING:
    import numpy as np

Dialogue = list[tuple[str, str]]
"""Questions and their answers."""
INSTRUCTIONS = (
    "Describe the image concisely.",
    "Provide a brief description of the given image.",
    "Summarize the visual content of the image.",
    "Give a short and clear explanation of the subsequent image.",
)
"""Four of the eleven instructions of LLaVA's pretraining data."""
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
    """Images with one caption each, laid out as LLaVA-Pretrain (``blip_laion_cc_sbu_558k``)."""
    rng = random.Random(seed)
    entries = []
    for number, scene in enumerate(islice(scenes(rng.getrandbits(32)), records)):
        name = f"{number // 1000:05d}/{number:09d}.jpg"
        _save_jpeg(scene.draw(), out / "images" / name)
        question = rng.choice(["{}\n<image>", "<image>\n{}"]).format(rng.choice(INSTRUCTIONS))
        entries.append(entry(f"{number:09d}", name, [(question, scene.caption)]))
    _save_json(entries, out / "blip_laion_cc_sbu_558k.json")


def conversations(
    out: Path,
    *,
    seed: int,
    records: int = 8000,
    turns: int = 2,
    letters: float = 0.65,
    text_only: float = 0.04,
    wrong: float = 0.0,
) -> None:
    """Conversations about images, and some without one, laid out as LLaVA-1.5's ``llava_v1_5_mix665k``.

    A share ``letters`` of the records asks one multiple-choice question (in the original: A-OKVQA on COCO images),
    the others ask ``turns`` questions to be answered by a word (GQA). A share ``text_only`` has no image. A share
    ``wrong`` of the answers about images is wrong, as labels of annotators are.
    """
    rng = random.Random(seed)
    imaged = scenes(rng.getrandbits(32))
    entries = []
    for number in range(records):
        if rng.random() < text_only:
            entries.append(entry(f"text_{number}", None, _about_words(rng)))
            continue
        scene = next(imaged)
        if rng.random() < letters:
            name = f"coco/train2017/{number:012d}.jpg"
            attribute = rng.choice(list(ATTRIBUTES))
            dialogue = _by_letter(ask(attribute, _annotated(scene, attribute, wrong, rng), rng))
        else:
            name = f"gqa/images/{number:07d}.jpg"
            asked = rng.sample(list(ATTRIBUTES), turns)
            dialogue = _by_word({attribute: _annotated(scene, attribute, wrong, rng) for attribute in asked})
        _save_jpeg(scene.draw(), out / name)
        entries.append(entry(Path(name).stem, name, _imaged(dialogue)))
    _save_json(entries, out / "llava_v1_5_mix665k.json")


def digits(out: Path, *, seed: int, records: int = 500) -> None:
    """Handwritten digits (UCI ML hand-written digits, as shipped with scikit-learn), asked by letter or by word."""
    from sklearn.datasets import load_digits

    rng = random.Random(seed)
    source = load_digits()
    entries = []
    for number in sorted(rng.sample(range(len(source.target)), records)):
        name = f"images/{number:06d}.jpg"
        _save_jpeg(_enlarged(source.images[number]), out / name)
        dialogue = _about_digit(int(source.target[number]), rng)
        entries.append(entry(f"{number:06d}", name, _imaged(dialogue)))
    _save_json(entries, out / "digits.json")


def mmbench(out: Path, *, seed: int, questions: int = 300) -> None:
    """Multiple-choice questions about held-out images: MMBench's dev table with all rotations (CircularEval)."""
    rng = random.Random(seed)
    rows: list[dict[str, Any]] = []
    for index, scene in enumerate(islice(scenes(rng.getrandbits(32), held_out=True), questions), start=100):
        attribute = list(ATTRIBUTES)[index % len(ATTRIBUTES)]
        rows += _circular_rows(index, scene, attribute, rng)
    rows.sort(key=lambda row: row["index"])
    with (out / "mmbench_dev_en_20231003.tsv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, MMBENCH_COLUMNS, delimiter="\t", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def _circular_rows(index: int, scene: Scene, attribute: str, rng: random.Random) -> Iterator[dict[str, Any]]:
    """The rows of one question: as many rotations as it has options."""
    choice = ask(attribute, scene.value(attribute), rng)
    category, l2_category = CATEGORIES[attribute]
    image = base64.b64encode(_jpeg(scene.draw())).decode("ascii")
    for turn in range(len(choice.options)):
        rotated = choice.rotated(turn)
        yield {
            "index": index + turn * ROTATION,
            "question": rotated.question,
            **dict(zip(LETTERS, rotated.options, strict=False)),
            "answer": rotated.letter,
            "category": category,
            "image": image,
            "source": "made",
            "l2-category": l2_category,
            "split": "dev",
        }


def _enlarged(digit: np.ndarray) -> Image.Image:
    """An image of the usual size from gray levels (8, 8) between 0 and 16."""
    small = Image.fromarray((digit * (255 / 16)).astype("uint8"))
    return small.resize((PIXELS, PIXELS), Image.Resampling.BICUBIC).convert("RGB")


def _about_digit(digit: int, rng: random.Random) -> Dialogue:
    """One question about a digit; the options are four neighbours on a circle of ten."""
    question, answer = "What digit is written?", DIGITS[digit]
    if rng.random() < 0.5:
        return [(f"{question}\n{SHORT_ANSWER}", answer)]
    first = digit - rng.randrange(len(LETTERS))
    return _by_letter(Choice(question, tuple(DIGITS[(first + i) % 10] for i in range(len(LETTERS))), answer))


def _annotated(scene: Scene, attribute: str, wrong: float, rng: random.Random) -> str:
    """The label of an attribute, wrong with probability ``wrong``."""
    value = scene.value(attribute)
    if wrong and rng.random() < wrong:
        return rng.choice([other for other in ATTRIBUTES[attribute] if other != value])
    return value


def _by_letter(choice: Choice) -> Dialogue:
    return [(f"{choice.text}\n{LETTER_ANSWER}", choice.letter)]


def _by_word(answers: dict[str, str]) -> Dialogue:
    """One question an attribute; as in the original, only the first says which form of answer is wanted."""
    (question, answer), *rest = [(QUESTIONS[attribute], answer) for attribute, answer in answers.items()]
    return [(f"{question}\n{SHORT_ANSWER}", answer), *rest]


def _about_words(rng: random.Random) -> Dialogue:
    """A multiple-choice question without an image."""
    attribute = rng.choice(list(ATTRIBUTES))
    answer = rng.choice(ATTRIBUTES[attribute])
    return _by_letter(replace(ask(attribute, answer, rng), question=f"Which option says {answer}?"))


def _imaged(dialogue: Dialogue) -> Dialogue:
    """The dialogue with ``<image>`` before its first question."""
    (question, answer), *rest = dialogue
    return [(f"<image>\n{question}", answer), *rest]


def entry(identity: str, image: str | None, dialogue: Dialogue) -> dict[str, Any]:
    """A record in LLaVA's JSON schema; without an image it has no ``image``."""
    pairs = [({"from": "human", "value": question}, {"from": "gpt", "value": answer}) for question, answer in dialogue]
    return {
        "id": identity,
        **({"image": image} if image else {}),
        "conversations": [turn for pair in pairs for turn in pair],
    }


_jpeg = partial(encode_image, kind="JPEG", quality=90, subsampling=0)


def _save_jpeg(image: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(_jpeg(image))


def _save_json(entries: list[dict[str, Any]], path: Path) -> None:
    path.write_text(json.dumps(entries, indent=1) + "\n", encoding="utf-8")
