"""Conversion of a benchmark's official files: ``questions.jsonl``, ``references.jsonl``, ``images/``."""

from __future__ import annotations

import os
import random
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from mmpipe.artifacts import manifest
from mmpipe.artifacts.files import read_jsonl, store_by_content, write_jsonl
from mmpipe.benchmarks.base import Benchmark, Question, get
from mmpipe.benchmarks.jsonl import JsonDict
from mmpipe.benchmarks.readers import extension
from mmpipe.benchmarks.spec import BenchmarkEntry
from mmpipe.data.images import inspect_image
from mmpipe.errors import DataError, few

T = TypeVar("T")

QUESTIONS = "questions.jsonl"
REFERENCES = "references.jsonl"


def prepare(entry: BenchmarkEntry, source: Path, out: Path) -> dict[str, Any]:
    """Write the questions, references and images of ``entry`` from the official files below ``source`` into ``out``.

    Equal images are stored once, named by their content, and decoded to their end. Returns counts for the manifest,
    which the caller writes. Raises ArtifactError for files that are not what was fetched, DataError for those that are
    missing, damaged or not in the official form,
    ConfigError for an unknown benchmark, protocol or file role.
    """
    manifest.check_all(source)
    benchmark = get(entry.task)
    protocol = benchmark.protocol(entry.protocol)
    files = benchmark.source(source, entry.files)
    images = _Images(out)
    questions = [
        replace(question, images=tuple(images.store(image, question.id) for image in question.images))
        for question in benchmark.questions(files, protocol)
    ]
    if entry.questions is not None and len(questions) != entry.questions:
        raise DataError(
            f"{source}: {len(questions)} questions where '{benchmark.name}' has {entry.questions}: a file is cut off "
            "or of another version; if it is meant, set 'questions' of the entry in benchmarks.yaml"
        )
    references = benchmark.references(files, protocol)
    asked = _in_order(benchmark, questions, references, source)
    groups = set(islice(dict.fromkeys(map(_group, questions)), entry.limit))
    kept = [place for place, question in enumerate(questions) if _group(question) in groups]
    # questions that are only submitted keep their position in the official order
    if entry.limit is not None or len(asked) == len(references):
        references = [asked[i] for i in kept]
    questions = [questions[i] for i in kept]
    if entry.control == "shuffle_images":
        questions = shuffle_images(questions, seed=entry.task)
    write_jsonl(out / QUESTIONS, map(_as_json, questions))
    write_jsonl(out / REFERENCES, references)
    shown = {str(path) for question in questions for path in question.images}
    images.keep(shown)
    images.verify(shown)
    return {
        "benchmark": benchmark.name,
        "protocol": protocol.name,
        "questions": len(questions),
        "groups": len(groups),
        "images": len(shown),
        "max_new_tokens": entry.max_new_tokens or protocol.max_new_tokens,
    }


def _in_order(
    benchmark: Benchmark, questions: Sequence[Question], references: Sequence[JsonDict], source: Path
) -> list[JsonDict]:
    """The references of the questions, in the order of the questions.

    Raises DataError for a question without reference, and for a reference that is asked twice or not at all, unless
    it says so itself (``asked: false``: a question that is part of the submission only).
    """
    index = benchmark.index(references)
    asked_as = [{**q.extra, "question_id": q.id, "prompt": q.recorded_prompt} for q in questions]
    places = [benchmark.place(answer, index) for answer in asked_as]
    lost = [question.id for question, place in zip(questions, places, strict=True) if place is None]
    if lost:
        some = f"{len(lost)} questions have no reference, e.g. {lost[:5]}"
        raise DataError(f"{source}: {some}; are the files of one split?")
    asked = [references[place] for place in places if place is not None]
    wanted = sum(reference.get("asked", True) for reference in references)
    if len(set(places)) < len(places) or len(asked) != wanted:
        raise DataError(f"{source}: {len(asked)} questions but {wanted} references; is a file cut off?")
    return asked


def read_questions(directory: Path, *, images: bool = True) -> list[Question]:
    """The questions of a prepared benchmark, images as paths. Raises ArtifactError when the file or, with ``images``,
    one of their images is damaged."""
    manifest.check(directory / QUESTIONS)
    questions = [
        Question(
            id=record["question_id"],
            text=record["text"],
            images=tuple(directory / name for name in record["images"]),
            prompt=record.get("prompt"),
            group=record.get("group", ""),
            extra=record.get("extra", {}),
        )
        for record in read_jsonl(directory / QUESTIONS)
    ]
    if images:
        check_images(directory, questions)
    return questions


def check_images(directory: Path, questions: Iterable[Question]) -> None:
    """Raise ArtifactError when an image of some questions of a prepared benchmark is damaged."""
    shown = {path.relative_to(directory).as_posix() for q in questions for path in q.images if isinstance(path, Path)}
    manifest.check(directory, shown.__contains__)


def evenly(things: Sequence[T], count: int) -> list[T]:
    """At most ``count`` of ``things``, spread evenly."""
    return list(things[:: max(1, len(things) // count)][:count])


def shuffle_images(questions: Sequence[Question], seed: str) -> list[Question]:
    """The questions, each with the images of another one.

    Questions that shared their images share the new ones too, and so do the rotations of a circular
    question; no question keeps its own. The permutation depends on ``seed`` and the images alone. Raises
    DataError when there are not two different images to exchange.
    """
    own: dict[str, tuple[bytes | Path, ...]] = {}
    for question in questions:
        if question.images:
            own.setdefault(_group(question), question.images)
    pool = sorted(set(own.values()), key=str)
    if own and len(pool) < 2:
        raise DataError("shuffle_images needs at least two different images")
    generator, shuffled = random.Random(f"shuffle_images:{seed}"), list(pool)
    for last in range(len(pool) - 1, 0, -1):  # a single cycle, so without fixed points (Sattolo 1986)
        other = generator.randrange(last)
        shuffled[last], shuffled[other] = shuffled[other], shuffled[last]
    given = dict(zip(pool, shuffled, strict=True))
    return [replace(q, images=given[own[_group(q)]]) if q.images else q for q in questions]


def _group(question: Question) -> str:
    return question.group or f"question {question.id}"


def _as_json(question: Question) -> JsonDict:
    record: JsonDict = {"question_id": question.id, "images": list(map(str, question.images)), "text": question.text}
    if question.prompt is not None:
        record["prompt"] = question.prompt
    optional = {"group": question.group, "extra": dict(question.extra)}
    return record | {name: value for name, value in optional.items() if value}


@dataclass
class _Images:
    """Stores images under ``out/images`` by content; paths returned are relative to ``out``."""

    out: Path

    def __post_init__(self) -> None:
        self.folder = self.out / "images"
        self.folder.mkdir(parents=True, exist_ok=True)
        self._seen: dict[Path, Path] = {}
        self._origins: dict[str, str] = {}

    def store(self, image: bytes | Path, question: int | str) -> Path:
        where = f"question {question}"
        if isinstance(image, bytes):
            return self._place(image, None, where)
        if image not in self._seen:
            self._seen[image] = self._place(image.read_bytes(), image, f"{where}: {image}")
        return self._seen[image]

    def keep(self, asked: Iterable[str]) -> None:
        """Remove the images without a question."""
        wanted = set(asked)
        for path in self.folder.iterdir():
            if f"images/{path.name}" not in wanted:
                path.unlink()

    def verify(self, names: Iterable[str]) -> None:
        """Raise DataError, naming the questions, for images that cannot be decoded."""
        ordered = sorted(names)
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            found = list(pool.map(lambda name: inspect_image(self.out / name).fault, ordered))
        # the stored file is gone once the benchmark is refused
        faults = [
            f"{self._origins[name]}: {fault.removeprefix(f'{self.out / name}: ')}"
            for name, fault in zip(ordered, found, strict=True)
            if fault
        ]
        if faults:
            raise DataError(f"{len(faults)} of {len(ordered)} images cannot be shown to a model: {few(faults)}")

    def _place(self, content: bytes, origin: Path | None, where: str) -> Path:
        name = store_by_content(content, self.folder, f".{extension(content, where)}", digits=24, origin=origin)
        self._origins.setdefault(f"images/{name}", where)
        return Path("images", name)
