"""How much a teacher costs: a distillation step, live and from what the teacher wrote down, against supervised fine-tuning.

Prints one JSON line: medians in seconds of processor time and the ratios that matter,

* ``live / (sft + teacher forward)``: what distillation adds to the work that cannot be avoided;
* ``cached / sft``: what a written-down teacher costs, read from disk in every step;
* ``cached, kd_lm / sft``: the same with the cross entropy of the answers.

Steps of all kinds are interleaved in one run, so that other work on the machine hits them alike.

    python perf/distillation_step.py --repeat 7
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration, Qwen2Config

from mmpipe.artifacts import manifest
from mmpipe.losses.distillation import cached_distillation_loss, compose, distillation_loss
from mmpipe.losses.language_modelling import language_modelling_loss
from mmpipe.losses.teacher import most_probable_tokens
from mmpipe.models.llava import hidden_states
from mmpipe.training.objectives.base import Batch
from mmpipe.training.precomputed import SHARDS, TOKENS, PrecomputedLogProbs

VOCABULARY = 32768
IMAGE_TOKENS = 64
TEXT_TOKENS = 192
IMAGE = VOCABULARY - 1


def model(width: int, layers: int) -> LlavaForConditionalGeneration:
    """A random LLaVA."""
    text = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 64,
        tie_word_embeddings=True,
    )
    vision = CLIPVisionConfig(
        hidden_size=128, intermediate_size=256, num_hidden_layers=3, num_attention_heads=2, image_size=64, patch_size=8
    )
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE, image_seq_length=IMAGE_TOKENS)
    return LlavaForConditionalGeneration(config)


def batch(rows: int) -> Batch:
    """Rows with an image each; a quarter of the text is supervised."""
    text = torch.randint(0, IMAGE, (rows, TEXT_TOKENS))
    ids = torch.cat([torch.full((rows, IMAGE_TOKENS), IMAGE), text], dim=1)
    labels = torch.full_like(ids, -100)
    labels[:, -TEXT_TOKENS // 4 :] = ids[:, -TEXT_TOKENS // 4 :]
    return {
        "input_ids": ids,
        "labels": labels,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(rows, 3, 64, 64),
        "dummy_image": False,
    }


def written(ids_RK: torch.Tensor, log_p_RK: torch.Tensor, records: int, out: Path) -> PrecomputedLogProbs:
    """What a teacher says of so many records, as the rule publishes it."""
    flat = (ids_RK.numpy().astype(np.int32), log_p_RK.numpy().astype(np.float16))
    lists = [
        pa.array(list(values.reshape(records, -1)), TOKENS.field(name).type)
        for values, name in zip(flat, ("ids", "log_probabilities"), strict=True)
    ]
    (out / SHARDS).mkdir()
    with pa.OSFile(str(out / SHARDS / "00000-of-00001.arrow"), "wb") as file, pa.ipc.new_stream(file, TOKENS) as sink:
        index = pa.array(range(records), pa.int32())
        sink.write_batch(pa.RecordBatch.from_arrays([index, *lists], schema=TOKENS))
    settings = {"kind": "top_k", "k": ids_RK.shape[1]}
    facts = {"settings": settings, "vocabulary": VOCABULARY, "tokenizer": "", "pixels": {}}
    manifest.write(out, kind="annotations", spec="{}", inputs={}, **facts)
    return PrecomputedLogProbs(out)


def seconds(work: Callable[[], None]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    student, teacher = model(256, 4), model(512, 8).eval()
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-4)
    rows = batch(options.rows)

    def teach() -> torch.Tensor:
        with torch.no_grad():
            return hidden_states(teacher, rows)

    folder = tempfile.TemporaryDirectory()
    likely = most_probable_tokens(teach(), teacher.lm_head.weight, rows["labels"], 64)
    notes = written(*likely, options.rows, Path(folder.name))

    def step(loss: torch.Tensor) -> None:
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    def sft() -> None:
        step(language_modelling_loss(hidden_states(student, rows), student.lm_head.weight, rows["labels"]))

    def live() -> None:
        step(
            distillation_loss(
                hidden_states(student, rows), student.lm_head.weight, teach(), teacher.lm_head.weight, rows["labels"]
            )[0]
        )

    def read() -> None:
        notes.tokens(range(options.rows))

    def cached() -> None:
        head = student.lm_head.weight
        said = notes.tokens(range(options.rows))
        step(cached_distillation_loss(hidden_states(student, rows), head, rows["labels"], *said)[0])

    def cached_kd_lm() -> None:
        hidden, head, labels = hidden_states(student, rows), student.lm_head.weight, rows["labels"]
        said = notes.tokens(range(options.rows))
        distilled = cached_distillation_loss(hidden, head, labels, *said)[0]
        learnt = language_modelling_loss(hidden, head, labels)
        step(compose("kd_lm", distilled, learnt, torch.zeros(())))

    kinds = {
        "sft": sft,
        "teacher_forward": lambda: (teach(), None)[1],
        "live": live,
        "read": read,
        "cached": cached,
        "cached, kd_lm": cached_kd_lm,
    }
    for work in kinds.values():
        work()
    measured: dict[str, list[float]] = {name: [] for name in kinds}
    for _ in range(options.repeat):
        for name, work in kinds.items():
            measured[name].append(seconds(work))
    median = {name: statistics.median(values) for name, values in measured.items()}
    print(
        json.dumps(
            {
                "seconds": {name: round(value, 4) for name, value in median.items()},
                "live / (sft + teacher forward)": round(
                    median["live"] / (median["sft"] + median["teacher_forward"]), 3
                ),
                "cached / sft": round(median["cached"] / median["sft"], 3),
                "cached, kd_lm / sft": round(median["cached, kd_lm"] / median["sft"], 3),
                "torch": torch.__version__,
                "threads": options.threads,
            }
        )
    )


if __name__ == "__main__":
    main()
