"""Memory of a training process, part by part.

States: parameters, gradients and Adam's two moments are float32 whatever the precision (4 + 4 + 8 bytes for what
trains, 4 for what is frozen), as mixed precision needs them; ZeRO's stages spread the moments (1), the gradients (2)
and the parameters (3) over the processes: Rajbhandari et al. 2020, "ZeRO", arXiv 1910.02054, section 3.

Activations: what autograd keeps of a layer, counted as in Korthikanti et al. 2022, arXiv 2205.05198, section 4, for
layers with gated feed-forward networks, grouped queries and attention that keeps no scores.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from mmpipe.estimate.tensors import ModelConfig, heads
from mmpipe.losses import CHUNK_BYTES

_FLOAT, _BFLOAT = 4, 2
_MOMENTS = 8
"""Bytes of Adam's two float32 moments."""


@dataclass(frozen=True)
class Spread:
    """Partitioning of the states: ZeRO's stage (0: none), offloading to CPU RAM, number of processes."""

    processes: int = 1
    stage: int = 0
    offload_optimizer: bool = False
    offload_parameters: bool = False


@dataclass(frozen=True)
class Memory:
    """Bytes of one process on its device."""

    parameters: float = 0
    gradients: float = 0
    optimizer: float = 0
    casts: float = 0
    """Copies in bfloat16, and parameters that stage 3 gathers."""
    activations: float = 0
    head: float = 0
    teacher: float = 0
    context: float = 0
    """Memory of the runtime itself."""

    @property
    def total(self) -> float:
        """All of it."""
        return sum(getattr(self, field.name) for field in fields(self))


def states(parameters: int, trainable: int, layer: int, spread: Spread, bfloat16: bool) -> Memory:
    """Memory of parameters, gradients and optimizer; ``layer`` is the largest part that is gathered at once.

    Plain data parallelism over several processes keeps a second copy of the gradients in its buckets
    (``gradient_as_bucket_view`` of PyTorch's DistributedDataParallel is off).
    """
    share = {stage: spread.processes if spread.stage >= stage else 1 for stage in (1, 2, 3)}
    buckets = 2 if spread.processes > 1 and spread.stage == 0 else 1
    gathered = spread.stage >= 3
    computed = layer if gathered else parameters
    return Memory(
        parameters=0 if spread.offload_parameters else _FLOAT * parameters / share[3],
        gradients=0 if spread.offload_optimizer else _FLOAT * trainable * buckets / share[2],
        optimizer=0 if spread.offload_optimizer else _MOMENTS * trainable / share[1],
        casts=(_BFLOAT * computed if bfloat16 else 0) + (_FLOAT * layer if gathered else 0),
    )


def host_states(trainable: int, parameters: int, spread: Spread) -> float:
    """Bytes one process keeps in CPU RAM with offloading: moments and gradients, and with stage 3 the parameters."""
    bytes_ = (_MOMENTS + _FLOAT) * trainable if spread.offload_optimizer else 0
    bytes_ += _FLOAT * parameters if spread.offload_parameters else 0
    return bytes_ / spread.processes


def layer_bytes(config: ModelConfig, bfloat16: bool, networks: float = 1) -> float:
    """Bytes that autograd stores of one decoder layer for one token; ``networks`` feed-forward networks use the token.

    In the precision of computing: queries and keys before and after rotation, values, the attended values, and of each
    feed-forward network gate, up, activation and product. In float32: input and normalised input of both norms.
    With bfloat16 also the cast inputs of the projections.
    """
    size = _BFLOAT if bfloat16 else _FLOAT
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    query, key = heads(config)
    attention = size * (2 * (query + key) + key + query)
    network = size * 4 * inner * networks
    norms = _FLOAT * 4 * hidden + (size * 2 * hidden if bfloat16 else 0)
    return attention + network + norms


def activations(config: ModelConfig, tokens: int, *, bfloat16: bool, checkpointing: bool, networks: float = 1) -> float:
    """Bytes of all layers for ``tokens`` tokens at once. With gradient checkpointing each layer stores only its input,
    and one layer at a time is complete (Chen et al. 2016, arXiv 1604.06174)."""
    layers, each = config["num_hidden_layers"], layer_bytes(config, bfloat16, networks)
    if not checkpointing:
        return tokens * layers * each
    return tokens * (layers * _FLOAT * config["hidden_size"] + each)


def head() -> float:
    """Bytes of the output head: a chunk of logits, its softmax and its gradient."""
    return 3 * CHUNK_BYTES
