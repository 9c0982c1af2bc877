"""Construction: the recipe's `model` becomes a published checkpoint before anything trains."""

from __future__ import annotations

from typing import ClassVar, Literal

from mmpipe.stages.base import Stage, TemplateName


class Construct(Stage):
    """Imports a whole checkpoint of any layout, or joins a tower and a language model with a fresh projector.

    A recipe whose `model` names a `checkpoint` begins with this stage, listed or not. A whole checkpoint keeps its
    precision; parts are joined in float32.
    """

    ON_GPUS: ClassVar[bool] = False

    template: TemplateName = "vicuna_v1"
    """The conversation template the model was trained with; ``tokenizer`` is the tokenizer's own."""
    image_aspect: Literal["pad", "square"] = "pad"
    """``pad`` pads images to a square; ``square`` crops the centre."""


STAGE = Construct
