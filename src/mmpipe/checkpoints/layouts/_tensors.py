"""Reading a directory's weights from any file format, and loading them into a stock model, exactly."""

from __future__ import annotations

import pickle
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from mmpipe.artifacts.files import read_object
from mmpipe.errors import ArtifactError, first_of
from mmpipe.pretrained import load_pretrained

STEMS = ("model.safetensors", "pytorch_model.bin")
"""The names of a checkpoint's weights, in one file or behind ``<stem>.index.json``; the first is preferred."""

ModelT = TypeVar("ModelT", bound=nn.Module)


def weight_files(directory: Path) -> list[Path]:
    """The files that hold a checkpoint's weights; empty when there are none.

    Raises ArtifactError for an index that names files which are not there.
    """
    for stem in STEMS:
        index = directory / f"{stem}.index.json"
        if index.is_file():
            files = [directory / name for name in sorted(set(read_config(index)["weight_map"].values()))]
            lacking = [path.name for path in files if not path.is_file()]
            if lacking:
                raise ArtifactError(f"{index} names files that are missing: {first_of(lacking)}; fetch them again")
            return files
        if (directory / stem).is_file():
            return [directory / stem]
    return []


def read_weights(directory: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint directory by their names there.

    Raises ArtifactError when there are none, or a file is damaged.
    """
    files = weight_files(directory)
    if not files:
        raise ArtifactError(f"{directory}: no weights here; expected {' or '.join(STEMS)}, whole or in shards")
    return {name: tensor for path in files for name, tensor in read_file(path).items()}


def read_file(path: Path) -> dict[str, Tensor]:
    """The tensors of one safetensors or ``.bin`` file; of the latter, only tensors are unpickled."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise ArtifactError(f"{path}: no readable file of tensors: {reason}") from error
    strange = [name for name, value in tensors.items() if not isinstance(value, Tensor)]
    if strange:
        raise ArtifactError(f"{path}: holds more than tensors: {first_of(strange)}")
    return tensors


def read_config(path: Path) -> dict[str, Any]:
    """A JSON file that describes a model. Raises ArtifactError when it is missing or no JSON."""
    try:
        return read_object(path)
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be read ({error.strerror})") from error


def common_dtype(tensors: Iterable[Tensor]) -> torch.dtype:
    """The most common precision, by number of elements."""
    numbers: Counter[torch.dtype] = Counter()
    for tensor in tensors:
        numbers[tensor.dtype] += tensor.numel()
    return numbers.most_common(1)[0][0]


def assemble(
    kind: type[ModelT], config: Any, tensors: Mapping[str, Tensor], source: Path, dtype: torch.dtype | str
) -> ModelT:
    """A stock model of ``tensors``, named as its parameters are; with the dtype ``auto`` each keeps its precision.

    Raises ArtifactError naming missing, surplus and misshapen tensors: none is left at random values.
    """
    with torch.device("meta"):
        shell: Any = kind(config)
    parameters = dict(shell.named_parameters())
    buffers = dict(shell.named_buffers())
    parameters |= {name: buffers[name] for name in shell.state_dict() if name in buffers}
    if config.tie_word_embeddings:
        tensors = _without_tied_head(shell, tensors)
    problems = {
        "missing": sorted(parameters.keys() - tensors.keys()),
        "left over": sorted(tensors.keys() - parameters.keys()),
        "of another shape than the configuration says": [
            f"{name} {tuple(tensor.shape)}, expected {tuple(parameters[name].shape)}"
            for name, tensor in sorted(tensors.items())
            if name in parameters and tensor.shape != parameters[name].shape
        ],
    }
    found = "; ".join(f"{what}: {first_of(names)}" for what, names in problems.items() if names)
    if found:
        raise ArtifactError(f"{source}: the weights do not fit a {type(config).__name__}; {found}")
    most = common_dtype(tensors.values()) if dtype == "auto" else dtype
    model: ModelT = load_pretrained(kind, None, config=config, state_dict=dict(tensors), dtype=most)
    if dtype == "auto":
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if name in tensors:
                tensor.data = tensors[name]
    return model.eval()


def _without_tied_head(shell: Any, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Leave out the stored copy of a tied tensor; a head that differs stays, to be reported."""
    kept = dict(tensors)
    rows = next(name for name, value in shell.named_parameters() if value is shell.get_input_embeddings().weight)
    if rows in kept and "lm_head.weight" in kept and torch.equal(kept[rows], kept["lm_head.weight"]):
        del kept["lm_head.weight"]
    return kept
