"""Projector (adaptor) files, with our tensor names and with LLaVA's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mmpipe.artifacts.files import apply_umask
from mmpipe.errors import ArtifactError

FILE = "projector.safetensors"
_PREFIX = "multi_modal_projector."
# LLaVA numbers the modules of a Sequential(Linear, GELU, Linear); stock LLaVA names the two linear layers.
_LLAVA_NAMES = {"linear_1": "0", "linear_2": "2"}


def state(model: nn.Module) -> dict[str, Tensor]:
    """The projector's tensors under the stock names (``multi_modal_projector.linear_1.weight``), on the CPU."""
    projector: nn.Module = model.model.multi_modal_projector  # type: ignore[union-attr, assignment]
    return {f"{_PREFIX}{name}": tensor.detach().cpu().contiguous() for name, tensor in projector.state_dict().items()}


def save(model: nn.Module, path: Path) -> None:
    """Write ``projector.safetensors``."""
    save_file(state(model), path, metadata={"format": "pt"})
    apply_umask(path)


def save_llava_bin(model: nn.Module, path: Path) -> None:
    """Write ``mm_projector.bin`` with LLaVA's key names (``model.mm_projector.0.weight``)."""
    named = ((name.removeprefix(_PREFIX).partition("."), tensor) for name, tensor in state(model).items())
    torch.save({f"model.mm_projector.{_LLAVA_NAMES[layer]}.{rest}": tensor for (layer, _, rest), tensor in named}, path)


def load(model: nn.Module, path: Path) -> None:
    """Load a projector file of either kind into ``model``.

    Raises ArtifactError listing missing, surplus and misshapen tensors.
    """
    tensors = _read(path)
    projector: nn.Module = model.model.multi_modal_projector  # type: ignore[union-attr, assignment]
    wanted = {name: tuple(t.shape) for name, t in projector.state_dict().items()}
    found = {name: tuple(t.shape) for name, t in tensors.items()}
    if wanted != found:
        raise ArtifactError(
            f"{path}: this projector is for another model; it holds {found}, the model needs {wanted}. "
            "Check the recipe's backbones and projector type"
        )
    projector.load_state_dict(tensors)


def _read(path: Path) -> dict[str, Tensor]:
    """Tensors by their name inside the projector (``linear_1.weight``)."""
    if path.suffix == ".safetensors":
        return {name.removeprefix(_PREFIX): tensor for name, tensor in load_file(path).items()}
    raw: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    back = {number: name for name, number in _LLAVA_NAMES.items()}
    tensors = {}
    for key, tensor in raw.items():
        _, separator, tail = key.partition("mm_projector.")
        if not separator:
            continue
        number, _, rest = tail.partition(".")
        # MoE-LLaVA and its derivatives nest the projector one level deeper, beside a video projector
        if number == "image_spatial_proj":
            number, _, rest = rest.partition(".")
        tensors[f"{back.get(number, number)}.{rest}"] = tensor
    if not tensors:
        raise ArtifactError(f"{path}: no key holds 'mm_projector.'; this is not a LLaVA projector file")
    return tensors
