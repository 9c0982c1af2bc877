"""Resumable checkpoints: trainable parameters, and the layout over processes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mmpipe.artifacts.files import apply_umask, read_json, sync, write_json
from mmpipe.artifacts.state import COMPLETE
from mmpipe.errors import ConfigError, MmpipeError
from mmpipe.training import deepspeed
from mmpipe.training.objectives.base import Task

WEIGHTS = "trainable.safetensors"
LAYOUT = "layout.json"


@dataclass(frozen=True)
class ParallelLayout:
    """The layout of a training over processes: a DeepSpeed checkpoint can be resumed only with its own."""

    engine: str | None
    """A kind of :mod:`mmpipe.stages.zero`; None for plain training."""
    world: int
    """Processes."""

    def require_resumable(self, checkpoint: Path) -> None:
        """Raise ConfigError when the optimizer's state in ``checkpoint`` cannot be read in this layout."""
        written = ParallelLayout(None, 1)
        if (checkpoint / LAYOUT).is_file():
            written = ParallelLayout(**read_json(checkpoint / LAYOUT))
        if written == self or (written.engine is None and self.engine is None):
            return
        raise ConfigError(
            f"{checkpoint}: written by {written}, and now the stage runs with {self}. DeepSpeed keeps the optimizer's state in "
            "pieces that fit no other number of processes or kind. Give the stage its former hardware until it is done, or "
            f"delete {checkpoint.parent} to train it afresh"
        )

    def __str__(self) -> str:
        return f"{self.world} process(es) with {self.engine or 'plain data parallelism'}"


def trainable_state(task: Task, keep: bool = True) -> dict[str, Tensor]:
    """The trainable parameters by name, on the CPU; a tensor with two names is included once.

    Every process must call it when parameters are partitioned; those with ``keep`` false get nothing.
    """
    state = {}
    for name, parameter in task.model.named_parameters():
        if parameter.requires_grad:
            with deepspeed.whole(parameter):
                if keep:
                    state[name] = parameter.detach().to("cpu", copy=True).contiguous()
    return state


def trainable_bytes(task: Task) -> int:
    """Size of the trainable parameters."""
    return sum(p.numel() * p.element_size() for p in task.model.parameters() if p.requires_grad)


def save_trainable(task: Task, folder: Path, layout: ParallelLayout, writes: bool) -> None:
    """Write the trainable parameters and the layout, in the process that ``writes``; every process must call it."""
    tensors = trainable_state(task, keep=writes)
    if writes:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, folder / WEIGHTS)
        write_json(folder / LAYOUT, asdict(layout))


def load_trainable(task: Task, checkpoint: Path) -> None:
    """Load a checkpoint's parameters; names and shapes must match exactly."""
    set_trainable(task.model, load_file(checkpoint / WEIGHTS), where=str(checkpoint))


def set_trainable(model: Any, tensors: Mapping[str, Tensor], where: str) -> None:
    """Overwrite the trainable parameters. Raises MmpipeError, opened by ``where``, when the names differ."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if parameters.keys() != tensors.keys():
        raise MmpipeError(
            f"{where}: the checkpoint holds other parameters than this stage trains; delete the stage's folder 'state'"
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])


def mark_complete(folder: Path) -> None:
    """Sync all files of a checkpoint to the disk, then write the file that marks it as complete."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            apply_umask(path)
        sync(path)
    (folder / COMPLETE).touch()
    sync(folder)


def last_checkpoint(folder: Path) -> tuple[Path, int] | None:
    """The newest complete checkpoint and its step."""
    steps = [int(mark.parent.name.removeprefix("checkpoint-")) for mark in folder.glob(f"checkpoint-*/{COMPLETE}")]
    return (folder / f"checkpoint-{max(steps)}", max(steps)) if steps else None
