"""Snakemake's memory of what was made, beside the results, and compared by content.

Snakemake by itself decides by time stamps and by records in the working directory. A copy of the project loses the
records, a restored backup has old times, and neither says what a file was made from. This backend keeps the records of
:mod:`mmpipe.provenance.records`, and finds a job stale when and only when

* the configuration makes something else of it, or of anything that it is made from, than when it ran; or
* an input has another content than when the job started; or
* an output has another content than it wrote, or its manifest proves other settings or inputs.

Times decide nothing: an input that is newer and equal is no reason, one that is older and different is. Records of
earlier versions, in ``.snakemake/metadata``, are read where there is no other.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import snakemake.workflow
from snakemake.exceptions import WorkflowError
from snakemake.io import is_flagged
from snakemake.persistence import NO_PARAMS_CHANGE, MetadataRecord, ParamsChange
from snakemake.persistence.file import FilePersistence
from snakemake_interface_executor_plugins.settings import ExecMode

from mmpipe.artifacts import manifest
from mmpipe.artifacts.files import canonical_json
from mmpipe.artifacts.state import drop_progress
from mmpipe.errors import MmpipeError
from mmpipe.provenance import records
from mmpipe.provenance.run_lock import RunLock

READS = "reads"
"""A parameter with settings that a job reads: they count for what is stale downstream, and Snakemake does not record them,
so that results of versions without it are kept."""


@dataclass
class Mismatch(ParamsChange):
    """Why the outputs of a job are not what it would make now; Snakemake prints it as a reason."""

    reason: str = ""

    def __bool__(self) -> bool:
        return True

    def __str__(self) -> str:
        return self.reason


def install() -> None:
    """Let Snakemake use :class:`Provenance` for the workflow that is being read."""
    snakemake.workflow.FilePersistence = Provenance


class Provenance(FilePersistence):
    """The backend. ``dag`` must be the one whose jobs are asked about."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._notes: dict[str, dict[str, Any]] = {}
        self._plans: dict[Any, dict[str, str]] = {}
        self._order: dict[str, Any] = {}
        self._lock = RunLock()
        # inputs of any size are compared by content where they are newer; what is recorded stays limited
        self.dag.max_checksum_file_size = 1 << 60

    # records

    def _note(self, key: str) -> dict[str, Any]:
        """The record of an output, read once until something changes."""
        if key not in self._notes:
            self._notes[key] = records.read(key)
        return self._notes[key]

    def _clear_cache(self) -> None:
        self._notes.clear()
        super()._clear_cache()

    @lru_cache  # noqa: B019 - one object a run, as in the class above
    def _read_record_cached(self, key: str) -> MetadataRecord | None:
        found = self._note(key)
        if not found:
            record: MetadataRecord | None = super()._read_record_cached(key)
            return record
        return MetadataRecord.model_validate({k: v for k, v in found.items() if k in MetadataRecord.model_fields})

    def _write_record(self, key: str, record: MetadataRecord) -> None:
        if records.place(key, records.RECORDS) is None:
            return super()._write_record(key, record)
        content = dict(record.items()) | {
            "input_checksums": self._order["inputs"],
            "plan": self._order["plan"],
            "output_checksum": records.checksum(key),
            "temporary": key in self._order["temporary"],
        }
        records.write(key, content)
        super()._delete_record(key)

    def _delete_record(self, key: str) -> bool:
        return any([records.delete(key), super()._delete_record(key)])

    def started(self, job: Any, external_jobid: str | None = None) -> None:
        if self.dag.workflow.exec_mode == ExecMode.DEFAULT:
            order = self._ordered(job)
            for output in job.output:
                records.write(output, order, records.ORDERS)
                self._delete_record(output)  # it is of what is being replaced
        super().started(job, external_jobid)

    async def finished(self, job: Any) -> None:
        if self.dag.workflow.exec_mode != ExecMode.DEFAULT:  # the process of one job; the run itself records
            return await super().finished(job)
        self._order = records.read(job.output[0], records.ORDERS) if job.output else {}
        self._order = self._order or self._ordered(job)  # with --touch, nothing was started
        try:
            await super().finished(job)
        finally:
            self._order = {}
        for output in job.output:
            records.delete(output, records.ORDERS)
        if directory := _published(job):
            drop_progress(directory)

    def _ordered(self, job: Any) -> dict[str, Any]:
        """What a job is to be made of, as it is now."""
        return {
            "settings": _settings(job),
            "plan": self._plan(job),
            "inputs": {str(f): sum_ for f in job.input if not f.is_ancient and (sum_ := records.checksum(f))},
            "temporary": [str(f) for f in job.output if is_flagged(f, "temp")],
        }

    def _params(self, job: Any) -> list[Any]:
        hidden = repr(job.params.get(READS))
        return [param for param in super()._params(job) if param != hidden]

    # what is stale

    def has_metadata(self, job: Any) -> bool:
        known = any(self._note(str(f)) for f in job.output) or _published(job) is not None
        return known or super().has_metadata(job)

    def params_changed(self, job: Any, file: Any = None) -> Any:
        return super().params_changed(job, file) or self._mismatch(job) or NO_PARAMS_CHANGE

    def input_checksums(self, job: Any, input_path: Any) -> set[Any]:
        found = _published(job)
        if found is None or any(self._note(str(f)) for f in job.output):
            return super().input_checksums(job, input_path)
        inputs = manifest.read_inputs(found)
        return {f"sha256:{inputs[str(input_path)]}" if str(input_path) in inputs else None}

    async def incomplete(self, job: Any) -> list[Any]:
        """Outputs that a killed run left marked; a published artifact that proves itself is accepted instead."""
        found = await super().incomplete(job)
        directory = _published(job)
        if not found or directory is None or not all([await f.exists() for f in job.output]):
            return found
        if records.changed_artifact(directory, job.params.get("spec")):
            return found
        if not self.dag.workflow.dryrun and self.dag.workflow.exec_mode == ExecMode.DEFAULT:
            await self.finished(job)
        return []

    def _mismatch(self, job: Any) -> Mismatch | None:
        """Why the outputs that are there are not those that the job would make; None when nothing says so."""
        there = [str(f) for f in job.output if Path(f).exists()]
        reason = next(self._reasons(job, there), None)
        return Mismatch(files=set(there), reason=reason) if reason else None

    def _reasons(self, job: Any, outputs: list[str]) -> Iterator[str]:
        directory = _published(job)
        for output in outputs:
            record = self._note(output)
            if planned := record.get("plan"):
                now = self._plan(job)
                yield from (f"{path} has other settings now" for path in now if path and planned.get(path) != now[path])
                if planned.get("") != now[""]:
                    yield "its settings are others now"
            yield from records.changed_inputs(record.get("input_checksums") or {})
            covered = directory is not None and directory in Path(output).parents
            if not covered and (why := records.changed_output(output, record)):
                yield why
        if directory is not None and (why := records.changed_artifact(directory, job.params.get("spec"))):
            yield why

    def _plan(self, job: Any) -> dict[str, str]:
        """Hashes of what the configuration makes of the job (``""``) and of each input, without looking at files."""
        if job not in self._plans:
            dependencies = self.dag.dependencies[job].items()
            made = {str(f): self._plan(maker)[""] for maker, files in dependencies for f in files}
            inputs = {str(f): made.get(str(f), "") for f in sorted(job.input)}
            own = hashlib.sha256(canonical_json({"settings": _settings(job), "inputs": inputs}).encode()).hexdigest()
            self._plans[job] = {**inputs, "": own}
        return self._plans[job]

    # locks

    @property
    def locked(self) -> bool:
        return self._lock.conflict(self._reading(), self._writing()) is not None

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keep other runs off the files of this one, in whatever clone they run."""
        try:
            with self._lock.held(self._reading(), self._writing()):
                self._accept_orphans()
                yield
        except MmpipeError as error:
            raise WorkflowError(str(error)) from None

    def _accept_orphans(self) -> None:
        """Drop the progress of trainings that outlived their run and published."""
        for job in self.dag.jobs:
            if not self.dag.needrun(job) and (directory := _published(job)):
                drop_progress(directory)

    def cleanup_locks(self) -> None:
        self._lock.remove_all()
        super().cleanup_locks()

    def _reading(self) -> set[str]:
        return {str(f) for f in self.all_inputfiles()}

    def _writing(self) -> set[str]:
        return {str(f) for f in self.all_outputfiles()}


def _settings(job: Any) -> dict[str, str]:
    return {name: str(value) for name, value in sorted(job.params.items())}


def _published(job: Any) -> Path | None:
    return records.published(job.output)
