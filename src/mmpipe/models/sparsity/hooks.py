"""Connecting predictors with a stock language model, by hooks: its own forward stays as it is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from mmpipe.errors import ConfigError
from mmpipe.models.sparsity import attention
from mmpipe.models.sparsity.cache import adopt, slots_of
from mmpipe.models.sparsity.context import KEYWORD, PruningPass, Setting
from mmpipe.models.sparsity.sparsifier import Sparsifier
from mmpipe.models.sparsity.spec import SparsitySettings

FAMILIES = ("llama", "mistral", "mixtral", "phi3", "qwen2", "qwen2_moe", "qwen3")
"""Language models whose layers take mask, positions and rotations as arguments; those the tests cover."""

PROMPT = "sparse_prompt"

HookResult = tuple[tuple[Any, ...], dict[str, Any]]


def sparsify(model: Any, settings: SparsitySettings, *, seed: int = 0) -> Sparsifier:
    """Give a LLaVA model fresh predictors, a pure function of ``seed``, in place; returns them.

    Raises ConfigError for a family that cannot be wrapped, a layer that does not exist, or a model that has predictors.
    """
    sparsifier = attach(model, settings)
    sparsifier.reset_parameters(seed)
    return sparsifier


def attach(model: Any, settings: SparsitySettings) -> Sparsifier:
    """Give a LLaVA model predictors whose values are yet to be set."""
    text = model.model.language_model
    sparsifier = wrap(text, settings, model.config.image_seq_length)
    like = text.get_input_embeddings().weight
    sparsifier.to(device=like.device, dtype=like.dtype).train(text.training)
    model.model.register_forward_pre_hook(see_images, with_kwargs=True)
    return sparsifier


def wrap(text: nn.Module, settings: SparsitySettings, image_tokens: int) -> Sparsifier:
    """Put predictors on a text model, in place; their values are what PyTorch draws."""
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
            f"sparse_layer: {first}: the language model has the layers 0 to {layers - 1}; layers from 1 on can be sparse"
        )
    sparsifier = Sparsifier(config.hidden_size, settings, image_tokens)
    text.sparsifier = sparsifier
    text.register_forward_pre_hook(begin, with_kwargs=True)
    text.register_forward_hook(finish, with_kwargs=True)
    for index, layer in enumerate(text.layers):  # type: ignore[arg-type]
        layer.register_forward_pre_hook(follow if index >= first else discard, with_kwargs=True)
        if index >= first:
            layer.self_attn.register_forward_pre_hook(attention.choose, with_kwargs=True)
            layer.self_attn.register_forward_hook(attention.restore, always_call=True)
    return sparsifier


def of_model(model: Any) -> Sparsifier | None:
    """The predictors of a LLaVA model, if it has any."""
    return getattr(model.model.language_model, "sparsifier", None)


def of_prompt(model: Any) -> dict[str, Any]:
    """Arguments of a forward pass over a prompt or a piece of it, which may be as short as a generated token.

    Nothing for a model that keeps everything.
    """
    return {} if of_model(model) is None else {PROMPT: True}


def shares_prompts(model: Any) -> bool:
    """Whether prompts that begin alike may share that part of the cache.

    Not with a predictor for questions, which always keeps the last token of what it is given.
    """
    sparsifier = of_model(model)
    return sparsifier is None or sparsifier.instruct_score_predictor is None


@contextmanager
def whole(model: Any) -> Iterator[None]:
    """The dense model behind a sparsified one, for a while."""
    sparsifier = of_model(model)
    if sparsifier is None:
        yield
        return
    before, sparsifier.enabled = sparsifier.enabled, False
    try:
        yield
    finally:
        sparsifier.enabled = before


def set_keep_rate(model: Any, rate: float | None, where: str) -> None:
    """Let a sparsified model keep another share of its images than it was trained for; None keeps all of everything.

    Raises ConfigError, opened by ``where``, for a model without predictors or a rate outside (0, 1].
    """
    sparsifier = of_model(model)
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
    """``model`` with another keep rate for a while, as :func:`set_keep_rate` sets it."""
    sparsifier: Any = of_model(model)
    before = sparsifier and (sparsifier.settings, sparsifier.enabled)
    set_keep_rate(model, rate, "keep rate")
    try:
        yield
    finally:
        sparsifier.settings, sparsifier.enabled = before


# ---- hooks, in the order in which they run


def see_images(body: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> HookResult:
    """Pre-hook of the vision-language model: in evaluation, tell the text model where images are."""
    prompt = kwargs.pop(PROMPT, None)
    ids: Tensor | None = kwargs.get("input_ids")
    if KEYWORD not in kwargs and ids is not None and not body.training and body.language_model.sparsifier.prunes:
        kwargs = kwargs | {KEYWORD: PruningPass(ids == body.config.image_token_id, prompt)}
    return args, kwargs


def begin(text: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> HookResult:
    """Pre-hook of the text model: complete a pass, and have its cache pruned."""
    current = kwargs.get(KEYWORD)
    if current is None:
        if slots_of(kwargs.get("past_key_values")) is not None:
            raise ConfigError(
                "a pruned cache was given to a call that prunes nothing; give it input_ids, in evaluation"
            )
        return args, kwargs
    tokens = next(x for x in (kwargs.get("inputs_embeds"), kwargs.get("input_ids"), *args) if x is not None)
    rows, length = tokens.shape[:2]
    mask = kwargs.get("attention_mask")
    if mask is not None and mask.ndim != 2:
        raise ConfigError("a sparsified model takes attention masks of two dimensions only: rows and tokens")
    cache = kwargs.get("past_key_values")
    if mask is None:
        mask = tokens.new_ones(rows, length + (cache.get_seq_length() if cache is not None else 0), dtype=torch.long)
    setting = Setting(text.sparsifier, text.config, mask[:, -length:].bool().to(tokens.device), mask.sum(1))
    if isinstance(current, PruningPass) and _uses_cache(text, kwargs):
        cache = DynamicCache(config=text.config) if cache is None else cache
        current.slots = slots_of(cache) or adopt(
            cache, rows, tokens.device, text.sparsifier.settings.sparse_layer, len(text.layers)
        )
        kwargs = kwargs | {"past_key_values": cache}
    return args, kwargs | {KEYWORD: (current, setting)}


def discard(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> HookResult:
    """Pre-hook of the layers before the sparse one: the pass is none of their business."""
    return args, {key: value for key, value in kwargs.items() if key != KEYWORD}


def follow(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> HookResult:
    """Pre-hook of the other layers: the first of them decides, all work on what is kept."""
    kwargs = dict(kwargs)
    current, setting = kwargs.pop(KEYWORD, (None, None))
    if current is None:
        return args, kwargs
    index = layer.self_attn.layer_idx
    if index == setting.sparsifier.settings.sparse_layer:
        args = (current.decide(setting, args[0], kwargs), *args[1:])
        if isinstance(current, PruningPass) and setting.sparsifier.record is not None:
            setting.sparsifier.record.note(current, setting)
    return args, current.arguments(setting, index, kwargs)


def finish(text: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """Hook of the text model: hidden states at the places they had."""
    current, _ = kwargs.get(KEYWORD) or (None, None)
    if current is not None:
        output.last_hidden_state = current.finish(output.last_hidden_state)
    return output


def _uses_cache(text: Any, kwargs: dict[str, Any]) -> bool:
    wanted = kwargs.get("use_cache")
    return bool(text.config.use_cache if wanted is None else wanted)
