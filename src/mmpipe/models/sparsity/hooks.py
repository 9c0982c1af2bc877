"""Hooks that connect predictors with a stock language model; its own ``forward`` is unchanged."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from mmpipe.errors import ConfigError
from mmpipe.models.forward_context import Args, HookResult, Kwargs, hand_over, input_of
from mmpipe.models.sparsity import attention
from mmpipe.models.sparsity.cache import convert_cache, slots_of
from mmpipe.models.sparsity.context import KEYWORD, PruningPass, SparsityState
from mmpipe.models.sparsity.sparsifier import Sparsifier
from mmpipe.models.sparsity.spec import SparsitySettings

FAMILIES = ("llama", "mistral", "mixtral", "phi3", "qwen2", "qwen2_moe", "qwen3")
"""Language models whose layers take mask, positions and rotations as arguments; all are tested."""

PROMPT = "sparse_prompt"


def sparsify(model: Any, settings: SparsitySettings, *, seed: int = 0) -> Sparsifier:
    """Add fresh predictors, a pure function of ``seed``, to a LLaVA model, in place; returns them.

    Raises ConfigError for a family that cannot be wrapped, a layer that does not exist, or a model that has predictors.
    """
    sparsifier = attach(model, settings)
    sparsifier.reset_parameters(seed)
    return sparsifier


def attach(model: Any, settings: SparsitySettings) -> Sparsifier:
    """Add uninitialised predictors to a LLaVA model."""
    text = model.model.language_model
    sparsifier = wrap(text, settings, model.config.image_seq_length)
    like = text.get_input_embeddings().weight
    sparsifier.to(device=like.device, dtype=like.dtype).train(text.training)
    model.model.register_forward_pre_hook(see_images, with_kwargs=True)
    return sparsifier


def wrap(text: nn.Module, settings: SparsitySettings, image_tokens: int) -> Sparsifier:
    """Add predictors to a text model, in place, with PyTorch's default initialisation."""
    config: Any = text.config
    if config.model_type not in FAMILIES:
        raise ConfigError(
            f"a language model of the family '{config.model_type}' cannot be sparsified; those that can: "
            f"{', '.join(FAMILIES)}"
        )
    if hasattr(text, "sparsifier"):
        raise ConfigError("the model has predictors already; start from one that was not sparsified")
    first, layers = settings.sparse_layer, len(text.layers)  # type: ignore[arg-type]
    if first >= layers:
        raise ConfigError(
            f"sparse_layer: {first}: the language model has the layers 0 to {layers - 1}; layers from 1 on can be "
            "sparse"
        )
    sparsifier = Sparsifier(config.hidden_size, settings, image_tokens)
    text.sparsifier = sparsifier
    decoder: Any = text.layers
    hand_over(text, KEYWORD, begin, ((layer, follow if i >= first else None) for i, layer in enumerate(decoder)))
    text.register_forward_hook(finish, with_kwargs=True)
    for layer in decoder[first:]:
        layer.self_attn.register_forward_pre_hook(attention.choose, with_kwargs=True)
        layer.self_attn.register_forward_hook(attention.restore, always_call=True)
    return sparsifier


def get_sparsifier(model: Any) -> Sparsifier | None:
    """The predictors of a LLaVA model, if it has any."""
    return getattr(model.model.language_model, "sparsifier", None)


def prompt_retention(model: Any) -> dict[str, Any]:
    """Arguments of a forward pass over a prompt or a piece of it, even of one token.

    Nothing for a model without predictors.
    """
    return {} if get_sparsifier(model) is None else {PROMPT: True}


def shares_prompts(model: Any) -> bool:
    """Whether prompts with a common prefix may share its cache.

    False with a predictor for questions, which always retains the last token of its input.
    """
    sparsifier = get_sparsifier(model)
    return sparsifier is None or sparsifier.instruct_score_predictor is None


def set_keep_rate(model: Any, rate: float | None, where: str) -> None:
    """Set the share of image tokens that a sparsified model retains; None retains all tokens.

    Raises ConfigError, opened by ``where``, for a model without predictors or a rate outside (0, 1].
    """
    sparsifier = get_sparsifier(model)
    if sparsifier is None:
        raise ConfigError(f"{where}: the checkpoint has no predictors; only a sparsified one can be told what to keep")
    if rate is None:
        sparsifier.enabled = False
        return
    if sparsifier.image_score_predictor is None:
        raise ConfigError(f"{where}: the checkpoint has no predictor for images, so they have no keep rate")
    if not 0 < rate <= 1:
        raise ConfigError(f"{where}: a keep rate is above 0 and at most 1, not {rate:g}")
    sparsifier.settings = sparsifier.settings.model_copy(update={"vision_keep_rate": rate})


@contextmanager
def keeping(model: Any, rate: float | None) -> Iterator[None]:
    """Context manager: ``model`` with another keep rate, as set by :func:`set_keep_rate`."""
    sparsifier: Any = get_sparsifier(model)
    before = sparsifier and (sparsifier.settings, sparsifier.enabled)
    set_keep_rate(model, rate, "keep rate")
    try:
        yield
    finally:
        sparsifier.settings, sparsifier.enabled = before


def without_sparsity(model: Any) -> AbstractContextManager[None]:
    """Context manager: a sparsified model computes as its dense model; other models are unchanged."""
    return nullcontext() if get_sparsifier(model) is None else keeping(model, None)


# ---- hooks, in the order in which they run


def see_images(body: Any, args: Args, kwargs: Kwargs) -> HookResult:
    """Pre-hook of the vision-language model: in evaluation, pass the image positions to the text model."""
    prompt = kwargs.pop(PROMPT, None)
    ids: Tensor | None = kwargs.get("input_ids")
    if KEYWORD not in kwargs and ids is not None and not body.training and body.language_model.sparsifier.prunes:
        kwargs = kwargs | {KEYWORD: PruningPass(ids == body.config.image_token_id, prompt)}
    return args, kwargs


def begin(text: Any, args: Args, kwargs: Kwargs) -> HookResult:
    """Pre-hook of the text model: complete the context, and prepare its cache for pruning."""
    current, cache = kwargs.get(KEYWORD), kwargs.get("past_key_values")
    if current is None:
        if slots_of(cache) is not None:
            raise ConfigError(
                "a pruned cache was given to a call that prunes nothing; give it input_ids, in evaluation"
            )
        return args, kwargs
    tokens, mask = input_of(args, kwargs), kwargs.get("attention_mask")
    rows, length = tokens.shape[:2]
    if mask is None:
        mask = tokens.new_ones(rows, length + (cache.get_seq_length() if cache is not None else 0), dtype=torch.long)
    if mask.ndim != 2:
        raise ConfigError("a sparsified model takes attention masks of two dimensions only: rows and tokens")
    state = SparsityState(text.sparsifier, text.config, mask[:, -length:].bool().to(tokens.device), mask.sum(1))
    wanted = kwargs.get("use_cache")
    if isinstance(current, PruningPass) and (text.config.use_cache if wanted is None else wanted):
        cache = DynamicCache(config=text.config) if cache is None else cache
        current.slots = slots_of(cache) or convert_cache(
            cache, rows, tokens.device, text.sparsifier.settings.sparse_layer, len(text.layers)
        )
        kwargs = kwargs | {"past_key_values": cache}
    return args, kwargs | {KEYWORD: (current, state)}


def follow(layer: Any, context: Any, args: Args, kwargs: Kwargs) -> HookResult:
    """Receiver of the layers from the sparse one on: the first decides, all compute the retained tokens."""
    if context is None:
        return args, kwargs
    current, state = context
    index = layer.self_attn.layer_idx
    if index == state.sparsifier.settings.sparse_layer:
        args = (current.decide(state, args[0], kwargs), *args[1:])
        if isinstance(current, PruningPass) and state.sparsifier.record is not None:
            state.sparsifier.record.passes.append(current.decision(state))
    return args, current.arguments(state, index, kwargs)


def finish(text: nn.Module, args: Args, kwargs: Kwargs, output: Any) -> Any:
    """Hook of the text model: hidden states at their original positions."""
    current, _ = kwargs.get(KEYWORD) or (None, None)
    if current is not None:
        output.last_hidden_state = current.finish(output.last_hidden_state)
    return output
