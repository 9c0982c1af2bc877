"""Common to all jobs of the workflow: log file, plan, GPUs and threads, an offline environment, errors in one line.

A step is a file in ``workflow/scripts`` whose ``main`` takes Snakemake's ``snakemake`` object and the plan. Libraries
that load torch are imported inside ``main``: threads, GPUs and the offline environment must be set before.
"""

from __future__ import annotations

import logging
import os
import re
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

from mmpipe.artifacts import manifest
from mmpipe.artifacts.state import only_worker
from mmpipe.errors import ConfigError, MmpipeError, explained, is_full_disk
from mmpipe.escapes import LogFormatter, escape_tracebacks, message
from mmpipe.gpu_locks import locked_gpus, visible_devices
from mmpipe.plan.configfile import read_plainly
from mmpipe.plan.plan import Plan
from mmpipe.provenance import records

log = logging.getLogger("mmpipe")

_PATIENCE = 600
"""Seconds to wait for a process of a killed run, or of another clone, that makes the same files."""
_CHANGED = "{}: the configuration changed after this job was planned; run the same command again"


def job(main: Callable[[Any, Plan], None]) -> Callable[[Any], None]:
    """Wrap a step: open its log, read the plan, respect threads and GPUs, explain errors.

    An error that the user can correct is printed without a traceback, to the terminal and to the log, and ends the job
    with status 1. Any other is logged with its traceback and raised.
    """

    @wraps(main)
    def run(snakemake: Any) -> None:
        # the shell around this process ignores SIGTERM, which is inherited
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        escape_tracebacks()
        os.environ.setdefault("OMP_NUM_THREADS", str(snakemake.threads))
        with _logging_to(Path(snakemake.log[0])):
            try:
                _require_planned(snakemake)
                with only_worker(_lock(snakemake), patience=_PATIENCE) as waited:
                    if waited and _published(snakemake):
                        log.info("another process made %s meanwhile", snakemake.output[0])
                        return
                    _check_inputs(snakemake)
                    with locked_gpus(gpus(snakemake)):
                        main(snakemake, Plan(snakemake.config))
            except Exception as error:
                ours = isinstance(error, MmpipeError)
                if not (ours or isinstance(error, OSError) or is_full_disk(error)):
                    log.exception("unexpected failure: %s", explained(error))
                    raise
                text = str(error) if ours else explained(error)
                log.error("%s", text, exc_info=not ours)
                print(f"mmpipe: {message(text)}", file=sys.stderr)
                raise SystemExit(1) from None

    return run


def offline_job(main: Callable[[Any, Plan], None]) -> Callable[[Any], None]:
    """A :func:`job` that computes on fetched inputs, without network access."""

    @wraps(main)
    def run(snakemake: Any) -> None:
        os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TRANSFORMERS_OFFLINE="1")
        job(main)(snakemake)

    return run


@contextmanager
def _logging_to(path: Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(path, mode="w", encoding="utf-8")
    handler.setFormatter(LogFormatter("%(asctime)s %(levelname)s %(message)s", "%Y-%m-%d %H:%M:%S"))
    root = logging.getLogger()
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    for chatty in ("httpx", "matplotlib", "datasets", "torch", "accelerate"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    try:
        yield
    finally:
        root.removeHandler(handler)
        handler.close()


def _require_planned(snakemake: Any) -> None:
    """Raises ConfigError when the settings of the job are others now than when Snakemake planned it."""
    planned = records.read(str(snakemake.output[0]), records.ORDERS).get("settings")
    if planned is not None and planned != {name: str(value) for name, value in snakemake.params.items()}:
        raise ConfigError(_CHANGED.format(snakemake.output[0]))


def _check_inputs(snakemake: Any) -> None:
    """Raises ArtifactError when a file that the job reads is damaged. Files that an artifact has beside its manifest are
    checked when it is opened, weights while they are loaded."""
    for path in map(Path, snakemake.input):
        if path.name != manifest.NAME and path.suffix != ".safetensors":
            manifest.check(path)


def _lock(snakemake: Any) -> Path:
    """What a job locks: two processes never make the same files at once, in whatever clone they run."""
    output = str(snakemake.output[0])
    place = records.place(output, "jobs")
    return place.with_suffix("") if place else Path(f"{output}.job")


def _published(snakemake: Any) -> bool:
    """Whether all outputs are there, and a manifest proves that they are what the job would make."""
    directory = records.published(snakemake.output)
    if directory is None or not all(Path(output).exists() for output in snakemake.output):
        return False
    return records.changed_artifact(directory, snakemake.params.get("spec")) is None


def unchanged(snakemake: Any, spec: str, parameter: str = "spec") -> str:
    """``spec``, after checking that it equals the rule's ``parameter``.

    Raises:
        ConfigError: the configuration changed between planning and running the job.
    """
    if snakemake.params.get(parameter) != spec:
        raise ConfigError(_CHANGED.format(snakemake.output[0]))
    return spec


def gpus(snakemake: Any) -> int:
    """Number of GPUs the job was given in all, by ``gpu`` or by ``gres`` and ``nodes``."""
    per_node = re.match(r"gpu(?::[^:]+)?:(\d+)$", str(snakemake.resources.get("gres", "")))
    if per_node:
        return int(per_node[1]) * int(snakemake.resources.get("nodes", 1))
    return int(snakemake.resources.get("gpu", 0))


def device(snakemake: Any) -> str:
    """``cuda`` or ``cpu``, where the job's model runs; sets torch's threads and hides the bars of loading weights."""
    import torch
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    torch.set_num_threads(snakemake.threads)
    return "cuda" if gpus(snakemake) and torch.cuda.is_available() else "cpu"


def failed_report(snakemake: Any) -> Path:
    """Path of the report of a job that found too many faults to publish: beside its log, which remains."""
    return Path(snakemake.log[0]).with_suffix(".report.json")


def with_progress(items: Iterable[Any], total: int, title: str) -> Iterator[Any]:
    """``items``, with a progress bar on a terminal."""
    from tqdm import tqdm

    return iter(tqdm(items, total=total, desc=title, disable=not sys.stderr.isatty()))


def mock_snakemake(rule: str, *, configfiles: Sequence[str] = (), **wildcards: str) -> Any:
    """The ``snakemake`` object that Snakemake hands to the script of ``rule``, to step through it in a debugger.

    Call it in the root of the project with the rule's wildcards (``smoke`` may be left out). The rule's inputs must exist,
    its outputs are written in place, and Snakemake does not record the run.
    """
    from snakemake.api import SnakemakeApi
    from snakemake.dag import DAG
    from snakemake.iocontainers import Snakemake
    from snakemake.jobs import Job
    from snakemake.settings.types import ConfigSettings, ResourceSettings

    read_plainly()
    limits = ResourceSettings(cores=os.cpu_count(), resources={"gpu": len(visible_devices())})
    with SnakemakeApi() as api:
        workflow_api = api.workflow(limits, ConfigSettings(configfiles=[Path(path) for path in configfiles]))
        workflow_api.dag()
        workflow = workflow_api._workflow
        found = workflow.get_rule(rule)
        values = {name: wildcards.get(name, "") for name in found.wildcard_names}
        made = Job(found, DAG(workflow, rules=workflow.rules), values)
        facts = (made.input, made.output, made.params, made.wildcards, made.threads, made.resources, made.log)
        return Snakemake(*facts, workflow.config, rule, None)
