"""Publishing a stage's checkpoint atomically: files first, manifest last."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch

from mmpipe.artifacts import manifest
from mmpipe.artifacts.files import read_json, read_jsonl, staged_directory, write_json, write_text
from mmpipe.checkpoints import roundtrip
from mmpipe.checkpoints.dummy_inputs import dummy_rows
from mmpipe.checkpoints.load import projector_base
from mmpipe.checkpoints.save import save_checkpoint
from mmpipe.models import lora, projector
from mmpipe.models.moe import hf
from mmpipe.models.moe.collect import moe_layers
from mmpipe.models.sparsity import hooks
from mmpipe.stages.base import Stage, StageJob, TrainStage
from mmpipe.training.progress import HISTORY, REPLACED

log = logging.getLogger(__name__)


def publish_trained(stage: TrainStage, job: StageJob, model: Any, processor: Any, state: Any) -> None:
    """Publish a trained checkpoint, and the history and speed of its training beside the report.

    ``state`` is the trainer's state at the end.
    """
    job.report_dir.mkdir(parents=True, exist_ok=True)
    write_text(job.report_dir / HISTORY, (job.state_dir / HISTORY).read_text(encoding="utf-8"))
    perf = job.state_dir / "perf.json"
    if perf.is_file():
        write_json(job.report_dir / "perf.json", read_json(perf))
    # over all steps, also those before an interruption
    replaced = round(sum(row.get(REPLACED, 0) for row in read_jsonl(job.report_dir / HISTORY)))
    if replaced:
        log.warning("%d times a record could not be read and another took its place", replaced)
    if stage.PUBLISHES == "projector" and job.parent is not None:
        base = projector_base(job.parent, manifest.read(job.parent, hashed=False))
    else:
        base = {"backbones": {role: path.as_posix() for role, path in job.backbones.items()}}
    publish(
        stage,
        job,
        model,
        processor,
        facts={"template": stage.template, "image_aspect": stage.image_aspect, **base},
        llava_projector=stage.llava_projector,
        steps=state.global_step,
        tokens_seen=int(state.num_input_tokens_seen),
        records_replaced=replaced,
    )


def publish(
    stage: Stage,
    job: StageJob,
    model: Any,
    processor: Any,
    *,
    facts: dict[str, Any],
    llava_projector: bool = False,
    **statements: Any,
) -> None:
    """Write model or projector, read a sparse or sparsified model back in a new process, then publish with a manifest.

    Adapters are written separately and merged first. ``facts`` are how the checkpoint is used (template, images,
    backbones), ``statements`` further entries of the manifest. Raises ArtifactError when the model read back gives
    other logits.
    """
    model.eval()
    with staged_directory(job.model_dir) as out:
        if lora.has_adapters(model):
            lora.save(model, out / lora.FOLDER, base=str(job.parent or ""))
            lora.merge(model)
        if stage.PUBLISHES == "model":
            save_checkpoint(model, processor, out)
            _read_back(model, out)
        projector.save(model, out / projector.FILE)
        if llava_projector:
            projector.save_llava_bin(model, out / "mm_projector.bin")
        manifest.write(
            out,
            kind=stage.PUBLISHES,
            spec=job.spec,
            inputs=manifest.input_hashes(list(job.manifests)),
            recipe=job.recipe,
            stage=job.stage,
            seed=stage.seed,
            smoke=job.max_steps is not None,
            checkpoint=facts,
            **statements,
        )
    log.info("published %s", job.model_dir)


def _read_back(model: Any, out: Path) -> None:
    """Read the files back in a new process: experts with transformers' classes, predictors with ours."""
    with_experts = bool(moe_layers(model)) and hf.why_not_stock(model) is None
    sparsified = hooks.get_sparsifier(model) is not None
    if with_experts or sparsified:
        model.to("cpu", torch.float32)
    if with_experts:
        with hooks.without_sparsity(model):
            expected = roundtrip.reference(model, dummy_rows(model))
        difference = roundtrip.check_roundtrip(out, expected)
        log.info("read back by stock transformers: largest difference of logits %.3g", difference)
    if sparsified:
        difference = roundtrip.check_roundtrip(out, roundtrip.reference(model, dummy_rows(model)), reader="mmpipe")
        log.info("read back with its predictors: largest difference of logits %.3g", difference)
