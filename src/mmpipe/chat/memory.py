"""Whether a checkpoint fits into memory, and loading the language model in 8 or 4 bits with bitsandbytes."""

from __future__ import annotations

import importlib.util
import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors import safe_open
from torch import nn

from mmpipe.chat.messages import ChatError
from mmpipe.chat.options import Bits
from mmpipe.models.moe.routers.base import BaseRouter

log = logging.getLogger(__name__)
# Bytes a weight; 4 bits come with their scales, and in both the parts around the language model stay as they are.
_SIZES = {"--dtype float32": 4.0, "--dtype bfloat16": 2.0, "--load-8bit": 1.1, "--load-4bit": 0.65}
_OVERHEAD = 1.1
"""Memory needed, in sizes of the weights: activations and the key-value cache come on top."""
# bitsandbytes' 4-bit product on a CPU packs blocks of this size: a layer's width and height must be multiples.
_CPU_WIDTH, _CPU_HEIGHT = 64, 32


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
    """Raise ChatError when the weights alone exceed the free memory of ``device``."""
    count, room = count_weights(path), free(device)
    need = count * bytes_per_weight
    if need > room:
        needs = f"the weights need {_gb(need)}, {device} has {_gb(room)} free"
        raise ChatError(f"{path}: {needs}; {advice(count, room)}")


def advice(count: int, room: int) -> str:
    """The precisions in which ``count`` weights fit into ``room`` bytes."""
    fits = [f"{way} ({_gb(count * size)})" for way, size in _SIZES.items() if count * size * _OVERHEAD < room]
    if fits:
        return f"would fit: {', '.join(fits)}"
    least = _gb(count * min(_SIZES.values()))
    return f"even in 4 bits it needs {least}; spread it with --device-map auto, or take a smaller one"


def quantization_config(bits: Bits, empty: Any, dtype: torch.dtype, device: torch.device) -> Any:
    """Quantises the linear layers of the language model's decoder, of a model like ``empty`` (on the meta device).

    The vision tower, the projector and the output head stay in the computing type (rounding the projector costs LLaVA
    most, and saves least), and so do routers, and experts held in one tensor, which are no linear layers. 4 bits are
    NF4 with quantised scales, computed in ``dtype``, as in LLaVA. Raises ChatError without bitsandbytes, and when no
    layer could be quantised.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ChatError(f"--load-{bits}bit needs bitsandbytes: pip install 'mmpipe[chat]'")
    from transformers import BitsAndBytesConfig

    # it would log at every layer of every token that it computes in float16
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    linear = {name: module for name, module in empty.named_modules() if isinstance(module, nn.Linear)}
    routers = [module for module in empty.modules() if isinstance(module, BaseRouter)]
    quantised = set(empty.get_decoder().modules()).difference(*(router.modules() for router in routers))
    kept = [name for name, layer in linear.items() if layer not in quantised]
    if bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=kept)
    if device.type == "cpu":
        kept += _odd_layers({name: layer for name, layer in linear.items() if layer in quantised})
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=kept,
    )


def _odd_layers(layers: dict[str, nn.Linear]) -> list[str]:
    """The layers that bitsandbytes cannot compute in 4 bits on a CPU."""
    odd = [n for n, m in layers.items() if m.in_features % _CPU_WIDTH or m.out_features % _CPU_HEIGHT]
    if len(odd) == len(layers):
        raise ChatError(
            f"--load-4bit: on a CPU, bitsandbytes computes layers whose width is a multiple of {_CPU_WIDTH} and height "
            f"one of {_CPU_HEIGHT}, and this model has none; use --load-8bit"
        )
    if odd:
        log.warning("%d of %d layers stay in full precision: their size does not suit a CPU", len(odd), len(layers))
    return odd


@contextmanager
def report_out_of_memory(what: str, hint: str) -> Iterator[None]:
    """Turn an out-of-memory error into a ChatError: ``what`` did not fit, ``hint`` is the advice."""
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
