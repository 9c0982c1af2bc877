"""PyTorch's version and GPUs, as one line of JSON. Run as a program (``python -m mmpipe.doctor.probe``)."""

from __future__ import annotations

import json
from typing import Any


def main() -> None:
    import torch

    from mmpipe.models.attention import why_not_flash

    facts: dict[str, Any] = {
        "version": torch.__version__,
        "cuda": torch.version.cuda or torch.version.hip,
        "available": torch.cuda.is_available(),
        "gpus": [],
        "nccl": None,
        "flash": None,
    }
    if facts["available"]:
        facts["gpus"] = [_gpu(torch, index) for index in range(torch.cuda.device_count())]
        if torch.distributed.is_available() and torch.distributed.is_nccl_available():
            facts["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    facts["flash"] = _flash_problem(why_not_flash("cuda" if facts["available"] else "cpu", torch.bfloat16))
    print(json.dumps(facts))


def _gpu(torch: Any, index: int) -> dict[str, Any]:
    """Name, memory in bytes, and whether the card computes in bfloat16 by itself."""
    properties = torch.cuda.get_device_properties(index)
    return {
        "name": properties.name,
        "memory": properties.total_memory,
        "free": torch.cuda.mem_get_info(index)[0],
        "bfloat16": torch.cuda.get_device_capability(index) >= (8, 0) or torch.version.hip is not None,
    }


def _flash_problem(problem: str | None) -> str | None:
    """Also import the package: one that was built for another torch is there, but does not load."""
    if problem is None:
        try:
            import flash_attn  # noqa: F401
        except (ImportError, OSError) as error:
            return f"flash-attn is installed but does not load ({error})"
    return problem


if __name__ == "__main__":
    main()
