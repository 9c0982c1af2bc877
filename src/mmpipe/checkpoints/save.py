"""Writing checkpoints: one directory that every reader of LLaVA checkpoints understands.

transformers 5 loads what transformers 4 wrote, but not the reverse, and other engines (vLLM, llama.cpp, older
scripts) read version 4's names. So a checkpoint is written the way version 4 wrote it:

* tensors are named ``language_model.model.*``, ``vision_tower.vision_model.*``, ``multi_modal_projector.*``;
* ``text_config`` has ``architectures``, and ``rope_theta`` beside ``rope_parameters``;
* ``preprocessor_config.json`` is beside a flat ``processor_config.json``, and the tokenizer names a class
  of version 4;
* the weights are one ``model.safetensors``, whose bytes depend only on them, and every file has the
  mode the umask asks for (transformers writes weights that only their owner can read).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers import AutoProcessor, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from mmpipe.artifacts.files import apply_umask, read_object, write_json
from mmpipe.checkpoints.complete import load_complete
from mmpipe.data.templates import published
from mmpipe.errors import ArtifactError
from mmpipe.models.llava import image_seq_length
from mmpipe.models.moe import hf
from mmpipe.models.moe.modeling_mmpipe_llava import SparseLlava, SparseLlavaConfig
from mmpipe.models.sparsity import io
from mmpipe.pretrained import load_pretrained

WEIGHTS = "model.safetensors"
_STOCK, _OURS = LlavaConfig.model_type, SparseLlavaConfig.model_type
_CLASSES = {_STOCK: LlavaForConditionalGeneration, _OURS: SparseLlava}

# Towers whose version 4 classes hold their body in an attribute ``vision_model``; none written since does.
_NESTED_TOWERS = frozenset({"clip_vision_model", "siglip_vision_model"})


def save_checkpoint(model: LlavaForConditionalGeneration, processor: LlavaProcessor, out: Path) -> None:
    """Write model and processor into the directory ``out`` in the layout described above.

    A sparse model is written as a stock one when there is a class for it, and under the model type
    ``mmpipe_llava`` otherwise (see :mod:`mmpipe.models.moe.modeling_mmpipe_llava`;
    :func:`mmpipe.models.moe.hf.why_not_stock` gives the reason). Token predictors are in separate files
    (see :mod:`mmpipe.models.sparsity.io`).

    The same weights and configuration give the same bytes. The caller publishes the directory (see
    :func:`mmpipe.artifacts.files.staged_directory`).
    """
    is_sparse, is_stock = bool(hf.sparse_layers(model)), hf.why_not_stock(model) is None
    text = hf.text_config(model) if is_sparse and is_stock else model.config.get_text_config()
    out.mkdir(parents=True, exist_ok=True)
    _write_config(model, text, out, is_stock)
    _write_processor(processor, out)
    named = dict(hf.tensors(model) if is_sparse and is_stock else model.state_dict())
    named = io.without_predictors(named)
    save_file(_disk_tensors(model, named, is_stock), out / WEIGHTS, metadata={"format": "pt"})
    io.save(model, out)
    for file in filter(Path.is_file, out.iterdir()):
        apply_umask(file)


def load_checkpoint(
    path: Path, dtype: torch.dtype | Literal["auto"] = torch.float32, **placement: Any
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """Open a checkpoint directory: the model in evaluation mode with weights of ``dtype`` (``auto``: as stored), and
    its processor.

    Images are processed with Pillow on every machine, so that pixels do not depend on what is installed.
    ``placement`` goes to ``load_pretrained`` (``device_map``, ``quantization_config``).

    Raises ArtifactError when the directory is not a LLaVA checkpoint, or naming the tensors for which its
    configuration and its weights disagree.
    """
    path = Path(path)
    kind = _model_class(path)
    try:
        model = load_complete(kind, path, dtype=dtype, **placement)
        processor = load_pretrained(AutoProcessor, path, backend="pil")
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ArtifactError(f"{path}: this checkpoint cannot be opened: {error}") from error
    model.config.image_seq_length = image_seq_length(path, model.config)
    model = hf.replace_moe_blocks(model).eval()
    io.load(model, path)
    return model, processor


def empty_model(path: Path) -> LlavaForConditionalGeneration:
    """The model of a checkpoint directory with fresh weights; without cost on the meta device."""
    kind: Any = _model_class(path)
    return kind(load_pretrained(kind.config_class, path))


def _disk_tensors(
    model: LlavaForConditionalGeneration, state: dict[str, torch.Tensor], is_stock: bool
) -> dict[str, torch.Tensor]:
    """The tensors to write by their names on disk, sorted; a tied output head is left out."""
    if model.config.get_text_config().tie_word_embeddings:
        state.pop("lm_head.weight")
    nested = model.model.vision_tower.config.model_type in _NESTED_TOWERS
    named = {disk_name(name, nested) if is_stock else name: tensor for name, tensor in state.items()}
    return {name: named[name].detach().to("cpu", copy=True).contiguous() for name in sorted(named)}


def disk_name(name: str, nested_tower: bool) -> str:
    """Translate a parameter's name in memory to its name on disk.

    >>> disk_name("model.language_model.norm.weight", True)
    'language_model.model.norm.weight'
    >>> disk_name("model.vision_tower.post_layernorm.bias", True)
    'vision_tower.vision_model.post_layernorm.bias'
    """
    part, _, rest = name.removeprefix("model.").partition(".")
    if part == "lm_head":
        return f"language_model.lm_head.{rest}"
    if part == "language_model":
        return f"language_model.model.{rest}"
    if part == "vision_tower" and nested_tower:
        return f"vision_tower.vision_model.{rest}"
    return f"{part}.{rest}"


def _write_config(model: LlavaForConditionalGeneration, text: PreTrainedConfig, out: Path, is_stock: bool) -> None:
    config = model.config.to_diff_dict()
    config["model_type"] = _STOCK if is_stock else _OURS
    config["architectures"] = [_CLASSES[config["model_type"]].__name__]
    config["text_config"] = _text_config(text)
    for part in (config, config["text_config"], config["vision_config"]):
        part["dtype"] = str(model.dtype).removeprefix("torch.")
    write_json(out / "config.json", _portable(config), sort_keys=True)
    generation = model.generation_config.to_diff_dict()
    generation.pop("_from_model_config", None)
    write_json(out / "generation_config.json", generation, sort_keys=True)


def _text_config(text: PreTrainedConfig) -> dict[str, Any]:
    """The language model's configuration, with all spellings that readers expect."""
    config = text.to_diff_dict()
    config.pop("transformers_version", None)
    config["architectures"] = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[text.model_type]]
    rope = config.get("rope_parameters") or {}
    if "rope_theta" in rope:
        config["rope_theta"] = rope["rope_theta"]
        if rope.get("rope_type", "default") != "default":
            config["rope_scaling"] = {key: value for key, value in rope.items() if key != "rope_theta"}
    return config


def _portable(config: dict[str, Any]) -> dict[str, Any]:
    """Drop entries that describe this run rather than the model."""
    local = ("_name_or_path", "_attn_implementation_autoset", "_experts_implementation", "_attn_implementation")
    kept = {key: value for key, value in config.items() if key not in local}
    return {key: _portable(value) if isinstance(value, dict) else value for key, value in kept.items()}


def _write_processor(processor: LlavaProcessor, out: Path) -> None:
    own = processor.chat_template
    try:
        processor.chat_template = published(own) if isinstance(own, str) else own
        processor.save_pretrained(out)
    finally:
        processor.chat_template = own
    config = read_object(out / "processor_config.json")
    image_processor = config.pop("image_processor", None) or processor.image_processor.to_dict()
    image_processor["image_processor_type"] = image_processor["image_processor_type"].removesuffix("Pil")
    write_json(out / "processor_config.json", config, sort_keys=True)
    write_json(out / "preprocessor_config.json", image_processor, sort_keys=True)

    tokenizer = read_object(out / "tokenizer_config.json")
    # The class that takes ``tokenizer.json`` unchanged in both versions; others may rebuild it.
    tokenizer["tokenizer_class"] = "PreTrainedTokenizerFast"
    # batches of other programs: answers begin right after the prompts
    tokenizer["padding_side"] = "left"
    tokenizer["model_input_names"] = list(processor.tokenizer.model_input_names)
    for key in ("backend", "is_local", "local_files_only", "name_or_path", "model_specific_special_tokens"):
        tokenizer.pop(key, None)
    extra = tokenizer.pop("extra_special_tokens", None)
    if isinstance(extra, list) and extra:
        tokenizer["additional_special_tokens"] = extra
    write_json(out / "tokenizer_config.json", tokenizer, sort_keys=True)


def _model_class(path: Path) -> type[LlavaForConditionalGeneration]:
    """The class of a checkpoint directory; ArtifactError for an unknown one."""
    for name in ("config.json", WEIGHTS):
        if not (path / name).is_file() and not (path / f"{name}.index.json").is_file():
            raise ArtifactError(f"{path}: not a checkpoint: {name} is missing")
    kind = read_object(path / "config.json").get("model_type")
    if not isinstance(kind, str) or kind not in _CLASSES:
        raise ArtifactError(f"{path}: holds a '{kind}' model, expected one of {sorted(_CLASSES)}")
    return _CLASSES[kind]
