"""DeepSpeed's ZeRO: optimizer states, gradients and (stage 3) parameters spread over the processes.

One JSON file here is one way to do it, and its name is what a recipe says (``hardware: {deepspeed: zero2}``). Everything that
could change a result (batch, clipping, precision, optimizer, schedule) comes from the stage: parameters stay in float32 and
compute under autocast, exactly as without DeepSpeed, so that only the rounding of sums tells the two apart.

This module is read while planning: torch and deepspeed are imported inside the functions.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mmpipe.artifacts.files import read_json
from mmpipe.errors import MmpipeError

log = logging.getLogger(__name__)

_ZERO = Path(__file__).parent.parent / "stages/zero"


def kinds() -> list[str]:
    """The names a recipe can give."""
    return sorted(path.stem for path in _ZERO.glob("*.json"))


def installed() -> bool:
    """Whether DeepSpeed can be used here."""
    return importlib.util.find_spec("deepspeed") is not None


def optimization(kind: str) -> dict[str, Any]:
    """What a kind spreads: ``stage``, and ``offload_optimizer`` and ``offload_param`` where they wait in main memory."""
    chosen: dict[str, Any] = read_json(_ZERO / f"{kind}.json")["zero_optimization"]
    return chosen


def settings(
    kind: str, *, micro_batch: int, accumulation: int, world: int, clipping: float, precision: str
) -> dict[str, Any]:
    """DeepSpeed's configuration for one run; nothing in it is ``auto``."""
    chosen: dict[str, Any] = read_json(_ZERO / f"{kind}.json")
    return chosen | {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation,
        "train_batch_size": micro_batch * accumulation * world,
        "gradient_clipping": clipping,
        # what is sent between processes stays in float32: no module is "safe" for less
        "torch_autocast": {"enabled": precision == "bfloat16", "dtype": "bfloat16", "lower_precision_safe_modules": []},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 2**31,
    }


def join_processes(on_gpu: bool) -> dict[str, Any]:
    """Connect the processes of this run; returns what TrainingArguments must be told.

    accelerate knows gloo only without DeepSpeed. So on a CPU the process group and accelerate's state are made here, and the
    trainer is told to take them as they are.
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
    """Let stage 3 fetch all parameters of a layer of experts at once, ours and transformers' own.

    It learns the order of modules in the first step, and which experts run differs from step to step and from rank to rank.
    """
    from deepspeed.utils import set_z3_leaf_modules

    classes = {type(module) for module in model.modules() if hasattr(module, "experts")}
    if classes:
        set_z3_leaf_modules(model, list(classes))


@contextmanager
def whole(parameter: Any) -> Iterator[None]:
    """The full tensor of a parameter that stage 3 may have spread; every rank must enter."""
    if not hasattr(parameter, "ds_id"):
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter]):
        yield


def require_engine(trainer: Any) -> None:
    """Raise MmpipeError unless DeepSpeed really runs the model over all processes.

    transformers and accelerate can fall back without a word: to plain DDP, or to ranks that all believe to be the only one.
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
    """End stage 3's hold on models that are loaded from now on."""
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()
