"""Building the vision-language model from its backbones, and opening published checkpoints."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoTokenizer,
    GenerationConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerBase,
)

from mmpipe.artifacts import manifest
from mmpipe.checkpoints.layouts.base import Part
from mmpipe.checkpoints.save import load_checkpoint
from mmpipe.data.images import image_processor
from mmpipe.data.templates import get_template
from mmpipe.errors import ArtifactError, ConfigError
from mmpipe.models import projector
from mmpipe.models.vision_tower import look_at
from mmpipe.stages.base import VisionLanguage

log = logging.getLogger(__name__)

IMAGE_TOKEN = "<image>"
Aspect = Literal["pad", "square"]


def build(
    backbones: Mapping[str, Path],
    settings: VisionLanguage,
    *,
    layouts: Mapping[str, str] = {},
    template: str,
    image_aspect: Aspect,
    seed: int,
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """Join a vision tower and a language model with a fresh projector.

    ``backbones`` gives the checkpoint directories of ``vision`` and ``language``, ``layouts`` how they name their tensors.
    The projector is initialised from ``seed`` with PyTorch's default for linear layers, as LLaVA does. Raises ArtifactError
    when a backbone does not load.
    """
    parts = _parts(backbones, layouts)
    vision_dir, found = backbones["vision"], parts["language"]
    tokenizer = with_image_token(found.layout.tokenizer(found.directory), found.directory)
    language: Any = found.layout.language(found.directory, torch.float32)
    image_id: Any = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    make_room(language, tokenizer, seed)
    vision: Any = vision_tower(vision_dir)
    config = joined_config(
        vision.config,
        language.config,
        image_id=image_id,
        feature_layer=settings.feature_layer,
        feature_select=settings.feature_select,
    )
    model = _assemble(config, vision, language, seed, settings.scales)
    processor = make_processor(tokenizer, vision_dir, config, template=template, image_aspect=image_aspect)
    model.generation_config = _greedy(language.generation_config, tokenizer)
    return model, processor


def joined_config(
    vision: Any, text: Any, *, image_id: int, feature_layer: int, feature_select: Literal["patch", "full"]
) -> LlavaConfig:
    """The configuration of a tower and a language model joined by LLaVA-1.5's projector."""
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=image_id,
        projector_hidden_act="gelu",
        vision_feature_select_strategy="default" if feature_select == "patch" else "full",
        vision_feature_layer=feature_layer,
        multimodal_projector_bias=True,
        image_seq_length=_picture_tokens(vision, feature_select),
        tie_word_embeddings=text.tie_word_embeddings,
    )


def bring_in(
    backbones: Mapping[str, Path],
    settings: VisionLanguage,
    *,
    layouts: Mapping[str, str] = {},
    template: str,
    image_aspect: Aspect,
    seed: int,
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """Open a whole model from elsewhere: ``backbones["checkpoint"]``, on the other backbones where it refers to them.

    Tensors keep the precision of the files; nothing is drawn from ``seed`` but rows of the vocabulary the model has no
    use for. Raises ArtifactError when files are missing, left over, or do not fit.
    """
    parts = _parts(backbones, layouts)
    source = parts.pop("checkpoint")
    whole = source.layout.whole(source.directory, parts)
    if whole.image_aspect not in (None, image_aspect):
        log.warning(
            "%s was trained with the pictures' aspect '%s'; the recipe says '%s' (image_aspect of construct)",
            *(source, whole.image_aspect, image_aspect),
        )
    tokenizer = with_image_token(whole.tokenizer, source.directory)
    make_room(whole.model, tokenizer, seed)
    _check_tokenizer(source.directory, whole.model, tokenizer)
    processor = make_processor(
        tokenizer, whole.pictures, whole.model.config, template=template, image_aspect=image_aspect
    )
    whole.model.generation_config = _greedy(whole.model.generation_config, tokenizer)
    return whole.model, processor


def _parts(backbones: Mapping[str, Path], layouts: Mapping[str, str]) -> dict[str, Part]:
    return {
        role: Part(directory, layouts.get(layouts.get(role, "stock")))
        for role, directory in backbones.items()
    }


def make_room(model: Any, tokenizer: PreTrainedTokenizerBase, seed: int) -> None:
    """Give the embeddings a row for every token of ``tokenizer``, if they lack one; new rows are drawn from ``seed``."""
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) <= rows:
        return
    # what readers without our tokens need: the number of rows the model came with
    model.config.get_text_config().original_vocab_size = rows
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        # whole multiples of 64 suit GPUs; a row more than the tokens need costs nothing
        model.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=64)


def text_side(
    directories: Mapping[str, Path], settings: VisionLanguage, layouts: Mapping[str, str] = {}
) -> tuple[PreTrainedTokenizerBase, int]:
    """The tokenizer of a model, and how many tokens it gives a picture; no weights are read.

    ``directories`` gives a published ``checkpoint``, or the ``vision`` and ``language`` backbones it is built from.
    """
    if "checkpoint" in directories:
        directory = directories["checkpoint"]
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
        return tokenizer, AutoConfig.from_pretrained(directory, local_files_only=True).image_seq_length
    language = _parts(directories, layouts)["language"]
    config = AutoConfig.from_pretrained(directories["vision"])
    tokens = _picture_tokens(getattr(config, "vision_config", config), settings.feature_select)
    return with_image_token(language.layout.tokenizer(language.directory), language.directory), tokens


def _assemble(
    config: LlavaConfig, vision: nn.Module, language: nn.Module, seed: int, scales: tuple[int, ...]
) -> LlavaForConditionalGeneration:
    """Put loaded parts into an empty shell, so that nothing large is initialised in vain."""
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config)
    model.model.vision_tower = vision
    model.model.language_model = language.model
    model.lm_head = language.lm_head
    if scales != (1,):
        look_at(model, scales)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for layer in (model.model.multi_modal_projector.linear_1, model.model.multi_modal_projector.linear_2):
            layer.to_empty(device="cpu").reset_parameters()
    model.tie_weights()
    return model.eval()


def vision_tower(path: Path, dtype: torch.dtype | Literal["auto"] = torch.float32) -> nn.Module:
    """The vision half of a CLIP or SigLIP checkpoint, or any vision model ``AutoModel`` opens."""
    config = AutoConfig.from_pretrained(path)
    config = getattr(config, "vision_config", config)
    tower, info = AutoModel.from_pretrained(path, config=config, dtype=dtype, output_loading_info=True)
    if info["missing_keys"]:
        raise ArtifactError(
            f"{path}: not a complete {config.model_type}; missing: {sorted(info['missing_keys'])[:5]}"
        )
    return tower


def _picture_tokens(config: Any, select: str) -> int:
    """Tokens a picture of a tower. ConfigError where dropping the class token would drop a piece of the picture."""
    patches = (config.image_size // config.patch_size) ** 2
    has_class_token = config.model_type == "clip_vision_model"
    if select == "patch" and not has_class_token:
        raise ConfigError(
            f"feature_select 'patch' drops the class token, and a tower of the kind '{config.model_type}' has none: the first "
            "piece of every picture would be lost. Say 'feature_select: full' under 'model' of the recipe"
        )
    return patches + (1 if has_class_token and select == "full" else 0)


def with_image_token(tokenizer: PreTrainedTokenizerBase, path: Path) -> PreTrainedTokenizerBase:
    """A backbone's tokenizer, ready for prompts with pictures. ArtifactError when it cannot end a text."""
    if tokenizer.eos_token is None:
        raise ArtifactError(
            f"{path}: the tokenizer has no end-of-text token; set eos_token in its tokenizer_config.json"
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if IMAGE_TOKEN not in tokenizer.get_vocab():
        tokenizer.add_special_tokens(
            {"additional_special_tokens": [IMAGE_TOKEN]}, replace_extra_special_tokens=False
        )
    tokenizer.padding_side = "left"
    return tokenizer


def make_processor(
    tokenizer: PreTrainedTokenizerBase,
    vision_dir: Path,
    config: Any,
    *,
    template: str,
    image_aspect: Aspect,
) -> LlavaProcessor:
    """The processor that is stored with a checkpoint: tokenizer, picture preprocessing, chat template."""
    class_token = 1 if config.vision_config.model_type == "clip_vision_model" else 0
    return LlavaProcessor(
        image_processor=image_processor(vision_dir, image_aspect),
        tokenizer=tokenizer,
        patch_size=config.vision_config.patch_size,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        chat_template=tokenizer.chat_template if template == "tokenizer" else get_template(template).jinja(),
        image_token=IMAGE_TOKEN,
        num_additional_image_tokens=class_token,
    )


def _greedy(base: GenerationConfig | None, tokenizer: PreTrainedTokenizerBase) -> GenerationConfig:
    """Greedy decoding by default; sampling settings of the backbone would contradict it and stop the saving."""
    eos = base.eos_token_id if base is not None and base.eos_token_id is not None else tokenizer.eos_token_id
    return GenerationConfig(
        do_sample=False,
        eos_token_id=eos,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
    )


def load(
    directory: Path, dtype: torch.dtype = torch.float32, **placement: Any
) -> tuple[Any, Any, dict[str, Any]]:
    """Open a published checkpoint of either kind: ``(model, processor, manifest)``.

    A projector alone is put on the checkpoint or the backbones its manifest names. ``placement`` is what
    ``from_pretrained`` takes to put a model elsewhere (``device_map``, ``quantization_config``). Raises ArtifactError when
    files are missing or do not fit.
    """
    card = manifest.read(directory)
    if card["kind"] != "projector":
        model, processor = load_checkpoint(directory, dtype, **placement)
        _check_tokenizer(directory, model, processor.tokenizer)
        return model, processor, card
    if "quantization_config" in placement:
        raise ArtifactError(
            f"{directory}: holds a projector alone, which is put on backbones in full precision; load it without "
            "--load-4bit and --load-8bit, or take a later stage of the recipe"
        )
    facts = card["checkpoint"]
    how = {"template": facts["template"], "image_aspect": facts["image_aspect"]}
    if "base" in facts:
        base = Path(facts["base"])
        model, processor, _ = load(base)
        processor = make_processor(processor.tokenizer, base, model.config, **how)
    else:
        model, processor = build(
            {role: Path(path) for role, path in facts["backbones"].items()},
            VisionLanguage(**card["spec"]["model"]),
            layouts=card["spec"].get("layouts", {}),
            seed=0,
            **how,
        )
    projector.load(model, directory / projector.FILE)
    model = model.to(dtype=dtype)  # type: ignore[call-arg]
    return _placed(model, placement.get("device_map")), processor, card


def _placed(model: Any, device_map: Any) -> Any:
    """A model that was built in main memory, where ``device_map`` wants it."""
    if device_map is None:
        return model
    from accelerate import dispatch_model, infer_auto_device_map

    if device_map == "auto":
        device_map = infer_auto_device_map(model, no_split_module_classes=model._no_split_modules)
    return (
        dispatch_model(model, device_map)
        if len(device_map) > 1
        else model.to(next(iter(device_map.values())))
    )


def pictures_of(directory: Path, card: Mapping[str, Any]) -> Path:
    """The directory that says how pictures are prepared for a published checkpoint with the manifest ``card``."""
    if card["kind"] != "projector":
        return directory
    facts = card["checkpoint"]
    return Path(facts["base"] if "base" in facts else facts["backbones"]["vision"])


def base_of(directory: Path, card: Mapping[str, Any]) -> dict[str, Any]:
    """What a projector trained from a checkpoint is to be put on: statements for its manifest."""
    if card["kind"] != "projector":
        return {"base": directory.as_posix()}
    return {key: card["checkpoint"][key] for key in ("base", "backbones") if key in card["checkpoint"]}


def _check_tokenizer(directory: Path, model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise ArtifactError when the tokenizer beside a checkpoint is not the one it was trained with."""
    image_id = tokenizer.get_vocab().get(IMAGE_TOKEN)
    rows = model.get_input_embeddings().weight.shape[0]
    if image_id != model.config.image_token_id or len(tokenizer) > rows:
        raise ArtifactError(
            f"{directory}: the tokenizer does not belong to this checkpoint: '{IMAGE_TOKEN}' is {image_id}, the model "
            f"expects {model.config.image_token_id}; it has {len(tokenizer)} tokens for {rows} embedding rows. "
            "Put back the tokenizer files the checkpoint was published with"
        )
