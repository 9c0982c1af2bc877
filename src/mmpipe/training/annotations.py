"""What a frozen model says about a mixture, written down once: log-probabilities of pairs, or likely tokens.

Kinds:

* ``log_probabilities``  of a preference pair's chosen and rejected answer (sums over the response, natural logarithm);
* ``top_k``              the k most likely tokens at every response position with their log-probabilities (softmax over the
                         full vocabulary, so that what they do not cover is known: the residual mass);
* ``sampled``            k tokens drawn with replacement from the same distribution: an unbiased estimate of the
                         divergence, which ``top_k`` is not.

One row a record, named by its place in the mixture. Ids are stored as int32 and log-probabilities as float32:
8 k bytes a position.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from mmpipe.artifacts import manifest
from mmpipe.artifacts.files import canonical_json, staged_directory
from mmpipe.data.dataset import Collator, PreferenceCollator, PreferenceDataset, SupervisedDataset
from mmpipe.data.tokens import TokenTable, tokenizer_hash
from mmpipe.errors import ArtifactError
from mmpipe.models import vlm
from mmpipe.objectives import positions
from mmpipe.objectives.preference import response_log_probabilities
from mmpipe.objectives.teacher import draws, most_likely
from mmpipe.training.objective import Batch, hidden_states

log = logging.getLogger(__name__)

FILE = "annotations.arrow"
_PAIRS = pa.schema([("index", pa.int32()), ("chosen", pa.float64()), ("rejected", pa.float64())])
_TOKENS = pa.schema(
    [
        ("index", pa.int32()),
        ("ids", pa.list_(pa.int32())),
        ("log_probabilities", pa.list_(pa.float32())),
    ]
)


def annotate(
    checkpoint: Path,
    tokens: Path,
    spec: str,
    settings: dict[str, Any],
    out: Path,
    *,
    device: str,
    batch_size: int,
    report: Callable[[Iterator[Any], int], Iterator[Any]],
) -> None:
    """Let the model of ``checkpoint`` annotate every record of a mixture and publish the result in ``out``.

    ``tokens`` holds the mixture as that model's tokenizer writes it.
    """
    model, processor, _ = vlm.load(checkpoint, torch.bfloat16 if device == "cuda" else torch.float32)
    model.to(device).requires_grad_(False).eval()
    table = TokenTable(tokens)
    table.require(processor.tokenizer, model.config.image_seq_length)
    pairs = settings["kind"] == "log_probabilities"
    dataset = (PreferenceDataset if pairs else SupervisedDataset)(table, processor.image_processor)
    size = model.config.vision_config.image_size
    collate = (PreferenceCollator if pairs else Collator)(processor.tokenizer.pad_token_id, (size, size))
    read, schema = (_pair_rows, _PAIRS) if pairs else (_token_rows, _TOKENS)
    inputs = manifest.input_hashes([checkpoint / manifest.NAME, tokens / manifest.NAME])
    with staged_directory(out) as stage:
        with (
            pa.OSFile(str(stage / FILE), "wb") as file,
            pa.ipc.new_stream(file, schema) as sink,
        ):
            starts = range(0, len(dataset), batch_size)
            for start in report(iter(starts), len(starts)):
                samples = [dataset[i] for i in range(start, min(start + batch_size, len(dataset)))]
                batch = {
                    name: value.to(device) if isinstance(value, Tensor) else value
                    for name, value in collate(samples).items()  # type: ignore[arg-type]
                }
                sink.write_batch(pa.RecordBatch.from_pylist(read(model, batch, settings), schema=schema))
        manifest.write(
            stage,
            kind="annotations",
            spec=spec,
            inputs=inputs,
            records=len(dataset),
            settings=settings,
            vocabulary=len(model.get_output_embeddings().weight),
            tokenizer=tokenizer_hash(processor.tokenizer),
        )


@torch.no_grad()
def _pair_rows(model: Any, batch: Batch, settings: dict[str, Any]) -> list[dict[str, Any]]:
    hidden_BLD = hidden_states(model, batch)
    sums_B, _ = response_log_probabilities(hidden_BLD, model.lm_head.weight, batch["labels"])
    _require_finite(sums_B, batch)
    chosen, rejected = sums_B.double().cpu().chunk(2)
    rows = zip(batch["indices"], chosen.tolist(), rejected.tolist(), strict=True)
    return [{"index": index, "chosen": c, "rejected": r} for index, c, r in rows]


@torch.no_grad()
def _token_rows(model: Any, batch: Batch, settings: dict[str, Any]) -> list[dict[str, Any]]:
    hidden_BLD, head_VD = hidden_states(model, batch), model.lm_head.weight
    k = min(settings["k"], len(head_VD))
    if settings["kind"] == "top_k":
        ids_RK, log_RK = most_likely(hidden_BLD, head_VD, batch["labels"], k)
    else:
        ids_RK, log_RK = draws(
            hidden_BLD, head_VD, batch["labels"], k, generator=_generator(hidden_BLD.device, settings, batch)
        )
    rows_R, _ = positions.response(batch["labels"])
    owner_R = (rows_R // batch["labels"].shape[1]).cpu()
    ids_RK, log_RK = ids_RK.cpu(), log_RK.cpu()
    return [
        {
            "index": index,
            "ids": ids_RK[owner_R == row].flatten().tolist(),
            "log_probabilities": log_RK[owner_R == row].flatten().tolist(),
        }
        for row, index in enumerate(batch["indices"])
    ]


def _generator(device: torch.device, settings: dict[str, Any], batch: Batch) -> torch.Generator:
    """Draws depend on the records alone, not on what was drawn before."""
    seed = hashlib.sha256(canonical_json([settings["seed"], batch["indices"]]).encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(seed[:7]))


def _require_finite(values: Tensor, batch: Batch) -> None:
    if not torch.isfinite(values).all():
        raise ArtifactError(
            f"the annotating model gives numbers that are not finite for the records {', '.join(batch['ids'])}; "
            "its weights are damaged, or too large for their precision"
        )


class Annotations:
    """Published annotations, memory mapped, by a record's place in the mixture."""

    def __init__(self, directory: Path) -> None:
        import datasets

        card = manifest.read(directory)
        self.directory = directory
        self.settings: dict[str, Any] = card["settings"]
        self.vocabulary: int = card["vocabulary"]
        self._tokenizer: str = card["tokenizer"]
        self._rows = datasets.Dataset.from_file(str(directory / FILE))
        index = self._rows.data.column("index").to_numpy()
        self._row_of = np.full(index.max(initial=-1) + 1, -1)
        self._row_of[index] = np.arange(len(index))

    def require_tokenizer(self, tokenizer: Any) -> None:
        """Raise ArtifactError unless the annotating model had the same tokens under the same ids."""
        if tokenizer_hash(tokenizer) != self._tokenizer:
            raise ArtifactError(
                f"{self.directory}: written by a model with another tokenizer than the student's; "
                "take a teacher with the student's tokenizer"
            )

    def log_probabilities(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Of the chosen and of the rejected answers, ``[B]`` float64 each."""
        rows = self._annotated(indices)
        return torch.tensor(rows["chosen"], dtype=torch.float64), torch.tensor(
            rows["rejected"], dtype=torch.float64
        )

    def tokens(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Token ids and log-probabilities ``[R, K]`` of the response positions of the records, in order."""
        rows = self._annotated(indices)
        ids = [token for row in rows["ids"] for token in row]
        values = [value for row in rows["log_probabilities"] for value in row]
        k = min(self.settings["k"], self.vocabulary)
        return torch.tensor(ids, dtype=torch.long).view(-1, k), torch.tensor(values).view(-1, k)

    def _annotated(self, indices: Sequence[int]) -> dict[str, list[Any]]:
        """The rows of records by their places in the mixture. Raises ArtifactError for one that has none."""
        known = len(self._row_of)
        missing = [index for index in indices if index >= known or self._row_of[index] < 0]
        if missing:
            raise ArtifactError(
                f"{self.directory}: nothing is written about record {missing[0]} of the mixture: it did not fit "
                "into max_length with the other model's image tokens; raise max_length of the stage"
            )
        rows: dict[str, list[Any]] = self._rows[self._row_of[list(indices)]]
        return rows
