"""Load a checkpoint for chat, one of mmpipe or any image-text model of transformers, and find its template."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, LlavaForConditionalGeneration
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from mmpipe.artifacts.files import read_object
from mmpipe.chat import memory
from mmpipe.chat.find import LocalCheckpoint
from mmpipe.chat.messages import ChatError
from mmpipe.chat.options import DTYPES, LoadOptions
from mmpipe.checkpoints.complete import load_complete
from mmpipe.checkpoints.load import open_checkpoint
from mmpipe.checkpoints.save import empty_model
from mmpipe.data.records import IMAGE_MARK, Turn
from mmpipe.data.templates import Template, TokenizerTemplate, get_template, render_jinja, template_names, to_messages
from mmpipe.errors import ArtifactError, DataError
from mmpipe.models.sparsity.hooks import set_keep_rate
from mmpipe.pretrained import from_config, load_pretrained

# With and without image, first and later round, so that all templates differ.
_CONVERSATION = to_messages(
    [Turn("user", f"{IMAGE_MARK}\nfirst question"), Turn("assistant", "answer"), Turn("user", "second question")]
)


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
        load["quantization_config"] = memory.quantization_config(options.bits, _empty(checkpoint), dtype, device)
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
        processor = load_pretrained(AutoProcessor, path)
        model = load_complete(AutoModelForImageTextToText, path, dtype=dtype, use_safetensors=True, **load)
    except (OSError, ValueError, ImportError) as error:
        raise ArtifactError(f"{path}: this checkpoint cannot be opened: {error}") from error
    if getattr(processor, "tokenizer", None) is None or getattr(processor, "image_processor", None) is None:
        raise ArtifactError(f"{path}: brings no processor for texts and images (processor_config.json)")
    return model, processor


def _config(path: Path) -> Any:
    """The configuration of an image-text model. Raises ArtifactError for a checkpoint of another family."""
    kind = read_object(path / "config.json").get("model_type")
    if kind not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        raise ArtifactError(
            f"{path}: holds a '{kind}' model; chat takes checkpoints of mmpipe and the image-text models that "
            "transformers opens without code of theirs (AutoModelForImageTextToText)"
        )
    try:
        return load_pretrained(AutoConfig, path)
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path}: its configuration cannot be read: {error}") from error


def _empty(checkpoint: LocalCheckpoint) -> Any:
    """The model on the meta device, without weights."""
    with torch.device("meta"):
        if checkpoint.ours:
            return empty_model(checkpoint.path)
        return from_config(AutoModelForImageTextToText, _config(checkpoint.path))


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
        config = read_object(path / "config.json") if (path / "config.json").is_file() else {}
        name = config.get("dtype") or config.get("torch_dtype") or "float32"
    dtype = getattr(torch, name, None)
    return dtype if isinstance(dtype, torch.dtype) else torch.float32


def resolve_template(processor: Any, name: str, *, wanted: str | None, trained: str | None) -> Template | None:
    """The template the checkpoint ``name`` was trained with; None when its own chat template has no name here.

    ``trained`` is the one in its manifest, ``wanted`` the user's. A checkpoint without a chat template is given the
    wanted one. Raises ArtifactError when it has another, or has none and none is wanted.
    """
    tokenizer = processor.tokenizer
    if isinstance(processor.chat_template, dict):  # several by name, of which a chat takes this one
        processor.chat_template = processor.chat_template.get("default")
    own = processor.chat_template
    template = get_template(wanted, tokenizer) if wanted else None
    if own is None:
        if template is None:
            raise ArtifactError(
                f"{name} brings no chat template; name the one it was trained with: --template, "
                f"one of {', '.join(template_names())}"
            )
        template.check(tokenizer)
        processor.chat_template = template.jinja()
        return template
    if template is None:
        return get_template(trained, tokenizer) if trained else _recognise(own, tokenizer)
    if _render(own, tokenizer) != _render(template.jinja(), tokenizer):
        same = _recognise(own, tokenizer)
        known = trained or (same.name if same else "one without a name here")
        raise ArtifactError(
            f"{name} was trained with another template than '{wanted}' (its own: {known}), and would answer badly; "
            "leave --template out"
        )
    return template


def _recognise(jinja: str, tokenizer: Any) -> Template | None:
    """A named template that renders as ``jinja`` does; the tokenizer's own only when no other does."""
    rendered = _render(jinja, tokenizer)
    for name in sorted(template_names(), key=lambda name: name == TokenizerTemplate.name):
        try:
            template = get_template(name, tokenizer)
        except DataError:  # the tokenizer has none that is suitable for training
            continue
        if rendered == _render(template.jinja(), tokenizer):
            return template
    return None


def _render(jinja: str, tokenizer: Any) -> str:
    where = str(tokenizer.name_or_path)
    return render_jinja(jinja, _CONVERSATION, where, add_generation_prompt=True, **tokenizer.special_tokens_map)[0]
