"""What a keep rate saves on a whole model: prompt, decoding, cache and memory, beside the dense model.

    python perf/efficiency.py
    python perf/efficiency.py --rates 0.1 0.2 0.5 1.0 --batches 1 16 --repeats 10
    python perf/efficiency.py --device cuda --dtype bfloat16 --width 4096 --layers 32

A LLaVA model of random weights reads 576 image tokens and 64 of text and generates 16 tokens, as the workflow measures its
checkpoints. Random predictors keep as many tokens of images as trained ones; how many generated tokens they keep is chance.
"""

from __future__ import annotations

import argparse
import json

import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from mmpipe.analysis.efficiency import measure_batch
from mmpipe.models.sparsity.hooks import sparsify
from mmpipe.models.sparsity.spec import SparsitySettings
from mmpipe.report.pages import MEASURES, in_units

IMAGE, TEXT, IMAGE_ID = 576, 64, 1


def model_of(arguments: argparse.Namespace) -> LlavaForConditionalGeneration:
    """A random LLaVA model whose tower has CLIP-L's proportions at the width of the language model."""
    heads = arguments.width // 64
    text = LlamaConfig(
        vocab_size=1024,
        hidden_size=arguments.width,
        intermediate_size=arguments.width * 11 // 4,
        num_hidden_layers=arguments.layers,
        num_attention_heads=heads,
        max_position_embeddings=2048,
    )
    tower = CLIPVisionConfig(
        hidden_size=min(1024, arguments.width),
        intermediate_size=4 * min(1024, arguments.width),
        num_hidden_layers=min(24, arguments.layers),
        num_attention_heads=min(16, heads),
        image_size=336,
        patch_size=14,
    )
    torch.manual_seed(0)
    config = LlavaConfig(text_config=text, vision_config=tower, image_token_index=IMAGE_ID, image_seq_length=IMAGE)
    model = LlavaForConditionalGeneration(config).eval()
    size = arguments.predictor
    sparsify(model, SparsitySettings(d_model=size, dim_feedforward=4 * size, vision_keep_rate=arguments.rates[0]))
    return model.to(device=arguments.device, dtype=getattr(torch, arguments.dtype))


def prompts_of(rows: int, arguments: argparse.Namespace) -> dict[str, torch.Tensor]:
    """Rows of text with an image in its middle."""
    ids = torch.randint(2, 1024, (rows, IMAGE + TEXT))
    ids[:, TEXT // 2 : TEXT // 2 + IMAGE] = IMAGE_ID
    pixels = torch.randn(rows, 3, 336, 336, dtype=getattr(torch, arguments.dtype))
    positions = torch.arange(IMAGE + TEXT).expand(rows, -1)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "position_ids": positions}
    return {name: tensor.to(arguments.device) for name, tensor in {**inputs, "pixel_values": pixels}.items()}


def main() -> None:
    """Measure every batch size and print a table and one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--predictor", type=int, default=512, help="width of the predictors")
    parser.add_argument("--rates", type=float, nargs="+", default=[0.2])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    arguments = parser.parse_args()
    model = model_of(arguments)
    rows = [
        row
        for size in arguments.batches
        for row in measure_batch(model, prompts_of(size, arguments), arguments.rates, arguments.repeats)
    ]
    for row in rows:
        keep = "dense" if row["keep"] is None else f"keep {row['keep']:g}"
        value = "–" if row["value"] is None else in_units(row["value"], row["unit"])
        against = "" if row["ratio"] is None else f"x{row['ratio']:.2f}" + ("" if row["gain"] else ", no gain")
        print(f"{row['batch']:>3}  {keep:<9}  {MEASURES[row['measure']]:<62}  {value:>12}  {against}")
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
