"""Flash attention: faster on long texts, never necessary."""

from __future__ import annotations

from collections.abc import Iterator

from mmpipe.doctor.base import Finding, Machine


def check(machine: Machine) -> Iterator[Finding]:
    torch = machine.torch
    if "error" in torch:
        return
    if not torch["flash"]:
        yield Finding("ok", "flash attention 2 will be used in bfloat16")
        return
    by_name = [s.id for s in machine.stages if s.settings.hardware.attention == "flash_attention_2"]
    seen = f"sdpa will be used: {torch['flash']}"
    if by_name and not machine.on_slurm:
        yield Finding("problem", f"{torch['flash']}, but {by_name[0]} asks for it by name", "say `attention: auto`")
    elif "does not load" in torch["flash"]:
        yield Finding("warning", seen, "rebuild it for this torch, or uninstall it: pip uninstall flash-attn")
    else:
        yield Finding("ok", seen)
