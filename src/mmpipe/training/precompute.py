"""Writing down what a frozen model says about a mixture: shard by shard, in chunks, then published as one artifact.

A shard holds :data:`mmpipe.training.precomputed.RECORDS_PER_SHARD` records and depends on these alone, so its bytes are
the same whichever chunk writes it and however often it is interrupted. Shards wait in an undeclared directory that is
named by what they are made from; a job that goes on, also with another number of chunks, finds those that are finished,
and those that were published from the same inputs.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from mmpipe.artifacts import manifest
from mmpipe.artifacts.files import (
    atomic_open,
    canonical_json,
    link_or_copy,
    read_json,
    sha256,
    staged_directory,
    write_json,
)
from mmpipe.artifacts.state import open_state
from mmpipe.checkpoints.load import preprocessor_directory
from mmpipe.data.dataset import Collator, PreferenceCollator, PreferenceDataset, SupervisedDataset
from mmpipe.data.images import image_processor, pixel_settings, require_same_pixels
from mmpipe.data.tokens import TokenTable, tokenizer_hash
from mmpipe.errors import ArtifactError
from mmpipe.inference.open_answerer import open_for_inference
from mmpipe.losses.preference import response_log_probabilities
from mmpipe.losses.teacher import draws, most_likely
from mmpipe.losses.vocabulary import token_rows
from mmpipe.training.objectives.base import Batch, hidden_states
from mmpipe.training.precomputed import PAIRS, RECORDS_PER_SHARD, SHARDS, TOKENS
from mmpipe.training.stop import as_helper

log = logging.getLogger(__name__)

BATCH = 8
"""Records computed at once. Rounding depends on what is computed together, so this is no setting."""
_ROWS_PER_WRITE = 256


@dataclass(frozen=True)
class Work:
    """What is annotated, by whom, and where shards wait until all of them are there."""

    checkpoint: Path
    tokens: Path
    """The mixture as the checkpoint's tokenizer writes it."""
    spec: str
    settings: Mapping[str, Any]
    out: Path
    """Where the annotations are published."""
    state: Path

    @property
    def inputs(self) -> dict[str, str]:
        """Hashes of what the annotations are made from."""
        return manifest.input_hashes([path / manifest.NAME for path in (self.checkpoint, self.tokens)])

    @cached_property
    def fingerprint(self) -> str:
        return manifest.fingerprint(self.spec, self.inputs)

    @property
    def shards(self) -> Path:
        """Where shards wait."""
        return self.state / f"{SHARDS}-{self.fingerprint[:12]}"


def annotate_chunk(
    work: Work,
    chunk: Path,
    *,
    device: str,
    workers: int = 0,
    report: Callable[[Iterator[Any], int], Iterator[Any]] = lambda shards, total: shards,
) -> None:
    """Write the shards of ``chunk`` (``.../0002-of-0008.json``) that are not there yet, and then that file.

    The file tells :func:`publish` of the chunk's shards with size and hash (``files``) and of the model (``facts``; none
    without shards). Raises ConfigError when the model saw other images than ``settings['image_aspect']`` makes,
    ArtifactError, naming the records, when its numbers are not finite.
    """
    table = TokenTable(work.tokens)
    number, _, chunks = chunk.stem.partition("-of-")
    names = shard_names(len(table))
    first, end = (len(names) * n // int(chunks) for n in (int(number), int(number) + 1))
    if first == end:
        return write_json(chunk, {"files": {}, "facts": None})
    with open_state(work.state / chunk.stem, work.fingerprint):
        annotator = _Annotator(work, table, device, workers)
        _reuse_published(work, names[first:end])
        for name in report(iter(names[first:end]), end - first):
            if not (work.shards / name).is_file():
                annotator.write(name, work.shards / name)
        files = {f"{SHARDS}/{name}": _file_facts(work.shards / name) for name in names[first:end]}
        write_json(chunk, {"files": files, "facts": annotator.facts()})


def publish(work: Work, chunks: Sequence[Path]) -> None:
    """Publish the shards of all ``chunks``, files that :func:`annotate_chunk` wrote.

    Raises ArtifactError when a shard is missing; its chunk is then removed, to be asked for again.
    """
    parts = {chunk: read_json(chunk) for chunk in chunks}
    files = {name: facts for part in parts.values() for name, facts in part["files"].items()}
    for chunk, part in parts.items():
        if lost := [name for name in part["files"] if not (work.shards / Path(name).name).is_file()]:
            chunk.unlink()
            raise ArtifactError(f"{work.shards / Path(lost[0]).name}: missing; run the same command again")
    records = len(TokenTable(work.tokens))
    if list(files) != [f"{SHARDS}/{name}" for name in shard_names(records)]:
        where = chunks[0].parent
        raise ArtifactError(f"{where}: not the chunks of {records} records; delete it and run again")
    facts = next(part["facts"] for part in parts.values() if part["facts"])
    with staged_directory(work.out) as stage:
        (stage / SHARDS).mkdir()
        for name in files:
            link_or_copy(work.shards / Path(name).name, stage / name)
        manifest.write(
            stage,
            kind="annotations",
            spec=work.spec,
            inputs=work.inputs,
            files=files,
            records=records,
            settings=dict(work.settings),
            **facts,
        )
    shutil.rmtree(work.state)


def shard_names(records: int) -> list[str]:
    """The shards of so many records, in order."""
    shards = -(-records // RECORDS_PER_SHARD)
    return [f"{number:05d}-of-{shards:05d}.arrow" for number in range(shards)]


class _Annotator:
    """The model, and the records it is shown."""

    def __init__(self, work: Work, table: TokenTable, device: str, workers: int) -> None:
        settings = work.settings
        self.where, self.settings, self.device, self.workers = work.checkpoint, settings, device, workers
        model, self.processor, card = open_for_inference(work.checkpoint, device)
        self.model = model
        self.tokenizer = self.processor.tokenizer
        table.require(self.tokenizer, model.config.image_seq_length)
        asked = image_processor(preprocessor_directory(work.checkpoint, card), settings["image_aspect"])
        self.pixels = pixel_settings(self.processor.image_processor)
        require_same_pixels(work.checkpoint, pixel_settings(asked), self.pixels, "annotating model")
        self.vocabulary = token_rows(self.tokenizer)
        pairs = settings["kind"] == "log_probabilities"
        self.dataset: Any = (PreferenceDataset if pairs else SupervisedDataset)(table, self.processor.image_processor)
        self.lengths = self.dataset.lengths
        size = model.config.vision_config.image_size
        self.collate = (PreferenceCollator if pairs else Collator)(self.tokenizer.pad_token_id, (size, size))
        self.rows, self.schema = (self._pair_rows, PAIRS) if pairs else (self._token_rows, TOKENS)

    def facts(self) -> dict[str, Any]:
        """What those who read must know of the model."""
        return {"vocabulary": self.vocabulary, "tokenizer": tokenizer_hash(self.tokenizer), "pixels": self.pixels}

    def write(self, name: str, path: Path) -> None:
        """Write the shard ``name``; the file takes its name when it is whole."""
        start = int(name.partition("-of-")[0]) * RECORDS_PER_SHARD
        # records of like length together: less padding
        places = sorted(
            range(start, min(start + RECORDS_PER_SHARD, len(self.dataset))), key=lambda i: (self.lengths[i], i)
        )
        batches = DataLoader(
            self.dataset,
            batch_sampler=[places[i : i + BATCH] for i in range(0, len(places), BATCH)],
            collate_fn=self.collate,
            num_workers=self.workers,
            worker_init_fn=as_helper,
        )
        rows = (row for batch in batches for row in self._annotated(batch))
        with atomic_open(path) as file, pa.ipc.new_stream(file, self.schema) as sink:
            while some := list(islice(rows, _ROWS_PER_WRITE)):
                sink.write_batch(pa.RecordBatch.from_pylist(some, schema=self.schema))

    @torch.no_grad()
    def _annotated(self, batch: Batch) -> list[dict[str, Any]]:
        batch = {name: value.to(self.device) if isinstance(value, Tensor) else value for name, value in batch.items()}
        try:
            return self.rows(batch, hidden_states(self.model, batch))
        except ArtifactError as error:
            raise ArtifactError(f"{self.where}, records {', '.join(batch['ids'])}: {error}") from error

    def _pair_rows(self, batch: Batch, hidden_BLD: Tensor) -> list[dict[str, Any]]:
        sums_B, _ = response_log_probabilities(hidden_BLD, self.model.lm_head.weight, batch["labels"])
        if not torch.isfinite(sums_B).all():
            raise ArtifactError("the reference's numbers are not finite: its weights are damaged or too large")
        chosen, rejected = sums_B.double().cpu().chunk(2)
        rows = zip(batch["indices"], chosen.tolist(), rejected.tolist(), strict=True)
        return [{"index": index, "chosen": c, "rejected": r} for index, c, r in rows]

    def _token_rows(self, batch: Batch, hidden_BLD: Tensor) -> list[dict[str, Any]]:
        found = []
        for row, index in enumerate(batch["indices"]):
            ids_RK, log_RK = self._tokens(hidden_BLD[row, None], batch["labels"][row, None], index)
            found.append(
                {
                    "index": index,
                    "ids": ids_RK.flatten().cpu().numpy().astype(np.int32),
                    "log_probabilities": log_RK.flatten().cpu().numpy().astype(np.float16),
                }
            )
        return found

    def _tokens(self, hidden_1LD: Tensor, labels_1L: Tensor, index: int) -> tuple[Tensor, Tensor]:
        """Ids and log-probabilities of one record; draws depend on it alone."""
        head_VD, k = self.model.lm_head.weight, min(self.settings["k"], self.vocabulary)
        if self.settings["kind"] == "top_k":
            return most_likely(hidden_1LD, head_VD, labels_1L, k, vocabulary=self.vocabulary)
        seed = hashlib.sha256(canonical_json([self.settings["seed"], index]).encode()).digest()
        generator = torch.Generator(hidden_1LD.device).manual_seed(int.from_bytes(seed[:7]))
        return draws(hidden_1LD, head_VD, labels_1L, k, generator=generator, vocabulary=self.vocabulary)


def _reuse_published(work: Work, names: Sequence[str]) -> None:
    """Take shards from what was published already, where that was made from the same."""
    try:
        card = manifest.read(work.out)
    except ArtifactError:
        return
    if manifest.fingerprint(canonical_json(card["spec"]), card["inputs"]) != work.fingerprint:
        return
    work.shards.mkdir(parents=True, exist_ok=True)
    for name in names:
        published, waiting = work.out / SHARDS / name, work.shards / name
        if not waiting.exists() and _file_facts(published) == card["files"].get(f"{SHARDS}/{name}"):
            link_or_copy(published, waiting)


def _file_facts(path: Path) -> dict[str, Any]:
    return {"size": path.stat().st_size, "sha256": sha256(path)}
