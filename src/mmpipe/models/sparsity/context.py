"""One forward pass of a sparsified language model: its inputs and its decisions.

It reaches the decoder layers by :mod:`mmpipe.models.forward_context`. Shapes: B rows, L tokens of the call, M of them
retained (the most of any row), D width.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mmpipe.models.moe import context as experts
from mmpipe.models.sparsity import masks
from mmpipe.models.sparsity.attention import POLICY
from mmpipe.models.sparsity.cache import Slots
from mmpipe.models.sparsity.record import KeepDecision
from mmpipe.models.sparsity.segments import Segments
from mmpipe.models.sparsity.sparsifier import Decisions, Sparsifier, annealed

KEYWORD = "sparse_forward_pass"

Arguments = dict[str, Any]


@dataclass(frozen=True)
class SparsityState:
    """The model and the tokens of one call."""

    sparsifier: Sparsifier
    config: Any
    """Of the text model."""
    real_BL: Tensor
    """Tokens of the call that are not padding."""
    whole_B: Tensor
    """Tokens of each row so far, those of earlier calls included."""


@dataclass
class TrainingPass:
    """Training removes no token: dropped ones stop being keys of others in the layers that follow."""

    segments: Segments
    noise_BL2: Tensor
    """Gumbel noise of the draws."""
    start_temperature: float = 1.0
    end_temperature: float = 0.1
    temperature: float = field(init=False, default=1.0)
    decisions: Decisions = field(init=False, default_factory=dict)
    """Set by the pass, with gradients."""

    def decide(self, state: SparsityState, hidden_BLD: Tensor, arguments: Arguments) -> Tensor:
        """Draw the decisions; returns the hidden states unchanged."""
        self.temperature = annealed(state.sparsifier.progress, self.start_temperature, self.end_temperature)
        self._policy_BL, self.decisions = state.sparsifier.draw(
            hidden_BLD, self.segments, self.temperature, self.noise_BL2
        )
        positions = arguments["position_ids"].expand(len(hidden_BLD), -1)
        self._positions_BL, self._real_BL = positions, state.real_BL
        self._masks: dict[int | None, Tensor] = {}
        return hidden_BLD

    def arguments(self, state: SparsityState, layer: int, given: Arguments) -> Arguments:
        """Arguments of a deep layer: the mask of allowed keys, and the policy."""
        window = masks.window_of(state.config, layer)
        if window not in self._masks:
            positions = self._positions_BL
            self._masks[window] = masks.allowed(self._real_BL, positions, positions, window)[:, None]
        return given | {"attention_mask": self._masks[window], POLICY: self._policy_BL}

    def finish(self, hidden_BLD: Tensor) -> Tensor:
        """The hidden states unchanged."""
        return hidden_BLD


class PruningPass:
    """Generation: dropped prompt tokens are not computed further; a new token may be left out of the cache."""

    def __init__(self, images_BL: Tensor, is_prompt: bool | None = None) -> None:
        self.images_BL = images_BL
        self.is_prompt = is_prompt
        """Whether the tokens are given rather than generated; None: unless it is one token behind others."""
        self.slots: Slots | None = None
        self.keep_BL: Tensor | None = None
        """Set by the pass: which tokens are retained."""
        self._source_BM: Tensor | None = None

    def decide(self, state: SparsityState, hidden_BLD: Tensor, arguments: Arguments) -> Tensor:
        """Decide which tokens are retained; returns their hidden states, ``[B, M, D]``."""
        rows, length = hidden_BLD.shape[:2]
        starts = self.slots is None or not self.slots.visible_BW.shape[1]
        prompt = (starts or length > 1) if self.is_prompt is None else self.is_prompt
        real_BL, sparsifier = state.real_BL, state.sparsifier
        positions_BL = arguments["position_ids"].expand(rows, -1)
        if prompt:
            self.keep_BL = sparsifier.retain_prompt(hidden_BLD, real_BL, self.images_BL, starts)
            self._narrow(self.keep_BL, real_BL)
            positions_BL = self._retained(positions_BL)
            self._real_BM = stored_BM = self._retained(self.keep_BL)
        else:
            self.keep_BL = stored_BM = sparsifier.retain_answer(hidden_BLD, real_BL)
            self._real_BM = real_BL
        self._positions_BM = positions_BL
        self._see(stored_BM)
        cos, sin = arguments["position_embeddings"]
        self._rotation = self._retained(cos.expand(rows, -1, -1)), self._retained(sin.expand(rows, -1, -1))
        self._masks: dict[int | None, Tensor | None] = {}
        self.is_prompt = prompt
        return self._retained(hidden_BLD)

    def arguments(self, state: SparsityState, layer: int, given: Arguments) -> Arguments:
        """Arguments of a deep layer: mask, positions and rotations of the retained tokens."""
        window = masks.window_of(state.config, layer)
        if window not in self._masks:
            self._masks[window] = masks.formatted(
                state.config._attn_implementation,
                self._visible_BK,
                self._key_positions_BK,
                self._positions_BM,
                window,
                self._rotation[0].dtype,
            )
        changed = {
            "attention_mask": self._masks[window],
            "position_ids": self._positions_BM,
            "position_embeddings": self._rotation,
        }
        if self.is_prompt and experts.KEYWORD in given:
            changed[experts.KEYWORD] = given[experts.KEYWORD].narrowed(self._real_BM)
        return given | changed

    def finish(self, hidden_BMD: Tensor) -> Tensor:
        """The hidden states at their original positions ``[B, L, D]``, zeros for dropped tokens."""
        if self._source_BM is None:
            return hidden_BMD
        length, width = self.images_BL.shape[1], hidden_BMD.shape[-1]
        full_BLD = hidden_BMD.new_zeros(len(hidden_BMD), length, width)
        source_BMD = self._source_BM[..., None].expand_as(hidden_BMD)
        return full_BLD.scatter(1, source_BMD, hidden_BMD * self._real_BM[..., None])

    def decision(self, state: SparsityState) -> KeepDecision:
        """The decisions of a pass that has made them, as plain data."""
        assert self.keep_BL is not None
        real_BL, keep_BL, prompt = state.real_BL, self.keep_BL, bool(self.is_prompt)
        cached = self.slots.counts if self.slots else []
        return KeepDecision(
            prompt,
            keep=[keep[real].tolist() for keep, real in zip(keep_BL, real_BL, strict=True)],
            images=keep_BL[self.images_BL].view(-1, state.sparsifier.image_tokens).tolist(),
            computed=(keep_BL if prompt else real_BL).sum(1).tolist(),
            cached=cached,
            cached_whole=state.whole_B.tolist() if cached else [],
        )

    def _narrow(self, keep_BL: Tensor, real_BL: Tensor) -> None:
        """Set the retained positions, in order; shorter rows are filled up with others."""
        most = int(keep_BL.sum(1).max())
        if most < keep_BL.shape[1]:
            self._source_BM = (~keep_BL).long().argsort(dim=1, stable=True)[:, :most]

    def _retained(self, tensor: Tensor) -> Tensor:
        """The retained positions of ``[B, L]`` or ``[B, L, C]``."""
        if self._source_BM is None:
            return tensor
        source = self._source_BM
        if tensor.ndim == 3:
            source = source[..., None].expand(-1, -1, tensor.shape[-1])
        return tensor.gather(1, source)

    def _see(self, stored_BM: Tensor) -> None:
        """Set the keys of this pass, and the content of the cache after it."""
        self._visible_BK, self._key_positions_BK = self._real_BM, self._positions_BM
        if self.slots is not None:
            self._visible_BK = torch.cat([self.slots.visible_BW, self._real_BM], dim=1)
            self._key_positions_BK = torch.cat([self.slots.positions_BW, self._positions_BM], dim=1)
            self.slots.plan(stored_BM, self._positions_BM)
