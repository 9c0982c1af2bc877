"""Time of one MoE layer, forward and backward, against other ways to compute the same.

    python perf/moe_layer.py            # width 512, inner 1408, 8 experts, top-2, 4096 tokens, float32
    python perf/moe_layer.py --quick    # 512 tokens, for a first look
    python perf/moe_layer.py --dtype bfloat16 --device cuda --tokens 16384

``dense`` is one SwiGLU network on as many rows as all experts together compute (tokens x k): the least any
dropless layer can cost. Repetitions are interleaved in random order; the table gives medians and quartiles,
and the median over dense. On a CPU it is processor time, which other work on the machine changes least. The
grouped backend of transformers and the naive loop must give our output; one-hot dispatch drops tokens.
"""

from __future__ import annotations

import argparse
import importlib.util
import random
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeExperts

from mmpipe.models.moe.experts import ExpertsConfig, SwiGLUExperts
from mmpipe.models.moe.layer import MoELayer
from mmpipe.models.moe.routers.base import build
from mmpipe.models.moe.spec import MoESettings

Variant = Callable[[Tensor], Tensor]


def our_layer(options: argparse.Namespace) -> MoELayer:
    settings = MoESettings(experts=options.experts, top_k=options.top_k)
    experts = SwiGLUExperts(ExpertsConfig(options.experts, options.width, options.inner))
    layer = MoELayer(experts, build(settings, options.width), settings)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return layer.to(options.device, getattr(torch, options.dtype))


class Naive(nn.Module):
    """For each expert: find its tokens, compute them, add them in place; the usual first implementation."""

    def __init__(self, layer: MoELayer) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x_BLD: Tensor) -> Tensor:
        x_TD = x_BLD.flatten(0, 1)
        routing = self.layer.router(x_TD)
        weights_TK = routing.weights_TK.to(x_TD.dtype)
        output_TD = torch.zeros_like(x_TD)
        experts = self.layer.experts
        for e in range(experts.num_experts):
            tokens, choice = torch.where(routing.indices_TK == e)
            gate, up = F.linear(x_TD[tokens], experts.gate_up_proj[e]).chunk(2, -1)
            result = F.linear(F.silu(gate) * up, experts.down_proj[e])
            output_TD[tokens] += result * weights_TK[tokens, choice, None]
        return output_TD.view_as(x_BLD)


class OneHot(nn.Module):
    """Dispatch and combine by products with one-hot tensors ``[T, N, capacity]`` (DeepSpeed before
    gathers)."""

    def __init__(self, layer: MoELayer, factor: float) -> None:
        super().__init__()
        self.layer = layer
        self.factor = factor

    def forward(self, x_BLD: Tensor) -> Tensor:
        from mmpipe.models.moe.layer import capacity, slot_numbers

        x_TD, experts = x_BLD.flatten(0, 1), self.layer.experts
        routing = self.layer.router(x_TD)
        n, k = experts.num_experts, routing.indices_TK.shape[1]
        slots = min(capacity(len(x_TD), n, k, self.factor), len(x_TD))
        places_TK = slot_numbers(routing.indices_TK, n)
        combine_TNC = x_TD.new_zeros(len(x_TD), n, slots)
        for choice in range(k):
            kept = places_TK[:, choice] < slots
            rows = kept.nonzero().squeeze(1)
            index = (rows, routing.indices_TK[rows, choice], places_TK[rows, choice])
            combine_TNC = combine_TNC.index_put(index, routing.weights_TK[rows, choice].to(x_TD.dtype))
        given_NCD = torch.einsum("tnc,td->ncd", (combine_TNC > 0).to(x_TD.dtype), x_TD)
        gate, up = torch.bmm(given_NCD, experts.gate_up_proj.transpose(1, 2)).chunk(2, -1)
        got_NCD = torch.bmm(F.silu(gate) * up, experts.down_proj.transpose(1, 2))
        return torch.einsum("tnc,ncd->td", combine_TNC, got_NCD).view_as(x_BLD)


class Stock(nn.Module):
    """transformers' Qwen2-MoE experts with their default, grouped, backend, behind our router."""

    def __init__(self, layer: MoELayer, options: argparse.Namespace) -> None:
        super().__init__()
        from transformers import Qwen2MoeConfig

        config = Qwen2MoeConfig(
            num_experts=options.experts, hidden_size=options.width, moe_intermediate_size=options.inner
        )
        config._experts_implementation = "grouped_mm"
        self.router = layer.router
        self.experts = Qwen2MoeExperts(config)
        self.experts.gate_up_proj, self.experts.down_proj = (layer.experts.gate_up_proj, layer.experts.down_proj)

    def forward(self, x_BLD: Tensor) -> Tensor:
        x_TD = x_BLD.flatten(0, 1)
        routing = self.router(x_TD)
        return self.experts(x_TD, routing.indices_TK, routing.weights_TK.to(x_TD.dtype)).view_as(x_BLD)


class Dense(nn.Module):
    """One SwiGLU network on tokens x k rows."""

    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__()
        self.gate_up = nn.Linear(options.width, 2 * options.inner, bias=False)
        self.down = nn.Linear(options.inner, options.width, bias=False)
        self.top_k = options.top_k

    def forward(self, x_D: Tensor) -> Tensor:
        rows_D = torch.cat([x_D] * self.top_k, -2) if self.top_k > 1 else x_D
        gate, up = self.gate_up(rows_D).chunk(2, -1)
        return self.down(F.silu(gate) * up)


def deepspeed_layer(options: argparse.Namespace) -> nn.Module:
    """DeepSpeed's MoE layer of SwiGLU networks on one process, dropping nothing."""
    import os

    import deepspeed
    from deepspeed.moe.layer import MoE

    for name, value in (
        ("RANK", "0"),
        ("LOCAL_RANK", "0"),
        ("WORLD_SIZE", "1"),
        ("MASTER_ADDR", "127.0.0.1"),
        ("MASTER_PORT", "29511"),
    ):
        os.environ.setdefault(name, value)
    deepspeed.init_distributed("nccl" if options.device == "cuda" else "gloo")
    one = argparse.Namespace(**vars(options) | {"top_k": 1})
    layer = MoE(options.width, Dense(one), options.experts, k=options.top_k, drop_tokens=False)

    class First(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = layer

        def forward(self, x_BLD: Tensor) -> Tensor:
            return self.inner(x_BLD)[0]

    return First()


def measure(variant: nn.Module, x_BLD: Tensor) -> float:
    variant.zero_grad(set_to_none=True)
    x_BLD.grad = None
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    start = clock()
    variant(x_BLD).square().mean().backward()
    if x_BLD.is_cuda:
        torch.cuda.synchronize()
    return clock() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--inner", type=int, default=1408)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--top-k", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeat", type=int, default=7)
    options = parser.parse_args()
    if options.quick:
        options.tokens, options.repeat = 512, 5

    layer = our_layer(options)
    variants: dict[str, nn.Module] = {
        "dense": Dense(options),
        "ours": layer,
        "transformers grouped": Stock(layer, options),
        "naive loop": Naive(layer),
        "one-hot, factor 1.5": OneHot(layer, 1.5),
    }
    if importlib.util.find_spec("deepspeed"):
        variants["deepspeed, dropless"] = deepspeed_layer(options)
    x_BLD = torch.randn(1, options.tokens, options.width, generator=torch.Generator().manual_seed(1))
    x_BLD = x_BLD.to(options.device, getattr(torch, options.dtype)).requires_grad_()
    for variant in variants.values():
        variant.to(options.device, getattr(torch, options.dtype)).train()
    expected = layer(x_BLD)
    for name in ("transformers grouped", "naive loop"):
        torch.testing.assert_close(variants[name](x_BLD), expected, atol=1e-2, rtol=1e-2)

    seconds: dict[str, list[float]] = {name: [] for name in variants}
    order = list(variants)
    for _ in range(options.repeat + 1):
        random.shuffle(order)
        for name in order:
            seconds[name].append(measure(variants[name], x_BLD))
    warm = {name: values[1:] for name, values in seconds.items()}
    bound = statistics.median(warm["dense"])
    print(f"{options.tokens} tokens, width {options.width}, inner {options.inner}, {options.experts} experts, "
          f"top-{options.top_k}, {options.dtype}, {options.device}")  # fmt: skip
    print(f"{'':22}{'median s':>10}{'quartiles':>18}{'/ dense':>9}")
    for name, values in warm.items():
        low, middle, high = statistics.quantiles(values, n=4)
        print(f"{name:22}{middle:10.4f}{low:9.4f}{high:9.4f}{middle / bound:9.2f}")


if __name__ == "__main__":
    main()
