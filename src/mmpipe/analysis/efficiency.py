"""What dropping context saves, measured: operations, times, cache and memory of a checkpoint at several keep rates.

The same prompts are answered densely and at every rate, one after the other in each repetition, so that whatever else the
machine does meets all of them. A saving is called one only where it shows in nine of ten repetitions. Operations are counted
by PyTorch while the model runs, predictors included.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import math
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from mmpipe.benchmarks.base import Question
from mmpipe.benchmarks.prepare import evenly
from mmpipe.errors import ConfigError
from mmpipe.inference.generate import Answerer
from mmpipe.models.sparsity.cost import cache_bytes, paper_image_flops
from mmpipe.models.sparsity.hooks import keeping, of_model, of_prompt
from mmpipe.models.sparsity.sparsifier import kept_tokens

BATCHES = (1, 16)
REPEATS = 10
MEMORY_REPEATS = 3
NEW_TOKENS = 16
SURE = 0.9
"""A gain shows in at least this share of the repetitions."""

UNITS = {
    "paper_flops": "FLOP",
    "image_flops": "FLOP",
    "prompt_flops": "FLOP",
    "token_flops": "FLOP",
    "image_seconds": "s",
    "prompt_seconds": "s",
    "first_token_seconds": "s",
    "token_seconds": "s",
    "predicted_cache_bytes": "B",
    "cache_bytes": "B",
    "answered_cache_bytes": "B",
    "peak_bytes": "B",
}
"""Everything that is measured, of a whole batch; ``token`` is a generated one of every row."""

Inputs = Mapping[str, torch.Tensor]
Values = dict[str, list[float]]
Row = dict[str, Any]


def prompts(questions: Sequence[Question], count: int) -> list[Question]:
    """``count`` questions with images, spread evenly; over again from the first where there are fewer.

    Raises ConfigError when none has an image.
    """
    asked = [question for question in questions if question.images]
    if not asked:
        raise ConfigError(
            "benchmarks: the first one has no images, which the measurement of sparsified checkpoints needs; put one that "
            "has images first"
        )
    return list(itertools.islice(itertools.cycle(evenly(asked, count)), count))


def measure(answerer: Answerer, questions: Sequence[Question], rates: Sequence[float]) -> list[Row]:
    """Everything in :data:`UNITS` for the dense model, the rate of training and ``rates``, a row a number.

    A row holds ``batch, keep`` (None: dense), ``measure, unit, value`` (median), ``low, high, repeats``, and against the
    dense model ``ratio`` (median of pairs, above 1 is a saving) and ``gain``. Where the device had not memory enough,
    ``value`` is None.
    """
    batches = (answerer.inputs(prompts(questions, size)) for size in BATCHES)
    return [row for inputs in batches for row in measure_batch(answerer.model, inputs, rates, REPEATS)]


@torch.inference_mode()
def measure_batch(model: Any, inputs: Inputs, rates: Sequence[float], repeats: int = REPEATS) -> list[Row]:
    """The rows of one batch of prompts: ``input_ids, attention_mask, position_ids`` padded on the left, ``pixel_values``."""
    found = _measured(model, inputs, ways(model, rates), repeats)
    dense, size = found[None], len(inputs["input_ids"])
    return [
        {"batch": size, "keep": keep, "measure": name, "unit": unit}
        | summary(values.get(name, []), dense.get(name, []), keep is None)
        for keep, values in found.items()
        for name, unit in UNITS.items()
    ]


def summary(values: Sequence[float], dense: Sequence[float], is_dense: bool = False) -> Row:
    """Median and range of repetitions, and what they say beside those of the dense model, pair by pair."""
    row: Row = {
        "value": statistics.median(values) if values else None,
        "low": min(values, default=None),
        "high": max(values, default=None),
        "repeats": len(values),
        "ratio": None,
        "gain": None,
    }
    if is_dense or not dense or not row["value"]:
        return row
    ratios = [before / now for before, now in zip(dense, values, strict=True)]
    row["ratio"] = statistics.median(ratios)
    return row | {"gain": sum(ratio > 1 for ratio in ratios) >= SURE * len(ratios)}


def ways(model: Any, rates: Sequence[float]) -> dict[float | None, Callable[[], AbstractContextManager[None]]]:
    """How the model is run, by keep rate: densely, as it was trained, and at ``rates``.

    Without a predictor for images there is no rate: everything of them is kept.
    """
    sparsifier = of_model(model)
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
    """The values of every way to run the model on one batch; none of one that the device has not memory for."""
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
    """Read the prompts and generate ``tokens`` greedily. Returns what ``now`` said at the start, between images and language
    model, behind the prompt and at the end; and the bytes of the cache at the last two."""
    marks: list[float] = []

    def mark(*_: Any) -> None:
        marks.append(now())

    handle = model.model.language_model.register_forward_pre_hook(mark, prepend=True)
    mark()
    try:
        out = model(**inputs, use_cache=True, logits_to_keep=1, **of_prompt(model))
    finally:
        handle.remove()
    mark()
    cache, mask = out.past_key_values, inputs["attention_mask"]
    held = [held_bytes(cache)]
    position = inputs["position_ids"][:, -1:]
    for _ in range(tokens):
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        position = position + 1
        out = model(
            input_ids=out.logits[:, -1].argmax(-1, keepdim=True),
            attention_mask=mask,
            position_ids=position,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
    mark()
    return marks, [*held, held_bytes(cache)]


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
    """What the formulas say; of the cache only where it depends on nothing but the rate."""
    sparsifier, text = of_model(model), model.config.text_config
    assert sparsifier is not None
    size, first = sparsifier.image_tokens, sparsifier.settings.sparse_layer
    kept = size if keep is None else kept_tokens(size, keep)
    images = [int(n) // size for n in (inputs["input_ids"] == model.config.image_token_id).sum(1).tolist()]
    lengths = inputs["attention_mask"].sum(1).tolist()
    flops = [paper_image_flops(text.num_hidden_layers, text.hidden_size, n * size, n * kept, first) for n in images]
    values: Values = {"paper_flops": [sum(flops)]}
    if keep is None or sparsifier.instruct_score_predictor is None:
        longest = max(length - n * (size - kept) for length, n in zip(lengths, images, strict=True))
        rows, whole = inputs["input_ids"].shape
        number = cache_bytes(text, rows, whole, longest, first, model.dtype.itemsize)
        values["predicted_cache_bytes"] = [number]
    return values


def _peak(model: Any, inputs: Inputs) -> dict[str, float]:
    """The most memory of one run, weights included; nothing where the system does not tell."""
    with _watched(inputs["input_ids"].device) as peak:
        _answer(model, inputs, NEW_TOKENS, float)
        value = peak()
    return {} if value is None else {"peak_bytes": value}


@contextmanager
def _watched(device: torch.device) -> Iterator[Callable[[], float | None]]:
    """Start again to watch memory: what tensors take on a GPU, what the process has of main memory on Linux."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield lambda: torch.cuda.max_memory_allocated(device)
        return
    with contextlib.suppress(OSError, AttributeError):
        # hand back what earlier runs freed, then forget the peak
        ctypes.CDLL(None).malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        yield lambda: None
        return
    yield _high_water


def _high_water() -> float:
    status = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(float(line.split()[1]) for line in status if line.startswith("VmHWM"))


# ---- what was measured where


def facts(answerer: Answerer, questions: Sequence[Question]) -> Row:
    """What the reader of the numbers has to know: the model, the prompts and the machine."""
    model = answerer.model
    sparsifier: Any = of_model(model)
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
