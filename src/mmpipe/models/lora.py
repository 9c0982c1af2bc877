"""Low-rank adapters, by peft: added, saved, merged."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from mmpipe.artifacts.files import apply_umask
from mmpipe.errors import ArtifactError, first_of
from mmpipe.models.settings import LoraSettings
from mmpipe.models.trainable import matching
from mmpipe.pretrained import load_pretrained

_CONFIGS = "peft_config"  # the attribute that holds peft's settings of a model

FOLDER = "adapter"
"""Subfolder of a published checkpoint with the adapter that is merged into it."""


def add_adapters(model: nn.Module, settings: LoraSettings, seed: int) -> None:
    """Add fresh adapters to the chosen linear layers of ``model``, in place; before training, outputs are unchanged.

    Raises ConfigError for a pattern that names no linear layer.
    """
    from peft import LoraConfig, inject_adapter_in_model

    linear = {
        name.removeprefix("model."): name for name, module in model.named_modules() if isinstance(module, nn.Linear)
    }
    chosen = {linear[name] for pattern in settings.targets for name in matching(pattern, linear, "linear layer")}
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,  # type: ignore[arg-type]  # need not be whole
        lora_dropout=settings.dropout,
        target_modules=sorted(chosen),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(config, model)


def has_adapters(model: nn.Module) -> bool:
    """Whether ``model`` has adapters."""
    return hasattr(model, _CONFIGS)


def save(model: nn.Module, out: Path, *, base: str) -> None:
    """Write the adapters of ``model``, trained on ``base``, into the directory ``out`` as peft does."""
    from peft import get_peft_model_state_dict

    out.mkdir()
    config = getattr(model, _CONFIGS)["default"]
    config.base_model_name_or_path = base
    config.inference_mode = True
    config.target_modules = sorted(config.target_modules)
    config.save_pretrained(str(out))
    tensors = get_peft_model_state_dict(model, save_embedding_layers=False)
    named = {f"base_model.model.{name}": tensors[name].detach().cpu().contiguous() for name in sorted(tensors)}
    path = out / "adapter_model.safetensors"
    save_file(named, path)
    apply_umask(path)


def merge(model: nn.Module) -> None:
    """Merge the adapters of ``model`` into its weights."""
    from peft.tuners.lora import LoraLayer

    adapted = [(name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer)]
    for name, layer in adapted:
        layer.merge()
        model.set_submodule(name, layer.get_base_layer())
    delattr(model, _CONFIGS)


def merge_file(model: Any, directory: Path, tensors: Mapping[str, Tensor]) -> Any:
    """``model`` with the adapter of ``directory`` added to its weights; ``tensors`` are the adapter's, as peft names
    them.

    Raises ArtifactError when adapter and model do not have the same tensors.
    """
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

    config = load_pretrained(LoraConfig, directory)
    config.inference_mode = True
    try:
        adapted = get_peft_model(model, config)
    except ValueError as error:
        raise ArtifactError(f"{directory}: the adapter does not fit its base: {error}") from error
    places = {name: tuple(value.shape) for name, value in get_peft_model_state_dict(adapted).items()}
    found = {name: tuple(value.shape) for name, value in tensors.items()}
    if places != found:
        wrong = sorted(name for name in places.keys() | found.keys() if places.get(name) != found.get(name))
        raise ArtifactError(
            f"{directory}: the adapter does not fit its base: {first_of(wrong)}; name the base it was trained on"
        )
    set_peft_model_state_dict(adapted, dict(tensors))
    return adapted.merge_and_unload()
