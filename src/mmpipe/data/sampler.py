"""Batch composition: a pure function of seed, epoch and step, so resuming restores no state.

The grouping is that of LLaVA's trainer (``group_by_length``, ``group_by_modality_length``): records are shuffled, cut
into global batches, sorted by length inside each and dealt out so that all micro batches are about equally long.
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch

from mmpipe.errors import ConfigError, DataError

Grouping = Literal["none", "length", "modality_length"]


@dataclass(frozen=True, kw_only=True)
class BatchPlan:
    """The batches of a run.

    The set of records in each global batch depends on ``seed``, ``grouping`` and the global batch size alone,
    not on how that is divided into ranks and accumulation steps. Every epoch is a new permutation; its last
    global batch is filled up with records from the beginning of the same epoch, so that each record is used
    and every step has the same size.
    """

    lengths: Sequence[int]
    """Length of each record, in any unit, positive."""
    has_image: Sequence[bool]
    """Whether each record has images."""
    micro_batch: int
    """Records per forward pass of a rank."""
    accumulation: int = 1
    """Forward passes per optimiser step."""
    world_size: int = 1
    """Ranks."""
    grouping: Grouping = "none"
    seed: int = 0
    _orders: dict[int, list[int]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not self.lengths:
            raise DataError("there are no records to make batches of")
        if len(self.lengths) != len(self.has_image):
            raise DataError(f"{len(self.lengths)} lengths but {len(self.has_image)} modality flags")
        if min(self.lengths) <= 0:
            raise DataError(f"record {list(self.lengths).index(min(self.lengths))} has no length")
        if min(self.micro_batch, self.accumulation, self.world_size) < 1:
            raise ConfigError("micro_batch, accumulation and world_size must be at least 1")

    @property
    def global_batch(self) -> int:
        """Records per optimiser step."""
        return self.micro_batch * self.accumulation * self.world_size

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps per epoch."""
        return -(-len(self.lengths) // self.global_batch)

    def step(self, step: int, rank: int) -> list[list[int]]:
        """The micro batches of one rank in optimiser step ``step`` (counted over all epochs, from 0)."""
        if not 0 <= rank < self.world_size:
            raise ConfigError(f"there is no rank {rank} among {self.world_size}")
        epoch, place = divmod(step, self.steps_per_epoch)
        order = self.order(epoch)
        start = place * self.global_batch
        records = [order[i % len(order)] for i in range(start, start + self.global_batch)]
        return [
            records[first : first + self.micro_batch]
            for first in range(rank * self.micro_batch, self.global_batch, self.world_size * self.micro_batch)
        ]

    def batches(self, rank: int, start: int = 0, steps: int | None = None) -> RankBatches:
        """The micro batches of one rank from step ``start`` on, as a ``batch_sampler`` of a DataLoader."""
        return RankBatches(self, rank, start, self.steps_per_epoch - start if steps is None else steps)

    def order(self, epoch: int) -> list[int]:
        """The permutation of all records in an epoch."""
        if epoch not in self._orders:
            self._orders.clear()
            generator = torch.Generator().manual_seed(epoch_seed(self.seed, epoch))
            sizes = self.micro_batch, self.accumulation * self.world_size, generator
            if self.grouping == "length":
                self._orders[epoch] = length_order(self.lengths, *sizes)
            elif self.grouping == "modality_length":
                self._orders[epoch] = modality_length_order(self.lengths, self.has_image, *sizes)
            else:
                self._orders[epoch] = torch.randperm(len(self.lengths), generator=generator).tolist()
        return self._orders[epoch]


@dataclass(frozen=True)
class RankBatches:
    """Micro batches of one rank, one list of record numbers each, in the order of training."""

    plan: BatchPlan
    rank: int
    start: int
    steps: int

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self.start, self.start + self.steps):
            yield from self.plan.step(step, self.rank)

    def __len__(self) -> int:
        return self.steps * self.plan.accumulation


def epoch_seed(seed: int, epoch: int) -> int:
    """A seed of its own for each epoch, hashed because torch's generator takes only the low 32 bits of one."""
    return int.from_bytes(hashlib.sha256(f"{seed} {epoch}".encode()).digest()[:4])


def length_order(lengths: Sequence[int], micro_batch: int, chunks: int, generator: torch.Generator) -> list[int]:
    """A permutation in which every ``chunks`` micro batches in a row are about equally long.

    Shuffled records are cut into groups of ``chunks * micro_batch``; each group is sorted, longest first, and
    dealt out with ``even_chunks``. The last group may be smaller.
    """
    shuffled = torch.randperm(len(lengths), generator=generator).tolist()
    order: list[int] = []
    for group in _groups(shuffled, chunks * micro_batch):
        longest_first = sorted(group, key=lambda record: lengths[record], reverse=True)
        for chunk in even_chunks(longest_first, lengths, chunks):
            order += chunk
    return order


def modality_length_order(
    lengths: Sequence[int], has_image: Sequence[bool], micro_batch: int, chunks: int, generator: torch.Generator
) -> list[int]:
    """As ``length_order``, with only records with images, or only records without, in a global batch.

    Records with and without images are ordered separately. The last group of each kind, full or not, is
    taken out; the other groups of both are shuffled together; the two taken out follow at the end, by record
    number, so that up to two global batches of an epoch are mixed.
    """
    with_images = [record for record, flag in enumerate(has_image) if flag]
    without = [record for record, flag in enumerate(has_image) if not flag]
    if not with_images or not without:
        return length_order(lengths, micro_batch, chunks, generator)
    size = chunks * micro_batch
    groups: list[Sequence[int]] = []
    rest: list[int] = []
    for kind in (with_images, without):
        own_lengths = [lengths[record] for record in kind]
        order = [kind[place] for place in length_order(own_lengths, micro_batch, chunks, generator)]
        *whole, last = _groups(order, size)
        groups += whole
        rest += last
    shuffled = torch.randperm(len(groups), generator=generator).tolist()
    return [record for place in shuffled for record in groups[place]] + sorted(rest)


def even_chunks(records: Sequence[int], lengths: Sequence[int], chunks: int) -> list[list[int]]:
    """Deal records into ``chunks`` lists of equal size and about equal total length. Each record in turn goes to the
    list that is shortest so far and not full yet (the first of equals). A number of records that cannot be divided
    evenly is dealt out in turn."""
    if len(records) % chunks:
        return [list(records[first::chunks]) for first in range(chunks)]
    size = len(records) // chunks
    dealt: list[list[int]] = [[] for _ in range(chunks)]
    open_lists = [(0, number) for number in range(chunks)]
    for record in records:
        total, number = heapq.heappop(open_lists)
        dealt[number].append(record)
        if len(dealt[number]) < size:
            heapq.heappush(open_lists, (total + lengths[record], number))
    return dealt


def _groups(records: Sequence[int], size: int) -> list[Sequence[int]]:
    return [records[first : first + size] for first in range(0, len(records), size)]
