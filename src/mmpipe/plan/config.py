"""The typed models of the main configuration file and of recipe files."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from mmpipe.models.settings import VisionLanguage
from mmpipe.settings import Settings
from mmpipe.stages.base import Hardware


class Smoke(Settings):
    """Limits of smoke runs (``results/smoke/...``), which try every stage of a recipe for a few steps."""

    max_steps: int = Field(2, ge=1)
    """Optimizer steps of each stage."""
    questions: int = Field(16, ge=1)
    """Questions of each benchmark."""


class LogExperts(Settings):
    """Which expert choices are logged while benchmarks are answered, for the analysis of routers."""

    layers: tuple[int, ...] | None = Field(None, min_length=1)
    """Layers to log, in both tower and language model; default: every layer with experts. A projector is always logged."""
    benchmarks: list[str] = Field(["*"], min_length=1)
    """Patterns of the chosen benchmarks to log; controls are never logged."""
    checkpoints: list[str] | None = Field(None, min_length=1)
    """Patterns of the chosen checkpoints to log; default: those whose recipe adds experts."""
    without_first: bool = False
    """Also answer with each token's first expert left out, to measure how much depends on it."""
    similarity_questions: int = Field(32, ge=1)
    """Questions on which the outputs of the chosen experts are compared."""


def _switch(value: Any) -> Any:
    """``true`` is all defaults, ``false`` is None."""
    return {True: {}, False: None}[value] if isinstance(value, bool) else value


class Config(Settings):
    """The main configuration: what is trained and compared."""

    recipes: list[str] = Field(min_length=1)
    """Recipes whose checkpoints are compared; ``recipe@stage`` names an earlier checkpoint, ``*`` matches many.
    Sparsified ones can retain more or less: ``recipe+keep0.5``, ``recipe+whole``."""
    benchmarks: list[str | dict[str, dict[str, Any]]] = Field(min_length=1)
    """Benchmarks of ``benchmarks.yaml``; ``- name: {key: value}`` changes settings of the entry."""
    log_experts: Annotated[LogExperts | None, BeforeValidator(_switch, json_schema_input_type=bool | LogExperts)] = None
    """Log the experts of each token while benchmarks are answered, and draw the analysis of routers."""
    keep_rates: list[Annotated[float, Field(gt=0, le=1)]] = []
    """Sparsified checkpoints are also compared with these shares of each image's tokens retained, one row a rate."""
    smoke: Smoke = Smoke()
    gpu_request: str = Field("gpu", pattern="^(gpu|gres)$")
    """How GPUs are requested on the cluster: ``gpu`` (``--gpus``) or ``gres`` (``--gres``)."""
    gpus_per_node: int = Field(8, ge=1)
    """GPUs of one machine of the cluster; a stage with more runs on several."""
    gpu_memory_gb: float = Field(80.0, gt=0)
    """Memory of one GPU; ``mmpipe plan`` warns of stages that need more."""
    gpu_tflops: float = Field(312.0, gt=0)
    """Peak of one GPU in bfloat16, in 1e12 operations a second, for estimates of GPU-hours; 312 is an A100, 989 an H100."""


class Recipe(Settings):
    """A recipe: a path of stages from backbones to a final checkpoint."""

    description: str = ""
    extends: str | None = None
    """A recipe (or ``recipe@stage``) whose stages this one continues or changes."""
    model: VisionLanguage | None = None
    """The backbones to start from; inherited through ``extends``."""
    defaults: dict[str, Any] = {}
    """Settings for every stage of this recipe that has them; recipes that extend this one apply them to new stages."""
    hardware: dict[str, Any] = {}
    """Hardware of every stage of this recipe."""
    answering: Hardware | None = None
    """Hardware for answering benchmarks with this recipe's checkpoints; inherited through ``extends``."""
    stages: dict[str, dict[str, Any] | None] = {}
    """The stages in order; a stage the parent has too is changed, and so is everything after it."""
