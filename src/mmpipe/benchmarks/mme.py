"""MME (Fu et al. 2023, arXiv 2306.13394): two yes/no questions an image, in 14 categories.

The official release is a folder a category; in some the images and the question files are in ``images/`` and
``questions_answers_YN/``, in the others side by side. A question file holds two lines ``question<TAB>Yes|No``. Both
questions of an image have the same id (``category/[images/]file``), so answers are distinguished by their prompt.

A category scores 100 x (share of right answers) + 100 x (share of images with both right); perception is the sum of
ten categories, cognition of four (``eval_tool/calculation.py``). The two questions of an image are found by its id, not
by their order in a file.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from statistics import fmean
from typing import Any

from mmpipe.artifacts.files import atomic_open
from mmpipe.benchmarks.base import SHORT_ANSWER, AnswerPair, Item, Protocol, grouped, mean_score
from mmpipe.benchmarks.jsonl import Document, JsonDict, key, records_of
from mmpipe.benchmarks.stats import MetricEstimate, bootstrap_groups
from mmpipe.benchmarks.yes_no import YesNo, first_four, first_four_lmms, yes_or_no_word
from mmpipe.errors import DataError

PERCEPTION = (
    "existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR",
)  # fmt: skip
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")

_INSTRUCTION = "Please answer yes or no."
_IMAGES = (".jpg", ".jpeg", ".png")
_COGNITION_NAMES = {"official": "cognition", "lmms": "mme_cognition_score", "vlmevalkit": "reasoning"}


class Mme(YesNo):
    """MME."""

    name = "mme"
    submission = "zip"
    files = {"questions": "MME_Benchmark_release_version", "parquet": "data"}
    image_role = "questions"
    shown = ("category", "question")
    fields = hub_columns = ("question_id", "category", "question", "answer")
    prompts = {"llava": "{core}" + SHORT_ANSWER}
    rules = {"official": first_four, "lmms": first_four_lmms, "vlmevalkit": yes_or_no_word}
    protocols = (
        Protocol("official", "the rule of calculation.py: yes or no within the first four characters",
                 metric="perception", aliases=("llava",)),
        Protocol("lmms", "lmms-eval: blanks and periods deleted, y and n accepted", rule="lmms",
                 metric="mme_perception_score", max_new_tokens=16, aliases=("libmoe",)),
        Protocol("vlmevalkit", "VLMEvalKit: the word yes or no, not both", rule="vlmevalkit", metric="perception"),
    )  # fmt: skip

    def read_references(self, paths: Sequence[Path]) -> list[JsonDict]:
        """Besides files of records, the folder of the official release."""
        folders = [path for path in paths if path.is_dir()]
        records = [record for folder in folders for record in _tree(folder)]
        return records + super().read_references([path for path in paths if path not in folders])

    def parse_references(self, documents: Sequence[Document]) -> list[JsonDict]:
        return [dict(r) for r in records_of(documents, self.fields)]

    def reference_keys(self, reference: JsonDict) -> list[tuple[str, ...]]:
        return [(key(reference["question_id"]), _core(reference["question"]))]

    def answer_keys(self, answer: JsonDict) -> list[tuple[str, ...]]:
        if "prompt" not in answer:
            raise DataError(
                f"mme: the answer to {answer['question_id']} has no 'prompt'; both questions of an image have one id, "
                "the prompt tells them apart"
            )
        return [(key(answer["question_id"]), _core(str(answer["prompt"])))]

    def variables(self, record: JsonDict) -> JsonDict:
        return {**record, "core": _core(record["question"])}

    def metrics(self, items: Sequence[Item], pairs: Sequence[AnswerPair], protocol: Protocol) -> JsonDict:
        scores = _category_scores(items)
        perception = sum(score for name, score in scores.items() if name not in COGNITION)
        cognition = sum(score for name, score in scores.items() if name in COGNITION)
        totals = {protocol.metric: perception, _COGNITION_NAMES[protocol.rule]: cognition}
        return {**totals, "total": perception + cognition, "per_category": scores}

    def estimate(self, items: Sequence[Item], metrics: JsonDict, protocol: Protocol) -> MetricEstimate:
        """The perception score, resampled by image; all of it where no category of perception was asked."""
        kept = [item for item in items if item.facts["category"] not in COGNITION] or list(items)
        images = [
            (members[0].unit, category, (sum(item.score for item in members), len(members), _all_right(members), 1))
            for category, some in grouped(kept, "category").items()
            for members in grouped(some).values()
        ]

        def score(sums: Any) -> Any:
            right, asked, both, images = (sums[..., place] for place in range(4))
            return (100 * right / asked + 100 * both / images).sum(axis=-1)

        value = sum(_category_scores(kept).values())
        return bootstrap_groups(protocol.metric, sorted(grouped(kept, "category")), images, score, value)

    def convert(self, pairs: Sequence[AnswerPair], out: Path) -> JsonDict:
        """The files that ``calculation.py`` reads, one a category: packed, where ``out`` ends in ``.zip``, otherwise in
        the folder ``out``.

        Tabs and line ends of a reply would break their lines; they become blanks and are counted.
        """
        files = {name: text.encode("utf-8", "replace") for name, text in eval_tool_files(pairs).items()}
        packed = {out: _zipped(files)} if out.suffix == ".zip" else {}
        for path, content in (packed or {out / f"{name}.txt": content for name, content in files.items()}).items():
            with atomic_open(path) as file:
                file.write(content)
        broken = sum(pair.text != _one_cell(pair.text) for pair in pairs)
        return {"files": sorted(files), "replies_with_tabs_or_line_ends": broken}


def eval_tool_files(pairs: Sequence[AnswerPair]) -> dict[str, str]:
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


def _zipped(files: Mapping[str, bytes]) -> bytes:
    """A zip whose bytes depend only on the files."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in sorted(files):
            info = zipfile.ZipInfo(f"{name}.txt", date_time=(1980, 1, 1, 0, 0, 0))
            archive.writestr(info, files[name], zipfile.ZIP_DEFLATED)
    return buffer.getvalue()


def _core(text: str) -> str:
    """The question without instruction, by which prompts and references are matched."""
    text = text.removesuffix(SHORT_ANSWER).strip().removesuffix(_INSTRUCTION)
    return " ".join(text.split())


def _tree(root: Path) -> list[JsonDict]:
    """The records of the official folders, categories, images and questions in order."""
    records: list[JsonDict] = []
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


def _questions_of(path: Path, category: str, image: str) -> Iterator[JsonDict]:
    if not path.is_file():
        raise DataError(f"{path}: the question file of the image {image} is missing")
    for line in path.read_text(encoding="utf-8-sig").splitlines():
        if line.strip():
            question, tab, answer = line.rpartition("\t")
            if not tab or answer.strip().lower() not in ("yes", "no"):
                raise DataError(f"{path}: the line {line[:60]!r} is not 'question<TAB>Yes|No'")
            names = {"question_id": image, "category": category, "image": image}
            yield {**names, "question": question, "answer": answer.strip()}


def _all_right(items: Sequence[Item]) -> bool:
    return all(item.score for item in items)


def _category_scores(items: Sequence[Item]) -> dict[str, float]:
    return {
        category: 100 * mean_score(members) + 100 * fmean(map(_all_right, grouped(members).values()))
        for category, members in grouped(items, "category").items()
    }


BENCHMARK = Mme()
