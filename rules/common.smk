"""Helpers of the rules; no rules here. The plan resolves recipes."""

import gc
import os
import sys
from pathlib import Path

from snakemake.exceptions import WorkflowError

# what Snakemake imported stays: collecting garbage among it again and again takes a tenth of a dry run
gc.freeze()

SOURCE = os.path.join(workflow.basedir, "src")
# plan and jobs use this checkout, not an mmpipe installed beside Snakemake
sys.path.insert(0, SOURCE)

# Slurm sends SIGTERM to every process of a job: the shell around a job must survive it while the job saves its progress
shell.prefix("trap '' TERM; ")

from mmpipe.errors import MmpipeError
from mmpipe.escapes import printable
from mmpipe.plan.plan import Plan
from mmpipe.provenance import persistence
from mmpipe.registry import export_source_dir
from mmpipe.stages.base import Hardware
from mmpipe.plan.variants import PATTERN as VARIANT
from mmpipe.plan.wildcards import one_of

export_source_dir(SOURCE)

# what is stale is decided by content and settings, not by time stamps
persistence.install()

try:
    PLAN = Plan(config, Path(workflow.basedir))
except MmpipeError as error:
    raise WorkflowError(printable(error)) from None


STAGE_RULES = {stage.kind for stage in PLAN.stages()}


wildcard_constraints:
    smoke=r"(?:smoke/)?",
    recipe=one_of(PLAN.recipes),
    checkpoint=rf"{one_of(PLAN.recipes)}(?:@[a-z0-9_]+)?(?:{VARIANT})?",
    benchmark=one_of(PLAN.benchmarks),
    mixture=one_of(PLAN.mixtures),
    backbone=one_of(PLAN.backbones),
    dataset=one_of(PLAN.datasets),
    chunk=r"\d+-of-\d+",


def out(wildcards):
    """``results`` or ``results/smoke``."""
    return os.path.join("results", wildcards.smoke).rstrip("/")


def planned(wildcards):
    """The stage a job makes."""
    return PLAN.stage(wildcards.recipe, wildcards.stage)


def stage_spec(wildcards):
    return PLAN.spec(planned(wildcards))


def stage_inputs(wildcards):
    """The manifests a stage is made from. Weights are ancient: their manifest changes when they do."""
    stage = planned(wildcards)
    inputs = {role: str(path) for role, path in PLAN.inputs(stage, out(wildcards)).items()}
    if stage.parent:
        parent = stage.parent.directory(out(wildcards)) / "model" / stage.parent.weights
        inputs["weights"] = ancient(str(parent))
    return inputs


def stages_of(kind):
    """A wildcard constraint for the stages of one kind."""
    return one_of({stage.name for stage in PLAN.stages() if stage.kind == kind})


def trained(kind):
    """The checkpoints of one kind of stage on the paths of the chosen recipes."""
    return [str(stage.manifest()) for stage in PLAN.chosen_stages() if stage.kind == kind]


def checkpoint_inputs(wildcards):
    """The manifest and the weights of the checkpoint a benchmark reads."""
    stage = PLAN.checkpoint(wildcards.checkpoint)
    manifest = stage.manifest(out(wildcards))
    return {"checkpoint": str(manifest), "weights": ancient(str(manifest.parent / stage.weights))}


def wanted_tokens(wildcards):
    """The tokens that a stage or a precomputation needs."""
    return PLAN.tokens[f"{wildcards.mixture}/{wildcards.key}"]


def requested_precomputation(wildcards):
    """The precomputed outputs that a stage needs."""
    return PLAN.precomputations[f"{wildcards.teacher}/{wildcards.mixture}/{wildcards.key}"]


def precomputation_inputs(wildcards):
    """The checkpoint whose outputs are precomputed, and its tokens."""
    stage = PLAN.checkpoint(wildcards.teacher)
    manifest = stage.manifest(out(wildcards))
    return {
        "checkpoint": str(manifest),
        "weights": ancient(str(manifest.parent / stage.weights)),
        "tokens": str(PLAN.precomputation_tokens(requested_precomputation(wildcards)).directory / "manifest.json"),
    }


def precomputation_hardware(wildcards):
    return PLAN.checkpoint(wildcards.teacher).answering


def resources_of(hardware):
    """The resources of a job that needs ``hardware(wildcards)``; keys that do not apply are left out."""
    gres = PLAN.config.gpu_request == "gres"

    def gpus(wildcards):
        return hardware(wildcards).gpus or None

    def nodes(wildcards):
        count = PLAN.nodes(hardware(wildcards))
        return count if count > 1 else None

    def for_nodes(value):
        return lambda wildcards: value if nodes(wildcards) else None

    return {
        "mem_mb": lambda wildcards: 1000 * hardware(wildcards).memory_gb,
        "runtime": lambda wildcards: hardware(wildcards).runtime_minutes,
        "gpu": (lambda wildcards: None) if gres else gpus,
        "gres": (
            (lambda wildcards: gpus(wildcards) and f"gpu:{gpus(wildcards) // (nodes(wildcards) or 1)}")
            if gres
            else (lambda wildcards: None)
        ),
        # without this the Slurm plugin starts one copy of the job per GPU
        "tasks_per_gpu": lambda wildcards: 0 if gpus(wildcards) else None,
        # several machines: Slurm starts the job on the first one, and the job starts the others
        "nodes": nodes,
        "tasks": nodes,
        "mpi": for_nodes("srun"),
    }


def stage_hardware(wildcards):
    return planned(wildcards).settings.hardware


def answer_hardware(wildcards):
    return PLAN.checkpoint(wildcards.checkpoint).answering


def light(memory_gb, minutes):
    """Resources of a job without a model."""
    needs = Hardware(memory_gb=memory_gb, runtime_minutes=minutes)
    return resources_of(lambda wildcards: needs)


def announce(jobs):
    """Print how many stages the ``jobs`` of this run train, smoke runs apart."""
    making = [job for job in jobs if job.rule.name in STAGE_RULES]
    for smoke in ("", "smoke/"):
        stages = [planned(job.wildcards) for job in making if job.wildcards.smoke == smoke]
        trained = [stage for stage in stages if stage.settings.mixture()]
        if said := PLAN.announcement(trained, bool(smoke)):
            print(said, file=sys.stderr)
