"""Opening a checkpoint to talk to it: one of ours, or any image-text model that transformers knows."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, LlavaForConditionalGeneration

from mmpipe.artifacts.files import read_json
from mmpipe.chat import memory, quantise
from mmpipe.chat.find import Found
from mmpipe.chat.messages import ChatError
from mmpipe.chat.options import DTYPES, Loading
from mmpipe.chat.template import settle
from mmpipe.checkpoints.load import open_checkpoint
from mmpipe.checkpoints.save import empty_model
from mmpipe.data.templates import Template
from mmpipe.errors import ArtifactError
from mmpipe.models.sparsity.hooks import set_keep_rate


@dataclass(frozen=True)
class Opened:
    """A checkpoint ready to be asked."""

    name: str
    path: Path
    model: Any
    processor: Any
    template: Template | None


def open_for_chat(found: Found, loading: Loading) -> Opened:
    """Load what :func:`mmpipe.chat.find.find` found.

    Raises ArtifactError when it is no image-text model or does not fit its template, ChatError when it does not fit into
    memory, or a way of loading is not possible here.
    """
    device = _device(loading.device)
    dtype = _dtype(loading.dtype, found.path)
    if loading.device_map is None:
        memory.require(found.path, device, {None: dtype.itemsize, 8: 1.0, 4: 0.5}[loading.bits])
    options: dict[str, Any] = {}
    if loading.device_map or loading.bits or device.type != "cpu":
        options["device_map"] = loading.device_map or {"": str(device)}
    if loading.bits:
        options["quantization_config"] = quantise.settings(loading.bits, _empty(found), dtype, device)
    with memory.told(f"{found.name} does not load", memory.advice(memory.weights(found.path), memory.free(device))):
        model, processor, noted = (_ours if found.ours else _stock)(found.path, dtype, options)
    if loading.sparsity is not None:
        _sparsify(model, found.name, loading.sparsity)
    template = settle(processor, found.name, asked=loading.template, noted=noted)
    return Opened(found.name, found.path, model.eval(), processor, template)


def _sparsify(model: Any, name: str, wanted: str) -> None:
    if not isinstance(model, LlavaForConditionalGeneration):
        raise ChatError(f"--sparsity: {name} has no predictors; only a sparsified one can be told what to keep")
    try:
        rate = None if wanted == "off" else float(wanted)
    except ValueError as error:
        raise ChatError(f"--sparsity takes a share such as 0.2, or off, not '{wanted}'") from error
    set_keep_rate(model, rate, f"--sparsity with {name}")


def _ours(path: Path, dtype: torch.dtype, options: dict[str, Any]) -> tuple[Any, Any, str | None]:
    model, processor, card = open_checkpoint(path, dtype, **options)
    return model, processor, card["checkpoint"]["template"]


def _stock(path: Path, dtype: torch.dtype, options: dict[str, Any]) -> tuple[Any, Any, str | None]:
    _config(path)
    safe: dict[str, Any] = {"trust_remote_code": False, "local_files_only": True}
    try:
        processor = AutoProcessor.from_pretrained(path, **safe)
        model = AutoModelForImageTextToText.from_pretrained(path, dtype=dtype, use_safetensors=True, **safe, **options)
    except (OSError, ValueError, ImportError) as error:
        raise ArtifactError(f"{path}: this checkpoint cannot be opened: {error}") from error
    if getattr(processor, "tokenizer", None) is None or getattr(processor, "image_processor", None) is None:
        raise ArtifactError(f"{path}: brings no processor for texts and images (processor_config.json)")
    return model, processor, None


def _config(path: Path) -> Any:
    """The configuration of an image-text model. Raises ArtifactError for a checkpoint of another family."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    kind = read_json(path / "config.json").get("model_type")
    if kind not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        raise ArtifactError(
            f"{path}: holds a '{kind}' model; chat takes checkpoints of mmpipe and the image-text models that transformers "
            "opens without code of theirs (AutoModelForImageTextToText)"
        )
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path}: its configuration cannot be read: {error}") from error


def _empty(found: Found) -> Any:
    """The model without weights, to look at its parts."""
    with torch.device("meta"):
        if found.ours:
            return empty_model(found.path)
        return AutoModelForImageTextToText.from_config(_config(found.path), trust_remote_code=False)


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ChatError(f"there is no device '{name}'; give cpu, cuda, cuda:1, …") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ChatError(f"there is no {name} here: {torch.cuda.device_count()} GPUs are seen")
    return device


def _dtype(name: str, path: Path) -> torch.dtype:
    if name not in DTYPES:
        raise ChatError(f"there is no number type '{name}'; known: {', '.join(DTYPES)}")
    if name == "auto":
        config = read_json(path / "config.json") if (path / "config.json").is_file() else {}
        name = config.get("dtype") or config.get("torch_dtype") or "float32"
    dtype = getattr(torch, name, None)
    return dtype if isinstance(dtype, torch.dtype) else torch.float32
