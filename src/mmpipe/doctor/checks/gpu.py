"""GPUs: the driver, the cards, and the libraries that use them."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterator

from mmpipe.doctor.base import Finding, Machine, ok, problem, warning
from mmpipe.sources.transfer.progress import format_size


def check_driver(machine: Machine) -> Iterator[Finding]:
    """The NVIDIA driver against the CUDA that torch was built with."""
    torch, answer = machine.torch, machine.ask("nvidia-smi")
    if "error" in torch:
        yield problem(f"torch does not start: {torch['error']}", "pip install -r envs/requirements.lock")
        return
    built = f"torch {torch['version']} for {'CUDA ' + torch['cuda'] if torch['cuda'] else 'CPUs'}"
    if answer is None:
        elsewhere = "; the nodes of the cluster may have one" if machine.on_slurm else ""
        missing = ok(f"{built}, no NVIDIA driver on this machine{elsewhere}")
        hint = "install the driver, or use --profile local"
        yield (problem(missing.seen, hint) if machine.local_gpus and not torch["available"] else missing)
        return
    if answer.status != 0:
        yield problem(
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
        yield problem(
            f"{seen}: too new for the driver",
            f"update the driver, or install a torch for CUDA {supports}; such a pair fails late, often as a hang in NCCL",
        )
    elif not torch["available"]:
        yield problem(f"{seen}, yet torch finds no usable GPU", "check CUDA_VISIBLE_DEVICES and `nvidia-smi -L`")
    else:
        yield ok(seen)


def _versions(text: str) -> tuple[str, str]:
    """Versions of the driver and of the newest CUDA it knows, from the head of nvidia-smi's table."""
    driver, cuda = (re.search(rf"{label}:\s*([\d.]+)", text) for label in ("Driver Version", "CUDA(?: UMD)? Version"))
    return driver[1] if driver else "?", cuda[1] if cuda else ""


def _major(version: str) -> int:
    """Minor versions of one major version work together (CUDA Compatibility, docs.nvidia.com/deploy)."""
    return int(version.partition(".")[0])


def check_gpus(machine: Machine) -> Iterator[Finding]:
    """GPUs: number, memory, bfloat16, and the requests of the recipes."""
    gpus = machine.torch.get("gpus", [])
    if not gpus:
        wants = [stage.id for stage in machine.stages if stage.settings.hardware.gpus]
        if wants and not machine.on_slurm:
            yield warning(
                f"none here, and {wants[0]} is made for GPUs",
                "train it on a machine with GPUs, or expect days: --profile local runs it on the CPU",
            )
        else:
            yield ok("none on this machine")
        return
    kinds = Counter((gpu["name"], format_size(gpu["memory"])) for gpu in gpus)
    seen = ", ".join(f"{count} x {name} ({memory})" for (name, memory), count in kinds.items())
    if machine.local_gpus > len(gpus):
        yield problem(
            f"{seen}, but profile '{machine.profile}' hands out {machine.local_gpus}",
            f"give --resources gpu={len(gpus)}",
        )
    else:
        yield ok(seen)
    yield from _precision(machine)
    yield from _occupied(machine)


def _precision(machine: Machine) -> Iterator[Finding]:
    old = [gpu["name"] for gpu in machine.torch["gpus"] if not gpu["bfloat16"]]
    wanting = [stage.id for stage in machine.stages if getattr(stage.settings, "precision", "") == "bfloat16"]
    if old and wanting:
        yield warning(
            f"{old[0]} has no bfloat16, which {wanting[0]} computes in",
            "torch imitates it slowly: use newer GPUs, or `precision: float32`",
        )


def _occupied(machine: Machine) -> Iterator[Finding]:
    for index, gpu in enumerate(machine.torch["gpus"]):
        if gpu["free"] < 0.9 * gpu["memory"] and not machine.on_slurm:
            yield warning(
                f"GPU {index}: {format_size(gpu['memory'] - gpu['free'])} are in use already",
                "see who computes there (nvidia-smi); CUDA_VISIBLE_DEVICES leaves cards out",
            )


def check_nccl(machine: Machine) -> Iterator[Finding]:
    """NCCL, the communication between GPUs."""
    torch = machine.torch
    if not torch.get("gpus"):
        yield ok("not needed: no GPU here")
    elif torch["nccl"]:
        yield ok(f"NCCL {torch['nccl']}")
    elif len(torch["gpus"]) > 1:
        yield problem("this torch has no NCCL", "install torch from its own index; one GPU works without")
    else:
        yield ok("none, and one GPU needs none")


def check_flash_attention(machine: Machine) -> Iterator[Finding]:
    """Flash attention: faster on long texts, never necessary."""
    torch = machine.torch
    if "error" in torch:
        return
    if not torch["flash"]:
        yield ok("flash attention 2 will be used in bfloat16")
        return
    by_name = [s.id for s in machine.stages if s.settings.hardware.attention == "flash_attention_2"]
    seen = f"sdpa will be used: {torch['flash']}"
    if by_name and not machine.on_slurm:
        yield problem(f"{torch['flash']}, but {by_name[0]} asks for it by name", "say `attention: auto`")
    elif "does not load" in torch["flash"]:
        yield warning(seen, "rebuild it for this torch, or uninstall it: pip uninstall flash-attn")
    else:
        yield ok(seen)


def check_deepspeed(machine: Machine) -> Iterator[Finding]:
    """DeepSpeed, and the compilers of its operators."""
    wanting = [stage.id for stage in machine.stages if stage.settings.hardware.deepspeed]
    try:
        version = importlib.metadata.version("deepspeed")
    except importlib.metadata.PackageNotFoundError:
        seen = "DeepSpeed is not installed"
        if wanting:
            yield warning(
                f"{seen}: {wanting[0]} will train with plain data parallelism, which needs more memory",
                "pip install 'mmpipe[deepspeed]'",
            )
        else:
            yield ok(f"{seen}, and no chosen stage asks for it")
        return
    # the operators of GPUs are compiled at first use
    tools = {"ninja": _has("ninja"), "g++": _has(os.environ.get("CXX", "g++"))}
    if machine.torch.get("gpus"):
        tools["nvcc"] = _has("nvcc") or bool(os.environ.get("CUDA_HOME"))
    missing = [name for name, found in tools.items() if not found]
    if missing and wanting:
        yield warning(
            f"DeepSpeed {version} without {', '.join(missing)}",
            f"{wanting[0]} trains as long as no operator must be compiled; install {', '.join(missing)} to be sure",
        )
    else:
        yield ok(f"DeepSpeed {version}" + (f" (no {', '.join(missing)})" if missing else ", with compiler"))


def _has(program: str) -> bool:
    return shutil.which(program.split()[0]) is not None
