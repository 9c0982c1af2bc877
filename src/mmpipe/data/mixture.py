"""Building a mixture: every record of every part is read, verified and written, or dropped and counted."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, cast

from mmpipe import registry
from mmpipe.artifacts.files import write_json
from mmpipe.data import formats
from mmpipe.data.formats.base import Draft, Format
from mmpipe.data.overlap import PICTURES, write_digests
from mmpipe.data.pictures import EmbeddedPictures, Found, PictureFinder
from mmpipe.data.records import IMAGE_MARK, AnyRecord, BadRecord, check_record, length_in_words
from mmpipe.data.spec import MixtureSpec, PartSpec
from mmpipe.data.store import write_records
from mmpipe.data.tally import Tally, histogram, up_to
from mmpipe.errors import ConfigError, DataError, did_you_mean

RECORDS = "records.arrow"
REPORT = "report.json"
_BLOCK = 4096
_SIDES = (64, 128, 224, 336, 448, 672, 1024, 2048, 4096)
"""Upper bounds of the longer side in the histogram of picture sizes."""

Log = Callable[[str], None]


def build_mixture(
    spec: MixtureSpec,
    datasets: Mapping[str, Path],
    out: Path,
    *,
    workers: int = 1,
    log: Log = print,
    published: Path | None = None,
) -> dict[str, Any]:
    """Write ``records.arrow``, ``pictures.arrow`` and ``report.json`` into ``out`` and return the report.

    ``datasets`` gives the directory of each data set by name. Pictures are decoded by ``workers`` threads;
    the result does not depend on their number. Each dropped record is a line of ``log``. Pictures that
    annotations contain are written to ``out/images``; ``published`` is where ``out`` will be, if not there.

    Raises DataError when a file or folder cannot be read, when a picture's name leads out of its folder, or
    when more than ``spec.max_bad`` of the records of a part are bad; the message lists the reasons.
    """
    out.mkdir(parents=True, exist_ok=True)
    ids = _Ids()
    embedded = EmbeddedPictures(out / "images", (published or out) / "images")
    parts = [_Part(part, datasets[part.dataset], spec.seed, ids, embedded, log) for part in spec.parts]
    with ThreadPoolExecutor(max_workers=max(1, workers)) as pool:
        write_records(out / RECORDS, (record for part in parts for record in part.records(pool)))
    report = _report(spec, parts)
    _check(spec, parts)
    write_digests(out / PICTURES, {name: digest for part in parts for name, digest in part.digests.items()})
    write_json(out / REPORT, report)
    log(f"kept {report['kept']} of {report['wanted']} records")
    return report


class _Ids:
    """Makes the ids of a data set different from each other."""

    def __init__(self) -> None:
        self._used: dict[str, set[str]] = {}
        self._contents: dict[str, set[int]] = {}

    def distinct(self, record: AnyRecord) -> tuple[AnyRecord, str | None]:
        """The record under an id of its own, and what was odd: its id, or all of it, has been seen before."""
        used = self._used.setdefault(record.source, set())
        contents = self._contents.setdefault(record.source, set())
        content = hash(replace(record, id=""))
        repeated = content in contents
        contents.add(content)
        new_id, number = record.id, 1
        while new_id in used:
            number += 1
            new_id = f"{record.id}#{number}"
        used.add(new_id)
        if repeated:
            return replace(record, id=new_id), "record seen before, kept again"
        return replace(record, id=new_id), "id used before, numbered" if number > 1 else None


class _Part:
    """One part of a mixture and all that is counted about it."""

    def __init__(
        self,
        spec: PartSpec,
        directory: Path,
        seed: int,
        ids: _Ids,
        embedded: EmbeddedPictures,
        log: Log,
    ) -> None:
        self.spec = spec
        self.found = 0
        self.wanted = 0
        self.kept = 0
        self.with_images = 0
        self.dropped = Tally()
        self.notes = Tally()
        self.lengths: Counter[int] = Counter()
        self.sides: Counter[int] = Counter()
        self.digests: dict[str, bytes] = {}
        self._seed = seed
        self._ids = ids
        self._embedded = embedded
        self._log = log
        self._files = [path for name in spec.annotations for path in _files(directory, name)]
        self._format = _format(spec.format)
        self._folders = [directory / name for name in spec.images]

    @property
    def name(self) -> str:
        """How messages call it."""
        return f"{self.spec.dataset} ({', '.join(self.spec.annotations)})"

    def records(self, pool: Executor) -> Iterator[AnyRecord]:
        """The good records, in order."""
        self._log(f"{self.name}: reading")
        pictures = PictureFinder(self._folders, self._embedded)
        drafts = map(pictures.unpacked, self._chosen())
        while block := list(islice(drafts, _BLOCK)):
            pictures.prepare((name for draft in block if draft.record for name in draft.record.images), pool)
            for draft in block:
                self.wanted += 1
                try:
                    record = self._verified(draft, pictures)
                except BadRecord as fault:
                    self.dropped.add(fault.reason, f"{draft.id}: {fault.detail}")
                    self._log(f"dropped {self.spec.dataset}/{draft.id}: {fault}")
                    continue
                self._count(record)
                yield record
            self._log(f"{self.name}: {self.wanted} records so far, {self.bad} bad")
        self._log(f"{self.name}: kept {self.kept} of {self.wanted}")

    def _found(self) -> Iterator[Draft]:
        """Every draft of the wanted kind."""
        for path in self._files:
            for draft in self._format.read(path, self.spec.dataset):
                has_images = bool(draft.record and draft.record.images)
                if draft.record is None or self.spec.with_images in (None, has_images):
                    yield draft

    def _chosen(self) -> Iterator[Draft]:
        """The drafts that ``take`` chooses, in the order of the files."""
        if self.spec.take is None:
            for draft in self._found():
                self.found += 1
                yield draft
            return
        self.found = sum(1 for _ in self._found())
        number = self.spec.take if isinstance(self.spec.take, int) else round(self.spec.take * self.found)
        if number > self.found:
            raise DataError(
                f"{self.name}: `take: {number}` but there are only {self.found} such records; "
                "lower it, or leave it out to take all"
            )
        # The choice depends on this part alone: adding other parts does not change it.
        chooser = random.Random(f"{self._seed} {self.spec.dataset} {self.spec.annotations}")
        chosen = set(chooser.sample(range(self.found), number))
        for position, draft in enumerate(self._found()):
            if position in chosen:
                yield draft

    def _verified(self, draft: Draft, finder: PictureFinder) -> AnyRecord:
        """The record as it will be trained on. Raises BadRecord."""
        if draft.record is None:
            raise cast(BadRecord, draft.fault)
        for note in draft.notes:
            self.notes.add(note, draft.id)
        record = draft.record.with_questions(self._question)
        check_record(record)
        pictures = [finder[name] for name in record.images]
        for picture in pictures:
            self._look_at(picture)
        record = replace(record, images=tuple(picture.name for picture in pictures))
        record, oddity = self._ids.distinct(record)
        if oddity:
            self.notes.add(oddity, draft.id)
        return record

    def _question(self, text: str) -> str:
        if self.spec.image_position == "first":
            text = images_first(text)
        return text + self.spec.suffix

    def _look_at(self, picture: Found) -> None:
        self.digests[picture.name] = picture.inspection.digest
        side = max(picture.inspection.width, picture.inspection.height)
        self.sides[next((bound for bound in _SIDES if side <= bound), side)] += 1
        for note in picture.inspection.notes:
            self.notes.add(note, picture.name)

    def _count(self, record: AnyRecord) -> None:
        self.kept += 1
        self.with_images += bool(record.images)
        self.lengths[up_to(length_in_words(record))] += 1

    @property
    def bad(self) -> int:
        """Dropped records."""
        return self.wanted - self.kept

    def report(self) -> dict[str, Any]:
        """What is published about the part."""
        return {
            "dataset": self.spec.dataset,
            "annotations": list(self.spec.annotations),
            "take": self.spec.take,
            **({"expected": self.spec.expected} if self.spec.expected else {}),
            "found": self.found,
            "wanted": self.wanted,
            "kept": self.kept,
            "with_images": self.with_images,
            "dropped": self.dropped.report(),
            "notes": self.notes.report(),
            "words_up_to": histogram(self.lengths),
            "longer_side_up_to": histogram(self.sides),
        }


def images_first(question: str) -> str:
    """The marks of all pictures at the head of the question, then the rest of its text, as LLaVA does."""
    marks = question.count(IMAGE_MARK)
    if not marks:
        return question
    rest = question.replace(IMAGE_MARK, "").strip()
    return f"{IMAGE_MARK * marks}\n{rest}".strip()


def _format(name: str) -> Format:
    found = registry.modules(formats.__name__)
    if name not in found:
        raise ConfigError(f"there is no data format '{name}'{did_you_mean(name, found)}")
    return cast(Format, found[name])


def _files(directory: Path, name: str) -> list[Path]:
    """The annotation files that ``name`` stands for: one, or all that match it if it is a pattern."""
    if not any(sign in name for sign in "*?["):
        return [directory / name]
    found = sorted(directory.glob(name))
    if not found:
        raise DataError(f"{directory}: no file matches `annotations: {name}`")
    return found


def _report(spec: MixtureSpec, parts: Sequence[_Part]) -> dict[str, Any]:
    lengths, sides = Counter[int](), Counter[int]()
    for part in parts:
        lengths += part.lengths
        sides += part.sides
    return {
        "kept": sum(part.kept for part in parts),
        "wanted": sum(part.wanted for part in parts),
        "dropped": sum(part.bad for part in parts),
        "with_images": sum(part.with_images for part in parts),
        "max_bad": spec.max_bad,
        "words_up_to": histogram(lengths),
        "longer_side_up_to": histogram(sides),
        "parts": [part.report() for part in parts],
    }


def _check(spec: MixtureSpec, parts: Sequence[_Part]) -> None:
    """Raise DataError when a part has too many bad records or no good one."""
    lines = []
    for part in parts:
        if not part.kept or part.bad > spec.max_bad * part.wanted:
            lines.append(f"  {part.name}: {part.bad} of {part.wanted} records are bad")
            for reason, facts in part.dropped.report().items():
                lines.append(f"    {reason}: {facts['count']}, e.g. {facts['examples'][0]}")
    if lines:
        raise DataError(
            f"too many bad records (max_bad is {spec.max_bad:.1%} of each part):\n"
            + "\n".join(lines)
            + "\nthe log names every one; mend the data set, fetch it again, or raise max_bad of the mixture"
        )
