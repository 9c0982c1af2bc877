"""Load the language model in 8 or 4 bits with bitsandbytes.

Only the linear layers of the language model's decoder are quantised. The vision tower, the projector and the output
head stay in the computing type (rounding the projector costs LLaVA most, and saves least), and so do routers; experts
held in one tensor are no linear layers and stay as they are too.
"""

from __future__ import annotations

import importlib.util
import logging
from typing import Any

import torch
from torch import nn

from mmpipe.chat.messages import ChatError
from mmpipe.chat.options import Bits
from mmpipe.models.moe.routers.base import BaseRouter

log = logging.getLogger(__name__)
# bitsandbytes' 4-bit product on a CPU packs blocks of this size: a layer's width and height must be multiples.
_CPU_WIDTH, _CPU_HEIGHT = 64, 32


def settings(bits: Bits, empty: Any, dtype: torch.dtype, device: torch.device) -> Any:
    """The quantization config to load a model like ``empty`` (which may lie on the meta device).

    4 bits are NF4 with quantised scales, computed in ``dtype``, as in LLaVA. Raises ChatError without bitsandbytes, and
    when no layer could be quantised.
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
