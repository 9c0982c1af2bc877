"""Running one training stage: model and data in, trainer, published checkpoint out."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments, set_seed

from mmpipe import slurm
from mmpipe.artifacts import manifest
from mmpipe.artifacts.files import read_json, read_jsonl, write_json, write_text
from mmpipe.artifacts.state import open_state
from mmpipe.checkpoints.load import build_model, open_checkpoint, preprocessor_directory, projector_base
from mmpipe.data.sampler import BatchPlan
from mmpipe.data.tokens import TokenTable
from mmpipe.errors import ConfigError, MmpipeError, first_of
from mmpipe.models import attention, lora
from mmpipe.models.llava import make_processor
from mmpipe.models.trainable import select
from mmpipe.models.vision_tower import freeze_idle
from mmpipe.stages.base import StageJob, TrainStage
from mmpipe.training import deepspeed, launch, stop
from mmpipe.training.objectives.base import Task
from mmpipe.training.progress import Progress
from mmpipe.training.publish import publish
from mmpipe.training.trainer import (
    REPLACED,
    Layout,
    StageTrainer,
    drop_checkpoints,
    last_checkpoint,
    load_trainable,
    put_trainable,
    trainable_bytes,
    trainable_state,
    warmup_steps,
)

log = logging.getLogger(__name__)

HISTORY = "history.jsonl"


def train(stage: TrainStage, job: StageJob) -> None:
    """Train one stage and publish its checkpoint, going on from the last checkpoint in progress if there is one."""
    inputs = manifest.input_hashes(list(job.manifests))
    limits = {"max_steps": str(job.max_steps)} if job.max_steps else {}
    with open_state(job.state_dir, manifest.fingerprint(job.spec, inputs | limits)) as resumable:
        log.info("%s %s: %s", job.recipe, job.stage, "resuming" if resumable else "starting afresh")
        (job.state_dir / stop.RECORD).unlink(missing_ok=True)
        launch.run(stage, job)
        _require_finished(job)
        drop_checkpoints(job.state_dir / "checkpoints")


def _require_finished(job: StageJob) -> None:
    """Raise Stopped when training stopped early; a job whose time is up puts itself back into Slurm's queue."""
    record = job.state_dir / stop.RECORD
    if not record.is_file():
        return
    stopped = read_json(record)
    message = f"{job.recipe} {job.stage}: stopped at step {stopped['step']} ({stopped['reason']}) with a checkpoint; "
    slurm_job = slurm.job_id()
    if stopped["reason"] == stop.TIME_LIMIT and slurm_job and slurm.requeue(slurm_job):
        raise stop.Stopped(f"{message}Slurm runs the job again, and it goes on from there")
    raise stop.Stopped(f"{message}run the same command again, and it goes on from there")


def work(stage: TrainStage, job: StageJob, requests: stop.Requests) -> None:
    """The work of one process: train, and publish where this is the first one."""
    # the processes of a machine share its cores, and data-loading processes take one each
    cores = job.threads // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    torch.set_num_threads(max(1, cores - stage.hardware.workers))
    if stage.hardware.tf32 and job.gpus:
        torch.set_float32_matmul_precision("high")
    set_seed(stage.seed)
    model, processor = untrained_model(stage, job)
    attention.use(model, _attention(stage, job))
    if job.tokens is None:
        raise ConfigError(f"{job.recipe}: {job.stage}: the stage needs 'data', a mixture to train on")
    tokens = TokenTable(job.tokens)
    share = tokens.require(processor.tokenizer, model.config.image_seq_length, minimum=stage.minimum_supervised)
    log.info("%d records; %.1f %% of the text tokens are supervised", len(tokens), 100 * share)
    dataset = stage.dataset(tokens, processor.image_processor)
    trainer = make_trainer(stage, job, model, processor, dataset)
    stopper = stop.make_callback(requests, job.state_dir, job.end_time, 3 * trainable_bytes(trainer.task))
    trainer.add_callback(stopper)
    run_trainer(trainer, job)
    if stopper.reason:
        if trainer.is_world_process_zero():
            record = {"step": trainer.state.global_step, "reason": stopper.reason}
            write_json(job.state_dir / stop.RECORD, record)
        return
    model = trained_model(stage, job, model, trainer)
    if trainer.is_world_process_zero():
        finish(stage, job, model, processor, trainer)


def _attention(stage: TrainStage, job: StageJob) -> str:
    dtype = torch.bfloat16 if stage.precision == "bfloat16" else torch.float32
    return attention.choose(stage.hardware.attention, "cuda" if job.gpus else "cpu", dtype)


def trained_model(stage: TrainStage, job: StageJob, model: Any, trainer: StageTrainer) -> Any:
    """The model with what was learnt, ready to be published by the first process.

    DeepSpeed's stage 3 leaves only fragments in the model. So with DeepSpeed the first process takes a fresh model and puts
    what was trained into it; what was frozen is what it was by construction.
    """
    if trainer.layout.engine is None:
        attention.use(model, "sdpa")
        return model
    learnt = trainable_state(trainer.task, keep=trainer.is_world_process_zero())
    if not trainer.is_world_process_zero():
        return None
    deepspeed.forget()
    fresh, _ = untrained_model(stage, job)
    put_trainable(fresh, learnt, where=f"{job.recipe} {job.stage}")
    return fresh


def untrained_model(stage: TrainStage, job: StageJob) -> tuple[Any, Any]:
    """The model before the first step, with what trains chosen, and its processor."""
    model, processor = starting_model(stage, job)
    stage.prepare(model, job)
    if stage.lora:
        lora.add_adapters(model, stage.lora, stage.seed)
    select(model, stage.trains())
    if idle := freeze_idle(model):
        log.info("not trained, for nothing reads it: %s of the vision tower", first_of(idle))
    return model, processor


def starting_model(stage: TrainStage, job: StageJob) -> tuple[Any, Any]:
    """The model a stage starts from with the processor it will publish."""
    if job.parent is None:
        return build_model(
            job.backbones,
            job.vision_language,
            layouts=job.layouts,
            template=stage.template,
            image_aspect=stage.image_aspect,
            seed=stage.seed,
        )
    model, processor, card = open_checkpoint(job.parent)
    processor = make_processor(
        processor.tokenizer,
        preprocessor_directory(job.parent, card),
        model.config,
        template=stage.template,
        image_aspect=stage.image_aspect,
    )
    return model, processor


@dataclass(frozen=True)
class Split:
    """How a batch is cut: ``micro`` samples a process computes at once, ``accumulation`` times a step."""

    micro: int
    accumulation: int


def split_batch(batch_size: int, processes: int, wanted: int | None, on_gpu: bool) -> Split:
    """Cut ``batch_size`` over ``processes``, at most ``wanted`` samples at once, keeping the batch exactly.

    Raises ConfigError when the processes cannot share the batch evenly.
    """
    share, rest = divmod(batch_size, processes)
    if rest or share == 0:
        raise ConfigError(
            f"a batch of {batch_size} cannot be shared evenly by {processes} processes; "
            "change hardware.gpus (or nodes), or batch_size (which changes the result)"
        )
    most = min(share, wanted or (8 if on_gpu else share))
    micro = next(size for size in range(most, 0, -1) if share % size == 0)
    return Split(micro, share // micro)


def make_trainer(stage: TrainStage, job: StageJob, model: Any, processor: Any, dataset: Any) -> StageTrainer:
    """The trainer of a stage, not yet started."""
    # before the trainer's arguments: with stage 3 in them, transformers would spread every model that is loaded, the
    # teacher's too
    task = Task(model, stage.objective(job, model, processor))
    world = int(os.environ.get("WORLD_SIZE", "1"))
    kind = launch.zero_kind(stage)
    split = split_batch(stage.batch_size, world, stage.hardware.micro_batch, job.gpus > 0)
    plan = BatchPlan(
        lengths=dataset.lengths,
        has_image=dataset.has_image,
        micro_batch=split.micro,
        accumulation=split.accumulation,
        world_size=world,
        grouping=stage.grouping,
        seed=stage.seed,
    )
    steps = job.max_steps or stage.max_steps or max(1, round(stage.epochs * plan.steps_per_epoch))
    size = model.config.vision_config.image_size
    checkpoints = job.state_dir / "checkpoints"
    layout = Layout(kind, world)
    found = last_checkpoint(checkpoints)
    if found:
        layout.require_resumable(found[0])
    special = _deepspeed(stage, job, kind, split, world) if kind else _plain(stage, job)
    args = TrainingArguments(
        output_dir=str(checkpoints),
        max_steps=steps,
        per_device_train_batch_size=split.micro,
        gradient_accumulation_steps=split.accumulation,
        learning_rate=stage.learning_rate,
        lr_scheduler_type=stage.schedule,
        warmup_steps=warmup_steps(stage.warmup_ratio, steps),
        weight_decay=stage.weight_decay,
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
        **special,
    )
    if stage.hardware.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if args.world_size != world:
        raise MmpipeError(f"started {world} processes, but the trainer sees {args.world_size}")
    start = found[1] if found else 0
    log.info(
        "%d steps of %d samples: %d process(es) x %d accumulated x %d%s; from step %d",
        steps, stage.batch_size, world, split.accumulation, split.micro, f", {kind}" if kind else "", start,
    )  # fmt: skip
    return StageTrainer(
        task,
        args,
        dataset,
        stage.collator(processor.tokenizer.pad_token_id, (size, size)),
        plan.batches(int(os.environ.get("RANK", "0")), start, steps - start),
        learning_rates=stage.learning_rates,
        layout=layout,
        callbacks=[Progress(job.state_dir / HISTORY, f"{job.recipe} {job.stage}", start)],
    )


def _plain(stage: TrainStage, job: StageJob) -> dict[str, Any]:
    """What the trainer is told without DeepSpeed."""
    return {"optim": "adamw_torch", "bf16": stage.precision == "bfloat16", "use_cpu": job.gpus == 0}


def _deepspeed(stage: TrainStage, job: StageJob, kind: str, split: Split, world: int) -> dict[str, Any]:
    """What the trainer is told with DeepSpeed, whose own autocast gives the precision."""
    configuration = deepspeed.settings(
        kind,
        micro_batch=split.micro,
        accumulation=split.accumulation,
        world=world,
        clipping=stage.max_gradient_norm,
        precision=stage.precision,
    )
    offloaded = "offload_optimizer" in configuration["zero_optimization"]
    return {
        # moments in main memory: the fused update runs on all cores
        "optim": "adamw_torch_fused" if offloaded else "adamw_torch",
        "deepspeed": configuration,
        **deepspeed.join_processes(job.gpus > 0),
    }


def run_trainer(trainer: StageTrainer, job: StageJob) -> None:
    """Train to the end, from the last complete checkpoint if there is one."""
    found = last_checkpoint(job.state_dir / "checkpoints")
    if found and found[1] >= trainer.args.max_steps:
        # nothing is left to train, so no engine has spread the parameters
        load_trainable(trainer.task, found[0])
        trainer.state = type(trainer.state).load_from_json(str(found[0] / "trainer_state.json"))
        return
    trainer.train(resume_from_checkpoint=str(found[0]) if found else None)


def finish(stage: TrainStage, job: StageJob, model: Any, processor: Any, trainer: StageTrainer) -> None:
    """Publish the trained checkpoint, and what the report shows of the training."""
    job.report_dir.mkdir(parents=True, exist_ok=True)
    write_text(job.report_dir / HISTORY, (job.state_dir / HISTORY).read_text(encoding="utf-8"))
    perf = job.state_dir / "perf.json"
    if perf.is_file():
        write_json(job.report_dir / "perf.json", read_json(perf))
    replaced = records_replaced(job.report_dir / HISTORY)
    if replaced:
        log.warning("%d times a record could not be read and another took its place", replaced)
    publish(
        stage,
        job,
        model,
        processor,
        facts={"template": stage.template, "image_aspect": stage.image_aspect, **_foundation(stage, job)},
        llava_projector=stage.llava_projector,
        steps=trainer.state.global_step,
        tokens_seen=int(trainer.state.num_input_tokens_seen),
        records_replaced=replaced,
    )


def records_replaced(history: Path) -> int:
    """How often in a training, resumed or not, another record took the place of one that could not be read."""
    return round(sum(row.get(REPLACED, 0) for row in read_jsonl(history)))


def _foundation(stage: TrainStage, job: StageJob) -> dict[str, Any]:
    """What the model stands on; a projector published alone is put back there."""
    if stage.PUBLISHES == "projector" and job.parent is not None:
        return projector_base(job.parent, manifest.read(job.parent))
    return {"backbones": {role: path.as_posix() for role, path in job.backbones.items()}}
