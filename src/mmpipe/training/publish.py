"""Publishing a stage's checkpoint: files first, manifest last, nothing half-written."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mmpipe.artifacts import manifest
from mmpipe.artifacts.files import staged_directory
from mmpipe.checkpoints import roundtrip
from mmpipe.checkpoints.dummy_inputs import dummy_rows
from mmpipe.checkpoints.save import save_checkpoint
from mmpipe.models import lora, projector
from mmpipe.models.moe import hf
from mmpipe.models.moe.collect import moe_layers
from mmpipe.models.sparsity import hooks

if TYPE_CHECKING:
    from mmpipe.stages.base import Stage, StageJob

log = logging.getLogger(__name__)


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
    """Write model or projector, let a fresh process read a sparse or sparsified model back, then publish with a manifest.

    Adapters on the model are written on their own and merged first. ``facts`` says how the checkpoint is to be used
    (template, images, backbones); ``statements`` are further entries of the manifest. Raises ArtifactError when stock
    transformers computes something else from the files.
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
    """Let a fresh process read what is not plain: experts with stock classes, predictors with ours."""
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
