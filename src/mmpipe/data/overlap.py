"""Pictures that are both trained on and asked about.

Files are compared by their content. A picture that was scaled or encoded again is another file and is not found.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa

from mmpipe.benchmarks.prepare import read_questions
from mmpipe.data.images import content_digest
from mmpipe.data.tally import EXAMPLES

PICTURES = "pictures.arrow"
_SCHEMA = pa.schema([pa.field("name", pa.string()), pa.field("digest", pa.binary(16))])
_ROWS = 65_536


def write_digests(path: Path, digests: Mapping[str, bytes]) -> None:
    """Write the digest of every picture of a mixture, in order."""
    names = list(digests)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, _SCHEMA) as writer:
        for start in range(0, len(names), _ROWS):
            chosen = names[start : start + _ROWS]
            columns = [pa.array(chosen), pa.array([digests[name] for name in chosen], pa.binary(16))]
            writer.write_batch(pa.record_batch(columns, schema=_SCHEMA))


def overlap(mixture: Path, benchmarks: Mapping[str, Path]) -> dict[str, Any]:
    """How many pictures of each prepared benchmark are in the mixture, and how many questions they touch."""
    with pa.memory_map(str(mixture / PICTURES)) as source:
        table = pa.ipc.open_stream(source).read_all()
        names, digests = table.column("name").to_pylist(), table.column("digest").to_pylist()
    trained = dict(zip(digests, names, strict=True))
    shared = {name: _shared(trained, prepared) for name, prepared in benchmarks.items()}
    return {"pictures": len(names), "benchmarks": shared}


def _shared(trained: Mapping[bytes, str], prepared: Path) -> dict[str, Any]:
    questions = read_questions(prepared)
    asked = sorted({path for question in questions for path in question.images if isinstance(path, Path)})
    digests = {path: content_digest(path.read_bytes()) for path in asked}
    found = {path: trained[digest] for path, digest in digests.items() if digest in trained}
    return {
        "pictures": len(asked),
        "shared_pictures": len(found),
        "questions": len(questions),
        "touched_questions": sum(any(path in found for path in question.images) for question in questions),
        "examples": [f"{path.name} is {name}" for path, name in list(found.items())[:EXAMPLES]],
    }
