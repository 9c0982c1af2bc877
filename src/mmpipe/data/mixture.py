"""Building a mixture: every record of every source is read, verified and written, or dropped and counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from mmpipe.artifacts import manifest
from mmpipe.artifacts.files import write_json
from mmpipe.data.image_files import EmbeddedImages
from mmpipe.data.record_table import IMAGES, RECORDS, digest_writer, write_records
from mmpipe.data.report import Log, Throughput, histogram, keeping, or_raise_max_bad
from mmpipe.data.spec import MixtureSpec
from mmpipe.data.verify import EQUAL_IMAGE, Deduplicator, MixtureSource
from mmpipe.errors import DataError

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
    the result does not depend on their number, and memory use hardly depends on that of the records. Each dropped record is
    a line of ``log``. Images that annotations contain are written to ``out/images``; ``published`` is where ``out``
    will be, if not there.

    Raises ArtifactError when a data set is damaged, DataError when a file or folder cannot be read, when an
    image's name leads out of its folder, or when more than ``spec.max_bad`` of the records of a source are bad; the
    message lists the reasons, and the report is written to ``failed_report`` then.
    """
    for directory in datasets.values():
        manifest.check_all(directory)
    out.mkdir(parents=True, exist_ok=True)
    throughput = Throughput()
    embedded = EmbeddedImages(out / "images", (published or out) / "images")
    with digest_writer(out / IMAGES) as digests, ThreadPoolExecutor(max_workers=max(1, workers)) as pool:
        shared = spec.seed, Deduplicator(digests), embedded, log
        sources = [MixtureSource(source, datasets[source.dataset], *shared) for source in spec.parts]
        write_records(out / RECORDS, (record for source in sources for record in source.records(pool)))
    report = _report(spec, sources)
    with keeping(report, failed_report):
        _check(spec, sources)
    write_json(out / REPORT, report)
    log(f"kept {report['kept']} of {report['wanted']} records, {throughput(report['wanted'])}")
    return report


def _report(spec: MixtureSpec, sources: Sequence[MixtureSource]) -> dict[str, Any]:
    return {
        "kept": sum(source.kept for source in sources),
        "wanted": sum(source.wanted for source in sources),
        "dropped": sum(source.bad for source in sources),
        "with_images": sum(source.with_images for source in sources),
        "equal_images": sum(source.notes.counts[EQUAL_IMAGE] for source in sources),
        "max_bad": spec.max_bad,
        "words_up_to": histogram(sum((source.lengths for source in sources), Counter())),
        "longer_side_up_to": histogram(sum((source.sides for source in sources), Counter())),
        "parts": [source.report() for source in sources],
    }


def _check(spec: MixtureSpec, sources: Sequence[MixtureSource]) -> None:
    """Raise DataError when a source has too many bad records or no good one."""
    lines, helped = [], True
    for source in sources:
        if not source.kept or source.bad > spec.max_bad * source.wanted:
            helped = helped and bool(source.kept)
            lines.append(f"  {source.name}: {source.bad} of {source.wanted} records are bad")
            lines += (f"    {reason}" for reason in source.reasons())
    if lines:
        head = f"too many bad records (max_bad is {spec.max_bad:.1%} of each source)" if helped else "no record is left"
        advice = or_raise_max_bad(["mend the data set", "fetch it again"], helped, spec.max_bad)
        raise DataError("\n".join([f"{head}:", *lines, f"the log names every one; {advice}"]))
