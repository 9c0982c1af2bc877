"""MME (Fu et al. 2023, arXiv 2306.13394): two yes/no questions an image, in 14 categories.

The official release is a folder a category; in some the images and the question files are in ``images/``
and ``questions_answers_YN/``, in the others side by side. A question file holds two lines
``question<TAB>Yes|No``. Both questions of an image carry the same id (``category/[images/]file``), so
answers are told apart by their prompt.

A category scores 100 x (share of right answers) + 100 x (share of images with both right); perception is
the sum of ten categories, cognition of four. The two questions of an image are found by its id, not by their
order in a file.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from statistics import fmean
from typing import Any, ClassVar

from mmpipe.artifacts.files import atomic_open
from mmpipe.benchmarks.base import (
    SHORT_ANSWER,
    Benchmark,
    Document,
    Item,
    Pair,
    Protocol,
    Question,
    Record,
    Source,
    key,
    records_of,
)
from mmpipe.benchmarks.readers import hub_images, hub_records, on_hub
from mmpipe.benchmarks.stats import Estimate, bootstrap
from mmpipe.benchmarks.yesno import OTHER, first_four, first_four_lmms, yes_or_no_word
from mmpipe.errors import DataError

PERCEPTION = (
    "existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR",
)  # fmt: skip
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")

_INSTRUCTION = "Please answer yes or no."
_FIELDS = ("question_id", "category", "question", "answer")
_IMAGES = (".jpg", ".jpeg", ".png")
_RULES: Mapping[str, Callable[[str], str]] = {
    "official": first_four,
    "lmms": first_four_lmms,
    "vlmevalkit": yes_or_no_word,
}
_TOTALS = {
    "official": ("perception", "cognition"),
    "lmms": ("mme_perception_score", "mme_cognition_score"),
    "vlmevalkit": ("perception", "reasoning"),
}


class Mme(Benchmark):
    """MME."""

    name = "mme"
    submission = "zip"
    files: ClassVar[Mapping[str, str]] = {"questions": "MME_Benchmark_release_version", "parquet": "data"}
    protocols = (
        Protocol(
            "official", "the rule of calculation.py: yes or no within the first four characters", aliases=("llava",)
        ),
        Protocol(
            "lmms",
            "lmms-eval: blanks and periods deleted, y and n accepted",
            rule="lmms",
            max_new_tokens=16,
            aliases=("libmoe",),
        ),
        Protocol("vlmevalkit", "VLMEvalKit: the word yes or no, not both", rule="vlmevalkit"),
    )

    def questions(self, source: Source, protocol: Protocol) -> Iterator[Question]:
        records = self.references(source, protocol)
        images: Iterator[bytes | Path] = (
            hub_images(source)
            if on_hub(source)
            else (Source(source.path("questions")).inside(record["image"]) for record in records)
        )
        for record, image in zip(records, images, strict=True):
            yield Question(
                id=record["question_id"],
                text=_core(record["question"]) + SHORT_ANSWER,
                images=(image,),
                extra={"category": record["category"]},
            )

    def references(self, source: Source, protocol: Protocol) -> list[Record]:
        return hub_records(source, _FIELDS) if on_hub(source) else self.read_references([source.path("questions")])

    def read_references(self, paths: Sequence[Path]) -> list[Record]:
        """Besides files of records, the folder of the official release."""
        folders = [path for path in paths if path.is_dir()]
        records = [record for folder in folders for record in _tree(folder)]
        files = [path for path in paths if path not in folders]
        return records + (super().read_references(files) if files else [])

    def parse_references(self, documents: Sequence[Document]) -> list[Record]:
        return [dict(r) for r in records_of(documents, _FIELDS)]

    def reference_keys(self, reference: Record) -> list[tuple[str, ...]]:
        return [(key(reference["question_id"]), _core(reference["question"]))]

    def answer_keys(self, answer: Record) -> list[tuple[str, ...]]:
        if "prompt" not in answer:
            raise DataError(
                f"mme: the answer to {answer['question_id']} has no 'prompt'; both questions of an image have "
                "one id, the prompt tells them apart"
            )
        return [(key(answer["question_id"]), _core(str(answer["prompt"])))]

    def rate(self, pairs: Sequence[Pair], protocol: Protocol) -> tuple[list[Item], Record]:
        items = [_rate(pair, _RULES[protocol.rule]) for pair in pairs]
        scores = _category_scores(items)
        perception = sum(score for name, score in scores.items() if name not in COGNITION)
        cognition = sum(score for name, score in scores.items() if name in COGNITION)
        totals = dict(zip(_TOTALS[protocol.rule], (perception, cognition), strict=True))
        return items, {**totals, "total": perception + cognition, "per_category": scores}

    def estimate(self, items: Sequence[Item], metrics: Record, protocol: Protocol) -> Estimate:
        """The perception score, resampled by image; all of it where no category of perception was asked."""
        kept = [item for item in items if item.facts["category"] not in COGNITION] or list(items)
        names = sorted({item.facts["category"] for item in kept})
        totals: dict[str, list[float]] = {}
        for unit, members in _by_image(kept).items():
            row = totals.setdefault(unit, [0.0] * (4 * len(names)))
            first = 4 * names.index(members[0].facts["category"])
            right = sum(item.score for item in members)
            for offset, count in enumerate((right, len(members), right == len(members), 1)):
                row[first + offset] += count

        def score(sums: Any) -> Any:
            right, asked, both, images = (sums[..., offset::4] for offset in range(4))
            return (100 * right / asked + 100 * both / images).sum(axis=-1)

        scores = _category_scores(kept)
        return bootstrap(_TOTALS[protocol.rule][0], totals, score, sum(scores.values()))

    def convert(self, pairs: Sequence[Pair], out: Path) -> Record:
        """The files that ``calculation.py`` reads, one a category: packed, where ``out`` ends in ``.zip``, otherwise in
        the folder ``out``.

        Tabs and line ends of a reply would break their lines; they become blanks and are counted.
        """
        files = eval_tool_files(pairs)
        packed = {out: _zipped(files)} if out.suffix == ".zip" else {}
        for path, content in (packed or {out / f"{c}.txt": _lines(text) for c, text in files.items()}).items():
            with atomic_open(path) as file:
                file.write(content)
        broken = sum(pair.text != _one_cell(pair.text) for pair in pairs)
        return {"files": sorted(files), "replies_with_tabs_or_line_ends": broken}


def eval_tool_files(pairs: Sequence[Pair]) -> dict[str, str]:
    """``{category: lines}`` of ``file<TAB>question<TAB>gold<TAB>reply``."""
    lines: dict[str, list[str]] = {}
    for pair in pairs:
        reference = pair.reference
        name = PurePosixPath(str(reference.get("image") or reference["question_id"])).with_suffix(".txt").name
        cells = (name, reference["question"], reference["answer"], _one_cell(pair.text))
        lines.setdefault(reference["category"], []).append("\t".join(cells) + "\n")
    return {category: "".join(members) for category, members in lines.items()}


def _one_cell(text: str) -> str:
    return " ".join(text.replace("\t", "\n").splitlines()) if any(c in text for c in "\t\n\r") else text


def _lines(text: str) -> bytes:
    return text.encode("utf-8", "replace")


def _zipped(files: Mapping[str, str]) -> bytes:
    """A zip whose bytes depend on the files alone."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in sorted(files):
            info = zipfile.ZipInfo(f"{name}.txt", date_time=(1980, 1, 1, 0, 0, 0))
            archive.writestr(info, _lines(files[name]), zipfile.ZIP_DEFLATED)
    return buffer.getvalue()


def _core(text: str) -> str:
    """The question without instruction, by which prompts and references are matched."""
    text = text.removesuffix(SHORT_ANSWER).strip().removesuffix(_INSTRUCTION)
    return " ".join(text.split())


def _tree(root: Path) -> list[Record]:
    """The records of the official folders, categories, images and questions in order."""
    records: list[Record] = []
    for category in (*PERCEPTION, *COGNITION):
        folder = root / category
        if not folder.is_dir():
            raise DataError(f"{root}: the category '{category}' has no folder; is the release unpacked here?")
        nested = (folder / "images").is_dir()
        for image in sorted((folder / "images" if nested else folder).iterdir()):
            if image.suffix.lower() in _IMAGES:
                lines = (folder / "questions_answers_YN" if nested else folder) / f"{image.stem}.txt"
                records += _questions_of(lines, category, image.relative_to(root).as_posix())
    return records


def _questions_of(path: Path, category: str, image: str) -> Iterator[Record]:
    if not path.is_file():
        raise DataError(f"{path}: the question file of the image {image} is missing")
    for line in path.read_text(encoding="utf-8-sig").splitlines():
        if line.strip():
            question, tab, answer = line.rpartition("\t")
            if not tab or answer.strip().lower() not in ("yes", "no"):
                raise DataError(f"{path}: the line {line[:60]!r} is not 'question<TAB>Yes|No'")
            yield {
                "question_id": image,
                "category": category,
                "image": image,
                "question": question,
                "answer": answer.strip(),
            }


def _rate(pair: Pair, rule: Callable[[str], str]) -> Item:
    reference = pair.reference
    parsed = rule(pair.text) if pair.answered else None
    gold = str(reference["answer"]).strip().lower()
    return Item(
        id=reference["question_id"],
        score=float(parsed == gold),
        unit=key(reference["question_id"]),
        parsed=parsed,
        answered=pair.answered,
        unparsed=parsed == OTHER,
        facts={"category": reference["category"], "question": reference["question"], "gold": gold},
    )


def _by_image(items: Sequence[Item]) -> dict[str, list[Item]]:
    images: dict[str, list[Item]] = {}
    for item in items:
        images.setdefault(f"{item.facts['category']}/{item.unit}", []).append(item)
    return images


def _category_scores(items: Sequence[Item]) -> dict[str, float]:
    categories: dict[str, list[Item]] = {}
    for item in items:
        categories.setdefault(item.facts["category"], []).append(item)
    return {
        category: 100 * fmean(item.score for item in members)
        + 100 * fmean(all(item.score for item in pair) for pair in _by_image(members).values())
        for category, members in categories.items()
    }


BENCHMARK = Mme()
