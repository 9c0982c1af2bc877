"""Learned sparsification: predictors after the first layers select the image and answer tokens that later layers need."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from mmpipe.models.sparsity.spec import SparsitySettings
from mmpipe.stages.base import TrainStage


class Sparsify(TrainStage):
    """Defaults are Dynamic-LLaVA's ``train_dynamic_llava_7b.sh``, from a fine-tuned checkpoint.

    ``trainable`` follows the published code, which trains the projector with the language model; the paper keeps it frozen:
    ``trainable: ["language_model.*", "lm_head.*"]``.
    """

    SPARSIFIES: ClassVar[bool] = True

    sparsity: SparsitySettings = SparsitySettings()
    mask_loss_weight: float = Field(100.0, ge=0)
    """Weight of the squared distance from the keep rates."""
    gumbel_start_tau: float = Field(1.0, gt=0)
    """Gumbel-softmax temperature at the first step; it falls geometrically."""
    gumbel_end_tau: float = Field(0.1, gt=0)
    """Gumbel-softmax temperature at the last step."""
    requires_image: bool = True
    """Leave out records without images."""
    learning_rate: float = Field(5e-6, gt=0)
    learning_rates: dict[str, float] = {"language_model.sparsifier.*": 2e-4}
    batch_size: int = Field(64, ge=1)


STAGE = Sparsify
