"""The outputs of a checkpoint's experts on some questions."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmpipe.benchmarks.prepare import check_images, evenly, read_questions
from mmpipe.inference.open_answerer import open_answerer
from mmpipe.models.moe.hooks import Place, placed_layers


def expert_outputs(checkpoint: Path, prepared: Path, device: str, questions: int) -> Iterator[tuple[Place, Tensor]]:
    """Outputs of the chosen experts for every token of a prompt, ``[T, K, D]``, one layer and question at a time.

    ``questions`` are spread evenly over the benchmark.
    """
    answerer = open_answerer(checkpoint, device)
    found: list[tuple[Place, Tensor]] = []
    for place, layer in placed_layers(answerer.model).items():
        layer.experts.register_forward_pre_hook(_keeps(place, found))
    chosen = evenly(read_questions(prepared, images=False), questions)
    check_images(prepared, chosen)
    for question in chosen:
        # one token is enough: the pass over the prompt is recorded
        for _ in answerer.answer([question], max_new_tokens=1, share_prefix=False):
            yield from found
        found.clear()


def _keeps(place: Place, found: list[tuple[Place, Tensor]]) -> Any:
    def hook(experts: nn.Module, args: tuple[Tensor, Tensor, Tensor]) -> None:
        hidden_TD, indices_TK, weights_TK = args
        one_T1 = torch.ones_like(weights_TK[:, :1])
        outputs = [
            experts.forward(hidden_TD, indices_TK[:, choice : choice + 1], one_T1)
            for choice in range(indices_TK.shape[1])
        ]
        found.append((place, torch.stack(outputs, dim=1)))

    return hook
