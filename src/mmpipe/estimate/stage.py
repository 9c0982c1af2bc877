"""Memory, disk space and time of one stage of a plan."""

from __future__ import annotations

from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmpipe.artifacts.files import read_json, read_report
from mmpipe.estimate import flops, memory
from mmpipe.estimate import tensors as count
from mmpipe.estimate.model import Model, model_of
from mmpipe.stages import zero
from mmpipe.stages.base import Precomputation, TrainStage

if TYPE_CHECKING:
    from mmpipe.plan.plan import Plan, StagePlan

UTILIZATION = 0.4
"""Assumed utilization of a GPU's peak."""
TEXT_TOKENS = 256
"""Tokens of text in a sample, as long as its mixture has not been tokenised."""
_CONTEXT = {True: 1.5e9, False: 0.6e9}
"""Bytes of a process without tensors: CUDA's context and libraries, or Python's."""
_ENTRY_BYTES = 6
"""Of one precomputed teacher token: its id in 4 bytes, its log-probability in 2."""
_ON_CPU = 8
"""Micro batch on GPUs where the recipe sets none."""


@dataclass(frozen=True)
class ResourceEstimate:
    """Memory and time of a training stage."""

    parameters: int
    trainable: int
    published: int
    """Bytes of the checkpoint: the model in float32, or the projector alone."""
    memory: memory.Memory
    """Of one process, on its GPU or, without GPUs, in CPU RAM."""
    host: float
    """Bytes of CPU RAM on one machine."""
    gpu_hours: float | None
    """None without GPUs, or while the number of records is unknown."""
    length: int
    """Tokens assumed of the longest samples."""
    measured: bool
    """Whether lengths come from the tokenised mixture."""


@dataclass(frozen=True)
class _Lengths:
    records: int | None
    mean: float
    longest: int
    supervised: float
    measured: bool


def estimate(plan: Plan, stage: StagePlan, root: Path = Path()) -> ResourceEstimate | None:
    """The needs of a training stage; None for other stages, and while the model's size is unknown."""
    settings = stage.settings
    model = model_of(plan, stage, root) if isinstance(settings, TrainStage) else None
    if model is None or not isinstance(settings, TrainStage):
        return None
    hardware = settings.hardware
    bfloat16 = settings.precision == "bfloat16"
    tensors, trained = _trained(model, settings)
    parameters, trainable = sum(tensors.values()), sum(tensors[name] for name in trained)
    nodes = plan.nodes(hardware)
    processes = hardware.gpus or nodes
    lengths = _lengths(plan, stage, model, root)
    teachers = [
        found
        for reference in settings.references().values()
        if (found := model_of(plan, plan.checkpoint(reference), root))
    ]
    spread = _spread(hardware.deepspeed, processes)
    micro = min(hardware.micro_batch or (_ON_CPU if hardware.gpus else settings.batch_size), settings.batch_size)
    states = memory.states(parameters, trainable, _largest(tensors), spread, bfloat16)
    need = replace(
        states,
        activations=_activations(model, trained, settings, micro, lengths.longest),
        head=memory.head(),
        teacher=sum(found.parameters for found in teachers) * (2 if hardware.gpus else 4),
        context=_CONTEXT[hardware.gpus > 0],
    )
    each = -(-processes // nodes)
    # every process builds the whole model before it moves to its GPU
    loading = 4 * parameters + _CONTEXT[False]
    host = each * max(loading, memory.host_states(trainable, parameters, spread) + _CONTEXT[False])
    return ResourceEstimate(
        parameters=parameters,
        trainable=trainable,
        published=4 * (parameters if settings.PUBLISHES == "model" else trainable),
        memory=need,
        host=host if hardware.gpus else each * need.total,
        gpu_hours=_hours(plan, settings, model, trained, teachers, lengths) if hardware.gpus else None,
        length=lengths.longest,
        measured=lengths.measured,
    )


def warnings(plan: Plan, stage: StagePlan, found: ResourceEstimate) -> list[str]:
    """Warnings about a hopeless run of the stage."""
    hardware = stage.settings.hardware
    said = []
    room = hardware.gpu_memory_gb or plan.config.gpu_memory_gb
    if hardware.gpus and found.memory.total > room * 1e9:
        largest = max(("activations", "optimizer", "parameters", "gradients"), key=lambda n: getattr(found.memory, n))
        remedy = {
            "activations": "a smaller micro_batch, or gradient_checkpointing",
            "parameters": "deepspeed: zero3",
        }.get(largest, "deepspeed: zero2 or zero3, or more GPUs")
        said.append(
            f"{stage.id}: needs about {found.memory.total / 1e9:.0f} GB a GPU, the recipe's hardware has {room:g} "
            f"(gpu_memory_gb); most of it are {largest}: {remedy}"
        )
    if found.host > hardware.memory_gb * 1e9:
        said.append(
            f"{stage.id}: needs about {found.host / 1e9:.0f} GB of CPU RAM a machine, "
            f"hardware.memory_gb is {hardware.memory_gb}"
        )
    return said


def _trained(model: Model, settings: TrainStage) -> tuple[count.Tensors, list[str]]:
    """All tensors, adapters included, and the names of those that train. Tied heads train with the embeddings."""
    tensors = dict(model.tensors)
    if settings.lora:
        layers = [name.removesuffix(".weight") for name in tensors if name.endswith("_proj.weight")]
        chosen = [name for name in layers if any(fnmatchcase(name, p) for p in settings.lora.targets)]
        tensors |= count.adapters(tensors, chosen, settings.lora.rank, model.text)
    return tensors, [name for name in tensors if any(fnmatchcase(name, p) for p in settings.trains())]


def _spread(kind: str | None, processes: int) -> memory.Spread:
    if kind is None:
        return memory.Spread(processes)
    chosen: dict[str, Any] = zero.optimization(kind)
    return memory.Spread(processes, chosen["stage"], "offload_optimizer" in chosen, "offload_param" in chosen)


def _largest(tensors: count.Tensors) -> int:
    """Elements of the largest tensor that stage 3 gathers with its neighbours: a layer, or the embeddings."""
    layers: dict[str, int] = {}
    for name, size in tensors.items():
        head, inside, rest = name.partition(".layers.")
        key = f"{head}.{rest.partition('.')[0]}" if inside else name
        layers[key] = layers.get(key, 0) + size
    return max(layers.values())


def _activations(model: Model, trained: list[str], settings: TrainStage, micro: int, longest: int) -> float:
    """Bytes of the decoder, and of the tower where it trains; a frozen tower stores none."""
    how: dict[str, Any] = {
        "bfloat16": settings.precision == "bfloat16",
        "checkpointing": settings.hardware.gradient_checkpointing,
    }
    needed = memory.activations(model.text, micro * longest, networks=model.networks, **how)
    if any(name.startswith("vision_tower") for name in trained):
        # two layers of the plain feed-forward network stand for the four of a gated one
        needed += memory.activations(model.vision, micro * model.tokens_per_image, networks=0.5, **how)
    return needed


def _lengths(plan: Plan, stage: StagePlan, model: Model, root: Path) -> _Lengths:
    """Lengths of samples: measured once the mixture is tokenised, assumed before."""
    settings = stage.settings
    assert isinstance(settings, TrainStage)
    tokens = plan.tokens_of(stage)
    report = root / tokens.directory / "report.json" if tokens else None
    if report and report.is_file():
        counted = read_report(report)
        kept = max(1, counted["kept"])
        longest = max((int(bound) for bound in counted["tokens_up_to"]), default=1)
        return _Lengths(
            kept,
            (counted["text_tokens"] + counted["image_tokens"]) / kept,
            min(longest, settings.max_length),
            counted["supervised_tokens"] / kept,
            measured=True,
        )
    length = min(settings.max_length, model.tokens_per_image + TEXT_TOKENS)
    return _Lengths(_records(plan, settings.data), length, length, TEXT_TOKENS / 2, measured=False)


def _records(plan: Plan, mixture: str) -> int | None:
    """Records of a mixture by its publishers' counts; None while one is unknown."""
    total = 0
    for part in plan.mixtures[mixture].parts:
        known = part.expected or plan.datasets[part.dataset].records
        if isinstance(part.take, int):
            known = part.take
        if known is None:
            return None
        total += round(known * part.take) if isinstance(part.take, float) else known
    return total


def _hours(
    plan: Plan, settings: TrainStage, model: Model, trained: list[str], teachers: list[Model], lengths: _Lengths
) -> float | None:
    if settings.max_steps:
        samples = float(settings.max_steps * settings.batch_size)
    elif lengths.records:
        samples = settings.epochs * lengths.records
    else:
        return None
    trains = set(trained)
    training = flops.training(_work(model, trains, lengths), settings.hardware.gradient_checkpointing)
    teaching = sum(flops.forward(_work(teacher, set(), lengths)) for teacher in teachers)
    return flops.gpu_hours(samples * (training + teaching), plan.config.gpu_tflops, UTILIZATION)


def _work(model: Model, trained: set[str], lengths: _Lengths) -> flops.SampleWork:
    layers = [name for name in model.tensors if name.startswith("language_model.layers.")]
    tower = [name for name in model.tensors if name.startswith("vision_tower.")]
    head = "lm_head.weight" if "lm_head.weight" in model.tensors else "language_model.embed_tokens.weight"
    return flops.SampleWork(
        length=lengths.mean,
        supervised=lengths.supervised,
        layers=sum(map(model.active, layers)),
        trained_layers=sum(model.active(name) for name in layers if name in trained),
        head=model.tensors[head],
        attention_width=model.text["num_hidden_layers"] * count.heads(model.text)[0],
        tower=sum(model.tensors[name] for name in tower),
        tower_trains=any(name in trained for name in tower),
        tower_tokens=model.tokens_per_image,
        head_trains=head in trained,
    )


# ---- precomputed teachers


def bytes_per_token(request: Precomputation) -> int | None:
    """Bytes on the disk for every supervised token of the mixture; None for preference pairs (two numbers a pair)."""
    settings = request.settings
    return _ENTRY_BYTES * int(settings["k"]) if "k" in settings else None


def total_bytes(plan: Plan, request: Precomputation, root: Path = Path()) -> int | None:
    """Bytes of all entries; None until the mixture is tokenised, and for preference pairs."""
    each = bytes_per_token(request)
    report = root / plan.precomputation_tokens(request).directory / "report.json"
    return each * int(read_json(report)["supervised_tokens"]) if each and report.is_file() else None
