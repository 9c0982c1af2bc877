"""The model class for sparse models without a stock class in transformers.

Other routers than softmax top-k, residual experts, experts in the tower and images at several scales have no
counterpart in transformers. Such a model is stored under the model type ``mmpipe_llava``, with its own tensor names;
after ``import mmpipe.models.moe.modeling_mmpipe_llava`` the ``Auto`` classes of transformers open it.
"""

from __future__ import annotations

from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from mmpipe.models.moe.placement import chosen_sites
from mmpipe.models.moe.upcycle import empty_layer, install, saved_moe_settings
from mmpipe.models.vision_tower import enable_multi_scale, saved_scales


class SparseLlavaConfig(LlavaConfig):
    """A LLaVA configuration whose entry ``mmpipe`` describes experts and scales."""

    model_type = "mmpipe_llava"


class SparseLlava(LlavaForConditionalGeneration):
    """LLaVA with experts in the parts that ``config.mmpipe["moe"]`` names, and images at the scales of
    ``config.mmpipe["tower"]``."""

    config: SparseLlavaConfig
    config_class = SparseLlavaConfig

    def __init__(self, config: SparseLlavaConfig) -> None:
        super().__init__(config)
        scales = saved_scales(self)
        if scales is not None:
            enable_multi_scale(self, scales)
        for part, settings in saved_moe_settings(self).items():
            for site in chosen_sites(self, part, settings):
                site.put(empty_layer(site, settings))
            install(self, part, settings)


AutoConfig.register(SparseLlavaConfig.model_type, SparseLlavaConfig)
AutoModelForImageTextToText.register(SparseLlavaConfig, SparseLlava)
AutoProcessor.register(SparseLlavaConfig, LlavaProcessor)
