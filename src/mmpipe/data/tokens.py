"""Tokenised mixtures: every record encoded once, in shards that training memory-maps.

On disk an image is one token, however many positions it takes in the model, and labels are the ranges that are
supervised: a record costs a few bytes a word. Images stay files, by reference. Equal records and settings give equal
bytes, however many processes worked.
"""

from __future__ import annotations

import copy
import hashlib
import multiprocessing
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pyarrow as pa

from mmpipe.artifacts import manifest
from mmpipe.artifacts.files import canonical_json, read_report, sha256, write_json
from mmpipe.data.control_tokens import ControlTokens
from mmpipe.data.labels import IGNORE, Encoded, encode
from mmpipe.data.record_table import RECORDS, ArrowWriter, ImageDigests, RecordTable
from mmpipe.data.records import AnyRecord, BadRecord, PreferenceRecord, Record, check_marks, length_in_words
from mmpipe.data.report import Log, ReasonCounts, Throughput, histogram, keeping, or_raise_max_bad, up_to
from mmpipe.data.templates import Template
from mmpipe.errors import ArtifactError, DataError

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerBase

SHARDS = "shards"
REPORT = "report.json"
ROWS_PER_SHARD = 65_536
_ROWS_PER_BATCH = 256
"""Rows held as Python lists before a write: one of 500 tokens takes 20 KB."""

_INTEGERS = pa.list_(pa.int32())
_CONVERSATIONS = pa.list_(pa.struct({"ids": _INTEGERS, "supervised": _INTEGERS}))
SCHEMA = pa.schema(
    {"index": pa.int32(), "id": pa.string(), "images": pa.list_(pa.string()), "conversations": _CONVERSATIONS}
    | {"tokens": pa.int32(), "words": pa.int32(), "has_image": pa.bool_()}
)


@dataclass(frozen=True, kw_only=True)
class TextEncoder:
    """The tokenisation of text, with labels."""

    template: Template
    tokenizer: PreTrainedTokenizerBase
    image_token: str
    tokens_per_image: int
    max_length: int | None = None
    """In tokens, images counted; longer texts are cut from the right."""
    max_positions: int | None = None
    """The language model's: longer texts cannot be trained on."""

    def __call__(self, record: Record) -> Encoded:
        """Token ids and labels. Raises BadRecord if the record cannot be trained on."""
        check_marks(record)
        turns = self._control.guard_turns(record.turns)
        size = self.image_token, self.tokens_per_image, self.max_length
        encoded = encode(self.tokenizer, self.template.render(turns), *size, self._control)
        if self.max_positions is not None and len(encoded.input_ids) > self.max_positions:
            raise BadRecord(
                "longer than the model's positions",
                f"{len(encoded.input_ids)} tokens, the language model has {self.max_positions} positions "
                f"(max_position_embeddings); set max_length to {self.max_positions} to cut such texts, or leave them out",
            )
        return replace(encoded, control=tuple(self._control.found(turns)))

    @cached_property
    def _control(self) -> ControlTokens:
        return ControlTokens(self.tokenizer, self.template.stop)

    @property
    def image_token_id(self) -> int:
        """The id that stands for an image."""
        found: Any = self.tokenizer.convert_tokens_to_ids(self.image_token)
        return int(found)

    def __str__(self) -> str:
        return f"the template '{self.template.name}' and the tokenizer {self.tokenizer.name_or_path}"


def tokenizer_hash(tokenizer: Any) -> str:
    """Hash of a tokenizer's tokens and ids."""
    return hashlib.sha256(canonical_json(tokenizer.get_vocab()).encode()).hexdigest()


class Packed(NamedTuple):
    """A conversation on disk: one token per image, and the supervised ``[start, end)`` ranges, flat."""

    ids: list[int]
    supervised: list[int]


def pack(encoded: Encoded, image_id: int, image_tokens: int) -> Packed:
    """Reduce every image to one token, and the labels to ranges.

    >>> pack(Encoded([9, 9, 9, 5, 6], [-100, -100, -100, -100, 6]), image_id=9, image_tokens=3)
    Packed(ids=[9, 5, 6], supervised=[2, 3])
    """
    ids: list[int] = []
    supervised: list[int] = []
    position = 0
    while position < len(encoded.input_ids):
        token = encoded.input_ids[position]
        if encoded.labels[position] != IGNORE:
            if supervised and supervised[-1] == len(ids):
                supervised[-1] += 1
            else:
                supervised += [len(ids), len(ids) + 1]
        ids.append(token)
        position += image_tokens if token == image_id else 1
    return Packed(ids, supervised)


def unpack(packed: Packed, image_id: int, image_tokens: int) -> Encoded:
    """The inverse of :func:`pack`."""
    input_ids: list[int] = []
    labels: list[int] = []
    ranges = iter(packed.supervised)
    start, end = next(ranges, -1), next(ranges, -1)
    for place, token in enumerate(packed.ids):
        if place == end:
            start, end = next(ranges, -1), next(ranges, -1)
        if token == image_id:
            input_ids += [token] * image_tokens
            labels += [IGNORE] * image_tokens
        else:
            input_ids.append(token)
            labels.append(token if start <= place < end else IGNORE)
    return Encoded(input_ids, labels)


_COUNTED = ("records", "kept", "cut", "text_tokens", "supervised_tokens", "image_tokens")


@dataclass
class _Counts:
    """Counts of :data:`_COUNTED`, dropped records by reason, and records by length in tokens."""

    of: Counter[str] = field(default_factory=Counter)
    dropped: ReasonCounts = field(default_factory=ReasonCounts)
    notes: ReasonCounts = field(default_factory=ReasonCounts)
    lengths: Counter[int] = field(default_factory=Counter)

    def update(self, later: _Counts) -> None:
        self.of += later.of
        self.dropped.update(later.dropped)
        self.notes.update(later.notes)
        self.lengths += later.lengths

    def report(self) -> dict[str, Any]:
        counted = {name: self.of[name] for name in _COUNTED}
        # without notes the report is the one of earlier versions, byte for byte: training does not become stale
        notes = {"notes": self.notes.report()} if self.notes.counts else {}
        return {**counted, "dropped": self.dropped.report(), **notes, "tokens_up_to": histogram(self.lengths)}


def tokenise(
    records: Path,
    encoder: TextEncoder,
    out: Path,
    *,
    max_bad: float,
    workers: int = 1,
    log: Log = print,
    failed_report: Path | None = None,
) -> dict[str, Any]:
    """Write ``shards/*.arrow`` and ``report.json`` into ``out`` and return the report.

    A record without a single supervised token, or whose images do not fit into ``max_length``, is dropped and counted.
    One process a core encodes shard after shard; memory does not grow with the number of records.

    Raises DataError, naming template, tokenizer and records, when the template does not belong to the tokenizer, when
    more than ``max_bad`` of the records are dropped, or when everything is supervised although the template has
    questions; the report is written to ``failed_report`` then.
    """
    throughput = Throughput()
    encoder.template.check(encoder.tokenizer)
    table = RecordTable(records)
    if not len(table):
        raise DataError(f"{records}: there are no records")
    (out / SHARDS).mkdir(parents=True, exist_ok=True)
    everything = range(len(table))
    ranges = [everything[start : start + ROWS_PER_SHARD] for start in everything[::ROWS_PER_SHARD]]
    jobs = [
        (records, encoder, places, out / SHARDS / f"{number:05d}-of-{len(ranges):05d}.arrow")
        for number, places in enumerate(ranges)
    ]
    counts = _Counts()
    for found in _encoded(jobs, workers):
        counts.update(found)
        log(f"{counts.of['records']} of {len(table)} records, {counts.dropped.total()} dropped")
    report = {
        "template": encoder.template.name,
        "tokenizer": tokenizer_hash(encoder.tokenizer),
        "image_token_id": encoder.image_token_id,
        "tokens_per_image": encoder.tokens_per_image,
        "max_length": encoder.max_length,
        "preferences": isinstance(table[0], PreferenceRecord),
        **counts.report(),
    }
    with keeping(report, failed_report):
        _check(records, encoder, counts, max_bad)
    log(f"kept {counts.of['kept']} of {counts.of['records']} records, {throughput(counts.of['records'])}")
    write_json(out / REPORT, report)
    return report


_Job = tuple[Path, TextEncoder, range, Path]


def _encoded(jobs: Sequence[_Job], workers: int) -> Iterator[_Counts]:
    if min(workers, len(jobs)) <= 1:
        yield from map(_shard, jobs)
        return
    # a fork would copy the locks of threads that Arrow and the tokenizer have started
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(_shard, jobs)


def _shard(job: _Job) -> _Counts:
    """Encode the records of some indices into one file."""
    records, encoder, places, file = job
    table, counts = RecordTable(records, checked=True), _Counts()
    with ArrowWriter(file, SCHEMA, _ROWS_PER_BATCH) as writer:
        for place in places:
            if row := _row(place, table[place], encoder, counts):
                writer.add(row)
    return counts


def _row(place: int, record: AnyRecord, encoder: TextEncoder, counts: _Counts) -> dict[str, Any] | None:
    """One record's row, or None for one that cannot be trained on; both are counted."""
    counts.of["records"] += 1
    name = f"{record.source}/{record.id}"
    try:
        encoded = [encoder(conversation) for conversation in record.conversations]
        if not all(conversation.supervised for conversation in encoded):
            raise BadRecord("nothing supervised", "no token is supervised")
        if isinstance(record, PreferenceRecord) and encoded[0].input_ids == encoded[1].input_ids:
            cut = f" after {encoded[0].cut} and {encoded[1].cut} were cut" if encoded[0].cut or encoded[1].cut else ""
            raise BadRecord("equal answers in tokens", f"the chosen and the rejected answer have the same tokens{cut}")
    except BadRecord as fault:
        counts.dropped.add(fault.reason, f"{name}: {fault.detail}")
        return None
    for text in sorted({text for conversation in encoded for text in conversation.control}):
        counts.notes.add(f"control token {text} kept as text", name)
    longest = max(len(conversation.input_ids) for conversation in encoded)
    images = len(record.images) * encoder.tokens_per_image
    counts.lengths[up_to(longest)] += 1
    counts.of.update(
        kept=1,
        cut=any(conversation.cut for conversation in encoded),
        image_tokens=images * len(encoded),
        text_tokens=sum(len(conversation.input_ids) - images for conversation in encoded),
        supervised_tokens=sum(conversation.supervised for conversation in encoded),
    )
    size = encoder.image_token_id, encoder.tokens_per_image
    return {
        "index": place,
        "id": name,
        "images": list(record.images),
        "conversations": [pack(conversation, *size)._asdict() for conversation in encoded],
        "tokens": longest,
        "words": length_in_words(record),
        "has_image": bool(record.images),
    }


def _check(records: Path, encoder: TextEncoder, counts: _Counts, max_bad: float) -> None:
    """Raise DataError when too many records were dropped, or when the template does not fit."""
    dropped = counts.dropped.total()
    if not counts.of["kept"] or dropped > max_bad * counts.of["records"]:
        lines = [f"  {line}" for line in counts.dropped.lines()]
        misfit = {"nothing supervised", "no image"} & counts.dropped.counts.keys()
        advice = [*(["choose the template that belongs to the model"] if misfit else []), "mend the records"]
        raise DataError(
            f"{records}: with {encoder}, {dropped} of {counts.of['records']} records cannot be trained on "
            f"(max_bad is {max_bad:.1%}):\n"
            + "\n".join(lines)
            + f"\n{or_raise_max_bad(advice, counts.of['kept'], max_bad)}"
        )
    if counts.of["supervised_tokens"] == counts.of["text_tokens"] and not encoder.template.captions:
        raise DataError(
            f"{records}: with {encoder}, every token is supervised, questions too; "
            "choose the template that belongs to the model"
        )


class TokenRow(NamedTuple):
    """One tokenised record."""

    place: int
    """In the mixture."""
    id: str
    images: tuple[str, ...]
    conversations: tuple[Encoded, ...]
    """One, or the chosen and the rejected one."""


class TokenTable:
    """The tokenised records of a mixture, memory mapped: fast to open, shared by all workers."""

    def __init__(self, directory: Path) -> None:
        import datasets

        self.directory = directory
        manifest.check(directory)
        try:
            self.report: Mapping[str, Any] = read_report(directory / REPORT)
            shards = [datasets.Dataset.from_file(str(path)) for path in sorted((directory / SHARDS).glob("*.arrow"))]
            self._table: datasets.Dataset = datasets.concatenate_datasets(shards)
        except (OSError, ValueError, pa.ArrowInvalid) as error:
            raise ArtifactError(f"{directory}: no records in tokens ({error}); make them again") from error
        if len(self._table) != self.report["kept"]:
            raise ArtifactError(
                f"{directory}: {len(self._table)} records, but its {REPORT} counts {self.report['kept']}; "
                "delete the directory to make it again"
            )

    def image_digests(self) -> ImageDigests | None:
        """The digests of the mixture's images; None when the mixture that the tokens were made from is not there."""
        for path, digest in manifest.read_inputs(self.directory).items():
            mixture = Path(path).parent
            if (mixture / RECORDS).is_file() and sha256(Path(path)) == digest:
                with suppress(FileNotFoundError):
                    return ImageDigests(mixture)
        return None

    def with_images(self) -> TokenTable:
        """Only the records with images. Raises DataError when there is none."""
        chosen = [row for row, has_image in enumerate(self.has_image) if has_image]
        if not chosen:
            raise DataError(
                f"{self.directory}: no record has an image; choose another mixture, or set requires_image: false"
            )
        others = copy.copy(self)
        others._table = self._table.select(chosen)
        return others

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, place: int) -> TokenRow:
        row = self._table[place]
        size = self.report["image_token_id"], self.report["tokens_per_image"]
        conversations = tuple(unpack(Packed(**packed), *size) for packed in row["conversations"])
        return TokenRow(row["index"], row["id"], tuple(row["images"]), conversations)

    def require(self, tokenizer: PreTrainedTokenizerBase, image_tokens: int, minimum: float = 0.0) -> float:
        """Check that a model can train on these tokens; returns the supervised share of the text tokens. Raises
        ArtifactError when they were made for another tokenizer or image size, DataError when a smaller share than
        ``minimum`` is supervised."""
        made_for = self.report["tokenizer"], self.report["tokens_per_image"]
        if made_for != (tokenizer_hash(tokenizer), image_tokens):
            raise ArtifactError(
                f"{self.directory}: made with another tokenizer or number of tokens an image than the model's; "
                "delete the directory to make it again"
            )
        share: float = self.report["supervised_tokens"] / max(1, self.report["text_tokens"])
        if share < minimum:
            raise DataError(
                f"{self.directory}: with the template '{self.report['template']}', {share:.2%} of the text tokens are "
                f"supervised, expected at least {minimum:.2%}; "
                "choose the template that belongs to the model, or lower min_supervised_fraction"
            )
        return share

    @property
    def preferences(self) -> bool:
        """Whether every record has a chosen and a rejected answer."""
        return bool(self.report["preferences"])

    @property
    def words(self) -> list[int]:
        """Length of each record in words, images counted, by which batches are grouped."""
        return list(self._table["words"])

    @property
    def has_image(self) -> list[bool]:
        """Whether each record has images."""
        return list(self._table["has_image"])
