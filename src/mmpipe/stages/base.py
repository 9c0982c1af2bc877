"""Shared settings of the stages, and the job that runs one. Imported while Snakemake builds its plan: no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field, field_validator, model_validator

from mmpipe.data.templates import template_names
from mmpipe.errors import ConfigError, did_you_mean
from mmpipe.models.settings import LoraSettings, VisionLanguage
from mmpipe.settings import Settings
from mmpipe.stages import zero


class Hardware(Settings):
    """The hardware of a stage. Changes here do not make a stage stale.

    The split of a batch (``gpus``, ``micro_batch``) changes the rounding of sums, and everything computed per micro batch:
    router losses, tokens dropped by experts, the batch means of ``kto_pair``, random draws, and every mean of
    ``compat: reference``. Compare runs of one split where such small differences matter.
    """

    gpus: int = Field(0, ge=0)
    """GPUs in all; 0 trains on the CPU, more than one with one process a GPU."""
    nodes: int | None = Field(None, ge=1)
    """Machines on a cluster. Default: as many as ``gpus`` fill at ``gpus_per_node``; one process each without GPUs."""
    cpus: int = Field(2, ge=1)
    """CPU cores of each machine; those not taken by ``workers`` compute."""
    memory_gb: int = Field(8, ge=1)
    """CPU RAM of each machine."""
    gpu_memory_gb: float | None = Field(None, gt=0)
    """Memory of each GPU; default: as in the configuration. Only ``mmpipe plan`` reads it, to warn."""
    runtime_minutes: int = Field(60, ge=1)
    """Time limit of a job. A longer training saves a checkpoint before the limit and continues in the next job."""
    micro_batch: int | None = Field(None, ge=1)
    """Samples per process and forward pass; the batch is reached by accumulation. Default: the whole batch on a CPU."""
    workers: int = Field(0, ge=0)
    """Data-loading processes per training process."""
    gradient_checkpointing: bool = False
    deepspeed: str | None = None
    """``zero2``, ``zero2_offload``, ``zero3`` or ``zero3_offload`` partition the training over the processes with DeepSpeed.
    Without the package the same recipe trains with plain data parallelism."""
    attention: Literal["auto", "eager", "sdpa", "flash_attention_2"] = "auto"
    """Attention in training: ``auto`` is flash attention 2 where it is installed and supported, else PyTorch's ``sdpa``."""
    tf32: bool = False
    """Allow TensorFloat-32 for float32 matrix products on GPUs."""
    checkpoint_every: int = Field(500, ge=1)
    """Optimizer steps between resumable checkpoints."""
    chunks: int = Field(1, ge=1)
    """Under ``answering``: number of jobs that precompute this checkpoint's log-probabilities on a mixture.
    (``benchmarks.yaml`` gives the number of jobs that answer a benchmark.)"""

    @field_validator("deepspeed")
    @classmethod
    def _known_kind(cls, kind: str | None) -> str | None:
        if kind is not None and kind not in zero.kinds():
            raise ValueError(f"there is no kind '{kind}'{did_you_mean(kind, zero.kinds())}")
        return kind


def _known_template(name: str) -> str:
    if name not in template_names():
        raise ValueError(f"there is no conversation template '{name}'{did_you_mean(name, template_names())}")
    return name


TemplateName = Annotated[str, AfterValidator(_known_template)]


def share_batch(batch_size: int, processes: int) -> int:
    """The samples of a batch that each process trains on. Raises ConfigError when they cannot share it evenly."""
    share, rest = divmod(batch_size, processes)
    if rest or not share:
        raise ConfigError(
            f"a batch of {batch_size} cannot be shared evenly by {processes} processes; "
            "change hardware.gpus (or nodes), or batch_size (which changes the result)"
        )
    return share


@dataclass(frozen=True)
class StageJob:
    """One stage to run: its inputs, outputs and hardware."""

    recipe: str
    stage: str
    spec: str
    """Canonical JSON of what determines the result."""
    model_dir: Path
    """Directory of the published checkpoint."""
    state_dir: Path
    """Directory of the training state, from which an interrupted run resumes."""
    report_dir: Path
    vision_language: VisionLanguage
    backbones: Mapping[str, Path]
    """The directories the model is built from, by role; empty where only the parent is read."""
    parent: Path | None
    """The checkpoint this stage starts from; None for the first stage."""
    references: Mapping[str, Path] = field(default_factory=dict)
    """Other checkpoints by their role (``teacher``)."""
    layouts: Mapping[str, str] = field(default_factory=dict)
    """The backbones' checkpoint layouts, by role, where they are not transformers' own."""
    precomputed: Mapping[str, Path] = field(default_factory=dict)
    """Log-probabilities of other checkpoints on the mixture, by role."""
    tokens: Path | None = None
    """The tokenised mixture this stage trains on."""
    manifests: tuple[Path, ...] = ()
    """Manifests of all inputs."""
    threads: int = 1
    gpus: int = 0
    """In all."""
    hosts: tuple[str, ...] = ()
    """Host names of this job's machines, when there are several."""
    end_time: float | None = None
    """The end of the job's time limit, in seconds since the epoch."""
    max_steps: int | None = None
    """Number of steps after which smoke runs stop."""
    log: Path | None = None


@dataclass(frozen=True)
class Encoding:
    """Tokenisation settings, without the tokenizer."""

    VERSION: ClassVar[int] = 1
    """Raised when a change of code (templates, labels, truncation) changes the tokens of some record."""

    template: str
    max_length: int


@dataclass(frozen=True)
class Precomputation:
    """Precomputed log-probabilities of a teacher or reference checkpoint on a mixture, as a stage requests them.

    ``VERSION`` is raised when a change of code changes them.
    """

    VERSION: ClassVar[int] = 2

    checkpoint: str
    mixture: str
    settings: Mapping[str, Any]


class Stage(Settings):
    """Base of all stages: the settings a recipe may give.

    A subclass raises ``VERSION`` when a change of code changes its results.
    """

    VERSION: ClassVar[int] = 1
    PUBLISHES: ClassVar[Literal["projector", "model"]] = "model"
    SPARSIFIES: ClassVar[bool] = False
    """Whether checkpoints from this stage on have token predictors."""
    ON_GPUS: ClassVar[bool] = True
    """Whether this stage uses the GPUs of a recipe's ``hardware``."""

    hardware: Hardware = Hardware()
    seed: int = 0

    def mixture(self) -> str | None:
        """The mixture this stage reads, if any."""
        return None

    def encoding(self) -> Encoding | None:
        """Tokenisation settings of the mixture; None for a stage that reads none."""
        return None

    def references(self) -> dict[str, str]:
        """Other checkpoints this stage reads: role -> ``recipe`` or ``recipe@stage``."""
        return {}

    def precomputations(self) -> dict[str, Precomputation]:
        """Log-probabilities of other checkpoints that this stage reads, by role."""
        return {}

    def adds_experts(self) -> bool:
        """Whether the stage makes a dense model sparse."""
        return False

    def spec(self) -> dict[str, Any]:
        """The settings that change the result, defaults left out, under the keys with which they were introduced."""
        return self.identity(exclude={"hardware"})


class TrainStage(Stage):
    """A stage that trains on a mixture."""

    FORMER_KEYS: ClassVar[Mapping[str, str]] = {"minimum_supervised": "min_supervised_fraction"}

    data: str
    """A mixture of ``mixtures.yaml``."""
    template: TemplateName = "vicuna_v1"
    """The conversation template; ``tokenizer`` is the tokenizer's own."""
    image_aspect: Literal["pad", "square"] = "pad"
    """``pad`` pads images to a square; ``square`` crops the centre."""
    max_length: int = Field(2048, ge=16)
    """Tokens per sample, image tokens included; longer texts are cut on the right."""
    trainable: tuple[str, ...] = ("language_model.*", "lm_head.*", "multi_modal_projector.*")
    """Glob patterns of the trainable parameters; the others stay bit-identical."""
    lora: LoraSettings | None = None
    """Train LoRA adapters instead; they are published in ``adapter/`` and merged into the published checkpoint."""
    epochs: float = Field(1.0, gt=0)
    max_steps: int | None = Field(None, ge=1)
    """Optimizer steps; overrides ``epochs``."""
    batch_size: int = Field(128, ge=1)
    """Samples per optimizer step over all devices."""
    learning_rate: float = Field(2e-5, gt=0)
    learning_rates: dict[str, float] = {}
    """Other learning rates by glob pattern of parameter names."""
    schedule: Literal["cosine", "linear", "constant", "constant_with_warmup"] = "cosine"
    warmup_ratio: float = Field(0.03, ge=0, le=1)
    weight_decay: float = Field(0.0, ge=0)
    adam_betas: tuple[float, float] = (0.9, 0.999)
    max_gradient_norm: float = Field(1.0, ge=0)
    """Gradients are clipped to this norm; 0 switches clipping off."""
    precision: Literal["float32", "bfloat16"] = "float32"
    grouping: Literal["none", "length", "modality_length"] = "none"
    """Batches of similar length, or of similar length and kind (with or without images)."""
    min_supervised_fraction: float = Field(0.001, ge=0, le=1)
    """Smallest supervised fraction of the text tokens; below it, the template does not fit and training does not start."""
    llava_projector: bool = False
    """Also write the projector as ``mm_projector.bin``, under LLaVA's names."""

    @model_validator(mode="after")
    def _adapters_or_whole_weights(self) -> TrainStage:
        if self.lora is not None:
            if self.PUBLISHES == "projector":
                raise ValueError("'lora' adapts the language model, which this stage does not train")
            if self.trainable != type(self).model_fields["trainable"].default:
                raise ValueError("with 'lora', 'trainable' says nothing; name what trains whole in 'lora.beside'")
        return self

    def trains(self) -> tuple[str, ...]:
        """Glob patterns of everything that trains, adapters included."""
        return self.trainable if self.lora is None else (*self.lora.beside, "*.lora_[AB].*")

    def mixture(self) -> str | None:
        return self.data

    def encoding(self) -> Encoding:
        return Encoding(self.template, self.max_length)

    def precomputation(self, checkpoint: str, settings: Mapping[str, Any]) -> Precomputation:
        """A request for ``checkpoint``'s log-probabilities on this stage's mixture, encoded as this stage encodes it."""
        encoding = {"template": self.template, "max_length": self.max_length, "image_aspect": self.image_aspect}
        return Precomputation(checkpoint, self.data, {**settings, **encoding})
