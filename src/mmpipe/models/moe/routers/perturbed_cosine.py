"""Cosine scores with lengths moved away from zero, which keeps gradients of short vectors bounded."""

from __future__ import annotations

from pydantic import Field

from mmpipe.models.moe.routers.cosine import CosineRouter, CosineSettings


class PerturbedCosineSettings(CosineSettings):
    """Settings of :class:`PerturbedCosineRouter`."""

    perturbation: float = Field(0.1, ge=0)


class PerturbedCosineRouter(CosineRouter):
    """The cosine router with a perturbation of 0.1, as in LibMoE's Perturbed Cosine-R."""

    Settings = PerturbedCosineSettings
