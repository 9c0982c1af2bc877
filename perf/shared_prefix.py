"""Time of answering several questions about each image: ours, against one ``generate`` call a question.

    python perf/shared_prefix.py                     # 3 images of 576 tokens, 12 questions each
    python perf/shared_prefix.py --questions 18      # as many as POPE asks
    python perf/shared_prefix.py --device cuda --width 2048 --layers 24 --dtype bfloat16

One call a question is how LLaVA evaluates: image and prompt are run through the model every time. The model has
random weights and LLaVA-1.5's proportions of image to text; half of the work is the vision tower's, as with CLIP-L
and a small language model. Repetitions are interleaved; the table gives medians, and the ratio to beat. On a CPU
it is processor time, which other work on the machine changes least. The answers must be equal.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from mmpipe.benchmarks.base import SHORT_ANSWER, Question
from mmpipe.data.templates import get_template
from mmpipe.inference.generate import Answerer

TARGET = 5.0
"""Ours must be so many times faster with twelve questions an image."""

_WORDS = ("Is", "there", "a", "red", "circle", "left", "of", "the", "square", "in", "image", "?")


def one_token_a_word() -> PreTrainedTokenizerFast:
    """A tokenizer that gives texts the lengths they have with a real one."""
    backend = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    words = {f"w{i}" for i in range(1000)}.union(_WORDS)
    backend.train_from_iterator(sorted(words), trainers.WordLevelTrainer(special_tokens=["<unk>"]))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        eos_token="<|endoftext|>",
        pad_token="<|pad|>",
        additional_special_tokens=["<image>"],
    )


def build(options: argparse.Namespace) -> Answerer:
    """An answerer on a random LLaVA with 24 x 24 patches."""
    tokenizer = one_token_a_word()
    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=options.width,
            intermediate_size=4 * options.width,
            num_hidden_layers=options.layers,
            num_attention_heads=options.width // 64,
            image_size=336,
            patch_size=14,
        ),
        text_config=Qwen2Config(
            vocab_size=8 * (-(-len(tokenizer) // 8)),
            hidden_size=options.width,
            intermediate_size=4 * options.width,
            num_hidden_layers=options.layers,
            num_attention_heads=options.width // 64,
            num_key_value_heads=options.width // 64,
        ),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=576,
    )
    model = LlavaForConditionalGeneration(config)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    processor = SimpleNamespace(
        tokenizer=tokenizer,
        image_token="<image>",
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336}),
    )
    dtype = getattr(torch, options.dtype)
    return Answerer(model.to(device=options.device, dtype=dtype), processor, get_template("vicuna_v1"))


def questions(options: argparse.Namespace, folder: Path) -> list[Question]:
    """``options.questions`` questions of different lengths about each of ``options.images`` images."""
    asked = []
    for image in range(options.images):
        path = folder / f"{image}.png"
        Image.effect_noise((320, 240), 30 + 20 * image).convert("RGB").save(path)
        for number in range(options.questions):
            text = " ".join(_WORDS[(number + i) % len(_WORDS)] for i in range(4 + number % 5))
            asked.append(Question(id=f"{image}-{number}", text=text + SHORT_ANSWER, images=(path,)))
    return asked


def answers(answerer: Answerer, asked: list[Question], options: argparse.Namespace, ours: bool) -> dict[str, Any]:
    """The text of every answer by its question."""
    settings = {"batch_size": options.batch_size} if ours else {"batch_size": 1, "share_prefix": False}
    done = answerer.answer(asked, max_new_tokens=options.new_tokens, **settings)
    return {answer["question_id"]: answer["text"] for answer in done}


def timed(answerer: Answerer, asked: list[Question], options: argparse.Namespace, ours: bool) -> float:
    """Seconds of one repetition."""
    clock = time.process_time if options.device == "cpu" else time.perf_counter
    start = clock()
    answers(answerer, asked, options, ours)
    if options.device != "cpu":
        torch.cuda.synchronize()
    return clock() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=3)
    parser.add_argument("--questions", type=int, default=12, help="questions an image")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--new-tokens", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--out", type=Path, help="write the numbers as JSON")
    options = parser.parse_args()
    torch.set_num_threads(1)

    answerer = build(options)
    with tempfile.TemporaryDirectory() as folder:
        asked = questions(options, Path(folder))
        same = answers(answerer, asked, options, ours=True) == answers(answerer, asked, options, ours=False)
        times: dict[bool, list[float]] = {True: [], False: []}
        for _ in range(options.repeats):
            for ours in (True, False):
                times[ours].append(timed(answerer, asked, options, ours))
    ours, one_by_one = (statistics.median(times[which]) for which in (True, False))
    result = {
        "questions": len(asked),
        "questions_per_image": options.questions,
        "shared_prefix_seconds": round(ours, 3),
        "one_generate_a_question_seconds": round(one_by_one, 3),
        "ratio": round(one_by_one / ours, 2),
        "target": TARGET,
        "equal_answers": same,
        "device": options.device,
        "dtype": options.dtype,
        "torch": torch.__version__,
    }
    print(json.dumps(result, indent=2))
    if options.out:
        options.out.write_text(json.dumps(result, indent=2) + "\n")
    if not same:
        raise SystemExit("the answers differ")
    if options.device == "cpu" and options.questions >= 12 and one_by_one / ours < TARGET:
        raise SystemExit(f"slower than the target of {TARGET}")


if __name__ == "__main__":
    main()
