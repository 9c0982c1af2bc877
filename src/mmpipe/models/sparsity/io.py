"""Predictors on disk: ``sparsity.safetensors`` and ``sparsity.json`` beside a stock dense checkpoint.

Without the two files, or read without this package, the checkpoint is the dense model. Tensors are named as in
Dynamic-LLaVA's released checkpoints (``image_score_predictor.down_mlp.0.weight``), with or without ``model.``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mmpipe.artifacts.files import read_report, write_json
from mmpipe.errors import ArtifactError
from mmpipe.models.sparsity.hooks import attach, get_sparsifier
from mmpipe.models.sparsity.spec import SparsitySettings

WEIGHTS = "sparsity.safetensors"
CONFIG = "sparsity.json"
_PREFIX = "model.language_model.sparsifier."


def without_predictors(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of the dense model alone."""
    return {name: tensor for name, tensor in state.items() if not name.startswith(_PREFIX)}


def save(model: Any, out: Path) -> None:
    """Write the predictors of ``model``, if any, into ``out``."""
    sparsifier = get_sparsifier(model)
    if sparsifier is None:
        return
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in sparsifier.state_dict().items()}
    save_file(tensors, out / WEIGHTS, metadata={"format": "pt"})
    config = sparsifier.settings.model_dump(mode="json") | {"image_tokens": sparsifier.image_tokens}
    write_json(out / CONFIG, config, sort_keys=True)


def load(model: Any, directory: Path) -> None:
    """Load the predictors of a checkpoint directory, if any, into ``model``, in place.

    Raises ArtifactError when one of the two files is missing or they do not fit each other or the model.
    """
    there = [(directory / name).is_file() for name in (CONFIG, WEIGHTS)]
    if not any(there):
        return
    if not all(there):
        missing = directory / (WEIGHTS if there[0] else CONFIG)
        raise ArtifactError(f"{missing} is missing; without it the checkpoint's predictors cannot be used")
    try:
        config = read_report(directory / CONFIG)
        image_tokens = config.pop("image_tokens")
        settings = SparsitySettings(**config)
        tensors = load_file(directory / WEIGHTS)
    except (ValueError, KeyError, ValidationError, SafetensorError) as error:
        raise ArtifactError(f"{directory}: the predictors cannot be read: {error}") from error
    if image_tokens != model.config.image_seq_length:
        raise ArtifactError(
            f"{directory / CONFIG}: the predictors were trained for images of {image_tokens} tokens, the model gives "
            f"an image {model.config.image_seq_length}; both must come from one training"
        )
    sparsifier = attach(model, settings)
    try:
        sparsifier.load_state_dict({name.removeprefix("model."): t for name, t in tensors.items()})
    except RuntimeError as error:
        raise ArtifactError(f"{directory / WEIGHTS}: {error}") from error
