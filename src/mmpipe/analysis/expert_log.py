"""Expert log: the experts of each token during generation, as a compact columnar file.

One row is one token in one layer. Shared computations are logged once: tokens that several questions about
an image share are under the shortest of them, and ``shared_by`` is the number of these questions.
Weighted by it, a log does not depend on batch size, chunks or interruptions. Padding is never logged, nor
tokens of a row after the end of its answer.

============= ======================= ==========================================================================
column        type                    meaning
============= ======================= ==========================================================================
question      int32                   index of the question in ``questions.jsonl``, from zero
question_id   dictionary of strings   its id
shared_by     uint16                  questions that share this computation
part          dictionary of strings   ``language_model``, ``vision_tower``, ``multi_modal_projector``
layer         int16                   layer of that part, from zero; 0 for the projector
scale         uint8                   1, or the scale of a multi-scale tower's view
position      int32                   index of the token in the prompt and answer; in tower and projector its
                                      index in the image, continued over images and tiles
kind          dictionary of strings   ``image``, ``text`` (of the prompt) or ``generated``
experts       list of uint16          chosen experts, the first choice first
weights       list of float16         their weights
============= ======================= ==========================================================================

The file has one row group a layer. With beams, only prompts are logged: which beam wins is known at the end.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from mmpipe.artifacts.files import atomic_open
from mmpipe.errors import ConfigError
from mmpipe.inference.question import Key, Owner, Question
from mmpipe.models.moe.hooks import Choices, Place, Recorder, placed_layers
from mmpipe.models.vision_tower import saved_scales

if TYPE_CHECKING:
    from numpy.typing import NDArray

KINDS = ("image", "text", "generated")
IMAGE, TEXT, GENERATED = range(3)
PARTS = ("vision_tower", "multi_modal_projector", "language_model")
_LANGUAGE = "language_model"
_PLACES, _QUESTIONS = b"places", b"questions"
_NAMES = pa.dictionary(pa.int32(), pa.string())
SCHEMA = pa.schema(
    {
        "question": pa.int32(),
        "question_id": _NAMES,
        "shared_by": pa.uint16(),
        "part": _NAMES,
        "layer": pa.int16(),
        "scale": pa.uint8(),
        "position": pa.int32(),
        "kind": _NAMES,
        "experts": pa.list_(pa.uint16()),
        "weights": pa.list_(pa.float16()),
    }
)


@dataclass
class _Tokens:
    """The tokens of one call, without their experts: arrays of equal length."""

    question: NDArray[np.int32]
    shared_by: NDArray[np.uint16]
    scale: NDArray[np.uint8]
    position: NDArray[np.int32]
    kind: NDArray[np.int8]
    rows: NDArray[np.int64] | None = None
    """Indices of these rows in the call; None: all."""


@dataclass
class ExpertLog:
    """Logs the choices of a model's routers during generation, one file per batch below ``folder``.

    ``questions`` are all questions of the chunk, the first of which has the index ``start`` in the benchmark.
    Raises ConfigError for a model, or ``layers``, without experts.
    """

    model: Any
    folder: Path
    questions: Sequence[Question]
    start: int = 0
    layers: Sequence[int] | None = None
    _seen: list[tuple[Place, _Tokens, Choices]] = field(default_factory=list)

    def __post_init__(self) -> None:
        layers = placed_layers(self.model, self.layers)
        if not layers:
            raise ConfigError("log_experts: this checkpoint has no experts; leave it out of 'checkpoints'")
        self._recorder = Recorder(layers)
        self._places = sorted(layers, key=_order)
        self._place_of = {q.key: self.start + i for i, q in enumerate(self.questions)}
        self._id_of = {self._place_of[q.key]: str(q.id) for q in self.questions}
        self.folder.mkdir(parents=True, exist_ok=True)

    # ---- while the model runs

    def prompts(self, owners: Sequence[Owner], ids: torch.Tensor, real: torch.Tensor, positions: torch.Tensor) -> None:
        """Record the last forward pass, over prompts ``ids`` ``[B, L]``; ``real`` is the mask of tokens that are not padding.

        Images of the owners went through tower and projector in the same pass, if there are any.
        """
        taken = self._recorder.take()
        self._images(owners, taken)
        tokens = self._prompt_tokens(owners, ids, real, positions)
        for place, calls in taken.items():
            if place.part == _LANGUAGE:
                self._seen += [(place, self._selected(tokens, real, call), call) for call in calls]

    def generated(self, owners: Sequence[Owner], alive: Sequence[bool], positions: torch.Tensor) -> None:
        """Record the last forward pass, over one generated token per row; ended rows are left out."""
        tokens = self._tokens(owners, np.flatnonzero(alive), positions[:, -1].cpu().numpy()[list(alive)], GENERATED)
        for place, calls in self._recorder.take().items():
            self._seen += [(place, tokens, call) for call in calls]

    def generate(self, owners: Sequence[Owner], ids: torch.Tensor, mask: torch.Tensor, lengths: Sequence[int]) -> None:
        """Record all forward passes of a call of the model's own ``generate`` on prompts ``ids`` ``[B, L]``,
        which gave answers of ``lengths`` tokens."""
        taken = self._recorder.take()
        positions = mask.cumsum(1) - 1
        prompt = self._prompt_tokens(owners, ids, mask, positions)
        self._images(owners, taken)
        for place, calls in taken.items():
            if place.part != _LANGUAGE:
                continue
            first, *steps = calls
            beams, rest = divmod(len(first), len(prompt.position))
            beams = 1 if rest else beams  # padding was routed, too
            self._seen.append((place, self._selected(prompt, mask, first, beams), first))
            if beams == 1 and all(len(step) == len(ids) for step in steps):
                for number, step in enumerate(steps, start=1):
                    rows = np.flatnonzero(np.array(lengths) > number)
                    at = mask.sum(1).cpu().numpy()[rows] + number - 1
                    self._seen.append((place, self._tokens(owners, rows, at, GENERATED), step))

    def write(self, questions: Iterable[Question]) -> None:
        """Write the recorded choices as the piece of these questions."""
        numbers = sorted(self._place_of[question.key] for question in questions)
        seen: dict[Place, list[tuple[_Tokens, Choices]]] = {}
        for place, tokens, choices in self._seen:
            seen.setdefault(place, []).append((tokens, choices))
        self._seen = []
        _write(
            self.folder / f"{numbers[0]:09d}.parquet",
            [place for place in self._places if place in seen],
            lambda place: self._table(place, seen[place]),
            numbers,
        )

    def close(self) -> None:
        """Remove the hooks from the model."""
        self._recorder.close()

    # ---- after an interruption

    def recover(self, answered: Iterable[Key]) -> set[Key]:
        """The answered questions that are complete in the log.

        A batch that was interrupted between its answers is removed, to be repeated as a whole.
        """
        numbers = {self._place_of[key] for key in answered}
        covered: set[int] = set()
        for piece in pieces(self.folder):
            wanted = set(json.loads(pq.read_schema(piece).metadata[_QUESTIONS]))
            if wanted <= numbers:
                covered |= wanted
            else:
                piece.unlink()
        return {key for key, number in self._place_of.items() if number in covered}

    # ---- tokens

    def _prompt_tokens(
        self, owners: Sequence[Owner], ids: torch.Tensor, real: torch.Tensor, positions: torch.Tensor
    ) -> _Tokens:
        """The real tokens, in the order of the layers' inputs."""
        row, column = real.cpu().numpy().nonzero()
        tokens = self._tokens(owners, row, positions.cpu().numpy()[row, column], TEXT)
        tokens.kind[ids.cpu().numpy()[row, column] == self.model.config.image_token_id] = IMAGE
        tokens.rows = None
        return tokens

    def _tokens(self, owners: Sequence[Owner], rows: NDArray[Any], positions: NDArray[Any], kind: int) -> _Tokens:
        numbers = np.array([self._place_of[question.key] for question, _ in owners], np.int32)
        shared = np.array([shared for _, shared in owners], np.uint16)
        return _Tokens(
            question=numbers[rows],
            shared_by=shared[rows],
            scale=np.ones(len(rows), np.uint8),
            position=positions.astype(np.int32),
            kind=np.full(len(rows), kind, np.int8),
            rows=rows,
        )

    @staticmethod
    def _selected(tokens: _Tokens, real: torch.Tensor, call: Choices, beams: int = 1) -> _Tokens:
        """Indices of a call's rows that are real tokens of the first beam; with ``compat: reference`` padding is
        routed, too."""
        rows: NDArray[np.int64] | None = None
        if beams > 1:
            each = real.sum(1).cpu().numpy()
            starts = np.concatenate([[0], np.cumsum(each * beams)[:-1]])
            rows = np.concatenate([np.arange(n) + start for n, start in zip(each, starts, strict=True)])
        elif len(call) == real.numel():
            rows = np.flatnonzero(real.cpu().numpy().ravel())
        elif len(call) != len(tokens.position):
            raise ConfigError(
                f"log_experts: {len(call)} of {len(tokens.position)} tokens reach a layer: this model leaves tokens "
                "out; log the checkpoint before it was made to"
            )
        return replace(tokens, rows=rows)

    def _images(self, owners: Sequence[Owner], taken: Mapping[Place, list[Choices]]) -> None:
        """Record the calls of tower and projector; a multi-scale tower is called once per scale."""
        images = [(owner, n) for owner in owners for n in range(len(owner[0].images))]
        scales = saved_scales(self.model) or (1,)
        for place, calls in taken.items():
            if place.part != _LANGUAGE:
                of_calls = scales if place.part == "vision_tower" else (1,)
                for call, scale in zip(calls, of_calls, strict=True):
                    self._seen.append((place, self._image_tokens(images, len(call), scale), call))

    def _image_tokens(self, images: Sequence[tuple[Owner, int]], rows: int, scale: int) -> _Tokens:
        """Rows of a tower: tile by tile, in each tile image by image, in each image token by token."""
        tiles = scale**2
        each = rows // (tiles * len(images))
        tile, image, token = (index.ravel() for index in np.indices((tiles, len(images), each), dtype=np.int32))
        numbers = np.array([number for _, number in images], np.int32)
        tokens = self._tokens(
            [owner for owner, _ in images], image, (numbers[image] * tiles + tile) * each + token, IMAGE
        )
        tokens.scale[:] = scale
        tokens.rows = None
        return tokens

    # ---- tables

    def _table(self, place: Place, seen: Sequence[tuple[_Tokens, Choices]]) -> pa.Table:
        """The rows of one layer in the columns of :data:`SCHEMA`."""
        names = ("question", "shared_by", "scale", "position", "kind")
        joined = {name: np.concatenate([getattr(tokens, name) for tokens, _ in seen]) for name in names}
        experts = _selected_rows([(t.rows, c.indices_TK) for t, c in seen], torch.int16, np.uint16)
        weights = _selected_rows([(t.rows, c.weights_TK) for t, c in seen], torch.float16, np.float16)
        rows = len(experts)
        ids, id_codes = np.unique(joined["question"], return_inverse=True)
        offsets = np.arange(rows + 1, dtype=np.int32) * experts.shape[1]
        columns: dict[str, Any] = {name: pa.array(values) for name, values in joined.items()} | {
            "question_id": _dictionary(id_codes, [self._id_of[number] for number in ids]),
            "part": _dictionary(np.zeros(rows, np.int32), [place.part]),
            "layer": pa.array(np.full(rows, place.layer, np.int16)),
            "kind": _dictionary(joined["kind"], list(KINDS)),
            "experts": pa.ListArray.from_arrays(offsets, pa.array(experts.ravel())),
            "weights": pa.ListArray.from_arrays(offsets, pa.array(weights.ravel())),
        }
        return pa.table(columns, schema=SCHEMA)


def _selected_rows(
    calls: Sequence[tuple[NDArray[np.int64] | None, torch.Tensor]], dtype: torch.dtype, as_type: Any
) -> NDArray[Any]:
    """The chosen rows of several calls in one array: one transfer, however many calls."""
    together = torch.cat([tensor for _, tensor in calls]).to(dtype).cpu().numpy().astype(as_type, copy=False)
    if all(rows is None for rows, _ in calls):
        return together
    starts = np.cumsum([0, *(len(tensor) for _, tensor in calls)])
    chosen = [
        start + (np.arange(len(tensor)) if rows is None else rows)
        for start, (rows, tensor) in zip(starts, calls, strict=False)
    ]
    return together[np.concatenate(chosen)]


def _order(place: Place) -> tuple[int, int]:
    """The parts in the order of the data flow: tower, projector, language model."""
    return PARTS.index(place.part), place.layer


def _dictionary(codes: NDArray[Any], values: list[str]) -> pa.DictionaryArray:
    return pa.DictionaryArray.from_arrays(pa.array(codes.astype(np.int32)), pa.array(values, pa.string()))


# ---- files


def pieces(folder: Path) -> list[Path]:
    """The pieces of a chunk's log."""
    return sorted(folder.glob("*.parquet"))


def places(path: Path) -> list[Place]:
    """The layers of a log with their numbers of experts, one a row group, in the order of the row groups."""
    metadata = pq.read_schema(path).metadata or {}
    return [Place(*place) for place in json.loads(metadata.get(_PLACES, b"[]"))]


def read_layer(path: Path, place: Place, columns: Sequence[str] | None = None) -> pa.Table | None:
    """The rows of one layer; None when a log has none."""
    found = places(path)
    if place not in found:
        return None
    return pq.ParquetFile(path).read_row_group(found.index(place), columns=columns)


def merge(logs: Sequence[Path], out: Path) -> int:
    """Join logs into ``out``, one layer at a time in memory, rows by question, scale and position; returns
    the number of rows."""
    found = [(path, places(path), pq.read_metadata(path)) for path in logs]
    every = sorted({place for _, some, _ in found for place in some}, key=_order)

    def read(path: Path, group: int, metadata: Any) -> pa.Table:
        # a group is small, so threads do not pay off; a thousand open files are too many
        with pq.ParquetFile(path, metadata=metadata) as file:
            return file.read_row_group(group, use_threads=False)

    def joined(place: Place) -> pa.Table:
        tables = [read(path, some.index(place), meta) for path, some, meta in found if place in some]
        table = pa.concat_tables(tables).unify_dictionaries().combine_chunks()
        return table.sort_by([(name, "ascending") for name in ("question", "scale", "position")])

    return _write(out, every, joined)


def _write(
    out: Path, places: Sequence[Place], table: Callable[[Place], pa.Table], questions: Sequence[int] = ()
) -> int:
    """One row group per layer, one in memory at a time; layers and questions are in the schema's metadata."""
    metadata = {
        _PLACES: json.dumps([[place.part, place.layer, place.experts] for place in places]).encode(),
        _QUESTIONS: json.dumps(list(questions)).encode(),
    }
    rows = 0
    with atomic_open(out) as file, pq.ParquetWriter(file, SCHEMA.with_metadata(metadata), compression="zstd") as writer:
        for place in places:
            group = table(place)
            rows += len(group)
            writer.write_table(group, row_group_size=max(1, len(group)))
    return rows
