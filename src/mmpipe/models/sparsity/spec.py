"""The settings of a sparsified model; the names are those of Dynamic-LLaVA's ``sparse_config``."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from mmpipe.settings import Settings

Rate = Annotated[float, Field(gt=0, le=1)]


class SparsitySettings(Settings):
    """Which tokens are dropped, in which layers, and the size of the predictors; the defaults are Dynamic-LLaVA's."""

    sparse_layer: int = Field(2, ge=1)
    """The first decoder layer with retained tokens only, counted from 0; earlier layers compute all tokens."""
    use_vision_predictor: bool = True
    vision_keep_rate: Rate = 0.2
    """Share of an image's tokens that is retained; generation retains exactly so many, rounded down, at least one."""
    use_output_text_predictor: bool = True
    """Predict for generated tokens whether later ones may attend to them."""
    output_text_keep_rate: Rate = 0.5
    """Target share of the answer's tokens that is retained, in training; 1 retains all, also in generation."""
    output_text_len_for_training: int = Field(50, ge=1)
    """Shorter answers (in tokens) are retained whole in training."""
    use_instruct_predictor: bool = False
    """Drop tokens of the question, too; the paper found that this hurts."""
    instruct_keep_rate: Rate = 0.7
    instruct_len_for_training: int = Field(25, ge=1)
    """Shorter questions are retained whole in training."""
    d_model: int = Field(512, ge=8, multiple_of=4)
    """Width of the predictors."""
    nhead: int = Field(8, ge=1)
    dim_feedforward: int = Field(2048, ge=1)
    num_layers: int = Field(2, ge=1)
    """Transformer blocks of the predictor for images."""

    @model_validator(mode="after")
    def _consistent(self) -> SparsitySettings:
        if self.d_model % self.nhead:
            raise ValueError(f"d_model {self.d_model} cannot be shared by {self.nhead} heads")
        if not (self.use_vision_predictor or self.use_output_text_predictor or self.use_instruct_predictor):
            raise ValueError("every predictor is switched off; there is nothing to sparsify")
        return self
