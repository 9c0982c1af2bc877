"""The decisions: which tokens are kept, in training by drawing, in generation by rank and by sign."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmpipe.models.schedule import FollowsTraining
from mmpipe.models.sparsity import gumbel
from mmpipe.models.sparsity.predictors import DROP, KEEP, TextPredictor, VisionPredictor, draw
from mmpipe.models.sparsity.record import Record
from mmpipe.models.sparsity.segments import Segments, one_by_one
from mmpipe.models.sparsity.spec import SparsitySettings

Decisions = dict[str, Tensor]
"""Keep decisions by segment (``images``, ``answers``, ``questions``), ``[tokens]`` in the order of rows and places."""


class Sparsifier(FollowsTraining):
    """The predictors of a language model of ``width`` whose images have ``image_tokens`` tokens.

    The temperature of the draws follows training.
    """

    def __init__(self, width: int, settings: SparsitySettings, image_tokens: int) -> None:
        super().__init__()
        self.settings = settings
        self.image_tokens = image_tokens
        self.enabled = True
        """Whether generation drops anything at all."""
        self.record: Record | None = None
        """Where decisions are noted down (see :func:`mmpipe.models.sparsity.record.recording`)."""
        self.image_score_predictor: VisionPredictor | None = None
        self.output_text_score_predictor: TextPredictor | None = None
        self.instruct_score_predictor: TextPredictor | None = None
        if settings.use_vision_predictor:
            self.image_score_predictor = VisionPredictor(width, settings)
        if settings.use_output_text_predictor:
            self.output_text_score_predictor = TextPredictor(width, settings)
        if settings.use_instruct_predictor:
            self.instruct_score_predictor = TextPredictor(width, settings)

    @property
    def prunes(self) -> bool:
        """Whether generation drops anything with the settings at hand."""
        settings = self.settings
        return self.enabled and (
            (settings.use_vision_predictor and settings.vision_keep_rate < 1)
            or (settings.use_output_text_predictor and settings.output_text_keep_rate < 1)
            or (settings.use_instruct_predictor and settings.instruct_keep_rate < 1)
        )

    def reset_parameters(self, seed: int) -> None:
        """Draw all predictors afresh, a pure function of ``seed``."""
        generator = torch.Generator().manual_seed(seed)
        for predictor in self.children():
            draw(predictor, generator)

    # ---- training

    def draw(
        self, hidden_BLD: Tensor, segments: Segments, temperature: float, noise_BL2: Tensor
    ) -> tuple[Tensor, Decisions]:
        """The policy of keys ``[B, L]`` and the decisions behind it, both with gradients, drawn by Gumbel noise.

        Answers and questions shorter than the settings say are kept whole.
        """
        policy_BL = hidden_BLD.new_ones(hidden_BLD.shape[:2], dtype=torch.float32)
        decisions: Decisions = {}
        for name, mask_BL, logits_T2, minimum in self._judged(hidden_BLD, segments):
            keep_T = gumbel.straight_through(logits_T2, noise_BL2[mask_BL], temperature)
            if not len(keep_T):
                # the predictor counts as used: devices wait for each other's gradients
                policy_BL = policy_BL + 0.0 * self._idle(name, hidden_BLD)
                continue
            decisions[name] = keep_T
            long_B = mask_BL.sum(1) >= minimum
            long_T = long_B[:, None].expand_as(mask_BL)[mask_BL]
            policy_BL = policy_BL.masked_scatter(mask_BL, torch.where(long_T, keep_T, 1.0))
        return policy_BL, decisions

    def _judged(self, hidden_BLD: Tensor, segments: Segments) -> list[tuple[str, Tensor, Tensor, int]]:
        """Name, mask, logits and least length of every segment that has a predictor."""
        judged = []
        if self.image_score_predictor is not None:
            images = one_by_one(hidden_BLD, segments.images_BL, self.image_tokens)
            logits_T2 = self.image_score_predictor(images).flatten(0, 1)
            judged.append(("images", segments.images_BL, logits_T2, 0))
        if self.output_text_score_predictor is not None:
            logits_T2 = self.output_text_score_predictor(hidden_BLD[segments.answers_BL])
            length = self.settings.output_text_len_for_training
            judged.append(("answers", segments.answers_BL, logits_T2, length))
        if self.instruct_score_predictor is not None:
            logits_T2 = self.instruct_score_predictor(hidden_BLD[segments.questions_BL])
            length = self.settings.instruct_len_for_training
            judged.append(("questions", segments.questions_BL, logits_T2, length))
        return judged

    def _idle(self, name: str, hidden_BLD: Tensor) -> Tensor:
        predictor: nn.Module | None = {
            "images": self.image_score_predictor,
            "answers": self.output_text_score_predictor,
            "questions": self.instruct_score_predictor,
        }[name]
        assert predictor is not None
        return predictor(hidden_BLD[:1, :1]).sum()

    # ---- generation

    def keep_of_prompt(self, hidden_BLD: Tensor, real_BL: Tensor, images_BL: Tensor, starts: bool) -> Tensor:
        """What of a prompt, or of a piece of it, is kept, ``[B, L]``.

        Of every image as many tokens as the rate says, the best ones. With a predictor for questions also what it
        keeps of the text behind the images, and always a row's last token. ``starts`` is false for pieces that follow
        others.
        """
        keep_BL = real_BL.clone()
        rate = self.settings.vision_keep_rate
        if self.image_score_predictor is not None and rate < 1 and bool(images_BL.any()):
            images = one_by_one(hidden_BLD, images_BL, self.image_tokens)
            scores_PN = self.image_score_predictor(images).float().log_softmax(-1)[..., KEEP]
            best = scores_PN.topk(kept_tokens(self.image_tokens, rate), dim=1).indices
            keep_BL[images_BL] = torch.zeros_like(scores_PN, dtype=torch.bool).scatter(1, best, True).flatten()
        if self.instruct_score_predictor is not None and self.settings.instruct_keep_rate < 1:
            asked_BL = _behind_images(real_BL, images_BL, starts)
            keep_BL &= ~asked_BL | _kept(self.instruct_score_predictor(hidden_BLD))
        return keep_BL

    def keep_of_answer(self, hidden_BLD: Tensor, real_BL: Tensor) -> Tensor:
        """Which generated tokens later ones may look at, ``[B, L]``."""
        if self.output_text_score_predictor is None or self.settings.output_text_keep_rate == 1:
            return real_BL
        return real_BL & _kept(self.output_text_score_predictor(hidden_BLD))


def kept_tokens(image_tokens: int, rate: float) -> int:
    """How many of an image's tokens generation keeps (576 at 0.2: 115)."""
    return max(1, int(image_tokens * rate))


def _kept(logits: Tensor) -> Tensor:
    return logits[..., KEEP] > logits[..., DROP]


def _behind_images(real_BL: Tensor, images_BL: Tensor, starts: bool) -> Tensor:
    """The text behind the last image of each row without its last token; all of a piece that follows others."""
    places_L = torch.arange(real_BL.shape[1], device=real_BL.device)
    last_B1 = torch.where(real_BL, places_L, -1).amax(1, keepdim=True)
    image_B1 = torch.where(images_BL, places_L, -1).amax(1, keepdim=True)
    behind_BL = real_BL & (places_L > image_B1) & (places_L < last_B1)
    return behind_BL & (image_B1 >= 0) if starts else behind_BL
