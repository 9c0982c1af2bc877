"""Model settings of a recipe: parts, and adapters that train in place of the weights."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from mmpipe.settings import Settings


class VisionLanguage(Settings):
    """The starting model of a recipe: parts and how they are joined, or a whole model."""

    vision: str | None = None
    """A vision backbone of ``backbones.yaml``."""
    language: str | None = None
    """A language backbone of ``backbones.yaml``."""
    checkpoint: str | None = None
    """A whole vision-language model of ``backbones.yaml``. ``vision`` and ``language`` then name the parts it lacks:
    the tower that original LLaVA checkpoints refer to, the base of an adapter or of a lone projector."""
    feature_layer: int = -2
    """Hidden state of the vision tower that is projected; -2 is the output of the block before the last."""
    feature_select: Literal["patch", "full"] = "patch"
    """``patch`` drops the class token; ``full`` keeps every token (towers without a class token)."""
    projector: Literal["mlp2x_gelu"] = "mlp2x_gelu"
    """Two linear layers with a GELU between, as in LLaVA-1.5."""
    scales: tuple[Annotated[int, Field(ge=1)], ...] = Field((1,), min_length=1)
    """Scales at which images are encoded, ``[1, 3]`` for LibMoE's S2: at scale 3, nine tiles of an image of three times
    the size; features are concatenated with those of scale 1, the number of image tokens is unchanged."""

    @model_validator(mode="after")
    def _parts_or_whole(self) -> VisionLanguage:
        if self.checkpoint is None:
            lacking = [role for role in ("vision", "language") if getattr(self, role) is None]
            if lacking:
                raise ValueError(
                    f"'{lacking[0]}' is missing; name a vision and a language backbone, or a whole 'checkpoint'"
                )
        elif joined := sorted(self.model_fields_set & {"feature_layer", "feature_select", "projector", "scales"}):
            raise ValueError(f"'{joined[0]}' is a fact of the checkpoint '{self.checkpoint}'; leave it out")
        return self

    def parts(self) -> dict[str, str]:
        """The entries of ``backbones.yaml`` by their role: ``vision``, ``language``, ``checkpoint``."""
        named = {role: getattr(self, role) for role in ("vision", "language", "checkpoint")}
        return {role: name for role, name in named.items() if name is not None}


class LoraSettings(Settings):
    """Low-rank adapters (Hu et al. 2021, arXiv 2106.09685) instead of whole weights; defaults are LLaVA-1.5's
    ``finetune_lora.sh``, whose learning rates are 2e-4 and 2e-5 for the projector."""

    rank: int = Field(128, ge=1)
    alpha: float = Field(256, gt=0)
    """The adapters' product is scaled by ``alpha / rank``."""
    dropout: float = Field(0.05, ge=0, lt=1)
    targets: tuple[str, ...] = ("language_model.layers.*_proj",)
    """Glob patterns of the linear layers that get an adapter, by their full names: towers stay out unless named."""
    beside: tuple[str, ...] = ("multi_modal_projector.*",)
    """Glob patterns of the parameters that train whole beside the adapters."""
