"""The vision tower as the language model uses it: multi-scale image features; unused parameters are frozen.

LLaVA projects the output of the tower's last block but one. The modules after it (the last block, the final
normalisation, a pooling head) do not affect the result and get no gradient. A stock checkpoint keeps them, because
every reader of LLaVA checkpoints counts the blocks from the end; here they never train. A tower that no stock class
computes anyway is built without them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutputWithPooling

from mmpipe.errors import ConfigError
from mmpipe.models.moe.context import next_pass

_BEHIND = ("post_layernorm", "head")
"""Modules that CLIP and SigLIP towers apply to the last block's output."""


def blocks(tower: nn.Module) -> nn.ModuleList:
    """The transformer blocks of a tower; ConfigError when it has none where CLIP and SigLIP have them."""
    found = getattr(getattr(tower, "encoder", None), "layers", None)
    if not isinstance(found, nn.ModuleList):
        raise ConfigError(f"a vision tower '{type(tower).__name__}' has no encoder.layers")
    return found


def used_blocks(model: LlavaForConditionalGeneration) -> int:
    """Number of the tower's blocks that the projected features depend on."""
    layers = len(blocks(model.model.vision_tower))
    chosen = model.config.vision_feature_layer
    return max(i % (layers + 1) for i in ([chosen] if isinstance(chosen, int) else chosen))


def freeze_unused(model: LlavaForConditionalGeneration) -> list[str]:
    """Freeze parameters that the projected features do not depend on: they get no gradient, which DDP waits for.

    Returns their names, within the tower, where they were trainable.
    """
    tower: Any = model.model.vision_tower
    try:
        found = blocks(tower)
    except ConfigError:
        return []
    behind = (getattr(tower, name, None) for name in _BEHIND)
    modules = [module for module in (*found[used_blocks(model) :], *behind) if module is not None]
    idle = {id(p) for module in modules for p in module.parameters() if p.requires_grad}
    for module in modules:
        module.requires_grad_(False)
    return [name for name, parameter in tower.named_parameters() if id(parameter) in idle]


def saved_scales(model: LlavaForConditionalGeneration) -> tuple[int, ...] | None:
    """The scales in the model's configuration; None for a stock tower."""
    saved = getattr(model.config, "mmpipe", {}).get("tower")
    return tuple(saved["scales"]) if saved else None


def enable_multi_scale(model: LlavaForConditionalGeneration, scales: Sequence[int]) -> None:
    """Make the tower encode every image at several scales (S2, Shi et al. 2024), in place.

    The tower ends with the projected block. The projector's first layer, when its width changes, is a new one
    without values. The number of image tokens is unchanged. ``(1,)`` only cuts the tower.

    Raises ConfigError when several blocks are projected at once.
    """
    if not isinstance(model.config.vision_feature_layer, int):
        raise ConfigError(f"feature_layer: {model.config.vision_feature_layer}: one block can be projected")
    tower: Any = model.model.vision_tower
    used = used_blocks(model)
    tower.encoder.layers = blocks(tower)[:used]
    for name in _BEHIND:
        if isinstance(getattr(tower, name, None), nn.Module):
            setattr(tower, name, nn.Identity())
    vision_config: Any = model.config.vision_config
    tower.config.num_hidden_layers = vision_config.num_hidden_layers = used
    model.config.vision_feature_layer = -1
    tower.__class__ = _multi_scale(type(tower))
    tower.scales = tuple(scales)
    projector: Any = model.model.multi_modal_projector
    width = tower.config.hidden_size * len(scales)
    if hasattr(projector, "linear_1") and projector.linear_1.in_features != width:
        old = projector.linear_1
        projector.linear_1 = nn.Linear(
            width, old.out_features, bias=old.bias is not None, device=old.weight.device, dtype=old.weight.dtype
        )
    model.config.mmpipe = {**getattr(model.config, "mmpipe", {}), "tower": {"scales": list(scales)}}


class _MultiScale:
    """Mixin of the classes that :func:`_multi_scale` makes."""

    scales: tuple[int, ...]

    def forward(self, pixel_values: Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        """Concatenated features of all scales, as the only hidden state: ``[B, tokens, scales * width]``."""
        kwargs = {k: v for k, v in kwargs.items() if k not in ("return_dict", "output_hidden_states")}
        one_scale: Any = super().forward  # type: ignore[misc]
        passes = 0

        def encode(pixels_BCHW: Tensor) -> Tensor:
            nonlocal passes
            if passes:
                next_pass(self)  # type: ignore[arg-type]
            passes += 1
            # the projected block is the last one
            return one_scale(pixels_BCHW, **kwargs).last_hidden_state

        class_tokens = 1 if hasattr(getattr(self, "embeddings", None), "class_embedding") else 0
        features = multi_scale_features(pixel_values, self.scales, encode, class_tokens=class_tokens)
        return BaseModelOutputWithPooling(last_hidden_state=features, hidden_states=(features,))


def _multi_scale(kind: type[nn.Module]) -> type[nn.Module]:
    """The multi-scale subclass of a tower's class; its tensors keep their names."""
    if issubclass(kind, _MultiScale):
        return kind
    return type(f"MultiScale{kind.__name__}", (_MultiScale, kind), {"__module__": __name__})


def multi_scale_features(
    pixels_BCHW: Tensor, scales: Sequence[int], encode: Callable[[Tensor], Tensor], *, class_tokens: int = 0
) -> Tensor:
    """Features of square images at several scales, ``[B, class_tokens + tokens, scales * width]``.

    For scale s the images are enlarged s times (bicubic, float32) and cut into s x s tiles of the original
    size; the tiles of all images go through ``encode`` as one batch (first tile of every image, second tile
    of every image, ...). Their maps of tokens are joined and averaged down to the first map's size
    (``area``). Class tokens, which come first, are averaged over the tiles.
    """
    maps: list[Tensor] = []
    heads: list[Tensor] = []
    for scale in scales:
        tokens_TNE = encode(tiles(pixels_BCHW, scale))
        head_TPE, body_TNE = tokens_TNE[:, :class_tokens], tokens_TNE[:, class_tokens:]
        map_BEGG = _assembled(body_TNE, scale)
        side = map_BEGG.shape[-1] // scale
        if scale > 1:
            map_BEGG = F.interpolate(map_BEGG.float(), size=(side, side), mode="area").to(map_BEGG.dtype)
        maps.append(map_BEGG)
        heads.append(head_TPE.unflatten(0, (scale**2, -1)).mean(0))
    body_BNE = torch.cat(maps, dim=1).flatten(2).transpose(1, 2)
    return torch.cat([torch.cat(heads, dim=2), body_BNE], dim=1)


def tiles(pixels_BCHW: Tensor, scale: int) -> Tensor:
    """The tiles of the enlarged images, ``[scale² * B, C, H, W]``: by position, row by row, then by image."""
    if scale == 1:
        return pixels_BCHW
    side = pixels_BCHW.shape[-1]
    enlarged = F.interpolate(
        pixels_BCHW.float(), size=(side * scale, side * scale), mode="bicubic", align_corners=False
    ).to(pixels_BCHW.dtype)
    return torch.cat([tile for row in enlarged.split(side, dim=2) for tile in row.split(side, dim=3)])


def _assembled(tokens_TNE: Tensor, scale: int) -> Tensor:
    """Tiles' tokens as one map an image, ``[B, width, scale * side, scale * side]``."""
    side = round(tokens_TNE.shape[1] ** 0.5)
    grid = tokens_TNE.unflatten(0, (scale, scale, -1)).unflatten(3, (side, side))
    # row of tiles, column of tiles, image, row, column, width -> image, width, rows, columns
    return grid.permute(2, 5, 0, 3, 1, 4).flatten(4, 5).flatten(2, 3)
