"""The trainer: transformers' own, told how we sample, weigh, save and log."""

from __future__ import annotations

import hashlib
import logging
import math
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from mmpipe.artifacts.files import read_json, sync, write_json
from mmpipe.errors import ConfigError, MmpipeError
from mmpipe.models.schedule import set_progress
from mmpipe.models.trainable import learning_rate_groups
from mmpipe.training import deepspeed, stop
from mmpipe.training.collapse import CollapseWatch
from mmpipe.training.objectives.base import Batch, Normaliser, Task

log = logging.getLogger(__name__)

WEIGHTS = "trainable.safetensors"
COMPLETE = "complete"
REPLACED = "records_replaced"
"""Of a step in the history, over all processes: records whose images could not be read, see
:class:`mmpipe.data.dataset.RecordDataset`."""
LAYOUT = "layout.json"


@dataclass(frozen=True)
class Layout:
    """How a training is spread: checkpoints of DeepSpeed can be resumed only as they were written."""

    engine: str | None
    """A kind of :mod:`mmpipe.training.deepspeed`; None for plain training."""
    world: int
    """Processes."""

    def require_resumable(self, checkpoint: Path) -> None:
        """Raise ConfigError when the optimizer's state in ``checkpoint`` cannot be read in this layout."""
        written = Layout(**read_json(checkpoint / LAYOUT)) if (checkpoint / LAYOUT).is_file() else Layout(None, 1)
        if written == self or (written.engine is None and self.engine is None):
            return
        raise ConfigError(
            f"{checkpoint}: written by {written}, and now the stage runs with {self}. DeepSpeed keeps the optimizer's state in "
            "pieces that fit no other number of processes or kind. Give the stage its former hardware until it is done, or "
            f"delete {checkpoint.parent} to train it afresh"
        )

    def __str__(self) -> str:
        return f"{self.world} process(es) with {self.engine or 'plain data parallelism'}"


class StageTrainer(Trainer):
    """One optimizer loop for every stage.

    ``batches`` gives the micro batches of this process as index lists, from the step to start at to the end; the order
    is a pure function of seed, epoch and step, so that resuming has nothing to restore. Checkpoints hold what trains,
    the optimizer, the schedule and the random state; one is complete when it carries the file ``complete``.
    """

    def __init__(
        self,
        task: Task,
        args: TrainingArguments,
        dataset: Dataset,
        collate: Any,
        batches: Any,
        learning_rates: dict[str, float],
        layout: Layout,
        **kwargs: Any,
    ) -> None:
        super().__init__(model=task, args=args, train_dataset=dataset, data_collator=collate, **kwargs)
        self.remove_callback(PrinterCallback)
        self.task = task
        self.dataset = dataset
        self.batches = batches
        self.learning_rates = learning_rates
        self.layout = layout
        self.add_callback(_Start(self))
        self.loss_is_scaled_for_ga = True
        self._sums: dict[str, Tensor] = {}
        self.collapse = CollapseWatch()
        if layout.engine:
            deepspeed.mark_experts(task)

    # --- data -------------------------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> DataLoader:
        return DataLoader(
            self.dataset,
            batch_sampler=self.batches,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=self.args.dataloader_num_workers > 0,
            worker_init_fn=stop.as_helper,
        )

    def _get_num_items_in_batch(  # type: ignore[override]
        self, batch_samples: list[Batch], device: torch.device
    ) -> dict[str, Tensor]:
        counted = [self.task.objective.counts(batch) for batch in batch_samples]
        totals = {name: torch.tensor(sum(c[name] for c in counted), device=device) for name in counted[0]}
        if self.args.world_size > 1:
            totals = {name: self.accelerator.gather(count).sum() for name, count in totals.items()}
        # a batch without supervised tokens contributes nothing, and not NaN
        return {name: count.clamp_min(1) for name, count in totals.items()}

    # --- loss -------------------------------------------------------------------------------------------------------

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        world = self.args.world_size
        set_progress(self.task.model, self.state.global_step / max(1, self.state.max_steps))
        normaliser = Normaliser(num_items_in_batch, self.current_gradient_accumulation_steps * world)
        for fault in inputs["replaced"]:
            log.warning("a record was replaced: %s", fault)
        replaced = torch.tensor(float(len(inputs["replaced"])), device=self.args.device)
        self._sums[REPLACED] = self._sums.get(REPLACED, torch.zeros_like(replaced)) + replaced
        where = f"step {self.state.global_step + 1}, records {', '.join(inputs['ids'])}"
        # dropout and the like follow from seed, step and records: who resumes draws the same
        digest = hashlib.sha256(f"{self.args.seed} {where}".encode()).digest()
        torch.manual_seed(int.from_bytes(digest[:7]))
        try:
            loss, metrics = model(inputs, normaliser)
        except MmpipeError as error:
            raise type(error)(f"{where}: {error}") from error
        if not torch.isfinite(loss):
            raise MmpipeError(f"{where}: the loss is {loss.item()}; lower the learning rate, or look at these records")
        self.collapse.see(self.task.model)
        for name, value in metrics.items():
            self._sums[name] = self._sums.get(name, torch.zeros((), device=value.device)) + value
        # gradients are averaged over processes, our sums are not
        return loss * world

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        # every step is logged, so the sums are those of one step
        for name, total in self._sums.items():
            if self.args.world_size > 1:
                total = self.accelerator.gather(total[None]).sum(0)
            if total.ndim == 0:
                logs[name] = total.item()
            elif total[1] > 0:  # a mean over something that this step had
                logs[name] = (total[0] / total[1]).item()
        self._sums = {}
        if not logs.get(REPLACED, 1):  # only steps that had some say so
            del logs[REPLACED]
        logs |= self.collapse.take(self.state.global_step)
        super().log(logs, start_time)

    # --- optimizer --------------------------------------------------------------------------------------------------

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            kind, kwargs = self.get_optimizer_cls_and_kwargs(self.args)
            groups = learning_rate_groups(
                self.task.model,
                base=self.args.learning_rate,
                others=self.learning_rates,
                weight_decay=self.args.weight_decay,
            )
            self.optimizer = kind(groups, **kwargs)
        return self.optimizer

    # --- checkpoints ------------------------------------------------------------------------------------------------

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write what trains, and how the training is spread."""
        folder = Path(output_dir or str(self.args.output_dir))
        tensors = trainable_state(self.task, keep=self.args.should_save)
        if self.args.should_save:
            folder.mkdir(parents=True, exist_ok=True)
            save_file(tensors, folder / WEIGHTS)
            write_json(folder / LAYOUT, asdict(self.layout))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.layout.engine:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        engine: Any = self.model_wrapped
        engine.save_checkpoint(output_dir, exclude_frozen_parameters=True)
        schedule: Any = self.lr_scheduler
        if self.args.should_save:
            torch.save(schedule.state_dict(), Path(output_dir, "scheduler.pt"))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        load_trainable(self.task, Path(resume_from_checkpoint))

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        if self.args.world_size > 1:
            # complete only when every process has written its share
            self.accelerator.wait_for_everyone()
        if self.args.should_save:
            folder = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
            for path in sorted(folder.rglob("*")):
                sync(path)
            (folder / COMPLETE).touch()
            sync(folder)


class _Start(TrainerCallback):
    """What must hold before the first step."""

    def __init__(self, trainer: StageTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        deepspeed.require_engine(self.trainer)


def trainable_state(task: Task, keep: bool = True) -> dict[str, Tensor]:
    """The parameters that train, by name, on the CPU; a tensor shared by two names is kept once.

    Every process must call it when they are spread over processes; those with ``keep`` false get nothing.
    """
    state = {}
    for name, parameter in task.model.named_parameters():
        if parameter.requires_grad:
            with deepspeed.whole(parameter):
                if keep:
                    state[name] = parameter.detach().to("cpu", copy=True).contiguous()
    return state


def trainable_bytes(task: Task) -> int:
    """Size of what trains."""
    return sum(p.numel() * p.element_size() for p in task.model.parameters() if p.requires_grad)


def load_trainable(task: Task, checkpoint: Path) -> None:
    """Put a checkpoint's parameters back; names and shapes must match exactly."""
    put_trainable(task.model, load_file(checkpoint / WEIGHTS), where=str(checkpoint))


def put_trainable(model: Any, tensors: Mapping[str, Tensor], where: str) -> None:
    """Give the parameters that train new values; names and shapes must match exactly."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if parameters.keys() != tensors.keys():
        raise MmpipeError(
            f"{where}: the checkpoint holds other parameters than this stage trains; delete the stage's folder 'state'"
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])


def last_checkpoint(folder: Path) -> tuple[Path, int] | None:
    """The newest complete checkpoint and its step."""
    found = [
        (int(path.name.removeprefix("checkpoint-")), path)
        for path in folder.glob("checkpoint-*")
        if (path / COMPLETE).is_file()
    ]
    return (max(found)[1], max(found)[0]) if found else None


def drop_checkpoints(folder: Path) -> None:
    """Remove all checkpoints. Their marks go first: a kill in between must not leave one that looks complete and is not."""
    for mark in folder.glob(f"checkpoint-*/{COMPLETE}"):
        mark.unlink()
    shutil.rmtree(folder, ignore_errors=True)


def warmup_steps(ratio: float, steps: int) -> int:
    """Warm-up steps for a share of the run, rounded up as transformers does."""
    return math.ceil(ratio * steps)
