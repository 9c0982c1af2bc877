"""DeepSpeed's ZeRO: optimizer states, gradients and (stage 3) parameters partitioned over the processes.

All settings that change a result (batch, clipping, precision, optimizer, schedule) come from the stage: parameters
stay in float32 and compute under autocast, exactly as without DeepSpeed; the results differ in the rounding of sums only.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from mmpipe.errors import MmpipeError
from mmpipe.stages import zero
from mmpipe.stages.base import TrainStage

log = logging.getLogger(__name__)


def usable(kind: str | None) -> str | None:
    """The kind of ZeRO to train with; None for plain data parallelism, also where DeepSpeed is not installed."""
    if kind and importlib.util.find_spec("deepspeed") is None:
        log.info(
            "DeepSpeed is not installed: training with plain data parallelism instead of %s; the result is the same, "
            "the memory is not (pip install 'mmpipe[deepspeed]')",
            kind,
        )
        return None
    return kind


def settings(kind: str, stage: TrainStage, micro_batch: int, accumulation: int, world: int) -> dict[str, Any]:
    """DeepSpeed's configuration for one run; nothing in it is ``auto``."""
    autocast = stage.precision == "bfloat16"
    return zero.configuration(kind) | {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation,
        "train_batch_size": micro_batch * accumulation * world,
        "gradient_clipping": stage.max_gradient_norm,
        # communication stays in float32: no module is "safe" for less
        "torch_autocast": {"enabled": autocast, "dtype": "bfloat16", "lower_precision_safe_modules": []},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 2**31,
    }


def join_processes(on_gpu: bool) -> dict[str, Any]:
    """Connect the processes of this run; returns the TrainingArguments this needs.

    accelerate offers gloo only without DeepSpeed. So on a CPU the process group and accelerate's state are created here, and
    the trainer uses them as they are.
    """
    if on_gpu:
        return {}
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed
    from accelerate import PartialState
    from accelerate.utils import DistributedType

    deepspeed.init_distributed(dist_backend="gloo")
    PartialState(cpu=True).distributed_type = DistributedType.DEEPSPEED
    return {"accelerator_config": {"use_configured_state": True}}


def mark_experts(model: Any) -> None:
    """Make stage 3 gather all parameters of an MoE layer at once, of ours and of transformers'.

    It records the order of modules in the first step, but which experts run differs by step and by rank.
    """
    from deepspeed.utils import set_z3_leaf_modules

    classes = {type(module) for module in model.modules() if hasattr(module, "experts")}
    if classes:
        set_z3_leaf_modules(model, list(classes))


@contextmanager
def whole(parameter: Any) -> Iterator[None]:
    """The full tensor of a parameter that stage 3 may have partitioned; every rank must enter."""
    if not hasattr(parameter, "ds_id"):
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter]):
        yield


def require_engine(trainer: Any) -> None:
    """Raise MmpipeError unless DeepSpeed runs the model over all processes.

    transformers and accelerate may fall back silently: to plain DDP, or to ranks that each train alone.
    """
    kind, wrapped = trainer.args.deepspeed, type(trainer.model_wrapped).__name__
    if (wrapped == "DeepSpeedEngine") != bool(kind):
        raise MmpipeError(
            f"the model runs in a {wrapped}, but the recipe asks for {'DeepSpeed' if kind else 'plain training'}; "
            "check the versions of deepspeed, accelerate and transformers"
        )
    world = int(os.environ.get("WORLD_SIZE", "1"))
    seen = {"accelerate": trainer.accelerator.num_processes, "the trainer": trainer.args.world_size}
    wrong = {name: count for name, count in seen.items() if count != world}
    if wrong:
        shown = ", ".join(f"{name} counts {count}" for name, count in wrong.items())
        raise MmpipeError(f"{world} processes were started, but {shown}; ranks would read the same data")


def forget() -> None:
    """Load later models unpartitioned: stage 3 would partition them."""
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()
