"""The NVIDIA driver against the CUDA that torch was built with."""

from __future__ import annotations

import re
from collections.abc import Iterator

from mmpipe.doctor.base import Finding, Machine


def check(machine: Machine) -> Iterator[Finding]:
    torch, answer = machine.torch, machine.ask("nvidia-smi")
    if "error" in torch:
        yield Finding("problem", f"torch does not start: {torch['error']}", "pip install -r envs/requirements.lock")
        return
    built = f"torch {torch['version']} for {'CUDA ' + torch['cuda'] if torch['cuda'] else 'CPUs'}"
    if answer is None:
        elsewhere = "; the nodes of the cluster may have one" if machine.on_slurm else ""
        missing = Finding("ok", f"{built}, no NVIDIA driver on this machine{elsewhere}")
        hint = "install the driver, or use --profile local"
        yield (Finding("problem", missing.seen, hint) if machine.local_gpus and not torch["available"] else missing)
        return
    if answer.status != 0:
        yield Finding(
            "problem",
            f"nvidia-smi: {answer.complaint or answer.text or 'failed'}",
            "the driver is not loaded or does not match its libraries: reboot, or ask the administrator",
        )
        return
    driver, supports = _versions(answer.text)
    seen = f"driver {driver}, up to CUDA {supports}; {built}"
    if torch["cuda"] is None:
        yield Finding(
            "problem" if machine.local_gpus else "warning", seen, "GPUs stay idle: install a CUDA build of torch"
        )
    elif supports and _major(torch["cuda"]) > _major(supports):
        yield Finding(
            "problem",
            f"{seen}: too new for the driver",
            f"update the driver, or install a torch for CUDA {supports}; such a pair fails late, often as a hang in NCCL",
        )
    elif not torch["available"]:
        yield Finding(
            "problem", f"{seen}, yet torch finds no usable GPU", "check CUDA_VISIBLE_DEVICES and `nvidia-smi -L`"
        )
    else:
        yield Finding("ok", seen)


def _versions(text: str) -> tuple[str, str]:
    """Versions of the driver and of the newest CUDA it knows, from the head of nvidia-smi's table."""
    driver, cuda = (re.search(rf"{label}:\s*([\d.]+)", text) for label in ("Driver Version", "CUDA(?: UMD)? Version"))
    return driver[1] if driver else "?", cuda[1] if cuda else ""


def _major(version: str) -> int:
    """Minor versions of one major version work together (CUDA Compatibility, docs.nvidia.com/deploy)."""
    return int(version.partition(".")[0])
