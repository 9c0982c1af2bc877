"""Building the vision-language model from its backbones, and opening published checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerBase,
)

from mmpipe.artifacts import manifest
from mmpipe.data.images import image_processor
from mmpipe.data.templates import get_template
from mmpipe.errors import ArtifactError
from mmpipe.models import projector
from mmpipe.models.export import load_checkpoint
from mmpipe.stages.base import VisionLanguage

IMAGE_TOKEN = "<image>"
Aspect = Literal["pad", "square"]


def build(
    backbones: Mapping[str, Path], settings: VisionLanguage, *, template: str, image_aspect: Aspect, seed: int
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """Join a vision tower and a language model with a fresh projector.

    ``backbones`` gives the checkpoint directories of ``vision`` and ``language``. The projector is initialised from
    ``seed`` with PyTorch's default for linear layers, as LLaVA does. Raises ArtifactError when a backbone does not load.
    """
    vision_dir, language_dir = backbones["vision"], backbones["language"]
    tokenizer = _tokenizer(language_dir)
    language: Any = AutoModelForCausalLM.from_pretrained(language_dir, dtype=torch.float32)
    image_id: Any = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    if image_id >= language.get_input_embeddings().weight.shape[0]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            # whole multiples of 64 suit GPUs; a row more than the tokens need costs nothing
            language.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=64)
    vision: Any = _vision_tower(vision_dir)
    config = LlavaConfig(
        vision_config=vision.config,
        text_config=language.config,
        image_token_index=image_id,
        projector_hidden_act="gelu",
        vision_feature_select_strategy="default" if settings.feature_select == "patch" else "full",
        vision_feature_layer=settings.feature_layer,
        multimodal_projector_bias=True,
        image_seq_length=_picture_tokens(vision.config, settings.feature_select),
        tie_word_embeddings=language.config.tie_word_embeddings,
    )
    model = _assemble(config, vision, language, seed)
    processor = make_processor(tokenizer, vision_dir, config, template=template, image_aspect=image_aspect)
    model.generation_config = _greedy(language.generation_config, tokenizer)
    return model, processor


def _assemble(
    config: LlavaConfig, vision: nn.Module, language: nn.Module, seed: int
) -> LlavaForConditionalGeneration:
    """Put loaded parts into an empty shell, so that nothing large is initialised in vain."""
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config)
    model.model.vision_tower = vision
    model.model.language_model = language.model
    model.lm_head = language.lm_head
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for layer in (model.model.multi_modal_projector.linear_1, model.model.multi_modal_projector.linear_2):
            layer.to_empty(device="cpu").reset_parameters()
    model.tie_weights()
    return model.eval()


def _vision_tower(path: Path) -> nn.Module:
    """The vision half of a CLIP or SigLIP checkpoint, or any vision model ``AutoModel`` opens."""
    config = AutoConfig.from_pretrained(path)
    config = getattr(config, "vision_config", config)
    tower, info = AutoModel.from_pretrained(
        path, config=config, dtype=torch.float32, output_loading_info=True
    )
    if info["missing_keys"]:
        raise ArtifactError(
            f"{path}: not a complete {config.model_type}; missing: {sorted(info['missing_keys'])[:5]}"
        )
    return tower


def _picture_tokens(config: Any, select: str) -> int:
    patches = (config.image_size // config.patch_size) ** 2
    has_class_token = config.model_type == "clip_vision_model"
    return patches + (1 if has_class_token and select == "full" else 0)


def _tokenizer(path: Path) -> PreTrainedTokenizerBase:
    tokenizer = AutoTokenizer.from_pretrained(path)
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


def load(directory: Path, dtype: torch.dtype = torch.float32) -> tuple[Any, Any, dict[str, Any]]:
    """Open a published checkpoint of either kind: ``(model, processor, manifest)``.

    A projector alone is put on the backbones its manifest names. Raises ArtifactError when files are missing or do not fit.
    """
    card = manifest.read(directory)
    if card["kind"] != "projector":
        model, processor = load_checkpoint(directory, dtype)
        _check_tokenizer(directory, model, processor.tokenizer)
        return model, processor, card
    facts = card["checkpoint"]
    model, processor = build(
        {role: Path(path) for role, path in facts["backbones"].items()},
        VisionLanguage(**card["spec"]["model"]),
        template=facts["template"],
        image_aspect=facts["image_aspect"],
        seed=0,
    )
    projector.load(model, directory / projector.FILE)
    return model.to(dtype=dtype), processor, card  # type: ignore[call-arg]


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
