"""Sparse models that no stock class computes, as a class of this package.

Other routers than softmax top-k, and residual experts, have no counterpart in transformers. Such a model is
stored under the model type ``mmpipe_llava``, with its own tensor names: plain transformers says that it does
not know the type, and after ``import mmpipe.models.moe.registered`` its ``Auto`` classes open it.
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

from mmpipe.models.moe.placement import layer_indices
from mmpipe.models.moe.spec import MoESettings
from mmpipe.models.moe.upcycle import empty_layer, install


class SparseLlavaConfig(LlavaConfig):
    """A LLaVA configuration whose entry ``mmpipe`` describes the experts."""

    model_type = "mmpipe_llava"


class SparseLlava(LlavaForConditionalGeneration):
    """LLaVA with experts in its language model, as ``config.mmpipe["moe"]`` says."""

    config: SparseLlavaConfig
    config_class = SparseLlavaConfig

    def __init__(self, config: SparseLlavaConfig) -> None:
        super().__init__(config)
        settings, text = MoESettings(**config.mmpipe["moe"]), self.model.language_model
        for index in layer_indices(settings.placement, len(text.layers)):
            layer = text.layers[index]
            layer.mlp = empty_layer(layer.mlp, text.config.hidden_act, settings, f"layer {index}")
        install(self, settings)


AutoConfig.register(SparseLlavaConfig.model_type, SparseLlavaConfig)
AutoModelForImageTextToText.register(SparseLlavaConfig, SparseLlava)
AutoProcessor.register(SparseLlavaConfig, LlavaProcessor)
