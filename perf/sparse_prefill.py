"""How much faster a prompt is read when a fifth of its image is kept, against what the FLOPs promise.

    python perf/sparse_prefill.py
    python perf/sparse_prefill.py --rates 0.1 0.2 0.5 1.0 --rows 4
    python perf/sparse_prefill.py --device cuda --width 2048 --layers 24 --dtype bfloat16

A text model of random weights reads 576 image tokens and 64 of text; predictors stand before layer 2. FLOPs are
counted by PyTorch while the model runs, dense and sparse, the predictor's included. Then the same with a vision tower of
CLIP-L's proportions before it, whose work sparsification does not touch. Repetitions are interleaved and the table gives
medians; on a CPU it is processor time, which other work on the machine changes least.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaModel

from mmpipe.models.sparsity.context import KEYWORD, PruningPass
from mmpipe.models.sparsity.hooks import wrap
from mmpipe.models.sparsity.spec import SparsitySettings

IMAGE, TEXT = 576, 64
TARGET = 0.9
"""The speed-up must be at least this share of what the FLOPs promise."""


def language_model(arguments: argparse.Namespace) -> LlamaModel:
    """A Llama without output head, with predictors whose settings each run changes."""
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=arguments.width,
        intermediate_size=arguments.width * 11 // 4,
        num_hidden_layers=arguments.layers,
        num_attention_heads=arguments.width // 64,
        max_position_embeddings=2048,
    )
    torch.manual_seed(0)
    model = LlamaModel(config).eval()
    wrap(model, SparsitySettings(d_model=arguments.predictor, dim_feedforward=4 * arguments.predictor), IMAGE)
    return model.to(device=arguments.device, dtype=getattr(torch, arguments.dtype))


def tower(arguments: argparse.Namespace) -> CLIPVisionModel:
    """A CLIP tower with as many layers and the width of the language model."""
    config = CLIPVisionConfig(
        hidden_size=arguments.width,
        intermediate_size=4 * arguments.width,
        num_hidden_layers=arguments.layers,
        num_attention_heads=arguments.width // 64,
        image_size=336,
        patch_size=14,
    )
    return CLIPVisionModel(config).eval().to(device=arguments.device, dtype=getattr(torch, arguments.dtype))


def readers(arguments: argparse.Namespace) -> dict[str, Callable[[], Any]]:
    """What is timed: the tower, and the prompt read densely and at every rate."""
    model, eye = language_model(arguments), tower(arguments)
    like = {"device": arguments.device, "dtype": getattr(torch, arguments.dtype)}
    embeddings = torch.randn(arguments.rows, IMAGE + TEXT, arguments.width, **like)
    images = torch.zeros(arguments.rows, IMAGE + TEXT, dtype=torch.bool, device=arguments.device)
    images[:, TEXT // 2 : TEXT // 2 + IMAGE] = True
    pixels = torch.randn(arguments.rows, 3, 336, 336, **like)
    full = model.sparsifier.settings

    def read(rate: float | None) -> None:
        further = {}
        if rate is not None:
            model.sparsifier.settings = full.model_copy(update={"vision_keep_rate": rate})
            further = {KEYWORD: PruningPass(images)}
        model(inputs_embeds=embeddings, use_cache=True, **further)

    return {
        "vision tower": lambda: eye(pixels),
        "dense": lambda: read(None),
        **{f"keep {rate:g}": lambda rate=rate: read(rate) for rate in arguments.rates},
    }


def flops(run: Callable[[], Any]) -> int:
    """Floating-point operations of one run, as PyTorch counts them."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def seconds(run: Callable[[], Any], device: str) -> float:
    """Time of one run: processor time on a CPU, time until it is done on a GPU."""
    clock = time.process_time if device == "cpu" else time.perf_counter
    start = clock()
    run()
    if device != "cpu":
        torch.cuda.synchronize()
    return clock() - start


@torch.inference_mode()
def main() -> None:
    """Time everything and print a table and one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--predictor", type=int, default=512, help="width of the predictors")
    parser.add_argument("--rates", type=float, nargs="+", default=[0.2])
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    arguments = parser.parse_args()
    torch.set_num_threads(1)

    runs = readers(arguments)
    counted = {name: flops(run) for name, run in runs.items()}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(arguments.repeats):
        for name, run in runs.items():
            times[name].append(seconds(run, arguments.device))
    median = {name: statistics.median(values) for name, values in times.items()}

    rows = []
    for name in list(runs)[2:]:
        for what, extra in (("language model", 0), ("with tower", 1)):
            promised = (counted["dense"] + extra * counted["vision tower"]) / (
                counted[name] + extra * counted["vision tower"]
            )
            measured = (median["dense"] + extra * median["vision tower"]) / (
                median[name] + extra * median["vision tower"]
            )
            rows.append({"run": name, "what": what, "promised": promised, "measured": measured})
    for name, value in median.items():
        print(f"{name:>14}  {1000 * value:8.1f} ms  {counted[name] / 1e9:8.2f} GFLOP")
    for row in rows:
        share = row["measured"] / row["promised"]
        row["share"] = share
        print(
            f"{row['run']:>14}  {row['what']:<14}  x{row['measured']:.2f}, promised x{row['promised']:.2f}: {share:.2f}"
        )
    held = all(row["share"] >= TARGET for row in rows)
    print(json.dumps({"target": TARGET, "met": held, "rows": rows}))


if __name__ == "__main__":
    main()
