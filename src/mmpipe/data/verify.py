"""One part of a mixture: its records read, chosen, verified, and all that is counted about them."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from dataclasses import replace
from fnmatch import fnmatchcase
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any, cast

from mmpipe import registry
from mmpipe.data import formats
from mmpipe.data.digests import DigestWriter
from mmpipe.data.formats.base import Draft, Format
from mmpipe.data.image_files import EmbeddedImages, Found, ImageFinder
from mmpipe.data.records import IMAGE_MARK, AnyRecord, BadRecord, check_record, length_in_words
from mmpipe.data.report import Tally, histogram, up_to
from mmpipe.data.seen import Seen, digest_of
from mmpipe.data.spec import PartSpec
from mmpipe.errors import ConfigError, DataError, did_you_mean

_BLOCK = 1024
"""Records that are held at once while their images are decoded."""
_SIDES = (64, 128, 224, 336, 448, 672, 1024, 2048, 4096)
"""Upper bounds of the longer side in the histogram of image sizes."""
_FOLDERS = 1000
"""So many folders of images are told apart."""
_FOLDERS_SHOWN = 20
_OFTEN = 8
"""An id that comes back more often has its last number remembered: counting up from 2 each time would take for ever."""
_HEAD = re.compile(rf"(?:{re.escape(IMAGE_MARK)}\s*)*")

Log = Callable[[str], None]


class Known:
    """What the parts of a mixture know together: ids, records and images that have come by."""

    def __init__(self, digests: DigestWriter) -> None:
        self._seen = Seen()
        self._last_numbers: dict[tuple[str, str], int] = {}
        self._digests = digests

    def numbered(self, record: AnyRecord) -> AnyRecord:
        """The record under an id that no other of its data set has."""
        identity = record.source, record.id
        number, new_id = self._last_numbers.get(identity, 1), record.id
        if number > 1:
            new_id = f"{record.id}#{number}"
        while not self._seen.add("id", record.source, new_id):
            number += 1
            new_id = f"{record.id}#{number}"
        if number > _OFTEN:
            self._last_numbers[identity] = number
        return record if new_id == record.id else replace(record, id=new_id)

    def repeated(self, record: AnyRecord, images: list[Found]) -> str | None:
        """Where the same texts about the same images have come by before, if they have."""
        content = digest_of(_texts(record), *(image.inspection.digest for image in images))
        anywhere = not self._seen.add("record", content)
        here = not self._seen.add("record of", record.source, content)
        if here:
            return "record seen before, kept again"
        return "record of another data set, kept again" if anywhere else None

    def image(self, found: Found) -> str | None:
        """Write the image down unless it has come by under this name; what is odd about it."""
        if not self._seen.add("image", found.name):
            return None
        self._digests.add(found.name, found.inspection.digest)
        new = self._seen.add("content", found.inspection.digest)
        return None if new else EQUAL_IMAGE


EQUAL_IMAGE = "image equal to one of another name"


def _texts(record: AnyRecord) -> list[tuple[str, str]]:
    """What is said in a record, whatever it and its images are called."""
    return [(turn.role, turn.text) for conversation in record.conversations for turn in conversation.turns]


class Part:
    """One part of a mixture and all that is counted about it.

    ``seed`` is the mixture's. Raises ConfigError for an unknown format, DataError when there are no files or folders.
    """

    def __init__(
        self, spec: PartSpec, directory: Path, seed: int, known: Known, embedded: EmbeddedImages, log: Log
    ) -> None:
        self.spec = spec
        self.found = 0
        self.left_out = 0
        self.wanted = 0
        self.kept = 0
        self.with_images = 0
        self.dropped = Tally()
        self.notes = Tally()
        self.lengths: Counter[int] = Counter()
        self.sides: Counter[int] = Counter()
        self._named: Counter[str] = Counter()
        self._lacking: Counter[str] = Counter()
        self._seed = seed
        self._known = known
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
        images = ImageFinder(self._folders, self._embedded)
        drafts = map(images.unpacked, self._chosen())
        while block := list(islice(drafts, _BLOCK)):
            images.prepare((name for draft in block if draft.record for name in draft.record.images), pool)
            for draft in block:
                self.wanted += 1
                try:
                    record = self._verified(draft, images)
                except BadRecord as fault:
                    self.dropped.add(fault.reason, f"{draft.id}: {fault.detail}")
                    self._log(f"dropped {self.spec.dataset}/{draft.id}: {fault}")
                    continue
                self._count(record)
                yield record
            self._log(f"{self.name}: {self.wanted} records so far, {self.bad} bad")
        self._log(f"{self.name}: kept {self.kept} of {self.wanted}")

    def _found(self) -> Iterator[Draft]:
        """Every draft that the part does not leave out."""
        self.left_out = 0
        for path in self._files:
            for draft in self._format.read(path, self.spec.dataset):
                if draft.record is None or self._is_wanted(draft.record):
                    yield draft
                else:
                    self.left_out += 1

    def _is_wanted(self, record: AnyRecord) -> bool:
        names, only = record.images, self.spec.only
        return (
            self.spec.with_images in (None, bool(names))
            and (not only or (bool(names) and all(_matches(name, only) for name in names)))
            and not any(_matches(name, self.spec.without) for name in names)
        )

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
        # The choice depends on this part alone: adding other parts does not change it. Each record is taken with the
        # probability that makes the number come out (selection sampling: Knuth, TAOCP 2, 3.4.2 S); none is remembered.
        chooser = random.Random(f"{self._seed} {self.spec.dataset} {self.spec.annotations}")
        for position, draft in enumerate(self._found()):
            if chooser.random() * (self.found - position) < number:
                number -= 1
                yield draft

    def _verified(self, draft: Draft, finder: ImageFinder) -> AnyRecord:
        """The record as it will be trained on. Raises BadRecord."""
        if draft.record is None:
            raise cast(BadRecord, draft.fault)
        for note in draft.notes:
            self.notes.add(note, draft.id)
        record = draft.record.with_questions(self._question)
        check_record(record)
        images = self._images(record, finder)
        for image in images:
            self._look_at(image)
        record = replace(record, images=tuple(image.name for image in images))
        numbered = self._known.numbered(record)
        oddity = self._known.repeated(record, images)
        if not oddity and numbered.id != record.id:
            oddity = "id used before, numbered"
        if oddity:
            self.notes.add(oddity, draft.id)
        return numbered

    def _question(self, text: str) -> str:
        if self.spec.image_position == "first":
            text = images_first(text)
        if self.spec.prefix:
            head = cast(re.Match[str], _HEAD.match(text)).end()
            text = text[:head] + self.spec.prefix + text[head:]
        return text + self.spec.suffix

    def _images(self, record: AnyRecord, finder: ImageFinder) -> list[Found]:
        """The record's images. Raises BadRecord, after counting the folder of the one that is missing or damaged."""
        for folder in {_first_folder(name) for name in record.images}:
            self._named[self._told_apart(folder)] += 1
        found = []
        for name in record.images:
            try:
                found.append(finder[name])
            except BadRecord:
                self._lacking[self._told_apart(_first_folder(name))] += 1
                raise
        return found

    def _told_apart(self, folder: str) -> str:
        return folder if folder in self._named or len(self._named) < _FOLDERS else "others"

    def _look_at(self, image: Found) -> None:
        side = max(image.inspection.width, image.inspection.height)
        self.sides[next((bound for bound in _SIDES if side <= bound), side)] += 1
        for note in image.inspection.notes:
            self.notes.add(note, image.name)
        if oddity := self._known.image(image):
            self.notes.add(oddity, image.name)

    def _count(self, record: AnyRecord) -> None:
        self.kept += 1
        self.with_images += bool(record.images)
        self.lengths[up_to(length_in_words(record))] += 1

    @property
    def bad(self) -> int:
        """Dropped records."""
        return self.wanted - self.kept

    def reasons(self) -> Iterator[str]:
        """Why records were dropped, from where, and what is known about that, a line each."""
        for reason, facts in self.dropped.report().items():
            yield f"{reason}: {facts['count']}, e.g. {facts['examples'][0]}"
        for folder, facts in self._lacking_folders().items():
            yield f"in {folder}: {facts['dropped']} of {facts['records']} records lack an image"
        if self.dropped.total() and self.spec.known:
            yield f"known: {self.spec.known}"

    def _lacking_folders(self) -> dict[str, dict[str, int]]:
        """Where images are missing or damaged: by first folder, records that name it and how many of them were dropped."""
        worst = sorted(self._lacking.items(), key=lambda item: (-item[1], item[0]))
        return {folder: {"records": self._named[folder], "dropped": count} for folder, count in worst[:_FOLDERS_SHOWN]}

    def report(self) -> dict[str, Any]:
        """What is published about the part."""
        return {
            "dataset": self.spec.dataset,
            "annotations": list(self.spec.annotations),
            "take": self.spec.take,
            **({"expected": self.spec.expected} if self.spec.expected else {}),
            **({"known": self.spec.known} if self.spec.known else {}),
            "left_out": self.left_out,
            "found": self.found,
            "wanted": self.wanted,
            "kept": self.kept,
            "with_images": self.with_images,
            "dropped": self.dropped.report(),
            "without_image_by_folder": self._lacking_folders(),
            "notes": self.notes.report(),
            "words_up_to": histogram(self.lengths),
            "longer_side_up_to": histogram(self.sides),
        }


def images_first(question: str) -> str:
    """The marks of all images at the head of the question, then the rest of its text, as LLaVA does."""
    marks = question.count(IMAGE_MARK)
    if not marks:
        return question
    rest = question.replace(IMAGE_MARK, "").strip()
    return f"{IMAGE_MARK * marks}\n{rest}".strip()


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _first_folder(name: str) -> str:
    """What stands before the first slash: the data set an image is from, where a mixture joins several."""
    parts = PurePosixPath(name.lstrip("\x00")).parts
    return parts[0] if len(parts) > 1 else "."


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
