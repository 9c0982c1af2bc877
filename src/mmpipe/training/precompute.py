"""Precomputing a frozen model's log-probabilities on a mixture, in shards and chunks, published as one artifact.

A shard holds :data:`mmpipe.training.precomputed.RECORDS_PER_SHARD` records and depends only on them: its bytes are the
same in any chunk and after any interruption. Unpublished shards are in an undeclared directory named by their
inputs; a resumed job, also with another number of chunks, reuses finished ones, and those published from the same inputs.
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
from typing import Any, cast

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from mmpipe.artifacts import files as on_disk
from mmpipe.artifacts import manifest
from mmpipe.artifacts.files import canonical_json
from mmpipe.artifacts.state import open_state
from mmpipe.checkpoints.load import preprocessor_directory
from mmpipe.data.dataset import Batch, Collator, PreferenceCollator, PreferenceDataset, SupervisedDataset
from mmpipe.data.images import image_processor, pixel_settings, require_same_pixels
from mmpipe.data.tokens import TokenTable, tokenizer_hash
from mmpipe.errors import ArtifactError
from mmpipe.inference.open_answerer import open_for_inference
from mmpipe.losses.preference import response_log_probabilities
from mmpipe.losses.teacher import most_probable_tokens, sample_tokens, token_rows
from mmpipe.models.llava import hidden_states
from mmpipe.training.precomputed import PAIRS, RECORDS_PER_SHARD, SHARDS, TOKENS
from mmpipe.training.stop import worker_init

log = logging.getLogger(__name__)

BATCH = 8
"""Records per batch. Rounding depends on it, so it is not a setting."""
_ROWS_PER_WRITE = 256


@dataclass(frozen=True)
class PrecomputeJob:
    """A precomputation: checkpoint, mixture and output."""

    checkpoint: Path
    tokens: Path
    """The mixture, tokenised with the checkpoint's tokenizer."""
    spec: str
    settings: Mapping[str, Any]
    out: Path
    """Directory of the published shards."""
    state: Path

    @property
    def inputs(self) -> dict[str, str]:
        """Hashes of the inputs' manifests."""
        return manifest.input_hashes([path / manifest.NAME for path in (self.checkpoint, self.tokens)])

    @cached_property
    def fingerprint(self) -> str:
        return manifest.fingerprint(self.spec, self.inputs)

    @property
    def shards(self) -> Path:
        """Directory of finished shards until publication."""
        return self.state / f"{SHARDS}-{self.fingerprint[:12]}"


def precompute_chunk(
    job: PrecomputeJob,
    chunk: Path,
    *,
    device: str,
    workers: int = 0,
    report: Callable[[Iterator[Any], int], Iterator[Any]] = lambda shards, total: shards,
) -> None:
    """Write the missing shards of ``chunk`` (``.../0002-of-0008.json``), then that file.

    The file holds size and hash of the chunk's shards (``files``) and ``facts`` of the model (None without shards). Raises
    ConfigError when the model was trained with another ``image_aspect`` than ``settings`` have, ArtifactError, naming the
    records, when its log-probabilities are not finite.
    """
    table = TokenTable(job.tokens)
    number, _, chunks = chunk.stem.partition("-of-")
    names = shard_names(len(table))
    first, end = (len(names) * n // int(chunks) for n in (int(number), int(number) + 1))
    if first == end:
        return on_disk.write_json(chunk, {"files": {}, "facts": None})
    with open_state(job.state / chunk.stem, job.fingerprint):
        writer = _ShardWriter(job, table, device, workers)
        _reuse_published(job, names[first:end])
        for name in report(iter(names[first:end]), end - first):
            if not (job.shards / name).is_file():
                writer.write(name, job.shards / name)
        files = {f"{SHARDS}/{name}": _file_facts(job.shards / name) for name in names[first:end]}
        on_disk.write_json(chunk, {"files": files, "facts": writer.facts()})


def publish(job: PrecomputeJob, chunks: Sequence[Path]) -> None:
    """Publish the shards of all ``chunks``, the files of :func:`precompute_chunk`.

    Raises ArtifactError when a shard is missing; its chunk is then removed, so that the next run repeats it.
    """
    parts = {chunk: on_disk.read_json(chunk) for chunk in chunks}
    files: dict[str, Any] = {}
    for chunk, part in parts.items():
        files |= part["files"]
        if lost := [name for name in part["files"] if not (job.shards / Path(name).name).is_file()]:
            chunk.unlink()
            raise ArtifactError(f"{job.shards / Path(lost[0]).name}: missing; run the same command again")
    records = len(TokenTable(job.tokens))
    if list(files) != [f"{SHARDS}/{name}" for name in shard_names(records)]:
        raise ArtifactError(f"{chunks[0].parent}: not the chunks of {records} records; delete it and run again")
    facts = next(part["facts"] for part in parts.values() if part["facts"])
    with on_disk.staged_directory(job.out) as stage:
        (stage / SHARDS).mkdir()
        for name in files:
            on_disk.link_or_copy(job.shards / Path(name).name, stage / name)
        manifest.write(
            stage,
            kind="annotations",
            spec=job.spec,
            inputs=job.inputs,
            files=files,
            records=records,
            settings=dict(job.settings),
            **facts,
        )
    shutil.rmtree(job.state)


def shard_names(records: int) -> list[str]:
    """The shards of ``records`` records, in order."""
    shards = -(-records // RECORDS_PER_SHARD)
    return [f"{number:05d}-of-{shards:05d}.arrow" for number in range(shards)]


class _ShardWriter:
    """The frozen model, and the records it runs on."""

    def __init__(self, job: PrecomputeJob, table: TokenTable, device: str, workers: int) -> None:
        self.job, self.device, self.workers = job, device, workers
        model, processor, card = open_for_inference(job.checkpoint, device)
        self.model = model
        self.tokenizer = processor.tokenizer
        table.require(self.tokenizer, model.config.image_seq_length)
        asked = image_processor(preprocessor_directory(job.checkpoint, card), job.settings["image_aspect"])
        self.pixels = pixel_settings(processor.image_processor)
        require_same_pixels(job.checkpoint, pixel_settings(asked), self.pixels, "precomputing model")
        self.vocabulary = token_rows(self.tokenizer)
        pairs = job.settings["kind"] == "log_probabilities"
        self.dataset: Any = (PreferenceDataset if pairs else SupervisedDataset)(table, processor.image_processor)
        self.lengths = self.dataset.lengths
        size = model.config.vision_config.image_size
        self.collate = (PreferenceCollator if pairs else Collator)(self.tokenizer.pad_token_id, (size, size))
        self.rows, self.schema = (self._pair_rows, PAIRS) if pairs else (self._token_rows, TOKENS)

    def facts(self) -> dict[str, Any]:
        """Facts of the model for readers of the shards."""
        return {"vocabulary": self.vocabulary, "tokenizer": tokenizer_hash(self.tokenizer), "pixels": self.pixels}

    def write(self, name: str, path: Path) -> None:
        """Write the shard ``name`` atomically."""
        start = int(name.partition("-of-")[0]) * RECORDS_PER_SHARD
        # records of similar length together reduce padding
        end = min(start + RECORDS_PER_SHARD, len(self.dataset))
        places = sorted(range(start, end), key=lambda i: (self.lengths[i], i))
        batches = DataLoader(
            self.dataset,
            batch_sampler=[places[i : i + BATCH] for i in range(0, len(places), BATCH)],
            collate_fn=self.collate,
            num_workers=self.workers,
            worker_init_fn=worker_init,
        )
        rows = (row for batch in batches for row in self._log_probs(batch))
        with on_disk.atomic_open(path) as file, pa.ipc.new_stream(file, self.schema) as sink:
            while some := list(islice(rows, _ROWS_PER_WRITE)):
                sink.write_batch(pa.RecordBatch.from_pylist(some, schema=self.schema))

    @torch.no_grad()
    def _log_probs(self, batch: Batch) -> list[dict[str, Any]]:
        moved = {name: value.to(self.device) if isinstance(value, Tensor) else value for name, value in batch.items()}
        batch = cast(Batch, moved)
        try:
            return self.rows(batch, hidden_states(self.model, batch))
        except ArtifactError as error:
            raise ArtifactError(f"{self.job.checkpoint}, records {', '.join(batch['ids'])}: {error}") from error

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
            ids, log_probs = (values.flatten().cpu().numpy() for values in (ids_RK, log_RK))
            columns = {"ids": ids.astype(np.int32), "log_probabilities": log_probs.astype(np.float16)}
            found.append({"index": index, **columns})
        return found

    def _tokens(self, hidden_1LD: Tensor, labels_1L: Tensor, index: int) -> tuple[Tensor, Tensor]:
        """Ids and log-probabilities of one record; samples depend only on the record."""
        head_VD, k = self.model.lm_head.weight, min(self.job.settings["k"], self.vocabulary)
        if self.job.settings["kind"] == "top_k":
            return most_probable_tokens(hidden_1LD, head_VD, labels_1L, k, vocabulary=self.vocabulary)
        seed = hashlib.sha256(canonical_json([self.job.settings["seed"], index]).encode()).digest()
        generator = torch.Generator(hidden_1LD.device).manual_seed(int.from_bytes(seed[:7]))
        return sample_tokens(hidden_1LD, head_VD, labels_1L, k, generator=generator, vocabulary=self.vocabulary)


def _reuse_published(job: PrecomputeJob, names: Sequence[str]) -> None:
    """Link shards of an earlier publication from the same inputs."""
    try:
        card = manifest.read(job.out, hashed=False)  # shards that are damaged are computed again
    except ArtifactError:
        return
    if manifest.fingerprint(canonical_json(card["spec"]), card["inputs"]) != job.fingerprint:
        return
    job.shards.mkdir(parents=True, exist_ok=True)
    for name in names:
        published, waiting = job.out / SHARDS / name, job.shards / name
        if not waiting.exists() and _file_facts(published) == card["files"].get(f"{SHARDS}/{name}"):
            on_disk.link_or_copy(published, waiting)


def _file_facts(path: Path) -> dict[str, Any]:
    return {"size": path.stat().st_size, "sha256": on_disk.sha256(path)}
