"""Training the predictors: language modelling under sampled masks, and the distance from the keep rates."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor

from mmpipe.data.dataset import Batch, SupervisedDataset
from mmpipe.data.tokens import TokenTable
from mmpipe.errors import ConfigError
from mmpipe.losses.language_modelling import language_modelling_loss
from mmpipe.losses.sparsity import image_loss, text_loss
from mmpipe.models import llava
from mmpipe.models.sparsity import segments
from mmpipe.models.sparsity.context import KEYWORD, TrainingPass
from mmpipe.models.sparsity.hooks import get_sparsifier, sparsify
from mmpipe.models.sparsity.segments import Segments
from mmpipe.models.sparsity.sparsifier import gumbel_noise
from mmpipe.stages.base import StageJob
from mmpipe.stages.sparsify import Sparsify
from mmpipe.training.objectives import base


class Sparsification(base.Objective):
    """Cross entropy, router losses, and for each predictor the squared distance from its keep rate.

    Rows without an answer (or question) are left out of its term; the published mean over no rows is NaN.
    """

    def __init__(self, settings: Sparsify, model: Any) -> None:
        self.settings = settings
        self.image_token = model.config.image_token_id
        sparsifier = get_sparsifier(model)
        assert sparsifier is not None
        self.sparsifier = sparsifier
        self.sparsity = sparsifier.settings
        self.image_tokens = sparsifier.image_tokens

    @classmethod
    def create(cls, stage: Sparsify, job: StageJob, model: Any, processor: Any) -> Sparsification:
        return cls(stage, model)

    @staticmethod
    def prepare(stage: Sparsify, job: StageJob, model: Any) -> None:
        """Add the predictors. Raises ConfigError when there is no model to sparsify."""
        if job.parent is None:
            raise ConfigError(
                f"{job.recipe}: {job.stage}: there is no model to sparsify; put a training stage before it"
            )
        sparsify(model, stage.sparsity, seed=stage.seed)

    @staticmethod
    def dataset(stage: Sparsify, tokens: TokenTable, image_processor: Any) -> SupervisedDataset:
        return SupervisedDataset(tokens.with_images() if stage.requires_image else tokens, image_processor)

    def counts(self, batch: Batch) -> dict[str, int]:
        found = self._segments(batch)
        return {
            "response": base.response_tokens(batch),
            "images": int(found.images_BL.sum()) // self.image_tokens,
            "answers": int(found.answers_BL.any(1).sum()),
            "questions": int(found.questions_BL.any(1).sum()),
        }

    def __call__(self, model: Any, batch: Batch, denominators: base.LossDenominators) -> tuple[Tensor, base.Metrics]:
        found = self._segments(batch)
        current = TrainingPass(found, self._noise(batch), self.settings.gumbel_start_tau, self.settings.gumbel_end_tau)
        hidden_BLD = llava.hidden_states(model, batch, **{KEYWORD: current})
        cross_entropy = language_modelling_loss(
            hidden_BLD, model.lm_head.weight, batch["labels"], denominator=denominators.counts["response"]
        )
        auxiliary, parts = base.router_losses(model, denominators)
        distances, kept = self._distances(found, current.decisions, denominators)
        loss = cross_entropy + auxiliary + self.settings.mask_loss_weight * sum(distances.values())
        tau = torch.tensor(current.temperature, device=cross_entropy.device) / denominators.micro_batches
        shown = {f"{name}_mask_loss": value.detach() for name, value in distances.items()}
        return loss, {"cross_entropy": cross_entropy.detach(), **parts, **shown, **kept, "gumbel_tau": tau}

    def _noise(self, batch: Batch) -> Tensor:
        """Gumbel noise ``[B, L, 2]``, per row a function of seed, step and record: the same for every split of the
        batch, and after an interruption."""
        rows, length = batch["input_ids"].shape
        noise_BL2 = torch.zeros(rows, length, 2)
        lengths = batch["attention_mask"].sum(1).tolist()
        for row, index, tokens in zip(noise_BL2, batch["indices"], lengths, strict=True):
            key = f"{self.settings.seed} {self.sparsifier.progress!r} {index}"
            digest = hashlib.sha256(key.encode()).digest()
            row[:tokens] = gumbel_noise(tokens, torch.Generator().manual_seed(int.from_bytes(digest[:7])))
        return noise_BL2.to(batch["input_ids"].device)

    def _segments(self, batch: Batch) -> Segments:
        return segments.of_batch(batch["input_ids"], batch["labels"], batch["attention_mask"], self.image_token)

    def _distances(
        self, found: Segments, decisions: dict[str, Tensor], denominators: base.LossDenominators
    ) -> tuple[dict[str, Tensor], base.Metrics]:
        """The squared distances from the keep rates by predictor, and the fractions of retained tokens."""
        distances: dict[str, Tensor] = {}
        kept: base.Metrics = {}
        if "images" in decisions:
            keep_PN = decisions["images"].view(-1, self.image_tokens)
            number = denominators.counts["images"]
            distances["image"] = image_loss(keep_PN, self.sparsity.vision_keep_rate, number)
            kept["image_kept"] = keep_PN.detach().mean(1).sum() / number
        its = self.sparsity
        output, instruct = its.output_text_len_for_training, its.instruct_len_for_training
        for name, segment, mask_BL, rate, minimum in (
            ("output_text", "answers", found.answers_BL, its.output_text_keep_rate, output),
            ("instruct", "questions", found.questions_BL, its.instruct_keep_rate, instruct),
        ):
            if segment in decisions:
                row_T = mask_BL.nonzero()[:, 0]
                number = denominators.counts[segment]
                distances[name] = text_loss(decisions[segment], row_T, rate, minimum, number)
        return distances, kept


OBJECTIVE = Sparsification
