"""Running a stage: from settings and inputs to a published checkpoint."""

from __future__ import annotations

import logging
import os
import sys
from typing import Any

import torch
from transformers import set_seed

from mmpipe.artifacts import manifest
from mmpipe.artifacts.builds import guard_builds
from mmpipe.artifacts.state import noticing_a_kill, open_state
from mmpipe.checkpoints.load import build_model, open_checkpoint, preprocessor_directory
from mmpipe.data.tokens import TokenTable
from mmpipe.errors import ConfigError, first_of
from mmpipe.models import attention, lora
from mmpipe.models.llava import greedy_generation, make_processor
from mmpipe.models.trainable import select
from mmpipe.models.vision_tower import freeze_unused
from mmpipe.stages.base import Stage, StageJob, TrainStage
from mmpipe.stages.construct import Construct
from mmpipe.stages.upcycle import Upcycle
from mmpipe.training import deepspeed, launch, resume, stop
from mmpipe.training.construct import construct_stage
from mmpipe.training.objectives import objective_class
from mmpipe.training.objectives.base import Task
from mmpipe.training.publish import publish_trained
from mmpipe.training.trainer import StageTrainer, make_trainer
from mmpipe.training.upcycle import upcycle_stage

log = logging.getLogger(__name__)


def run_stage(stage: Stage, job: StageJob) -> None:
    """Run a stage and publish its checkpoint."""
    match stage:
        case Construct():
            construct_stage(stage, job)
        case Upcycle():
            upcycle_stage(stage, job)
        case TrainStage():
            train(stage, job)
        case _:
            raise TypeError(f"{type(stage).__name__}: a stage without anything to run")


def train(stage: TrainStage, job: StageJob) -> None:
    """Train one stage and publish its checkpoint; training resumes from the last complete checkpoint in its state.

    Raises Stopped when training was asked to stop before its end.
    """
    inputs = manifest.input_hashes(list(job.manifests))
    limits = {"max_steps": str(job.max_steps)} if job.max_steps else {}
    with open_state(job.state_dir, manifest.fingerprint(job.spec, inputs | limits)) as resumable:
        log.info("%s %s: %s", job.recipe, job.stage, "resuming" if resumable else "starting afresh")
        (job.state_dir / stop.RECORD).unlink(missing_ok=True)
        with noticing_a_kill(job.state_dir, _warn):
            launch.run(stage, job, work)
        stop.require_finished(job)


def _warn(text: str) -> None:
    """To the log, and to the terminal: a killed process has left the user without a reason."""
    log.warning("%s", text)
    print(f"mmpipe: {text}", file=sys.stderr)


def work(stage: TrainStage, job: StageJob, stop_signal: stop.StopSignal) -> None:
    """The work of one process: train, and publish where this is the first one."""
    _set_up_process(stage, job)
    if deepspeed.usable(stage.hardware.deepspeed):
        guard_builds(lambda: stop_signal.leave_if_signalled(job.state_dir))
    model, processor = untrained_model(stage, job)
    dtype = torch.bfloat16 if stage.precision == "bfloat16" else torch.float32
    attention.use(model, attention.choose(stage.hardware.attention, "cuda" if job.gpus else "cpu", dtype))
    tokens = open_tokens(stage, job, model, processor)
    kind = objective_class(stage)
    dataset = kind.dataset(stage, tokens, processor.image_processor)
    # before the trainer's arguments: with ZeRO stage 3 in them, transformers would partition every model that is loaded,
    # the teacher's too
    task = Task(model, kind.create(stage, job, model, processor))
    size = model.config.vision_config.image_size
    collator = kind.COLLATOR(processor.tokenizer.pad_token_id, (size, size))
    trainer = make_trainer(stage, job, task, dataset, collator)
    stopper = stop.make_callback(stop_signal, job.state_dir, job.end_time, 3 * resume.trainable_bytes(task))
    trainer.add_callback(stopper)
    trainer.train_to_end()
    if stopper.reason:
        return
    trained = trained_model(stage, job, model, trainer)
    if trainer.is_world_process_zero():
        publish_trained(stage, job, trained, processor, trainer.state)


def _set_up_process(stage: TrainStage, job: StageJob) -> None:
    """Threads, precision of matrix products, seed."""
    # the processes of a machine share its cores, and each data-loading process takes one
    cores = job.threads // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    torch.set_num_threads(max(1, cores - stage.hardware.workers))
    if stage.hardware.tf32 and job.gpus:
        torch.set_float32_matmul_precision("high")
    set_seed(stage.seed)


def untrained_model(stage: TrainStage, job: StageJob) -> tuple[Any, Any]:
    """The model before the first step, with ``requires_grad`` set on trainable parameters, and its processor."""
    model, processor = _starting_model(stage, job)
    objective_class(stage).prepare(stage, job, model)
    if stage.lora:
        lora.add_adapters(model, stage.lora, stage.seed)
    select(model, stage.trains())
    if unused := freeze_unused(model):
        log.info("not trained, the projected features do not depend on it: %s of the vision tower", first_of(unused))
    return model, processor


def _starting_model(stage: TrainStage, job: StageJob) -> tuple[Any, Any]:
    """The parent's model, or a new one from the backbones, with the processor that will be published."""
    reading: dict[str, Any] = {"template": stage.template, "image_aspect": stage.image_aspect}
    if job.parent is None:
        return build_model(job.backbones, job.vision_language, layouts=job.layouts, seed=stage.seed, **reading)
    model, processor, card = open_checkpoint(job.parent)
    preprocessor = preprocessor_directory(job.parent, card)
    model.generation_config = greedy_generation(model.generation_config, processor.tokenizer, stage.template)
    return model, make_processor(processor.tokenizer, preprocessor, model.config, **reading)


def open_tokens(stage: TrainStage, job: StageJob, model: Any, processor: Any) -> TokenTable:
    """The tokenised mixture. Raises ConfigError without one, DataError when it does not fit the model or the template."""
    if job.tokens is None:
        raise ConfigError(f"{job.recipe}: {job.stage}: the stage needs 'data', a mixture to train on")
    tokens = TokenTable(job.tokens)
    share = tokens.require(processor.tokenizer, model.config.image_seq_length, minimum=stage.min_supervised_fraction)
    log.info("%d records; %.1f %% of the text tokens are supervised", len(tokens), 100 * share)
    return tokens


def trained_model(stage: TrainStage, job: StageJob, model: Any, trainer: StageTrainer) -> Any:
    """The trained model, ready to be published by the first process; None in others under DeepSpeed.

    ZeRO stage 3 leaves only partitions in the model. So with DeepSpeed the first process builds the model again and loads
    the trained parameters; the frozen ones are as they were built.
    """
    if trainer.layout.engine is None:
        attention.use(model, "sdpa")
        return model
    trained = resume.trainable_state(trainer.task, keep=trainer.is_world_process_zero())
    if not trainer.is_world_process_zero():
        return None
    deepspeed.forget()
    fresh, _ = untrained_model(stage, job)
    resume.set_trainable(fresh, trained, where=f"{job.recipe} {job.stage}")
    return fresh
