"""DeepSpeed, and what it builds its operators with."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
from collections.abc import Iterator

from mmpipe.doctor.base import Finding, Machine


def check(machine: Machine) -> Iterator[Finding]:
    wanting = [stage.id for stage in machine.stages if stage.settings.hardware.deepspeed]
    try:
        version = importlib.metadata.version("deepspeed")
    except importlib.metadata.PackageNotFoundError:
        seen = "DeepSpeed is not installed"
        if wanting:
            yield Finding(
                "warning",
                f"{seen}: {wanting[0]} will train with plain data parallelism, which needs more memory",
                "pip install 'mmpipe[deepspeed]'",
            )
        else:
            yield Finding("ok", f"{seen}, and no chosen stage asks for it")
        return
    # the operators of GPUs are compiled at first use
    tools = {"ninja": _has("ninja"), "g++": _has(os.environ.get("CXX", "g++"))}
    if machine.torch.get("gpus"):
        tools["nvcc"] = _has("nvcc") or bool(os.environ.get("CUDA_HOME"))
    missing = [name for name, found in tools.items() if not found]
    if missing and wanting:
        yield Finding(
            "warning",
            f"DeepSpeed {version} without {', '.join(missing)}",
            f"{wanting[0]} trains as long as no operator must be compiled; install {', '.join(missing)} to be sure",
        )
    else:
        yield Finding("ok", f"DeepSpeed {version}" + (f" (no {', '.join(missing)})" if missing else ", with compiler"))


def _has(program: str) -> bool:
    return shutil.which(program.split()[0]) is not None
