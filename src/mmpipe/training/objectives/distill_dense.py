"""Mimic distillation: the student learns from a frozen teacher, run live or with precomputed log-probabilities."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from mmpipe.checkpoints.load import open_checkpoint
from mmpipe.data.dataset import Batch
from mmpipe.data.images import pixel_settings, require_same_pixels
from mmpipe.errors import ConfigError
from mmpipe.losses import positions
from mmpipe.losses.distillation import (
    DistilledTokens,
    cached_distillation_loss,
    compose,
    distillation_loss,
    sampled_distillation_loss,
)
from mmpipe.losses.language_modelling import language_modelling_loss
from mmpipe.losses.teacher import shared_rows
from mmpipe.models import attention, llava
from mmpipe.stages.base import StageJob
from mmpipe.stages.distill_dense import DistillDense
from mmpipe.training.objectives import base
from mmpipe.training.precomputed import PrecomputedLogProbs


class Distillation(base.Objective):
    """Divergence from the teacher, with the cross entropy under ``loss_type: kd_lm``, and the router losses."""

    def __init__(self, settings: DistillDense, teacher: LiveTeacher | CachedTeacher) -> None:
        self.settings = settings
        self.teacher = teacher

    @classmethod
    def create(cls, stage: DistillDense, job: StageJob, model: Any, processor: Any) -> Distillation:
        if stage.teacher_cache:
            return cls(stage, CachedTeacher(PrecomputedLogProbs(job.precomputed["teacher"]), model, processor))
        return cls(stage, LiveTeacher(job.references["teacher"], model, processor, stage.tokens))

    def counts(self, batch: Batch) -> dict[str, int]:
        response = distilled = base.response_tokens(batch)
        if self.settings.tokens == "all":
            distilled = len(positions.every_token(batch["attention_mask"]))
        return {"response": response, "distilled": distilled}

    def __call__(self, model: Any, batch: Batch, denominators: base.LossDenominators) -> tuple[Tensor, base.Metrics]:
        reference = self.settings.compat == "reference"
        hidden_BLD = llava.hidden_states(model, batch)
        share = 1 / denominators.micro_batches if reference else 1.0
        distilled, metrics = self.teacher.loss(
            self.settings, model, hidden_BLD, batch, None if reference else denominators.counts["distilled"]
        )
        cross_entropy = hidden_BLD.new_zeros((), dtype=torch.float32)
        if self.settings.loss_type == "kd_lm":
            cross_entropy = language_modelling_loss(
                hidden_BLD,
                model.lm_head.weight,
                batch["labels"],
                denominator=None if reference else denominators.counts["response"],
            )
        # already divided
        auxiliary, parts = base.router_losses(model, denominators)
        loss = compose(
            self.settings.loss_type,
            distilled * share,
            cross_entropy * share,
            auxiliary,
            compat=self.settings.compat,
            count_auxiliary=self.settings.router_losses,
        )
        metrics = {name: value * share for name, value in metrics.items()}
        if self.settings.loss_type == "kd_lm":
            metrics["cross_entropy"] = cross_entropy.detach() * share
        return loss, metrics | parts


OBJECTIVE = Distillation


class LiveTeacher:
    """A frozen teacher, run on every batch with the student's images.

    Its tower and number of tokens per image may differ, as long as it takes the same pixels and only the response
    is distilled. Not a module: it is not wrapped, trained or saved with the student.

    Raises ConfigError for a teacher with another image processor or tokenizer, or, with ``tokens="all"``, another number
    of positions.
    """

    def __init__(self, checkpoint: Path, student: Any, processor: Any, tokens: DistilledTokens = "response") -> None:
        model, teacher_processor, _ = open_checkpoint(checkpoint)
        require_same_pixels(
            checkpoint, pixel_settings(processor.image_processor), pixel_settings(teacher_processor.image_processor)
        )
        self.image_tokens = (student.config.image_seq_length, model.config.image_seq_length)
        ours, theirs = self.image_tokens
        if tokens == "all" and ours != theirs:
            raise ConfigError(
                f"{checkpoint}: the teacher gives an image {theirs} tokens, the student {ours}: there is no position of "
                "the teacher for each of the student's; distil the response alone ('tokens: response')"
            )
        self.vocabulary = shared_rows(
            processor.tokenizer,
            teacher_processor.tokenizer,
            len(student.get_output_embeddings().weight),
            len(model.get_output_embeddings().weight),
        )
        self.model: nn.Module = model.requires_grad_(False).eval()

    def loss(
        self, settings: DistillDense, model: Any, hidden_BLD: Tensor, batch: Batch, denominator: Tensor | None
    ) -> tuple[Tensor, base.Metrics]:
        """The divergence on a batch whose student hidden states are given."""
        teacher = self._on_device(hidden_BLD.device)
        ours, theirs = self.image_tokens
        seen = batch if ours == theirs else resized_images(batch, model.config.image_token_id, ours, theirs)
        with torch.no_grad():
            teacher_hidden_BME = llava.hidden_states(teacher, seen)
        return distillation_loss(
            hidden_BLD,
            model.lm_head.weight,
            teacher_hidden_BME,
            teacher.lm_head.weight,
            batch["labels"],
            attention_mask_BL=batch["attention_mask"],
            teacher_labels_BM=seen["labels"],
            teacher_attention_mask_BM=seen["attention_mask"],
            divergence=settings.divergence,
            temperature=settings.temperature,
            tokens=settings.tokens,
            jsd_weight=settings.jsd_weight,
            vocabulary=self.vocabulary,
            denominator=denominator,
            compat=settings.compat,
        )

    def _on_device(self, device: torch.device) -> Any:
        if self.model.device != device:
            dtype = attention.inference_dtype(str(device))
            self.model.to(device=device, dtype=dtype)
            attention.use(self.model, attention.choose("auto", device.type, dtype))
        return self.model


class CachedTeacher:
    """Precomputed log-probabilities of a teacher: the most probable, or sampled, tokens of every response position.

    The teacher's distribution is over the tokens of the tokenizer, the student's over all rows of its head: padding rows,
    which are no tokens, learn a probability of zero.
    """

    def __init__(self, precomputed: PrecomputedLogProbs, student: Any, processor: Any) -> None:
        precomputed.require_tokenizer(processor.tokenizer)
        precomputed.require_pixels(processor.image_processor, "teacher")
        precomputed.require_rows(len(student.get_output_embeddings().weight))
        self.precomputed = precomputed
        self.sampled = precomputed.settings["kind"] == "sampled"

    def loss(
        self, settings: DistillDense, model: Any, hidden_BLD: Tensor, batch: Batch, denominator: Tensor | None
    ) -> tuple[Tensor, base.Metrics]:
        """The divergence on a batch whose student hidden states are given."""
        ids_RK, log_probabilities_RK = (
            tensor.to(hidden_BLD.device) for tensor in self.precomputed.tokens(batch["indices"])
        )
        common = (hidden_BLD, model.lm_head.weight, batch["labels"], ids_RK, log_probabilities_RK)
        if self.sampled:
            return sampled_distillation_loss(*common, denominator=denominator)
        return cached_distillation_loss(*common, tail=settings.tail, denominator=denominator)


def resized_images(batch: Batch, image_token: int, ours: int, theirs: int) -> Batch:
    """The batch with ``theirs`` image tokens per image in place of ``ours``; padded on the right."""
    rows = []
    for ids_L, labels_L, mask_L in zip(
        batch["input_ids"], batch["labels"], batch["attention_mask"].bool(), strict=True
    ):
        images_T = ids_L[mask_L] == image_token
        first_T = images_T & (images_T.cumsum(0) % ours == 1 % ours)
        counts_T = torch.where(images_T, torch.where(first_T, theirs, 0), 1)
        rows.append((ids_L[mask_L].repeat_interleave(counts_T), labels_L[mask_L].repeat_interleave(counts_T)))
    lengths = torch.tensor([len(ids) for ids, _ in rows], device=batch["input_ids"].device)
    pad = nn.utils.rnn.pad_sequence
    ids_BM = pad([ids for ids, _ in rows], batch_first=True)
    labels_BM = pad([labels for _, labels in rows], batch_first=True, padding_value=-100)
    mask_BM = (torch.arange(ids_BM.shape[1], device=ids_BM.device) < lengths[:, None]).long()
    return cast(Batch, {**batch, "input_ids": ids_BM, "labels": labels_BM, "attention_mask": mask_BM})
