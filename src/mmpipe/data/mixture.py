"""Building a mixture: every record of every part is read, verified and written, or dropped and counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from mmpipe.artifacts.files import write_json
from mmpipe.data.digests import IMAGES, DigestWriter
from mmpipe.data.image_files import EmbeddedImages
from mmpipe.data.record_table import write_records
from mmpipe.data.report import Pace, histogram, keeping
from mmpipe.data.spec import MixtureSpec
from mmpipe.data.verify import EQUAL_IMAGE, Known, Log, Part
from mmpipe.errors import DataError

RECORDS = "records.arrow"
REPORT = "report.json"


def build_mixture(
    spec: MixtureSpec,
    datasets: Mapping[str, Path],
    out: Path,
    *,
    workers: int = 1,
    log: Log = print,
    published: Path | None = None,
    failed_report: Path | None = None,
) -> dict[str, Any]:
    """Write ``records.arrow``, ``images.arrow`` and ``report.json`` into ``out`` and return the report.

    ``datasets`` gives the directory of each data set by name. Images are decoded by ``workers`` threads;
    the result does not depend on their number, and memory hardly grows with that of the records. Each dropped record is
    a line of ``log``. Images that annotations contain are written to ``out/images``; ``published`` is where ``out``
    will be, if not there.

    Raises DataError when a file or folder cannot be read, when an image's name leads out of its folder, or
    when more than ``spec.max_bad`` of the records of a part are bad; the message lists the reasons, and the report is
    written to ``failed_report`` then.
    """
    out.mkdir(parents=True, exist_ok=True)
    pace = Pace()
    embedded = EmbeddedImages(out / "images", (published or out) / "images")
    with DigestWriter(out / IMAGES) as digests, ThreadPoolExecutor(max_workers=max(1, workers)) as pool:
        known = Known(digests)
        parts = [Part(part, datasets[part.dataset], spec.seed, known, embedded, log) for part in spec.parts]
        write_records(out / RECORDS, (record for part in parts for record in part.records(pool)))
    report = _report(spec, parts)
    with keeping(report, failed_report):
        _check(spec, parts)
    write_json(out / REPORT, report)
    log(f"kept {report['kept']} of {report['wanted']} records, {pace(report['wanted'])}")
    return report


def _report(spec: MixtureSpec, parts: Sequence[Part]) -> dict[str, Any]:
    lengths, sides = Counter[int](), Counter[int]()
    for part in parts:
        lengths += part.lengths
        sides += part.sides
    return {
        "kept": sum(part.kept for part in parts),
        "wanted": sum(part.wanted for part in parts),
        "dropped": sum(part.bad for part in parts),
        "with_images": sum(part.with_images for part in parts),
        "equal_images": sum(part.notes.counts[EQUAL_IMAGE] for part in parts),
        "max_bad": spec.max_bad,
        "words_up_to": histogram(lengths),
        "longer_side_up_to": histogram(sides),
        "parts": [part.report() for part in parts],
    }


def _check(spec: MixtureSpec, parts: Sequence[Part]) -> None:
    """Raise DataError when a part has too many bad records or no good one."""
    lines = []
    for part in parts:
        if not part.kept or part.bad > spec.max_bad * part.wanted:
            lines.append(f"  {part.name}: {part.bad} of {part.wanted} records are bad")
            lines += (f"    {reason}" for reason in part.reasons())
    if lines:
        raise DataError(
            f"too many bad records (max_bad is {spec.max_bad:.1%} of each part):\n"
            + "\n".join(lines)
            + "\nthe log names every one; mend the data set, fetch it again, or raise max_bad of the mixture"
        )
