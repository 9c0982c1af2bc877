"""Mimic distillation: the student learns from a frozen teacher, live or from what the teacher wrote down."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mmpipe.checkpoints.load import open_checkpoint
from mmpipe.data.images import pixel_settings, require_same_pixels
from mmpipe.errors import ConfigError
from mmpipe.inference.open_answerer import inference_dtype
from mmpipe.losses import positions
from mmpipe.losses.distillation import (
    Tokens,
    cached_distillation_loss,
    compose,
    distillation_loss,
    sampled_distillation_loss,
)
from mmpipe.losses.language_modelling import language_modelling_loss
from mmpipe.losses.vocabulary import shared_rows
from mmpipe.models import attention
from mmpipe.training.objectives.base import Batch, Metrics, Normaliser, hidden_states, response_tokens, router_losses
from mmpipe.training.precomputed import Annotations

if TYPE_CHECKING:
    from mmpipe.stages.distill_dense import DistillDense


class Distillation:
    """Divergence from the teacher, by ``loss_type`` with or without the cross entropy, and the router losses."""

    def __init__(self, settings: DistillDense, teacher: LiveTeacher | WrittenTeacher) -> None:
        self.settings = settings
        self.teacher = teacher

    def counts(self, batch: Batch) -> dict[str, int]:
        distilled = response_tokens(batch)
        if self.settings.tokens == "all":
            distilled = len(positions.every_token(batch["attention_mask"]))
        return {"response": response_tokens(batch), "distilled": distilled}

    def __call__(self, model: Any, batch: Batch, normaliser: Normaliser) -> tuple[Tensor, Metrics]:
        reference = self.settings.compat == "reference"
        hidden_BLD = hidden_states(model, batch)
        share = 1 / normaliser.micro_batches if reference else 1.0
        distilled, metrics = self.teacher.loss(
            self.settings, model, hidden_BLD, batch, None if reference else normaliser.counts["distilled"]
        )
        learnt = hidden_BLD.new_zeros((), dtype=torch.float32)
        if self.settings.loss_type == "kd_lm":
            learnt = language_modelling_loss(
                hidden_BLD,
                model.lm_head.weight,
                batch["labels"],
                normaliser=None if reference else normaliser.counts["response"],
            )
        auxiliary, parts = router_losses(model, normaliser)
        # the parts are divided already
        loss = compose(
            self.settings.loss_type,
            distilled * share,
            learnt * share,
            auxiliary,
            compat=self.settings.compat,
            count_auxiliary=self.settings.router_losses,
        )
        metrics = {name: value * share for name, value in metrics.items()}
        if self.settings.loss_type == "kd_lm":
            metrics["cross_entropy"] = learnt.detach() * share
        return loss, metrics | parts


class LiveTeacher:
    """A frozen teacher that runs once on every batch, on the student's images.

    It may have its own tower and give an image another number of tokens, as long as it takes the same pixels and the
    response alone is distilled. Not a module: nothing wraps, trains or saves it.

    Raises ConfigError for a teacher that sees other pixels, has other tokens, or, with ``tokens="all"``, another number
    of positions.
    """

    def __init__(self, checkpoint: Path, student: Any, processor: Any, tokens: Tokens = "response") -> None:
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
        self, settings: DistillDense, model: Any, hidden_BLD: Tensor, batch: Batch, normaliser: Tensor | None
    ) -> tuple[Tensor, Metrics]:
        """The divergence on a batch whose student hidden states are given."""
        teacher = self._on(hidden_BLD.device)
        seen = self._as_teacher_sees(batch, model.config.image_token_id)
        with torch.no_grad():
            teacher_hidden_BME = hidden_states(teacher, seen)
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
            normaliser=normaliser,
            compat=settings.compat,
        )

    def _on(self, device: torch.device) -> Any:
        if self.model.device != device:
            dtype = inference_dtype(str(device))
            self.model.to(device=device, dtype=dtype)
            attention.use(self.model, attention.choose("auto", device.type, dtype))
        return self.model

    def _as_teacher_sees(self, batch: Batch, image_token: int) -> Batch:
        """The batch with as many tokens an image as the teacher gives it."""
        ours, theirs = self.image_tokens
        return batch if ours == theirs else resized_images(batch, image_token, ours, theirs)


class WrittenTeacher:
    """The most likely, or drawn, tokens that a teacher wrote down for every response position.

    The teacher's distribution is over the tokens of the tokenizer. The student's is over its whole head: rows that pad
    it stand for no token, and learn to say nothing.
    """

    def __init__(self, written: Annotations, student: Any, processor: Any) -> None:
        written.require_tokenizer(processor.tokenizer)
        written.require_pixels(processor.image_processor, "teacher")
        written.require_rows(len(student.get_output_embeddings().weight))
        self.written = written
        self.sampled = written.settings["kind"] == "sampled"

    def loss(
        self, settings: DistillDense, model: Any, hidden_BLD: Tensor, batch: Batch, normaliser: Tensor | None
    ) -> tuple[Tensor, Metrics]:
        """The divergence on a batch whose student hidden states are given."""
        ids_RK, log_probabilities_RK = (
            tensor.to(hidden_BLD.device) for tensor in self.written.tokens(batch["indices"])
        )
        common = (hidden_BLD, model.lm_head.weight, batch["labels"], ids_RK, log_probabilities_RK)
        if self.sampled:
            return sampled_distillation_loss(*common, normaliser=normaliser)
        return cached_distillation_loss(*common, tail=settings.tail, normaliser=normaliser)


def resized_images(batch: Batch, image_token: int, ours: int, theirs: int) -> Batch:
    """The batch with ``theirs`` image tokens in the place of every ``ours``; padded on the right as before."""
    rows = [
        _resized(ids[mask.bool()], labels[mask.bool()], image_token, ours, theirs)
        for ids, labels, mask in zip(batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True)
    ]
    lengths = torch.tensor([len(ids) for ids, _ in rows], device=batch["input_ids"].device)
    pad = nn.utils.rnn.pad_sequence
    ids_BM = pad([ids for ids, _ in rows], batch_first=True)
    labels_BM = pad([labels for _, labels in rows], batch_first=True, padding_value=-100)
    mask_BM = (torch.arange(ids_BM.shape[1], device=ids_BM.device) < lengths[:, None]).long()
    return batch | {"input_ids": ids_BM, "labels": labels_BM, "attention_mask": mask_BM}


def _resized(ids_L: Tensor, labels_L: Tensor, image_token: int, ours: int, theirs: int) -> tuple[Tensor, Tensor]:
    images_L = ids_L == image_token
    first_L = images_L & (images_L.cumsum(0) % ours == 1 % ours)
    counts_L = torch.where(images_L, torch.where(first_L, theirs, 0), 1)
    return ids_L.repeat_interleave(counts_L), labels_L.repeat_interleave(counts_L)
