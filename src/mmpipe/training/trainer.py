"""The trainer: transformers' Trainer with our sampling, loss denominators, checkpoints and logs."""

from __future__ import annotations

import hashlib
import logging
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from mmpipe.data.dataset import Batch
from mmpipe.data.sampler import BatchPlan
from mmpipe.errors import MmpipeError
from mmpipe.models.schedule import set_progress
from mmpipe.models.trainable import learning_rate_groups
from mmpipe.stages.base import StageJob, TrainStage, share_batch
from mmpipe.training import deepspeed, resume, stop
from mmpipe.training.objectives.base import LossDenominators, Task
from mmpipe.training.progress import HISTORY, REPLACED, CollapseWatch, Progress

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class BatchSplit:
    """Split of a batch: ``micro`` samples per process and forward pass, ``accumulation`` passes per step."""

    micro: int
    accumulation: int


def split_batch(batch_size: int, processes: int, wanted: int | None, on_gpu: bool) -> BatchSplit:
    """Split ``batch_size`` exactly over ``processes``, at most ``wanted`` samples per forward pass.

    Raises ConfigError when the processes cannot share the batch evenly.
    """
    share = share_batch(batch_size, processes)
    most = min(share, wanted or (8 if on_gpu else share))
    micro = next(size for size in range(most, 0, -1) if share % size == 0)
    return BatchSplit(micro, share // micro)


def make_trainer(stage: TrainStage, job: StageJob, task: Task, dataset: Any, collator: Any) -> StageTrainer:
    """The trainer of a stage, not yet started.

    Raises ConfigError when the batch cannot be split, or the last checkpoint not be resumed, on this hardware.
    """
    layout = resume.ParallelLayout(deepspeed.usable(stage.hardware.deepspeed), int(os.environ.get("WORLD_SIZE", "1")))
    split = split_batch(stage.batch_size, layout.world, stage.hardware.micro_batch, job.gpus > 0)
    plan = BatchPlan(
        lengths=dataset.lengths,
        has_image=dataset.has_image,
        micro_batch=split.micro,
        accumulation=split.accumulation,
        world_size=layout.world,
        grouping=stage.grouping,
        seed=stage.seed,
    )
    steps = job.max_steps or stage.max_steps or max(1, round(stage.epochs * plan.steps_per_epoch))
    found = resume.last_checkpoint(job.state_dir / "checkpoints")
    if found:
        layout.require_resumable(found[0])
    start = found[1] if found else 0
    args = _arguments(stage, job, split, layout, steps)
    if stage.hardware.gradient_checkpointing:
        model: Any = task.model
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if args.world_size != layout.world:
        raise MmpipeError(f"started {layout.world} processes, but the trainer sees {args.world_size}")
    log.info(
        "%d steps of %d samples: %d process(es) x %d accumulated x %d%s; from step %d",
        *(steps, stage.batch_size, layout.world, split.accumulation, split.micro),
        *(f", {layout.engine}" if layout.engine else "", start),
    )
    batches = plan.batches(int(os.environ.get("RANK", "0")), start, steps - start)
    progress = Progress(job.state_dir / HISTORY, f"{job.recipe} {job.stage}", start)
    return StageTrainer(stage, task, args, dataset, collator, batches, layout, callbacks=[progress])


def _arguments(
    stage: TrainStage, job: StageJob, split: BatchSplit, layout: resume.ParallelLayout, steps: int
) -> TrainingArguments:
    """The trainer's arguments; learning rates and weight decay are set by :meth:`StageTrainer.create_optimizer`."""
    engine: dict[str, Any] = {"bf16": stage.precision == "bfloat16", "use_cpu": job.gpus == 0}
    optimizer = "adamw_torch"
    if layout.engine:  # DeepSpeed's own autocast gives the precision
        configuration = deepspeed.settings(layout.engine, stage, split.micro, split.accumulation, layout.world)
        if "offload_optimizer" in configuration["zero_optimization"]:
            optimizer = "adamw_torch_fused"  # moments in CPU RAM: the fused update runs on all cores
        engine = {"deepspeed": configuration, **deepspeed.join_processes(job.gpus > 0)}
    return TrainingArguments(
        output_dir=str(job.state_dir / "checkpoints"),
        max_steps=steps,
        per_device_train_batch_size=split.micro,
        gradient_accumulation_steps=split.accumulation,
        optim=optimizer,
        lr_scheduler_type=stage.schedule,
        # rounded up, as transformers does
        warmup_steps=math.ceil(stage.warmup_ratio * steps),
        adam_beta1=stage.adam_betas[0],
        adam_beta2=stage.adam_betas[1],
        max_grad_norm=stage.max_gradient_norm,
        seed=stage.seed,
        save_strategy="steps",
        save_steps=stage.hardware.checkpoint_every,
        save_total_limit=2,
        logging_strategy="steps",
        logging_steps=1,
        logging_nan_inf_filter=False,
        ignore_data_skip=True,
        dataloader_num_workers=stage.hardware.workers,
        include_num_input_tokens_seen="non_padding",
        remove_unused_columns=False,
        report_to="none",
        disable_tqdm=True,
        **engine,
    )


class StageTrainer(Trainer):
    """One optimizer loop for every stage.

    ``batches`` gives the micro batches of this process as index lists, from the step to start at to the end; the order
    is a pure function of seed, epoch and step, so resuming restores no state. Checkpoints hold the trainable parameters,
    the optimizer, the schedule and the random state; one is complete when it holds the file ``complete``.
    """

    def __init__(
        self,
        stage: TrainStage,
        task: Task,
        args: TrainingArguments,
        dataset: Dataset,
        collate: Any,
        batches: Any,
        layout: resume.ParallelLayout,
        **kwargs: Any,
    ) -> None:
        super().__init__(model=task, args=args, train_dataset=dataset, data_collator=collate, **kwargs)
        self.remove_callback(PrinterCallback)
        self.stage = stage
        self.task = task
        self.dataset = dataset
        self.batches = batches
        self.layout = layout
        self.add_callback(_EngineCheck(self))
        self.loss_is_scaled_for_ga = True
        self._sums: dict[str, Tensor] = {}
        self.collapse = CollapseWatch()
        if layout.engine:
            deepspeed.mark_experts(task)

    def train_to_end(self) -> None:
        """Train to the last step, from the last complete checkpoint if there is one."""
        found = resume.last_checkpoint(Path(str(self.args.output_dir)))
        if found and found[1] >= self.args.max_steps:
            # no step is left, so no engine has partitioned the parameters
            resume.load_trainable(self.task, found[0])
            self.state = type(self.state).load_from_json(str(found[0] / "trainer_state.json"))
            return
        self.train(resume_from_checkpoint=str(found[0]) if found else None)

    # --- data -------------------------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> DataLoader:
        return DataLoader(
            self.dataset,
            batch_sampler=self.batches,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=self.args.dataloader_num_workers > 0,
            worker_init_fn=stop.worker_init,
        )

    def _get_num_items_in_batch(  # type: ignore[override]
        self, batch_samples: list[Batch], device: torch.device
    ) -> dict[str, Tensor]:
        counted = [self.task.objective.counts(batch) for batch in batch_samples]
        totals = {name: torch.tensor(sum(c[name] for c in counted), device=device) for name in counted[0]}
        if self.args.world_size > 1:
            totals = {name: self.accelerator.gather(count).sum() for name, count in totals.items()}
        # a batch without supervised tokens contributes zero, not NaN
        return {name: count.clamp_min(1) for name, count in totals.items()}

    # --- loss -------------------------------------------------------------------------------------------------------

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        world = self.args.world_size
        set_progress(self.task.model, self.state.global_step / max(1, self.state.max_steps))
        denominators = LossDenominators(num_items_in_batch, self.current_gradient_accumulation_steps * world)
        for fault in inputs["replaced"]:
            log.warning("a record was replaced: %s", fault)
        replaced = torch.tensor(float(len(inputs["replaced"])), device=self.args.device)
        self._sums[REPLACED] = self._sums.get(REPLACED, torch.zeros_like(replaced)) + replaced
        where = f"step {self.state.global_step + 1}, records {', '.join(inputs['ids'])}"
        # dropout etc. depend on seed, step and records only: a resumed training draws the same
        digest = hashlib.sha256(f"{self.args.seed} {where}".encode()).digest()
        torch.manual_seed(int.from_bytes(digest[:7]))
        try:
            loss, metrics = model(inputs, denominators)
        except MmpipeError as error:
            raise type(error)(f"{where}: {error}") from error
        if not torch.isfinite(loss):
            raise MmpipeError(f"{where}: the loss is {loss.item()}; lower the learning rate, or look at these records")
        self.collapse.add(self.task.model)
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
            elif total[1] > 0:  # a mean, if this step had values to average
                logs[name] = (total[0] / total[1]).item()
        self._sums = {}
        if not logs.get(REPLACED, 1):  # logged only in steps that had such values
            del logs[REPLACED]
        logs |= self.collapse.metrics(self.state.global_step)
        super().log(logs, start_time)

    # --- optimizer --------------------------------------------------------------------------------------------------

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """AdamW over parameter groups, each with its own learning rate and weight decay."""
        if self.optimizer is None:
            kind, kwargs = self.get_optimizer_cls_and_kwargs(self.args)
            del kwargs["lr"]
            groups = learning_rate_groups(
                self.task.model,
                base=self.stage.learning_rate,
                others=self.stage.learning_rates,
                weight_decay=self.stage.weight_decay,
            )
            self.optimizer = kind(groups, **kwargs)
        return self.optimizer

    # --- checkpoints ------------------------------------------------------------------------------------------------

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the trainable parameters and the layout over processes."""
        folder = Path(output_dir or str(self.args.output_dir))
        resume.save_trainable(self.task, folder, self.layout, self.args.should_save)

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
        resume.load_trainable(self.task, Path(resume_from_checkpoint))

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        if self.args.world_size > 1:
            # complete only when every process has written its part
            self.accelerator.wait_for_everyone()
        if self.args.should_save:
            resume.mark_complete(Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}")


class _EngineCheck(TrainerCallback):
    """Checks before the first step that the wanted engine runs."""

    def __init__(self, trainer: StageTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        deepspeed.require_engine(self.trainer)
