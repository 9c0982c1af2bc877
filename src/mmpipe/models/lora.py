"""Low-rank adapters, by peft: put on, taken off, merged."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from mmpipe.errors import ArtifactError
from mmpipe.models.export import some


def merge_file(model: Any, directory: Path, tensors: Mapping[str, Tensor]) -> Any:
    """``model`` with the adapter of ``directory`` added to its weights; ``tensors`` are the adapter's, as peft names them.

    Raises ArtifactError when a tensor of the adapter has no place in the model, or a place no tensor.
    """
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

    config = LoraConfig.from_pretrained(str(directory))
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
            f"{directory}: the adapter does not fit its base: {some(wrong)}; name the base it was trained on"
        )
    set_peft_model_state_dict(adapted, dict(tensors))
    return adapted.merge_and_unload()
