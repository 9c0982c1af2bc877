"""The vision-language model: a vision tower, a projector and a language model joined into a stock LLaVA.

Training runs :func:`hidden_states` (steps 1 to 4; the losses apply the head), everything else the forward pass of
transformers' ``LlavaForConditionalGeneration``. B rows of L tokens, P images of N tokens
each, widths E (tower) and D (language model), V tokens in the vocabulary:

1. ``pixel_values [P, 3, H, W]`` go through ``model.vision_tower``; its hidden state ``vision_feature_layer``, without
   the class token, is ``[P, N, E]`` (``S * E`` at S scales: :mod:`mmpipe.models.vision_tower`).
2. ``model.multi_modal_projector`` (linear, GELU, linear) maps it to ``[P, N, D]``.
3. ``input_ids [B, L]`` hold N tokens ``<image>`` for every image; their embeddings are replaced by the
   projected features.
4. ``model.language_model`` maps the embeddings to hidden states ``[B, L, D]``. In any of the three parts feed-forward
   networks can be experts (:mod:`mmpipe.models.moe`); decoder layers can drop tokens (:mod:`mmpipe.models.sparsity`).
5. ``lm_head`` gives logits ``[B, L, V]``.

The rest of this module joins the parts: configuration, weights, tokenizer and image processor.
"""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    GenerationConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerBase,
)

from mmpipe.artifacts.files import read_object
from mmpipe.data.images import Aspect, image_processor
from mmpipe.data.labels import single_token
from mmpipe.data.templates import get_template
from mmpipe.errors import ArtifactError, ConfigError, DataError, first_of
from mmpipe.models.moe.context import nothing_counts
from mmpipe.models.vision_tower import enable_multi_scale
from mmpipe.pretrained import from_config, load_pretrained

if TYPE_CHECKING:  # reads Arrow, which chat does without
    from mmpipe.data.dataset import Batch

IMAGE_TOKEN = "<image>"


def image_features(model: Any, batch: Batch) -> Tensor:
    """The projected features of all images of a batch, ``[image tokens, width]``, in order.

    The vision tower and the projector run for every batch (one without images has an image of zeros): all devices must
    use the same parameters in every step, or their gradient reduction hangs.
    """
    with nothing_counts() if batch["dummy_image"] else nullcontext():
        output = model.model.get_image_features(pixel_values=batch["pixel_values"], return_dict=True)
    return torch.cat(list(output.pooler_output))


def hidden_states(model: Any, batch: Batch, features_FD: Tensor | None = None, /, **further: Any) -> Tensor:
    """Run the vision-language model without its head; returns hidden states ``[rows, length, width]``.

    ``features_FD`` are the batch's :func:`image_features`, if computed already; ``further`` arguments reach the decoder
    layers. A batch of preference pairs has each image once and two rows for it: the features are repeated as a whole.
    Raises DataError when the image tokens are not as many as the features.
    """
    body = model.model
    if features_FD is None:
        features_FD = image_features(model, batch)
    embeddings_BLD = body.get_input_embeddings()(batch["input_ids"])
    if batch["dummy_image"]:
        embeddings_BLD = embeddings_BLD + 0.0 * features_FD.sum()
    else:
        mask_BL1 = (batch["input_ids"] == model.config.image_token_id).unsqueeze(-1)
        rows = len(batch["input_ids"]) // len(batch["ids"])
        if (tokens := int(mask_BL1.sum())) != rows * len(features_FD):
            raise DataError(
                f"records {first_of(batch['ids'])}: {tokens} image tokens, and {rows} x {len(features_FD)} image features; "
                "tokenise the mixture again for this model"
            )
        embeddings_BLD = embeddings_BLD.masked_scatter(mask_BL1, features_FD.to(embeddings_BLD.dtype).repeat(rows, 1))
    return body(
        inputs_embeds=embeddings_BLD, attention_mask=batch["attention_mask"], use_cache=False, **further
    ).last_hidden_state


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
        image_seq_length=image_tokens(vision, feature_select),
        tie_word_embeddings=text.tie_word_embeddings,
    )


def resize_embeddings(model: Any, tokenizer: PreTrainedTokenizerBase, seed: int) -> None:
    """Resize the embeddings to a row for every token of ``tokenizer``; new rows are drawn from ``seed``."""
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) <= rows:
        return
    # for readers without our tokens: the model's original number of rows
    model.config.get_text_config().original_vocab_size = rows
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        # multiples of 64 suit GPUs; surplus rows cost nothing
        model.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=64)


def assemble(
    config: LlavaConfig, vision: nn.Module, language: nn.Module, seed: int, scales: tuple[int, ...]
) -> LlavaForConditionalGeneration:
    """Join loaded parts in an empty model, without initialising weights that are replaced anyway."""
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config)
    model.model.vision_tower = vision
    model.model.language_model = language.model
    model.lm_head = language.lm_head
    if scales != (1,):
        enable_multi_scale(model, scales)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for layer in (model.model.multi_modal_projector.linear_1, model.model.multi_modal_projector.linear_2):
            layer.to_empty(device="cpu").reset_parameters()
    model.tie_weights()
    return model.eval()


def vision_tower(path: Path, dtype: torch.dtype | Literal["auto"] = torch.float32) -> nn.Module:
    """The vision half of a CLIP or SigLIP checkpoint, or any vision model ``AutoModel`` opens."""
    config = load_pretrained(AutoConfig, path)
    config = getattr(config, "vision_config", config)
    tower, info = load_pretrained(AutoModel, path, config=config, dtype=dtype, output_loading_info=True)
    if info["missing_keys"]:
        raise ArtifactError(f"{path}: not a complete {config.model_type}; missing: {sorted(info['missing_keys'])[:5]}")
    return tower


def image_seq_length(path: Path, config: Any) -> int:
    """Tokens per image of a whole checkpoint. transformers assumes 576 where its ``config.json`` does not say it.

    Raises ArtifactError when it says another number than the tower has.
    """
    written = read_object(path / "config.json").get("image_seq_length")
    strategy = config.vision_feature_select_strategy
    right = image_tokens(config.vision_config, "patch" if strategy == "default" else "full")
    if written not in (None, right):
        raise ArtifactError(
            f"{path}/config.json: image_seq_length is {written}, but its tower has {right} tokens an image"
        )
    return right


def image_tokens(config: Any, select: str) -> int:
    """Tokens per image of a tower. ConfigError where dropping the class token would drop a patch of the image."""
    patches = (config.image_size // config.patch_size) ** 2
    others = _other_tokens(config)
    if select == "patch" and not others:
        raise ConfigError(
            f"feature_select 'patch' drops the class token, and a tower of the kind '{config.model_type}' has none: the "
            "first piece of every image would be lost. Say 'feature_select: full' under 'model' of the recipe"
        )
    return patches + others - (select == "patch")


def _other_tokens(config: Any) -> int:
    """Tokens of a tower's output besides the patches, the class token first: registers and the like stay. A tower whose
    kind is not known here is run without weights and numbers to count them."""
    known = {"clip_vision_model": 1, "siglip_vision_model": 0}
    if config.model_type in known:
        return known[config.model_type]
    with torch.device("meta"), torch.no_grad():
        pixels = torch.zeros(1, getattr(config, "num_channels", 3), config.image_size, config.image_size)
        tokens: int = from_config(AutoModel, config)(pixels).last_hidden_state.shape[1]
    return tokens - (config.image_size // config.patch_size) ** 2


def with_image_token(tokenizer: PreTrainedTokenizerBase, path: Path) -> PreTrainedTokenizerBase:
    """A backbone's tokenizer, ready for prompts with images. ArtifactError when it has no end-of-text token."""
    if tokenizer.eos_token is None:
        raise ArtifactError(
            f"{path}: the tokenizer has no end-of-text token; set eos_token in its tokenizer_config.json"
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if IMAGE_TOKEN not in tokenizer.get_vocab():
        tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]}, replace_extra_special_tokens=False)
    tokenizer.padding_side = "left"
    return tokenizer


def make_processor(
    tokenizer: PreTrainedTokenizerBase, vision_dir: Path, config: Any, *, template: str, image_aspect: Aspect
) -> LlavaProcessor:
    """The processor that is stored with a checkpoint: tokenizer, image preprocessing, chat template."""
    return LlavaProcessor(
        image_processor=image_processor(vision_dir, image_aspect),
        tokenizer=tokenizer,
        patch_size=config.vision_config.patch_size,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        chat_template=tokenizer.chat_template if template == "tokenizer" else get_template(template).jinja(),
        image_token=IMAGE_TOKEN,
        num_additional_image_tokens=_other_tokens(config.vision_config),
    )


def greedy_generation(
    base: GenerationConfig | None, tokenizer: PreTrainedTokenizerBase, template: str
) -> GenerationConfig:
    """Greedy decoding by default; sampling settings of the backbone would contradict it and make saving fail. The token
    that ends the answers of ``template`` is an end token beside the backbone's own: ``generate`` of any program stops.
    """
    eos: Any = base.eos_token_id if base is not None and base.eos_token_id is not None else tokenizer.eos_token_id
    chosen = get_template(template, tokenizer)
    stop = single_token(tokenizer, chosen.stop) if chosen.stop_is_token else None
    known = eos if isinstance(eos, list) else [eos]
    return GenerationConfig(
        do_sample=False,
        eos_token_id=eos if stop is None or stop in known else [*known, stop],
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
    )


def max_positions(config: Any) -> int | None:
    """The tokens for which a language model has positions, by its configuration; None without a limit."""
    limit: int | None = getattr(config, "max_position_embeddings", None)
    rope = getattr(config, "rope_parameters", None) or {}
    kind, factor = rope.get("rope_type", "default"), float(rope.get("factor") or 1)
    if limit is None or kind == "dynamic":
        return None
    if kind == "linear":  # configurations state the length before scaling
        return int(limit * factor)
    return max(limit, int((rope.get("original_max_position_embeddings") or 0) * factor))
