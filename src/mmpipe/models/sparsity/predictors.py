"""Predictors: networks that classify every token. Class 0 is keep, class 1 is drop.

Parameters are named as in Dynamic-LLaVA's released checkpoints. Shapes: B rows, N tokens, D width of the language
model, E of the predictor.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmpipe.models.sparsity.spec import SparsitySettings

KEEP, DROP = 0, 1
INITIALIZER_RANGE = 0.02


class VisionPredictor(nn.Module):
    """Classifies the tokens of one image by each token and the average of all."""

    def __init__(self, width: int, settings: SparsitySettings) -> None:
        super().__init__()
        inner = settings.d_model
        self.down_mlp = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, inner), nn.GELU())
        self.transformer = nn.ModuleList(Block(settings) for _ in range(settings.num_layers))
        self.output_mlp = nn.Sequential(*_narrowing(inner))

    def forward(self, hidden_BND: Tensor, present_BN1: Tensor | None = None) -> Tensor:
        """Logits ``[B, N, 2]``; ``present_BN1`` are the tokens' weights in the average (ones by default)."""
        if present_BN1 is None:
            present_BN1 = hidden_BND.new_ones(*hidden_BND.shape[:2], 1)
        z_BNE = self.down_mlp(hidden_BND) * present_BN1
        for block in self.transformer:
            z_BNE = block(z_BNE)
        local, shared = z_BNE.chunk(2, dim=-1)
        shared = (shared * present_BN1).sum(1, keepdim=True) / present_BN1.sum(1, keepdim=True)
        return self.output_mlp(torch.cat([local, shared.expand_as(local)], dim=-1))


class TextPredictor(nn.Module):
    """Classifies every token alone, so that decisions are the same in generation as in training."""

    def __init__(self, width: int, settings: SparsitySettings) -> None:
        super().__init__()
        inner = settings.d_model
        self.output_mlp = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, inner), nn.GELU(), *_narrowing(inner))

    def forward(self, hidden_D: Tensor) -> Tensor:
        """Logits ``[..., 2]`` of hidden states ``[..., D]``."""
        return self.output_mlp(hidden_D)


def _narrowing(width: int) -> list[nn.Module]:
    """Three linear layers from ``width`` to the two classes."""
    half, quarter = width // 2, width // 4
    return [nn.Linear(width, half), nn.GELU(), nn.Linear(half, quarter), nn.GELU(), nn.Linear(quarter, 2)]


class Block(nn.Module):
    """A pre-norm transformer block: full attention, then a network of two layers."""

    def __init__(self, settings: SparsitySettings) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(settings.d_model)
        self.attn = Attention(settings.d_model, settings.nhead)
        self.norm2 = nn.LayerNorm(settings.d_model)
        self.mlp = Mlp(settings.d_model, settings.dim_feedforward)

    def forward(self, z_BNE: Tensor) -> Tensor:
        z_BNE = z_BNE + self.attn(self.norm1(z_BNE))
        return z_BNE + self.mlp(self.norm2(z_BNE))


class Attention(nn.Module):
    """Multi-head attention without mask or positions; queries, keys and values have no biases."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width)

    def forward(self, z_BNE: Tensor) -> Tensor:
        rows, tokens, width = z_BNE.shape
        q, k, v = self.qkv(z_BNE).view(rows, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v)
        return self.proj(mixed.transpose(1, 2).reshape(rows, tokens, width))


class Mlp(nn.Module):
    """Two linear layers with a GELU between."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, inner)
        self.fc2 = nn.Linear(inner, width)

    def forward(self, z_BNE: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(z_BNE)))


@torch.no_grad()
def draw(predictor: nn.Module, generator: torch.Generator) -> None:
    """Initialise a predictor: weights N(0, 0.02), biases 0, normalisation 1 and 0."""
    for module in predictor.modules():
        if isinstance(module, nn.Linear):
            module.weight.normal_(0.0, INITIALIZER_RANGE, generator=generator)
            if module.bias is not None:
                module.bias.zero_()
        elif isinstance(module, nn.LayerNorm):
            module.reset_parameters()
