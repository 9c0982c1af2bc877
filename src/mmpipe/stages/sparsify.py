"""Learned sparsification: predictors behind the first layers learn which tokens of images and answers later layers need."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field

from mmpipe.models.sparsity.spec import SparsitySettings
from mmpipe.stages.base import StageJob, TrainStage


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
    """Temperature of the draws at the first step; it falls geometrically."""
    gumbel_end_tau: float = Field(0.1, gt=0)
    """Temperature at the end."""
    requires_image: bool = True
    """Leave out records without images."""
    learning_rate: float = Field(5e-6, gt=0)
    learning_rates: dict[str, float] = {"language_model.sparsifier.*": 2e-4}
    batch_size: int = Field(64, ge=1)

    def prepare(self, model: Any, job: StageJob) -> None:
        from mmpipe.errors import ConfigError
        from mmpipe.models.sparsity.hooks import sparsify

        if job.parent is None:
            raise ConfigError(
                f"{job.recipe}: {job.stage}: there is no model to sparsify; put a training stage before it"
            )
        sparsify(model, self.sparsity, seed=self.seed)

    def dataset(self, tokens: Any, processor: Any) -> Any:
        from mmpipe.data.dataset import SupervisedDataset

        return SupervisedDataset(tokens.with_images() if self.requires_image else tokens, processor)

    def objective(self, job: StageJob, model: Any, processor: Any) -> Any:
        from mmpipe.training.objectives.sparsify import Sparsification

        return Sparsification(self, model)


STAGE = Sparsify
