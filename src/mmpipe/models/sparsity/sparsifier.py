"""Keep decisions: sampled in training; by rank and by sign in generation.

Samples are differentiable by the straight-through Gumbel softmax (Jang et al., arXiv 1611.01144).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmpipe.models.schedule import FollowsTraining
from mmpipe.models.sparsity.predictors import DROP, KEEP, TextPredictor, VisionPredictor, draw
from mmpipe.models.sparsity.record import KeepRecord
from mmpipe.models.sparsity.segments import Segments, one_by_one
from mmpipe.models.sparsity.spec import SparsitySettings

Decisions = dict[str, Tensor]
"""Keep decisions by segment (``images``, ``answers``, ``questions``), ``[tokens]`` in the order of rows and positions."""


class Sparsifier(FollowsTraining):
    """The predictors of a language model of ``width`` whose images have ``image_tokens`` tokens.

    The temperature of the draws is scheduled.
    """

    def __init__(self, width: int, settings: SparsitySettings, image_tokens: int) -> None:
        super().__init__()
        self.settings = settings
        self.image_tokens = image_tokens
        self.enabled = True
        """Whether generation drops any token."""
        self.record: KeepRecord | None = None
        """Record of the decisions (see :func:`mmpipe.models.sparsity.record.recording`)."""
        self.image_score_predictor = VisionPredictor(width, settings) if settings.use_vision_predictor else None
        texts = (settings.use_output_text_predictor, settings.use_instruct_predictor)
        answer, question = (TextPredictor(width, settings) if used else None for used in texts)
        self.output_text_score_predictor, self.instruct_score_predictor = answer, question

    @property
    def prunes(self) -> bool:
        """Whether generation drops any token with the current settings."""
        settings = self.settings
        rates = (
            settings.use_vision_predictor and settings.vision_keep_rate,
            settings.use_output_text_predictor and settings.output_text_keep_rate,
            settings.use_instruct_predictor and settings.instruct_keep_rate,
        )
        return self.enabled and any(0 < rate < 1 for rate in rates)

    def reset_parameters(self, seed: int) -> None:
        """Draw all predictors afresh, a pure function of ``seed``."""
        generator = torch.Generator().manual_seed(seed)
        for predictor in self.children():
            draw(predictor, generator)

    # ---- training

    def draw(
        self, hidden_BLD: Tensor, segments: Segments, temperature: float, noise_BL2: Tensor
    ) -> tuple[Tensor, Decisions]:
        """The policy of keys ``[B, L]`` and the underlying decisions, with gradients, drawn by Gumbel noise.

        Answers and questions shorter than the settings' minimum are retained whole.
        """
        policy_BL = hidden_BLD.new_ones(hidden_BLD.shape[:2], dtype=torch.float32)
        decisions: Decisions = {}
        for name, predictor, mask_BL, minimum in self._segments(segments):
            whole = predictor is self.image_score_predictor
            tokens = one_by_one(hidden_BLD, mask_BL, self.image_tokens) if whole else hidden_BLD[mask_BL]
            keep_T = straight_through(predictor(tokens).flatten(0, -2), noise_BL2[mask_BL], temperature)
            if not len(keep_T):
                # a zero term gives the predictor a gradient, which DDP waits for
                policy_BL = policy_BL + 0.0 * predictor(hidden_BLD[:1, :1]).sum()
                continue
            decisions[name] = keep_T
            long_B = mask_BL.sum(1) >= minimum
            long_T = long_B[:, None].expand_as(mask_BL)[mask_BL]
            policy_BL = policy_BL.masked_scatter(mask_BL, torch.where(long_T, keep_T, 1.0))
        return policy_BL, decisions

    def _segments(self, segments: Segments) -> list[tuple[str, nn.Module, Tensor, int]]:
        """Name, predictor, mask ``[B, L]`` and least length of every segment that has a predictor."""
        settings = self.settings
        found = (
            ("images", self.image_score_predictor, segments.images_BL, 0),
            ("answers", self.output_text_score_predictor, segments.answers_BL, settings.output_text_len_for_training),
            ("questions", self.instruct_score_predictor, segments.questions_BL, settings.instruct_len_for_training),
        )
        return [(name, predictor, mask, least) for name, predictor, mask, least in found if predictor is not None]

    # ---- generation

    def retain_prompt(self, hidden_BLD: Tensor, real_BL: Tensor, images_BL: Tensor, starts: bool) -> Tensor:
        """Mask of the retained tokens of a prompt, or of a piece of it, ``[B, L]``.

        The rate's share of every image's tokens, the highest scores first. With a predictor for questions also its choice
        of the text after the images, and always a row's last token. ``starts`` is false for pieces that follow others.
        """
        keep_BL = real_BL.clone()
        rate = self.settings.vision_keep_rate
        if self.image_score_predictor is not None and rate < 1 and bool(images_BL.any()):
            images = one_by_one(hidden_BLD, images_BL, self.image_tokens)
            scores_PN = self.image_score_predictor(images).float().log_softmax(-1)[..., KEEP]
            best = scores_PN.topk(retained_tokens(self.image_tokens, rate), dim=1).indices
            keep_BL[images_BL] = torch.zeros_like(scores_PN, dtype=torch.bool).scatter(1, best, True).flatten()
        if self.instruct_score_predictor is not None and self.settings.instruct_keep_rate < 1:
            asked_BL = _behind_images(real_BL, images_BL, starts)
            keep_BL &= ~asked_BL | _is_kept(self.instruct_score_predictor(hidden_BLD))
        return keep_BL

    def retain_answer(self, hidden_BLD: Tensor, real_BL: Tensor) -> Tensor:
        """Mask of the generated tokens that later ones may attend to, ``[B, L]``."""
        if self.output_text_score_predictor is None or self.settings.output_text_keep_rate == 1:
            return real_BL
        return real_BL & _is_kept(self.output_text_score_predictor(hidden_BLD))


def gumbel_noise(tokens: int, generator: torch.Generator) -> Tensor:
    """Standard Gumbel noise ``[tokens, 2]`` for the two classes of each token, float32, on the CPU."""
    return -torch.empty(tokens, 2).exponential_(generator=generator).log()


def straight_through(logits_T2: Tensor, noise_T2: Tensor, temperature: float) -> Tensor:
    """Whether class 0 is drawn, ``[T]`` of zeros and ones, float32.

    The gradient is that of ``softmax((log p + noise) / temperature)``.
    """
    soft_T = ((logits_T2.float().log_softmax(-1) + noise_T2) / temperature).softmax(-1)[..., 0]
    hard_T = (soft_T >= 0.5).to(soft_T.dtype)
    return hard_T - soft_T.detach() + soft_T


def annealed(progress: float, start: float, end: float) -> float:
    """The temperature at ``progress`` (0 to 1) of the training: from ``start`` to ``end``, geometrically."""
    return start * (end / start) ** progress


def retained_tokens(image_tokens: int, rate: float) -> int:
    """Number of an image's tokens that generation retains (576 at 0.2: 115)."""
    return max(1, int(image_tokens * rate))


def _is_kept(logits: Tensor) -> Tensor:
    return logits[..., KEEP] > logits[..., DROP]


def _behind_images(real_BL: Tensor, images_BL: Tensor, starts: bool) -> Tensor:
    """The text after the last image of each row without its last token; all of a piece that follows others."""
    places_L = torch.arange(real_BL.shape[1], device=real_BL.device)
    last_B1 = torch.where(real_BL, places_L, -1).amax(1, keepdim=True)
    image_B1 = torch.where(images_BL, places_L, -1).amax(1, keepdim=True)
    behind_BL = real_BL & (places_L > image_B1) & (places_L < last_B1)
    return behind_BL & (image_B1 >= 0) if starts else behind_BL
