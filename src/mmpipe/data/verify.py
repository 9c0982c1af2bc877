"""Reading, selecting, verifying and counting the records of one source of a mixture."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Executor
from dataclasses import replace
from fnmatch import fnmatchcase
from hashlib import blake2b
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any, cast

from mmpipe import registry
from mmpipe.artifacts.files import find_name
from mmpipe.data import formats
from mmpipe.data.formats.base import FormatReader, ParsedRecord
from mmpipe.data.image_files import EmbeddedImages, ImageFinder, ImageInfo
from mmpipe.data.record_table import ArrowWriter
from mmpipe.data.records import IMAGE_MARK, AnyRecord, BadRecord, check_record, length_in_words
from mmpipe.data.report import Log, ReasonCounts, histogram, up_to
from mmpipe.data.spec import MixtureSourceSpec
from mmpipe.errors import ConfigError, DataError, did_you_mean

_BLOCK = 1024
"""Records held in memory while their images are decoded."""
_SIDES = (64, 128, 224, 336, 448, 672, 1024, 2048, 4096)
"""Upper bounds of the longer side in the histogram of image sizes."""
_FOLDERS = 1000
"""Number of image folders that are counted separately."""
_FOLDERS_SHOWN = 20
_OFTEN = 8
"""Repetitions of an id above which its last number is stored: counting up from 2 each time would be quadratic."""
_HEAD = re.compile(rf"(?:{re.escape(IMAGE_MARK)}\s*)*")
_BUCKET_BITS = 17
_REST = 6
"""Stored bytes of a hash: the last ones; the bucket's number has the rest."""
EQUAL_IMAGE = "image equal to one of another name"


def digest_of(*what: object) -> bytes:
    """Eight bytes that identify things by their ``repr``."""
    return blake2b(repr(what).encode(), digest_size=8).digest()


class HashSet:
    """A set of 64-bit hashes: seven bytes each, where a ``set`` takes a hundred.

    Two of n things collide with a probability of about n² / 2⁶⁵: one in 400,000 for the ten million lookups of a
    mixture of two million records.

    >>> hashes = HashSet()
    >>> hashes.add("a", "b"), hashes.add("ab"), hashes.add("a", "b")
    (True, True, False)
    """

    def __init__(self) -> None:
        # the first bits of a hash choose the bucket, which holds the others one after another
        self._buckets = [bytearray() for _ in range(1 << _BUCKET_BITS)]

    def add(self, *what: object) -> bool:
        """Add what has this ``repr``; returns whether it is new."""
        key = digest_of(*what)
        bucket, rest = self._buckets[int.from_bytes(key) >> (64 - _BUCKET_BITS)], key[-_REST:]
        place = bucket.find(rest)
        while place >= 0 and place % _REST:  # the end of one and the beginning of the next
            place = bucket.find(rest, place + 1)
        if place < 0:
            bucket += rest
        return place < 0


class Deduplicator:
    """Finds repeated ids, records and images over all sources of a mixture."""

    def __init__(self, digests: ArrowWriter) -> None:
        self._hashes = HashSet()
        self._last_numbers: dict[tuple[str, str], int] = {}
        self._digests = digests

    def numbered(self, record: AnyRecord) -> AnyRecord:
        """The record under an id that no other of its data set has."""
        identity = record.source, record.id
        number, new_id = self._last_numbers.get(identity, 1), record.id
        if number > 1:
            new_id = f"{record.id}#{number}"
        while not self._hashes.add("id", record.source, new_id):
            number += 1
            new_id = f"{record.id}#{number}"
        if number > _OFTEN:
            self._last_numbers[identity] = number
        return record if new_id == record.id else replace(record, id=new_id)

    def repeated(self, record: AnyRecord, images: list[ImageInfo]) -> str | None:
        """A note if the same texts about the same images, whatever they are called, occurred before."""
        texts = [(turn.role, turn.text) for conversation in record.conversations for turn in conversation.turns]
        content = digest_of(texts, *(image.inspection.digest for image in images))
        anywhere = not self._hashes.add("record", content)
        here = not self._hashes.add("record of", record.source, content)
        if here:
            return "record seen before, kept again"
        return "record of another data set, kept again" if anywhere else None

    def image(self, image: ImageInfo) -> str | None:
        """Write the digest of an image with a new name; a note if an image of another name has the same content."""
        if not self._hashes.add("image", image.name):
            return None
        self._digests.add({"name": image.name, "digest": image.inspection.digest})
        return None if self._hashes.add("content", image.inspection.digest) else EQUAL_IMAGE


class MixtureSource:
    """One source of a mixture and all that is counted about it. ``seed`` is the mixture's. Raises ConfigError for an
    unknown format, DataError when there are no files or folders."""

    def __init__(
        self,
        spec: MixtureSourceSpec,
        directory: Path,
        seed: int,
        deduplicator: Deduplicator,
        embedded: EmbeddedImages,
        log: Log,
    ) -> None:
        self.spec = spec
        self.found = self.left_out = self.wanted = self.kept = self.with_images = 0
        self.dropped, self.notes = ReasonCounts(), ReasonCounts()
        self.lengths, self.sides = Counter[int](), Counter[int]()
        self._named, self._lacking = Counter[str](), Counter[str]()
        self._seed = seed
        self._deduplicator = deduplicator
        self._embedded = embedded
        self._log = log
        self._files = [path for name in spec.annotations for path in _files(directory, name)]
        self._read = _format(spec.format)
        self._folders = [directory / name for name in spec.images]

    @property
    def name(self) -> str:
        """Its name in messages."""
        return f"{self.spec.dataset} ({', '.join(self.spec.annotations)})"

    @property
    def bad(self) -> int:
        """Number of dropped records."""
        return self.wanted - self.kept

    def records(self, pool: Executor) -> Iterator[AnyRecord]:
        """The good records, in order."""
        self._log(f"{self.name}: reading")
        images = ImageFinder(self._folders, self._embedded)
        parsed = map(images.unpacked, self._chosen())
        while block := list(islice(parsed, _BLOCK)):
            images.prepare((name for one in block if one.record for name in one.record.images), pool)
            for one in block:
                self.wanted += 1
                try:
                    record = self._verified(one, images)
                except BadRecord as fault:
                    self.dropped.add(fault.reason, f"{one.id}: {fault.detail}")
                    self._log(f"dropped {self.spec.dataset}/{one.id}: {fault}")
                    continue
                self.kept += 1
                self.with_images += bool(record.images)
                self.lengths[up_to(length_in_words(record))] += 1
                yield record
            self._log(f"{self.name}: {self.wanted} records so far, {self.bad} bad")
        self._log(f"{self.name}: kept {self.kept} of {self.wanted}")

    def _parsed(self) -> Iterator[ParsedRecord]:
        """Every record that the source does not leave out."""
        self.left_out = 0
        for path in self._files:
            for parsed in self._read(path, self.spec.dataset):
                if parsed.record is None or self._is_wanted(parsed.record):
                    yield parsed
                else:
                    self.left_out += 1

    def _is_wanted(self, record: AnyRecord) -> bool:
        names, only = record.images, self.spec.only
        return (
            self.spec.with_images in (None, bool(names))
            and (not only or (bool(names) and all(_matches(name, only) for name in names)))
            and not any(_matches(name, self.spec.without) for name in names)
        )

    def _chosen(self) -> Iterator[ParsedRecord]:
        """The records that ``take`` chooses, in the order of the files."""
        if self.spec.take is None:
            for parsed in self._parsed():
                self.found += 1
                yield parsed
            return
        self.found = sum(1 for _ in self._parsed())
        number = self.spec.take if isinstance(self.spec.take, int) else round(self.spec.take * self.found)
        if number > self.found:
            raise DataError(
                f"{self.name}: `take: {number}` but there are only {self.found} such records; "
                "lower it, or leave it out to take all"
            )
        # The choice depends on this source alone: adding other ones does not change it. Each record is taken with the
        # probability that makes the number come out (selection sampling: Knuth, TAOCP 2, 3.4.2 S); none is remembered.
        chooser = random.Random(f"{self._seed} {self.spec.dataset} {self.spec.annotations}")
        for position, parsed in enumerate(self._parsed()):
            if chooser.random() * (self.found - position) < number:
                number -= 1
                yield parsed

    def _verified(self, parsed: ParsedRecord, finder: ImageFinder) -> AnyRecord:
        """The record as it will be trained on. Raises BadRecord."""
        if parsed.record is None:
            raise cast(BadRecord, parsed.fault)
        for note in parsed.notes:
            self.notes.add(note, parsed.id)
        record = parsed.record.with_questions(self._question)
        check_record(record)
        images = self._images(record, finder)
        for image in images:
            self._count_image(image)
        record = replace(record, images=tuple(image.name for image in images))
        numbered = self._deduplicator.numbered(record)
        oddity = self._deduplicator.repeated(record, images)
        if not oddity and numbered.id != record.id:
            oddity = "id used before, numbered"
        if oddity:
            self.notes.add(oddity, parsed.id)
        return numbered

    def _question(self, text: str) -> str:
        if self.spec.image_position == "first":
            text = images_first(text)
        if self.spec.prefix:
            head = cast(re.Match[str], _HEAD.match(text)).end()
            text = text[:head] + self.spec.prefix + text[head:]
        return text + self.spec.suffix

    def _images(self, record: AnyRecord, finder: ImageFinder) -> list[ImageInfo]:
        """The record's images. Raises BadRecord, after counting the folder of the one that is missing or damaged."""
        for folder in {_first_folder(name) for name in record.images}:
            self._named[self._counted_as(folder)] += 1
        found = []
        for name in record.images:
            try:
                found.append(finder[name])
            except BadRecord:
                self._lacking[self._counted_as(_first_folder(name))] += 1
                raise
        return found

    def _counted_as(self, folder: str) -> str:
        return folder if folder in self._named or len(self._named) < _FOLDERS else "others"

    def _count_image(self, image: ImageInfo) -> None:
        side = max(image.inspection.width, image.inspection.height)
        self.sides[next((bound for bound in _SIDES if side <= bound), side)] += 1
        for note in image.inspection.notes:
            self.notes.add(note, image.name)
        if oddity := self._deduplicator.image(image):
            self.notes.add(oddity, image.name)

    def reasons(self) -> Iterator[str]:
        """Reasons of dropped records, their folders, and known explanations, a line each."""
        yield from self.dropped.lines()
        for folder, facts in self._lacking_folders().items():
            yield f"in {folder}: {facts['dropped']} of {facts['records']} records lack an image"
        if self.dropped.total() and self.spec.known:
            yield f"known: {self.spec.known}"

    def _lacking_folders(self) -> dict[str, dict[str, int]]:
        """First folders of missing or damaged images: records that name them, and how many of these were dropped."""
        worst = sorted(self._lacking.items(), key=lambda item: (-item[1], item[0]))
        return {folder: {"records": self._named[folder], "dropped": count} for folder, count in worst[:_FOLDERS_SHOWN]}

    def report(self) -> dict[str, Any]:
        """The counts that are published."""
        return {
            "dataset": self.spec.dataset,
            "annotations": list(self.spec.annotations),
            "take": self.spec.take,
            **({"expected": self.spec.expected} if self.spec.expected else {}),
            **({"known": self.spec.known} if self.spec.known else {}),
            **{name: getattr(self, name) for name in ("left_out", "found", "wanted", "kept", "with_images")},
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
    """The part before the first slash: an image's data set, where a mixture joins several."""
    parts = PurePosixPath(name.lstrip("\x00")).parts
    return parts[0] if len(parts) > 1 else "."


def _format(name: str) -> FormatReader:
    found = registry.modules(formats.__name__)
    if name not in found:
        raise ConfigError(f"there is no data format '{name}'{did_you_mean(name, found)}")
    return cast(FormatReader, vars(found[name])["read"])


def _files(directory: Path, name: str) -> list[Path]:
    """The annotation files of ``name``: one, or all matches if it is a pattern."""
    if not any(sign in name for sign in "*?["):
        return [find_name(directory, name)]
    found = sorted(directory.glob(name))
    if not found:
        raise DataError(f"{directory}: no file matches `annotations: {name}`")
    return found
