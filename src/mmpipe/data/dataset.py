"""From a record on disk to a batch: what the trainer reads.

Shapes: T tokens of a sample, B samples and N pictures of a batch, H x W pixels of a processed picture.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypedDict, TypeVar

import torch
from torch.utils.data import Dataset

from mmpipe.data.images import open_picture
from mmpipe.data.labels import IGNORE, Encoded, encode
from mmpipe.data.records import AnyRecord, BadRecord, PreferenceRecord, Record, check_marks
from mmpipe.data.store import RecordTable
from mmpipe.data.templates import Template
from mmpipe.errors import DataError

if TYPE_CHECKING:
    from transformers import LlavaImageProcessorPil, PreTrainedTokenizerBase

log = logging.getLogger(__name__)

S = TypeVar("S")

_KINDS = {Record: "conversations", PreferenceRecord: "preferences"}

MAX_REPLACEMENTS = 32
"""So many records in a row that cannot be read mean that something else is wrong."""


class Tokens(TypedDict):
    """A conversation in tokens."""

    input_ids: torch.Tensor
    """[T] int64; every picture takes as many positions as it has image tokens."""
    labels: torch.Tensor
    """[T] int64; -100 where nothing is supervised."""


class Facts(TypedDict):
    """What is known of a record beside its text."""

    id: str
    index: int
    """The record's place in the mixture."""
    pixel_values: list[torch.Tensor]
    """Each [3, H, W] float32, in the order of the marks."""
    replaced: tuple[str, ...]
    """Why this record stands in for others: one line for each that could not be read."""


class Sample(Tokens, Facts):
    """One record, ready to be put into a batch."""


class Pair(Facts):
    """One preference record: two conversations about the same pictures, which are given once."""

    chosen: Tokens
    rejected: Tokens


def as_tensors(encoded: Encoded) -> Tokens:
    """The same as tensors."""
    return Tokens(input_ids=torch.tensor(encoded.input_ids), labels=torch.tensor(encoded.labels))


@dataclass(frozen=True, kw_only=True)
class Encoder:
    """How text and pictures become numbers; what training and preference data share."""

    template: Template
    tokenizer: PreTrainedTokenizerBase
    image_processor: LlavaImageProcessorPil
    image_token: str
    image_tokens_per_picture: int
    max_length: int | None = None
    """In tokens, pictures counted; longer texts are cut from the right."""

    def text(self, record: Record) -> Encoded:
        """Token ids and labels. Raises BadRecord if the record cannot be trained on."""
        check_marks(record)
        return encode(
            self.tokenizer,
            self.template.render(record.turns),
            self.image_token,
            self.image_tokens_per_picture,
            self.max_length,
        )

    def pictures(self, paths: Sequence[str]) -> list[torch.Tensor]:
        """Each picture as [3, H, W] float32. Raises DataError if one cannot be opened."""
        images = [open_picture(Path(path)).image for path in paths]
        if not images:
            return []
        return list(self.image_processor(images, return_tensors="pt")["pixel_values"])


class RecordDataset(Dataset[S], Generic[S], ABC):
    """The records of a mixture as samples.

    A record that cannot be read although the mixture was verified (a picture gone since, a text too long for
    its pictures) is replaced by the next one, so that the same run gives the same batches; the sample says so
    in ``replaced`` and a warning is logged. Nothing is replaced silently or at random.
    """

    kind: type[AnyRecord]
    """What the file must hold."""

    def __init__(self, records: Path, encoder: Encoder, with_images: bool = False) -> None:
        """``with_images`` leaves out the records without pictures."""
        self.records = RecordTable(records, with_images)
        self.encoder = encoder
        if with_images and not len(self):
            raise DataError(
                f"{records}: no record has a picture; choose another mixture, or set requires_image: false"
            )
        if len(self) and not isinstance(self.records[0], self.kind):
            raise DataError(
                f"{records} holds {_KINDS[type(self.records[0])]}, but the stage trains on {_KINDS[self.kind]}; "
                "choose another mixture for it"
            )

    @abstractmethod
    def sample(self, encoded: Sequence[Encoded], facts: Facts) -> S:
        """Put together what was read of one record; ``encoded`` has an entry for each conversation."""

    def __len__(self) -> int:
        return len(self.records)

    @property
    def lengths(self) -> list[int]:
        """Length of each record in words, pictures counted."""
        return self.records.lengths

    @property
    def has_image(self) -> list[bool]:
        """Whether each record has pictures."""
        return self.records.has_image

    def __getitem__(self, index: int) -> S:
        faults: list[str] = []
        for step in range(min(len(self), MAX_REPLACEMENTS)):
            place = (index + step) % len(self)
            record = self.records[place]
            name = f"{record.source}/{record.id}"
            try:
                encoded = [self.encoder.text(conversation) for conversation in record.conversations]
                pictures = self.encoder.pictures(record.images)
            except DataError as error:
                faults.append(f"{name}: {error}")
                log.warning("replaced by the next record: %s", faults[-1])
                continue
            return self.sample(
                encoded,
                Facts(
                    id=name, index=self.records.places[place], pixel_values=pictures, replaced=tuple(faults)
                ),
            )
        raise DataError(
            f"{self.records.path}: none of {len(faults)} records in a row can be read; the first: {faults[0]}"
        )


class SupervisedDataset(RecordDataset[Sample]):
    """Conversations whose answers are learnt."""

    kind = Record

    def sample(self, encoded: Sequence[Encoded], facts: Facts) -> Sample:
        """See RecordDataset."""
        (one,) = encoded
        return Sample(**as_tensors(one), **facts)


class PreferenceDataset(RecordDataset[Pair]):
    """Conversations with a chosen and a rejected last answer."""

    kind = PreferenceRecord

    def sample(self, encoded: Sequence[Encoded], facts: Facts) -> Pair:
        """See RecordDataset."""
        chosen, rejected = map(as_tensors, encoded)
        return Pair(chosen=chosen, rejected=rejected, **facts)


class Batch(TypedDict):
    """What a model is fed."""

    ids: list[str]
    indices: list[int]
    """The records' places in the mixture."""
    input_ids: torch.Tensor
    """[B, T] int64, padded on the right."""
    attention_mask: torch.Tensor
    """[B, T] int64, 1 for tokens and 0 for padding."""
    labels: torch.Tensor
    """[B, T] int64, -100 where nothing is supervised."""
    pixel_values: torch.Tensor
    """[N, 3, H, W] float32, in the order of the samples; one of zeros if no sample has a picture."""
    dummy_image: bool
    """The picture is of zeros and belongs to no token; every rank runs the tower, or ranks would hang."""
    replaced: list[str]
    """Why records were replaced, for the trainer to count."""


@dataclass(frozen=True)
class Padding:
    """How rows of different lengths become a batch."""

    pad_token_id: int
    picture_size: tuple[int, int]
    """Height and width of processed pictures, in pixels."""
    multiple_of: int = 1
    """The padded length is a multiple of this."""

    def batch(self, rows: Sequence[Tokens], samples: Sequence[Sample | Pair]) -> Batch:
        """A batch of ``rows`` with the pictures of ``samples``."""
        longest = max(len(row["input_ids"]) for row in rows)
        shape = (len(rows), -(-longest // self.multiple_of) * self.multiple_of)
        input_ids = torch.full(shape, self.pad_token_id)
        labels = torch.full(shape, IGNORE)
        attention_mask = torch.zeros(shape, dtype=torch.long)
        for number, row in enumerate(rows):
            length = len(row["input_ids"])
            input_ids[number, :length] = row["input_ids"]
            labels[number, :length] = row["labels"]
            attention_mask[number, :length] = 1
        pictures = [picture for sample in samples for picture in sample["pixel_values"]]
        return Batch(
            ids=[sample["id"] for sample in samples],
            indices=[sample["index"] for sample in samples],
            input_ids=input_ids,
            attention_mask=attention_mask,
            labels=labels,
            pixel_values=torch.stack(pictures) if pictures else torch.zeros(1, 3, *self.picture_size),
            dummy_image=not pictures,
            replaced=[fault for sample in samples for fault in sample["replaced"]],
        )


class Collator(Padding):
    """Pads samples to a batch."""

    def __call__(self, samples: Sequence[Sample]) -> Batch:
        return self.batch(samples, samples)


class PreferenceCollator(Padding):
    """Pads pairs to a batch of 2 B rows: B chosen answers, then the B rejected ones in the same order.

    ``ids`` has B entries and ``pixel_values`` each picture once; the features of all pictures, repeated as a
    whole, are those of the 2 B rows.
    """

    def __call__(self, samples: Sequence[Pair]) -> Batch:
        rows = [pair["chosen"] for pair in samples] + [pair["rejected"] for pair in samples]
        return self.batch(rows, samples)


@dataclass(frozen=True)
class Supervision:
    """How much of a data set is supervised, over the samples looked at."""

    samples: int
    text_tokens: int
    """Tokens other than those of pictures."""
    supervised_tokens: int
    bad: int
    """Samples that cannot be trained on."""

    @property
    def share(self) -> float:
        """Supervised tokens among the text tokens."""
        return self.supervised_tokens / max(1, self.text_tokens)


def check_supervision(
    dataset: RecordDataset[Any],
    samples: int = 256,
    minimum: float = 0.001,
    maximum: float | None = None,
    max_bad: float = 0.1,
) -> Supervision:
    """Measure what is supervised in records spread evenly over the data set, before training on them.

    Raises DataError, naming template, tokenizer and a record, when the template and the tokenizer do not
    belong together, when the share of supervised text tokens is below ``minimum`` or above ``maximum`` (by
    default what a template can reach at most), or when more than ``max_bad`` of the samples cannot be trained
    on: nothing to learn, or marks and pictures that differ.
    """
    encoder = dataset.encoder
    if not len(dataset):
        raise DataError(f"{dataset.records.path}: there are no records")
    encoder.template.check(encoder.tokenizer)
    if maximum is None:
        maximum = 1.0 if encoder.template.captions else 0.999
    image_id = encoder.tokenizer.convert_tokens_to_ids(encoder.image_token)
    count = min(samples, len(dataset))
    looked_at = [position * len(dataset) // count for position in range(count)]
    text_tokens = supervised_tokens = 0
    faults: list[str] = []
    for index in looked_at:
        record = dataset.records[index]
        where = f"{record.source}/{record.id}"
        try:
            conversations = [encoder.text(conversation) for conversation in record.conversations]
        except BadRecord as error:
            faults.append(f"{where}: {error}")
            continue
        if not all(encoded.supervised for encoded in conversations):
            faults.append(f"{where}: no token is supervised")
        for encoded in conversations:
            text_tokens += sum(token != image_id for token in encoded.input_ids)
            supervised_tokens += encoded.supervised
    found = Supervision(count, text_tokens, supervised_tokens, len(faults))
    how = f"with the template '{encoder.template.name}' and the tokenizer {encoder.tokenizer.name_or_path}"
    if len(faults) > max_bad * count:
        raise DataError(
            f"{dataset.records.path}: {how}, {len(faults)} of {count} records cannot be trained on, "
            f"e.g. {faults[0]}; choose the template that belongs to the model, or mend the records"
        )
    if not minimum <= found.share <= maximum:
        raise DataError(
            f"{dataset.records.path}: {how}, {found.share:.2%} of the text tokens are supervised, expected "
            f"{minimum:.2%} to {maximum:.2%}, e.g. in {where}; choose the template that belongs to the model"
        )
    return found
