"""Batches for the trainer, from tokenised records and their images.

Shapes: T tokens of a sample, B samples and N images of a batch, H x W pixels of a processed image.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Generic, TypedDict, TypeVar

import torch
from torch.utils.data import Dataset

from mmpipe.data.images import decode_image, open_image
from mmpipe.data.labels import IGNORE, Encoded
from mmpipe.data.record_table import ImageDigests
from mmpipe.data.tokens import TokenTable
from mmpipe.errors import DataError

if TYPE_CHECKING:
    from transformers import LlavaImageProcessorPil

log = logging.getLogger(__name__)

S = TypeVar("S")
_KINDS = {False: "conversations", True: "preferences"}
MAX_REPLACEMENTS = 32
"""Number of consecutive unreadable records that is an error."""


class TokenTensors(TypedDict):
    """A tokenised conversation."""

    input_ids: torch.Tensor
    """[T] int64; every image takes as many positions as it has image tokens."""
    labels: torch.Tensor
    """[T] int64; -100 where not supervised."""


class Facts(TypedDict):
    """A record without its text."""

    id: str
    index: int
    """The record's index in the mixture."""
    pixel_values: list[torch.Tensor]
    """Each [3, H, W] float32, in the order of the marks."""
    replaced: tuple[str, ...]
    """Error messages of the unreadable records that this one replaces."""


class Sample(TokenTensors, Facts):
    """One record as tensors."""


class PreferenceSample(Facts):
    """One preference record: two conversations about the same images, which are given once."""

    chosen: TokenTensors
    rejected: TokenTensors


def as_tensors(encoded: Encoded) -> TokenTensors:
    """The same as tensors."""
    return TokenTensors(input_ids=torch.tensor(encoded.input_ids), labels=torch.tensor(encoded.labels))


def pixels(
    paths: Sequence[str], processor: LlavaImageProcessorPil, digests: ImageDigests | None = None
) -> list[torch.Tensor]:
    """Each image as [3, H, W] float32. Raises DataError if one cannot be opened or is not the one in ``digests``."""
    images = [decode_image(digests.read(path), path) if digests else open_image(Path(path)).image for path in paths]
    return list(processor(images, return_tensors="pt")["pixel_values"]) if images else []


class RecordDataset(Dataset[S], Generic[S], ABC):
    """The records of a mixture as samples. A record whose images cannot be read although the mixture was verified is
    replaced by the next one, never at random; the sample lists it in ``replaced`` and a warning is logged."""

    preferences: bool
    """Whether the records must have two answers."""

    def __init__(self, tokens: TokenTable, processor: LlavaImageProcessorPil) -> None:
        self.tokens = tokens
        self.processor = processor
        self.digests = tokens.image_digests()
        if tokens.preferences != self.preferences:
            raise DataError(
                f"{tokens.directory} holds {_KINDS[tokens.preferences]}, but the stage trains on "
                f"{_KINDS[self.preferences]}; choose another mixture for it"
            )

    @abstractmethod
    def sample(self, encoded: Sequence[Encoded], facts: Facts) -> S:
        """Build the sample of one record; ``encoded`` has an entry for each conversation."""

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def lengths(self) -> list[int]:
        """Length of each record in words, images counted."""
        return self.tokens.words

    @property
    def has_image(self) -> list[bool]:
        """Whether each record has images."""
        return self.tokens.has_image

    def __getitem__(self, place: int) -> S:
        faults: list[str] = []
        for step in range(min(len(self), MAX_REPLACEMENTS)):
            row = self.tokens[(place + step) % len(self)]
            try:
                images = pixels(row.images, self.processor, self.digests)
            except DataError as error:
                faults.append(f"{row.id}: {error}")
                log.warning("replaced by the next record: %s", faults[-1])
                continue
            facts = Facts(id=row.id, index=row.place, pixel_values=images, replaced=tuple(faults))
            return self.sample(row.conversations, facts)
        raise DataError(
            f"{self.tokens.directory}: the images of {len(faults)} records in a row cannot be read; "
            f"the first: {faults[0]}"
        )


class SupervisedDataset(RecordDataset[Sample]):
    """Conversations whose answers are supervised."""

    preferences = False

    def sample(self, encoded: Sequence[Encoded], facts: Facts) -> Sample:
        (one,) = encoded
        return Sample(**as_tensors(one), **facts)


class PreferenceDataset(RecordDataset[PreferenceSample]):
    """Conversations with a chosen and a rejected last answer."""

    preferences = True

    def sample(self, encoded: Sequence[Encoded], facts: Facts) -> PreferenceSample:
        chosen, rejected = map(as_tensors, encoded)
        return PreferenceSample(chosen=chosen, rejected=rejected, **facts)


class Batch(TypedDict):
    """The inputs of a model."""

    ids: list[str]
    indices: list[int]
    """The records' indices in the mixture."""
    input_ids: torch.Tensor
    """[B, T] int64, padded on the right."""
    attention_mask: torch.Tensor
    """[B, T] int64, 1 for tokens and 0 for padding."""
    labels: torch.Tensor
    """[B, T] int64, -100 where not supervised."""
    pixel_values: torch.Tensor
    """[N, 3, H, W] float32, in the order of the samples; one of zeros if no sample has an image."""
    dummy_image: bool
    """The only image is a placeholder of zeros, without tokens: every rank has to run the tower."""
    replaced: list[str]
    """Why records were replaced, for the trainer to count."""


@dataclass(frozen=True)
class Padding:
    """Padding of rows of different lengths to a batch."""

    pad_token_id: int
    image_size: tuple[int, int]
    """Height and width of processed images, in pixels."""
    multiple_of: int = 1
    """The padded length is a multiple of this."""

    def batch(self, rows: Sequence[TokenTensors], samples: Sequence[Sample | PreferenceSample]) -> Batch:
        """A batch of ``rows`` with the images of ``samples``."""
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
        images = [image for sample in samples for image in sample["pixel_values"]]
        return Batch(
            ids=[sample["id"] for sample in samples],
            indices=[sample["index"] for sample in samples],
            input_ids=input_ids,
            attention_mask=attention_mask,
            labels=labels,
            pixel_values=torch.stack(images) if images else torch.zeros(1, 3, *self.image_size),
            dummy_image=not images,
            replaced=[fault for sample in samples for fault in sample["replaced"]],
        )


class Collator(Padding):
    """Pads samples to a batch."""

    def __call__(self, samples: Sequence[Sample]) -> Batch:
        return self.batch(samples, samples)


class PreferenceCollator(Padding):
    """Pads pairs to a batch of 2 B rows: B chosen answers, then the B rejected ones in the same order. ``ids`` has B
    entries and ``pixel_values`` each image once; the features of all images, repeated as a whole, are those of the 2 B
    rows."""

    def __call__(self, samples: Sequence[PreferenceSample]) -> Batch:
        rows = [pair["chosen"] for pair in samples] + [pair["rejected"] for pair in samples]
        return self.batch(rows, samples)
