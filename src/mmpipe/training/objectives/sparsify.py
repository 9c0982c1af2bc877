"""Training the predictors: the language model under drawn masks, and the distance from the keep rates."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mmpipe.losses.language_modelling import language_modelling_loss
from mmpipe.losses.sparsity import image_loss, text_loss
from mmpipe.models.sparsity import segments
from mmpipe.models.sparsity.context import KEYWORD, TrainingPass
from mmpipe.models.sparsity.hooks import get_sparsifier
from mmpipe.models.sparsity.segments import Segments
from mmpipe.models.sparsity.sparsifier import gumbel_noise
from mmpipe.training.objectives.base import Batch, Metrics, Normaliser, hidden_states, response_tokens, router_losses

if TYPE_CHECKING:
    from mmpipe.stages.sparsify import Sparsify


class Sparsification:
    """Cross entropy, router losses, and for each predictor the squared distance from its rate.

    A row without an answer (or question) does not count for its term; the published mean over nothing is not a number.
    """

    def __init__(self, settings: Sparsify, model: Any) -> None:
        self.settings = settings
        self.image_token = model.config.image_token_id
        sparsifier = get_sparsifier(model)
        assert sparsifier is not None
        self.sparsifier = sparsifier
        self.sparsity = sparsifier.settings
        self.image_tokens = sparsifier.image_tokens

    def counts(self, batch: Batch) -> dict[str, int]:
        found = self._segments(batch)
        return {
            "response": response_tokens(batch),
            "images": int(found.images_BL.sum()) // self.image_tokens,
            "answers": int(found.answers_BL.any(1).sum()),
            "questions": int(found.questions_BL.any(1).sum()),
        }

    def __call__(self, model: Any, batch: Batch, normaliser: Normaliser) -> tuple[Tensor, Metrics]:
        found = self._segments(batch)
        current = TrainingPass(found, self._noise(batch), self.settings.gumbel_start_tau, self.settings.gumbel_end_tau)
        hidden_BLD = hidden_states(model, batch, **{KEYWORD: current})
        learnt = language_modelling_loss(
            hidden_BLD, model.lm_head.weight, batch["labels"], normaliser=normaliser.counts["response"]
        )
        auxiliary, parts = router_losses(model, normaliser)
        distances, kept = self._distances(found, current.decisions, normaliser)
        loss = learnt + auxiliary + self.settings.mask_loss_weight * sum(distances.values())
        tau = torch.tensor(current.temperature, device=learnt.device) / normaliser.micro_batches
        shown = {f"{name}_mask_loss": value.detach() for name, value in distances.items()}
        return loss, {"cross_entropy": learnt.detach(), **parts, **shown, **kept, "gumbel_tau": tau}

    def _noise(self, batch: Batch) -> Tensor:
        """Gumbel noise ``[B, L, 2]``, of each row a function of seed, step and record.

        So it is the same however the batch is cut, and after an interruption.
        """
        rows, length = batch["input_ids"].shape
        noise_BL2 = torch.zeros(rows, length, 2)
        for row, index, tokens in zip(
            noise_BL2, batch["indices"], batch["attention_mask"].sum(1).tolist(), strict=True
        ):
            key = f"{self.settings.seed} {self.sparsifier.progress!r} {index}"
            digest = hashlib.sha256(key.encode()).digest()
            row[:tokens] = gumbel_noise(tokens, torch.Generator().manual_seed(int.from_bytes(digest[:7])))
        return noise_BL2.to(batch["input_ids"].device)

    def _segments(self, batch: Batch) -> Segments:
        return segments.of_batch(batch["input_ids"], batch["labels"], batch["attention_mask"], self.image_token)

    def _distances(
        self, found: Segments, decisions: dict[str, Tensor], normaliser: Normaliser
    ) -> tuple[dict[str, Tensor], Metrics]:
        """The distances from the keep rates by predictor, and the shares that were kept."""
        distances: dict[str, Tensor] = {}
        kept: Metrics = {}
        if "images" in decisions:
            keep_PN = decisions["images"].view(-1, self.image_tokens)
            number = normaliser.counts["images"]
            distances["image"] = image_loss(keep_PN, self.sparsity.vision_keep_rate, number)
            kept["image_kept"] = keep_PN.detach().mean(1).sum() / number
        for name, segment, mask_BL, rate, minimum in (
            (
                "output_text",
                "answers",
                found.answers_BL,
                self.sparsity.output_text_keep_rate,
                self.sparsity.output_text_len_for_training,
            ),
            (
                "instruct",
                "questions",
                found.questions_BL,
                self.sparsity.instruct_keep_rate,
                self.sparsity.instruct_len_for_training,
            ),
        ):
            if segment in decisions:
                row_T = mask_BL.nonzero()[:, 0]
                number = normaliser.counts[segment]
                distances[name] = text_loss(decisions[segment], row_T, rate, minimum, number)
        return distances, kept
