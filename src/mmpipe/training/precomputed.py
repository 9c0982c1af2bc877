"""Precomputed log-probabilities of a frozen model on a mixture, as training reads them.

Kinds:

* ``log_probabilities``  of a preference pair's chosen and rejected answer (sums over the response, natural logarithm);
* ``top_k``              the k most probable tokens of every response position and their log-probabilities (softmax over
                         all tokens of the tokenizer, so that the residual probability is known);
* ``sampled``            k tokens sampled with replacement from the same distribution: an unbiased estimate of the
                         divergence, which ``top_k`` is not.

One row a record, by its index in the mixture, in shards of :data:`RECORDS_PER_SHARD` records. An entry is an id (int32)
and a log-probability (float16): 6 k bytes a position. float16 is off by at most 2^-11 of a logarithm, less than the bfloat16
logits it is computed from.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from mmpipe.artifacts import manifest
from mmpipe.data.images import pixel_settings, require_same_pixels
from mmpipe.data.tokens import tokenizer_hash
from mmpipe.errors import ArtifactError

SHARDS = "shards"
RECORDS_PER_SHARD = 4096

PAIRS = pa.schema([("index", pa.int32()), ("chosen", pa.float64()), ("rejected", pa.float64())])
# 64-bit offsets: k times the positions of many records may pass 2^31
TOKENS = pa.schema(
    [("index", pa.int32()), ("ids", pa.large_list(pa.int32())), ("log_probabilities", pa.large_list(pa.float16()))]
)


class PrecomputedLogProbs:
    """Published log-probabilities, memory mapped, by a record's index in the mixture."""

    def __init__(self, directory: Path) -> None:
        card = manifest.read(directory)
        if not {"settings", "vocabulary", "tokenizer", "pixels"} <= card.keys():
            raise ArtifactError(f"{directory}: holds a {card['kind']}, not precomputed outputs")
        self.directory = directory
        self.settings: dict[str, Any] = card["settings"]
        self.vocabulary: int = card["vocabulary"]
        """Number of leading rows of the head that the distributions cover."""
        self._tokenizer: str = card["tokenizer"]
        self._pixels: dict[str, Any] = card["pixels"]
        self._table = pa.concat_tables(
            pa.ipc.open_stream(pa.memory_map(str(directory / name))).read_all() for name in card["files"]
        )
        index = self._table.column("index").to_numpy()
        self._row_of = np.full(index.max(initial=-1) + 1, -1)
        self._row_of[index] = np.arange(len(index))

    def require_tokenizer(self, tokenizer: Any) -> None:
        """Raise ArtifactError unless the precomputing model had the same tokens under the same ids."""
        if tokenizer_hash(tokenizer) != self._tokenizer:
            raise ArtifactError(
                f"{self.directory}: precomputed by a model with another tokenizer than the student's; "
                "take a teacher with the student's tokenizer"
            )

    def require_pixels(self, processor: Any, whose: str) -> None:
        """Raise ConfigError when the precomputing model, named ``whose``, preprocessed images unlike ``processor``."""
        require_same_pixels(self.directory, pixel_settings(processor), self._pixels, whose)

    def require_rows(self, rows: int) -> None:
        """Raise ArtifactError when a head of ``rows`` rows does not cover the cached vocabulary."""
        if rows < self.vocabulary:
            raise ArtifactError(
                f"{self.directory}: written about {self.vocabulary} tokens, the student's head has {rows} rows; "
                "give the student a row for every token of its tokenizer"
            )

    def log_probabilities(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Log-probabilities of the chosen and of the rejected answers, ``[B]`` float64 each."""
        pairs = self._table.take(pa.array(self._rows(indices)))
        return torch.tensor(pairs["chosen"].to_numpy()), torch.tensor(pairs["rejected"].to_numpy())

    def tokens(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Token ids (int64) and log-probabilities (float32) ``[R, K]`` of the records' response positions, in order."""
        rows, k = self._rows(indices), min(self.settings["k"], self.vocabulary)

        def joined(name: str) -> Tensor:
            column = self._table.column(name)
            return torch.from_numpy(np.concatenate([column[row].values.to_numpy() for row in rows])).view(-1, k)

        return joined("ids").long(), joined("log_probabilities").float()

    def _rows(self, indices: Sequence[int]) -> list[int]:
        """Rows of the table by index in the mixture. Raises ArtifactError for a record without a row."""
        known = len(self._row_of)
        missing = [index for index in indices if index >= known or self._row_of[index] < 0]
        if missing:
            raise ArtifactError(
                f"{self.directory}: nothing is written about record {missing[0]} of the mixture: it did not fit "
                "into max_length with the other model's image tokens (raise max_length of the stage), or its images "
                "could not be read then (delete the directory to write it again)"
            )
        rows: list[int] = self._row_of[list(indices)].tolist()
        return rows
