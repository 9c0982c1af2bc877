"""What logging the experts costs: answering with and without the log, interleaved.

    python perf/expert_log.py            # 8 layers of width 512, 4 experts in each, 144 image tokens, 48 questions
    python perf/expert_log.py --quick    # a smaller model, for a first look

Every layer of the language model, every second one of the tower and the projector have experts, and every one is logged; the
log is written to disk batch by batch and merged, as in an evaluation. On a CPU it is processor time. The larger the
model, the smaller the share: what a token costs to log does not depend on the model's width.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2Config,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from mmpipe.analysis.expert_log import ExpertLog, merge, pieces
from mmpipe.benchmarks.base import Question
from mmpipe.data.templates import get_template
from mmpipe.inference.generate import Answerer
from mmpipe.models.moe.spec import MoESettings
from mmpipe.models.moe.upcycle import upcycle

IMAGE, PATCH = 168, 14


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, after the special tokens."""
    special = ["<|endoftext|>", "<image>", "<|im_start|>", "<|im_end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(special + alphabet)}, []))
    backend.add_special_tokens(special)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=special[0], pad_token=special[0],
        extra_special_tokens={"image_token": special[1]},
    )  # fmt: skip


def model_of(width: int, layers: int) -> Any:
    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=width // 2, intermediate_size=2 * width, num_hidden_layers=4,
            num_attention_heads=4, image_size=IMAGE, patch_size=PATCH,
        ),
        text_config=Qwen2Config(
            vocab_size=320, hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers,
            num_attention_heads=4, num_key_value_heads=4,
        ),
        image_token_index=1,
        image_seq_length=(IMAGE // PATCH) ** 2,
    )  # fmt: skip
    model = LlavaForConditionalGeneration(config).eval()
    upcycle(model, MoESettings(placement="dense"))
    upcycle(model, MoESettings(placement="sparse"), part="vision_tower")
    return upcycle(model, MoESettings(placement="dense"), part="multi_modal_projector")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    if options.quick:
        options.width, options.layers, options.repeat = 128, 4, 3
    model = model_of(options.width, options.layers).to(options.device)
    processor = LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": IMAGE}, crop_size={"height": IMAGE, "width": IMAGE}),
        tokenizer(), patch_size=PATCH, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        image_token="<image>",
    )  # fmt: skip
    clock = time.perf_counter if options.device == "cuda" else time.process_time
    with tempfile.TemporaryDirectory() as folder:
        image = Path(folder, "p.png")
        questions = []
        for n in range(48):
            if n % 4 == 0:
                image = Path(folder, f"{n}.png")
                Image.new("RGB", (IMAGE, IMAGE), (n, 200 - n, 90)).save(image)
            text = f"Is there a shape number {n} in the image? Answer with one word."
            questions.append(Question(id=n, text=text, images=(image,)))

        def run(logged: bool) -> float:
            answerer = Answerer(model, processor, get_template("chatml"))
            with tempfile.TemporaryDirectory(dir=folder) as out:
                start = clock()
                log = ExpertLog(model, Path(out, "pieces"), questions) if logged else None
                for _ in answerer.answer(questions, max_new_tokens=8, log=log):
                    pass
                if log:
                    merge(pieces(log.folder), Path(out, "experts.parquet"))
                    log.close()
                    sizes.append(Path(out, "experts.parquet").stat().st_size)
                return clock() - start

        sizes: list[int] = []
        seconds: dict[bool, list[float]] = {False: [], True: []}
        for _ in range(options.repeat + 1):
            for logged in random.sample([False, True], 2):
                seconds[logged].append(run(logged))
    plain, logged_s = (statistics.median(values[1:]) for values in seconds.values())
    pairs = [with_ / without for without, with_ in zip(*(v[1:] for v in seconds.values()), strict=True)]
    print(f"width {options.width}, {options.layers} layers, {len(questions)} questions, {options.device}")
    print(f"without {plain:.3f} s, with {logged_s:.3f} s: {100 * (statistics.median(pairs) - 1):.1f} % more "
          f"(pairs {100 * (min(pairs) - 1):.1f} to {100 * (max(pairs) - 1):.1f} %); log {sizes[0] / 1e6:.2f} MB")  # fmt: skip


if __name__ == "__main__":
    main()
