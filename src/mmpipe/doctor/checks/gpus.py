"""GPUs: how many, how large, bfloat16, and what the recipes would like."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from mmpipe.doctor.base import Finding, Machine
from mmpipe.sources.transfer.progress import format_size


def check(machine: Machine) -> Iterator[Finding]:
    gpus = machine.torch.get("gpus", [])
    if not gpus:
        wants = [stage.id for stage in machine.stages if stage.settings.hardware.gpus]
        if wants and not machine.on_slurm:
            yield Finding(
                "warning",
                f"none here, and {wants[0]} is made for GPUs",
                "train it on a machine with GPUs, or expect days: --profile local runs it on the CPU",
            )
        else:
            yield Finding("ok", "none on this machine")
        return
    kinds = Counter((gpu["name"], format_size(gpu["memory"])) for gpu in gpus)
    seen = ", ".join(f"{count} x {name} ({memory})" for (name, memory), count in kinds.items())
    if machine.local_gpus > len(gpus):
        yield Finding(
            "problem",
            f"{seen}, but profile '{machine.profile}' hands out {machine.local_gpus}",
            f"give --resources gpu={len(gpus)}",
        )
    else:
        yield Finding("ok", seen)
    yield from _precision(machine)
    yield from _occupied(machine)


def _precision(machine: Machine) -> Iterator[Finding]:
    old = [gpu["name"] for gpu in machine.torch["gpus"] if not gpu["bfloat16"]]
    wanting = [stage.id for stage in machine.stages if getattr(stage.settings, "precision", "") == "bfloat16"]
    if old and wanting:
        yield Finding(
            "warning",
            f"{old[0]} has no bfloat16, which {wanting[0]} computes in",
            "torch imitates it slowly: use newer GPUs, or `precision: float32`",
        )


def _occupied(machine: Machine) -> Iterator[Finding]:
    for index, gpu in enumerate(machine.torch["gpus"]):
        if gpu["free"] < 0.9 * gpu["memory"] and not machine.on_slurm:
            yield Finding(
                "warning",
                f"GPU {index}: {format_size(gpu['memory'] - gpu['free'])} are in use already",
                "see who computes there (nvidia-smi); CUDA_VISIBLE_DEVICES leaves cards out",
            )
