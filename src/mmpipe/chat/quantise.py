"""Loading the language model in 8 or 4 bits with bitsandbytes.

Only the linear layers of the language model's decoder are stored that way. The vision tower, the projector and the output head
stay in the computing type (rounding the projector costs LLaVA most, and saves least), and so do routers; experts held in one
tensor are no linear layers and stay as they are too.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from mmpipe.chat.messages import ChatError
from mmpipe.chat.options import Bits
from mmpipe.models.moe.routers.base import BaseRouter

log = logging.getLogger(__name__)
# What bitsandbytes' 4-bit product on a CPU wants of a layer's width and height (it packs blocks of this size).
_CPU_WIDTH, _CPU_HEIGHT = 64, 32


def settings(bits: Bits, empty: nn.Module, dtype: torch.dtype, device: torch.device) -> Any:
    """How transformers is to load a model like ``empty`` (which may lie on the meta device).

    4 bits are NF4 with quantised scales, computed in ``dtype``, as in LLaVA. Raises ChatError without bitsandbytes, and when
    no layer could be stored that way.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ChatError(f"--load-{bits}bit needs bitsandbytes: pip install 'mmpipe[chat]'")
    from transformers import BitsAndBytesConfig

    # it would say at every layer of every token that it computes in float16
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    kept = sorted({*outside_decoder(empty), *_impossible(bits, empty, device)})
    if bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=kept)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=kept,
    )


def _impossible(bits: Bits, empty: Any, device: torch.device) -> list[str]:
    """Layers of the decoder that stay as they are because bitsandbytes cannot compute them on ``device``."""
    outside = set(outside_decoder(empty))
    layers = {
        name: module
        for name, module in empty.named_modules()
        if isinstance(module, nn.Linear) and not any(f"{name}.".startswith(f"{o}.") for o in outside)
    }
    if bits == 8 or device.type != "cpu":
        return []
    odd = [n for n, m in layers.items() if m.in_features % _CPU_WIDTH or m.out_features % _CPU_HEIGHT]
    if len(odd) == len(layers):
        raise ChatError(
            f"--load-4bit: on a CPU, bitsandbytes computes layers whose width is a multiple of {_CPU_WIDTH} and height one of "
            f"{_CPU_HEIGHT}, and this model has none; use --load-8bit"
        )
    if odd:
        log.warning("%d of %d layers stay in full precision: their size does not suit a CPU", len(odd), len(layers))
    return odd


def outside_decoder(model: Any) -> Iterator[str]:
    """The names of the modules that are not the language model's decoder: those beside each step of the way to it."""
    decoder = model.get_decoder()
    path = next((name for name, module in model.named_modules() if module is decoder), "")
    steps = path.split(".") if path else []
    for depth, step in enumerate(steps):
        prefix = ".".join(steps[:depth])
        for name, _ in model.get_submodule(prefix).named_children():
            if name != step:
                yield f"{prefix}.{name}".lstrip(".")
    yield from (name for name, module in model.named_modules() if isinstance(module, BaseRouter))
