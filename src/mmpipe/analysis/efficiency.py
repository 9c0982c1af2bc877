"""Efficiency of sparsified checkpoints, measured: operations, times, cache and memory at several keep rates.

The same prompts are answered densely and at every rate, in turns in each repetition, so that other load on the machine
affects all of them. A gain must show in nine of ten repetitions. Operations are counted by PyTorch while the model
runs, predictors included.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import math
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from mmpipe.analysis.base import Row
from mmpipe.benchmarks.prepare import evenly
from mmpipe.errors import ConfigError
from mmpipe.inference.generate import Answerer
from mmpipe.inference.question import Question
from mmpipe.models.sparsity.cost import cache_bytes, paper_image_flops
from mmpipe.models.sparsity.hooks import get_sparsifier, keeping, prompt_retention
from mmpipe.models.sparsity.sparsifier import retained_tokens

BATCHES = (1, 16)
REPEATS = 10
MEMORY_REPEATS = 3
NEW_TOKENS = 16
SURE = 0.9
"""Least share of repetitions that must show a gain."""

_MEASURED = {
    "FLOP": ("paper_flops", "image_flops", "prompt_flops", "token_flops"),
    "s": ("image_seconds", "prompt_seconds", "first_token_seconds", "token_seconds"),
    "B": ("predicted_cache_bytes", "cache_bytes", "answered_cache_bytes", "peak_bytes"),
}
UNITS = {name: unit for unit, names in _MEASURED.items() for name in names}
"""Units of all measures of a batch; ``token`` is one generated token per row."""

Inputs = Mapping[str, torch.Tensor]
Values = dict[str, list[float]]


def prompts(questions: Sequence[Question], count: int) -> list[Question]:
    """``count`` questions with images, spread evenly, repeated where there are fewer.

    Raises ConfigError when none has an image.
    """
    asked = [question for question in questions if question.images]
    if not asked:
        raise ConfigError(
            "benchmarks: the first one has no images, which the measurement of sparsified checkpoints needs; put "
            "one that has images first"
        )
    return list(itertools.islice(itertools.cycle(evenly(asked, count)), count))


def measure(answerer: Answerer, questions: Sequence[Question], rates: Sequence[float]) -> list[Row]:
    """Everything in :data:`UNITS` for the dense model, the rate of training and ``rates``, a row a number.

    A row holds ``batch, keep`` (None: dense), ``measure, unit, value`` (median), ``low, high, repeats``, and against
    the dense model ``ratio`` (median of pairs, above 1 is a saving) and ``gain``. Where the device lacked
    memory, ``value`` is None.
    """
    batches = (answerer.inputs(prompts(questions, size)) for size in BATCHES)
    return [row for inputs in batches for row in measure_batch(answerer.model, inputs, rates, REPEATS)]


@torch.inference_mode()
def measure_batch(model: Any, inputs: Inputs, rates: Sequence[float], repeats: int = REPEATS) -> list[Row]:
    """The rows of one batch: ``pixel_values``, and ``input_ids, attention_mask, position_ids`` padded on the left."""
    found = _measured(model, inputs, ways(model, rates), repeats)
    dense, size = found[None], len(inputs["input_ids"])
    return [
        {"batch": size, "keep": keep, "measure": name, "unit": unit}
        | summary(values.get(name, []), dense.get(name, []), keep is None)
        for keep, values in found.items()
        for name, unit in UNITS.items()
    ]


def summary(values: Sequence[float], dense: Sequence[float], is_dense: bool = False) -> Row:
    """Median and range of repetitions, and their comparison with those of the dense model, pair by pair."""
    value = statistics.median(values) if values else None
    row: Row = {"value": value, "low": min(values, default=None), "high": max(values, default=None)}
    row |= {"repeats": len(values), "ratio": None, "gain": None}
    if is_dense or not dense or not value:
        return row
    ratios = [before / now for before, now in zip(dense, values, strict=True)]
    gain = sum(ratio > 1 for ratio in ratios) >= SURE * len(ratios)
    return row | {"ratio": statistics.median(ratios), "gain": gain}


def ways(model: Any, rates: Sequence[float]) -> dict[float | None, Callable[[], AbstractContextManager[None]]]:
    """The variants of the model by keep rate: dense (None), the rate of training, and ``rates``.

    Without a predictor for images there is one rate, 1: all their tokens are retained. Raises ConfigError for a model
    without predictors.
    """
    sparsifier = get_sparsifier(model)
    if sparsifier is None:
        raise ConfigError("the checkpoint has no predictors; there is nothing to measure beside the dense model")
    dense = {None: partial(keeping, model, None)}
    if sparsifier.image_score_predictor is None:
        return dense | {1.0: nullcontext}
    trained = sparsifier.settings.vision_keep_rate
    return dense | {rate: partial(keeping, model, rate) for rate in sorted({trained, *rates})}


def _measured(
    model: Any, inputs: Inputs, runs: Mapping[float | None, Callable[[], AbstractContextManager[None]]], repeats: int
) -> dict[float | None, Values]:
    """The measured values of every variant on one batch; none where the device runs out of memory."""
    found: dict[float | None, Values] = {}
    for keep, way in runs.items():
        with way():
            try:
                found[keep] = _promised(model, inputs, keep) | _counted(model, inputs)
            except torch.OutOfMemoryError:
                found[keep] = {}
        if inputs["input_ids"].is_cuda:
            torch.cuda.empty_cache()
    fitting = [keep for keep, values in found.items() if values]
    for times, run in ((repeats, _timed), (MEMORY_REPEATS, _peak)):
        for _, keep in itertools.product(range(times), fitting):
            with runs[keep]():
                for name, value in run(model, inputs).items():
                    found[keep].setdefault(name, []).append(value)
    return found


# ---- one run


def _answer(model: Any, inputs: Inputs, tokens: int, now: Callable[[], float]) -> tuple[list[float], Any]:
    """Read the prompts and generate ``tokens`` greedily. Returns ``now()`` at the start, between images and language
    model, behind the prompt and at the end; and the bytes of the cache at the last two."""
    marks: list[float] = []

    def mark(*_: Any) -> None:
        marks.append(now())

    handle = model.model.language_model.register_forward_pre_hook(mark, prepend=True)
    mark()
    try:
        out = model(**inputs, use_cache=True, logits_to_keep=1, **prompt_retention(model))
    finally:
        handle.remove()
    mark()
    cache, mask, position = out.past_key_values, inputs["attention_mask"], inputs["position_ids"][:, -1:]
    held = held_bytes(cache)
    for _ in range(tokens):
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        position = position + 1
        given = {"attention_mask": mask, "position_ids": position, "past_key_values": cache}
        token = out.logits[:, -1].argmax(-1, keepdim=True)
        out = model(input_ids=token, **given, use_cache=True, logits_to_keep=1)
    mark()
    return marks, [held, held_bytes(cache)]


def held_bytes(cache: Any) -> int:
    """Bytes of the keys and values in a cache."""
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


def _timed(model: Any, inputs: Inputs) -> dict[str, float]:
    """Seconds of one run."""

    def now() -> float:
        if inputs["input_ids"].is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    (start, seen, read, end), _ = _answer(model, inputs, NEW_TOKENS, now)
    return {
        "image_seconds": seen - start,
        "prompt_seconds": read - seen,
        "first_token_seconds": read - start,
        "token_seconds": (end - read) / NEW_TOKENS,
    }


def _counted(model: Any, inputs: Inputs) -> Values:
    """Operations, as PyTorch counts them, and bytes of the cache; they are the same in every run."""
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten._grouped_mm: _grouped_flops}) as counter:
        (start, seen, read, end), _ = _answer(model, inputs, 1, counter.get_total_flops)
    _, (behind_prompt, behind_answer) = _answer(model, inputs, NEW_TOKENS, float)
    return {
        "image_flops": [seen - start],
        "prompt_flops": [read - seen],
        "token_flops": [end - read],
        "cache_bytes": [behind_prompt],
        "answered_cache_bytes": [behind_answer],
    }


def _grouped_flops(tokens: Sequence[int], experts: Sequence[int], *_: Any, **__: Any) -> int:
    """Operations of experts, ``[T, D]`` by ``[E, D, H]``, every token with one of them; PyTorch does not count them."""
    return 2 * math.prod(tokens) * experts[-1]


def _promised(model: Any, inputs: Inputs, keep: float | None) -> Values:
    """Values of the formulas (:mod:`mmpipe.models.sparsity.cost`); the cache's where it depends on the rate alone."""
    sparsifier, text = get_sparsifier(model), model.config.text_config
    assert sparsifier is not None
    size, first = sparsifier.image_tokens, sparsifier.settings.sparse_layer
    retained = size if keep is None else retained_tokens(size, keep)
    images = [int(n) // size for n in (inputs["input_ids"] == model.config.image_token_id).sum(1).tolist()]
    lengths = inputs["attention_mask"].sum(1).tolist()
    flops = [paper_image_flops(text.num_hidden_layers, text.hidden_size, n * size, n * retained, first) for n in images]
    if keep is not None and sparsifier.instruct_score_predictor is not None:
        return {"paper_flops": [sum(flops)]}
    longest = max(length - n * (size - retained) for length, n in zip(lengths, images, strict=True))
    rows, whole = inputs["input_ids"].shape
    number = cache_bytes(text, rows, whole, longest, first, model.dtype.itemsize)
    return {"paper_flops": [sum(flops)], "predicted_cache_bytes": [number]}


def _peak(model: Any, inputs: Inputs) -> dict[str, float]:
    """Peak memory of one run, weights included: tensors on a GPU, CPU RAM of the process on Linux, else nothing."""
    device = inputs["input_ids"].device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        _answer(model, inputs, NEW_TOKENS, float)
        return {"peak_bytes": torch.cuda.max_memory_allocated(device)}
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # release memory that earlier runs freed
    try:
        Path("/proc/self/clear_refs").write_text("5")  # reset the peak
    except OSError:
        return {}
    _answer(model, inputs, NEW_TOKENS, float)
    status = Path("/proc/self/status").read_text().splitlines()
    return {"peak_bytes": 1024 * next(float(line.split()[1]) for line in status if line.startswith("VmHWM"))}


# ---- conditions of the measurement


def facts(answerer: Answerer, questions: Sequence[Question]) -> Row:
    """Conditions of the measurement: the model, the prompts and the machine."""
    model = answerer.model
    sparsifier: Any = get_sparsifier(model)
    device = model.device.type
    return {
        "layers": model.config.text_config.num_hidden_layers,
        "sparse_layer": sparsifier.settings.sparse_layer,
        "image_tokens": sparsifier.image_tokens,
        "trained_rate": sparsifier.settings.vision_keep_rate if sparsifier.image_score_predictor else 1.0,
        "prompt_tokens": {size: answerer.inputs(prompts(questions, size))["input_ids"].shape[1] for size in BATCHES},
        "new_tokens": NEW_TOKENS,
        "dtype": str(model.dtype).removeprefix("torch."),
        "weights_bytes": sum(weight.nbytes for weight in model.parameters()),
        "device": torch.cuda.get_device_name() if device == "cuda" else _cpu(),
        "threads": torch.get_num_threads(),
        "system": platform.platform(),
        "memory": "what tensors take on the GPU" if device == "cuda" else "resident memory of the process",
    }


def _cpu() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
