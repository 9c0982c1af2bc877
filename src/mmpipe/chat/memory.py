"""Whether a checkpoint fits into memory, and what would."""

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
_ROOM = 1.1
"""Weights need so many times their size: activations and the cache of keys and values come on top."""


def weights(path: Path) -> int:
    """How many numbers the weights of a checkpoint directory are, from the heads of its safetensors files."""
    total = 0
    for file in sorted(path.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            total += sum(math.prod(opened.get_slice(name).get_shape()) for name in opened.keys())  # noqa: SIM118
    return total


def free(device: torch.device) -> int:
    """Bytes that are free on ``device``."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


def require(path: Path, device: torch.device, bytes_a_weight: float) -> None:
    """Raise ChatError when the weights alone are larger than what is free on ``device``."""
    count, room = weights(path), free(device)
    if count * bytes_a_weight > room:
        raise ChatError(f"{path}: {_needs(count, bytes_a_weight, device, room)}; {advice(count, room)}")


def _needs(count: int, bytes_a_weight: float, device: torch.device, room: int) -> str:
    return f"the weights need {_gb(count * bytes_a_weight)}, {device} has {_gb(room)} free"


def advice(count: int, room: int) -> str:
    """Which ways to load ``count`` weights would fit into ``room`` bytes."""
    fits = [f"{way} ({_gb(count * size)})" for way, size in _SIZES.items() if count * size * _ROOM < room]
    if fits:
        return f"would fit: {', '.join(fits)}"
    least = min(_SIZES.values())
    return f"even in 4 bits it needs {_gb(count * least)}; spread it with --device-map auto, or take a smaller one"


@contextmanager
def told(what: str, hint: str) -> Iterator[None]:
    """Turn running out of memory into a ChatError: ``what`` did not fit, ``hint`` says what would."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise ChatError(f"out of memory: {what}; {hint}") from error
    except RuntimeError as error:
        # the CPU's allocator has no class of its own
        if "not enough memory" not in str(error) and "can't allocate memory" not in str(error):
            raise
        raise ChatError(f"out of memory: {what}; {hint}") from error


def _gb(size: float) -> str:
    return f"{size / 1e9:.1f} GB"
