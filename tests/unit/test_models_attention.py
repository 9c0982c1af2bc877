"""Which attention is used, and that the choice is said and can be refused."""

from __future__ import annotations

import logging

import pytest
import torch
import transformers.utils
from tiny_llava import llava

from mmpipe.errors import ConfigError
from mmpipe.models import attention


def test_on_a_cpu_attention_is_sdpa_with_a_logged_reason(caplog):
    with caplog.at_level(logging.INFO):
        assert attention.choose("auto", "cpu", torch.float32) == "sdpa"
    assert "attention: sdpa (flash_attention_2: it needs a GPU)" in caplog.text


@pytest.mark.parametrize(
    ("dtype", "capability", "installed", "expected"),
    [
        (torch.bfloat16, (9, 0), True, attention.FLASH),
        (torch.float32, (9, 0), True, "sdpa"),
        (torch.bfloat16, (7, 5), True, "sdpa"),
        (torch.bfloat16, (9, 0), False, "sdpa"),
    ],
)
def test_on_a_gpu_it_depends(monkeypatch, dtype, capability, installed, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(transformers.utils, "is_flash_attn_2_available", lambda: installed)
    assert attention.choose("auto", "cuda", dtype) == expected


def test_flash_attention_by_name_must_be_possible():
    with pytest.raises(ConfigError, match=r"flash_attention_2 cannot be used: it needs a GPU; say 'auto'"):
        attention.choose("flash_attention_2", "cpu", torch.bfloat16)


def test_the_model_uses_what_was_chosen():
    model = llava()
    for chosen in ("eager", "sdpa"):
        attention.use(model, chosen)
        assert model.model.language_model.config._attn_implementation == chosen
        assert model.model.vision_tower.config._attn_implementation == chosen
