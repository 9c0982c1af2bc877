"""NCCL, which lets GPUs talk to each other."""

from __future__ import annotations

from collections.abc import Iterator

from mmpipe.doctor.base import Finding, Machine


def check(machine: Machine) -> Iterator[Finding]:
    torch = machine.torch
    if not torch.get("gpus"):
        yield Finding("ok", "not needed: no GPU here")
    elif torch["nccl"]:
        yield Finding("ok", f"NCCL {torch['nccl']}")
    elif len(torch["gpus"]) > 1:
        yield Finding("problem", "this torch has no NCCL", "install torch from its own index; one GPU works without")
    else:
        yield Finding("ok", "none, and one GPU needs none")
