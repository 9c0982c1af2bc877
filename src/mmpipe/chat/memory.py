"""Whether a checkpoint fits into memory, and which ways to load it would."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import torch
from safetensors import safe_open

from mmpipe.chat.messages import ChatError

# Bytes a weight; 4 bits come with their scales, and in both the parts around the language model stay as they are.
_SIZES = {"--dtype float32": 4.0, "--dtype bfloat16": 2.0, "--load-8bit": 1.1, "--load-4bit": 0.65}
_OVERHEAD = 1.1
"""Memory needed, in sizes of the weights: activations and the key-value cache come on top."""


def count_weights(path: Path) -> int:
    """Number of weights in a checkpoint directory, from the headers of its safetensors files."""
    total = 0
    for file in sorted(path.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            total += sum(math.prod(opened.get_slice(name).get_shape()) for name in opened.keys())  # noqa: SIM118
    return total


def free(device: torch.device) -> int:
    """Free bytes on ``device``."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


def require(path: Path, device: torch.device, bytes_per_weight: float) -> None:
    """Raise ChatError when the weights alone are larger than what is free on ``device``."""
    count, room = count_weights(path), free(device)
    need = count * bytes_per_weight
    if need > room:
        needs = f"the weights need {_gb(need)}, {device} has {_gb(room)} free"
        raise ChatError(f"{path}: {needs}; {advice(count, room)}")


def advice(count: int, room: int) -> str:
    """Which ways to load ``count`` weights would fit into ``room`` bytes."""
    fits = [f"{way} ({_gb(count * size)})" for way, size in _SIZES.items() if count * size * _OVERHEAD < room]
    if fits:
        return f"would fit: {', '.join(fits)}"
    least = _gb(count * min(_SIZES.values()))
    return f"even in 4 bits it needs {least}; spread it with --device-map auto, or take a smaller one"


@contextmanager
def report_out_of_memory(what: str, hint: str) -> Iterator[None]:
    """Turn running out of memory into a ChatError: ``what`` did not fit, ``hint`` says what would."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        # torch.OutOfMemoryError is a RuntimeError; the CPU's allocator has no class of its own
        known = isinstance(error, (torch.OutOfMemoryError, MemoryError))
        if not known and not any(sign in str(error) for sign in ("not enough memory", "can't allocate memory")):
            raise
        raise ChatError(f"out of memory: {what}; {hint}") from error


def _gb(size: float) -> str:
    return f"{size / 1e9:.1f} GB"
