"""Dense-to-dense mimic distillation: the dense student learns the teacher's distribution."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from mmpipe.settings import Settings
from mmpipe.stages.base import Precomputation, TrainStage


class TeacherCacheSettings(Settings):
    """Precompute the teacher's log-probabilities once, for any number of students, instead of running it in every step."""

    kind: Literal["top_k", "sampled"] = "top_k"
    """The k most probable tokens (biased: the tail is unknown), or k sampled ones (unbiased, noisier)."""
    k: int = Field(64, ge=1)
    """Tokens stored for every response position."""
    seed: int = 0
    """Seed of the draws."""


class DistillDense(TrainStage):
    """Defaults are LLaVA-MoD's ``dense2dense_distillation.sh``: forward KL on the response, nothing else."""

    teacher: str
    """The checkpoint to learn from: ``recipe`` or ``recipe@stage``."""
    loss_type: Literal["only_kd", "kd_lm"] = "only_kd"
    """``kd_lm`` adds the cross entropy of the answers, with weight 1."""
    tokens: Literal["response", "all"] = "response"
    """Positions to distil: those that predict the answer, or all that predict a real token."""
    divergence: Literal["forward_kl", "reverse_kl", "jsd"] = "forward_kl"
    temperature: float = Field(1.0, gt=0)
    jsd_weight: float = Field(0.5, gt=0, lt=1)
    """Weight of the teacher in the mixture of ``jsd``."""
    teacher_cache: TeacherCacheSettings | None = None
    tail: Literal["bucket", "renormalise", "drop"] = "bucket"
    """Treatment of the residual probability that the ``top_k`` tokens of ``teacher_cache`` do not cover."""
    router_losses: bool = True
    """Train on the router losses of a student with experts (LLaVA-MoD's ``moe_loss_enable``); they are logged anyway."""
    compat: Literal["fixed", "reference"] = "fixed"
    """``reference``: the loss of the published code (positions one too late, means per micro batch, router losses
    once more under ``kd_lm``)."""

    @model_validator(mode="after")
    def _nothing_is_ignored(self) -> DistillDense:
        """Raises ValueError for a setting that would have no effect."""
        cache, reference = self.teacher_cache, self.compat == "reference"
        fixed = ("divergence", "temperature")
        for void, names, why in (
            (
                cache is not None,
                (*fixed, "tokens", "compat"),
                "precomputed logits ('teacher_cache') give forward KL on the response at temperature 1 alone",
            ),
            (reference, fixed, "the published loss ('compat: reference') is forward KL at temperature 1"),
            (self.divergence != "jsd", ("jsd_weight",), "only 'divergence: jsd' has a weight"),
            (not cache or cache.kind != "top_k", ("tail",), "only a 'teacher_cache' of the kind 'top_k' leaves a tail"),
        ):
            for name in names if void else ():
                value, default = getattr(self, name), type(self).model_fields[name].default
                if value != default:
                    raise ValueError(f"'{name}: {value}' would be ignored: {why}; leave it at '{default}'")
        return self

    def references(self) -> dict[str, str]:
        return {} if self.teacher_cache else {"teacher": self.teacher}

    def precomputations(self) -> dict[str, Precomputation]:
        if self.teacher_cache is None:
            return {}
        settings = self.teacher_cache.model_dump(mode="json")
        if self.teacher_cache.kind == "top_k":
            del settings["seed"]
        return {"teacher": self.precomputation(self.teacher, settings)}


STAGE = DistillDense
