"""Load a checkpoint for chat: one of mmpipe, or any image-text model of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, LlavaForConditionalGeneration
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from mmpipe.artifacts.files import read_json
from mmpipe.chat import memory, quantise
from mmpipe.chat.find import LocalCheckpoint
from mmpipe.chat.messages import ChatError
from mmpipe.chat.options import DTYPES, LoadOptions
from mmpipe.chat.template import resolve_template
from mmpipe.checkpoints.load import open_checkpoint
from mmpipe.checkpoints.save import empty_model
from mmpipe.data.templates import Template
from mmpipe.errors import ArtifactError
from mmpipe.models.sparsity.hooks import set_keep_rate

_SAFE: dict[str, Any] = {"trust_remote_code": False, "local_files_only": True}


def open_for_chat(checkpoint: LocalCheckpoint, options: LoadOptions) -> tuple[Any, Any, Template | None]:
    """The model, its processor and its template.

    Raises ArtifactError when it is no image-text model or has another template than wanted, ChatError when it does not
    fit into memory or cannot be loaded as wanted on this machine.
    """
    device = _device(options.device)
    dtype = _dtype(options.dtype, checkpoint.path)
    if options.device_map is None:
        memory.require(checkpoint.path, device, {None: dtype.itemsize, 8: 1.0, 4: 0.5}[options.bits])
    load: dict[str, Any] = {}
    if options.device_map or options.bits or device.type != "cpu":
        load["device_map"] = options.device_map or {"": str(device)}
    if options.bits:
        load["quantization_config"] = quantise.settings(options.bits, _empty(checkpoint), dtype, device)
    hint = memory.advice(memory.count_weights(checkpoint.path), memory.free(device))
    with memory.report_out_of_memory(f"{checkpoint.name} does not load", hint):
        if checkpoint.ours:
            model, processor, card = open_checkpoint(checkpoint.path, dtype, **load)
            trained = card["checkpoint"]["template"]
        else:
            model, processor = _open_with_transformers(checkpoint.path, dtype, load)
            trained = None
    if options.sparsity is not None:
        _set_sparsity(model, checkpoint.name, options.sparsity)
    template = resolve_template(processor, checkpoint.name, wanted=options.template, trained=trained)
    return model.eval(), processor, template


def _set_sparsity(model: Any, name: str, wanted: str) -> None:
    if not isinstance(model, LlavaForConditionalGeneration):
        raise ChatError(f"--sparsity: {name} has no predictors; only a sparsified one can be told what to keep")
    try:
        rate = None if wanted == "off" else float(wanted)
    except ValueError as error:
        raise ChatError(f"--sparsity takes a share such as 0.2, or off, not '{wanted}'") from error
    set_keep_rate(model, rate, f"--sparsity with {name}")


def _open_with_transformers(path: Path, dtype: torch.dtype, load: dict[str, Any]) -> tuple[Any, Any]:
    _config(path)
    try:
        processor = AutoProcessor.from_pretrained(path, **_SAFE)
        model = AutoModelForImageTextToText.from_pretrained(path, dtype=dtype, use_safetensors=True, **_SAFE, **load)
    except (OSError, ValueError, ImportError) as error:
        raise ArtifactError(f"{path}: this checkpoint cannot be opened: {error}") from error
    if getattr(processor, "tokenizer", None) is None or getattr(processor, "image_processor", None) is None:
        raise ArtifactError(f"{path}: brings no processor for texts and images (processor_config.json)")
    return model, processor


def _config(path: Path) -> Any:
    """The configuration of an image-text model. Raises ArtifactError for a checkpoint of another family."""
    kind = read_json(path / "config.json").get("model_type")
    if kind not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        raise ArtifactError(
            f"{path}: holds a '{kind}' model; chat takes checkpoints of mmpipe and the image-text models that "
            "transformers opens without code of theirs (AutoModelForImageTextToText)"
        )
    try:
        return AutoConfig.from_pretrained(path, **_SAFE)
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path}: its configuration cannot be read: {error}") from error


def _empty(checkpoint: LocalCheckpoint) -> Any:
    """The model on the meta device, without weights."""
    with torch.device("meta"):
        if checkpoint.ours:
            return empty_model(checkpoint.path)
        return AutoModelForImageTextToText.from_config(_config(checkpoint.path), trust_remote_code=False)


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
