"""Training progress: a bar in a terminal, log lines, a history on disk, a warning when routing collapses."""

from __future__ import annotations

import json
import logging
import resource
import sys
import time
from datetime import timedelta
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import TrainerCallback, TrainerState, TrainingArguments

from mmpipe.artifacts.files import json_line, recover_lines, write_json, write_jsonl
from mmpipe.losses import COLLAPSE_ALARM
from mmpipe.models.moe.collect import collect_collapse, part_of
from mmpipe.training.objectives.base import ROUTING

log = logging.getLogger(__name__)

HISTORY = "history.jsonl"
REPLACED = "records_replaced"
"""Column of the history: records whose images could not be read, over all processes
(:class:`mmpipe.data.dataset.RecordDataset`)."""
LAYERS = f"{ROUTING}collapsed_layers"
"""Column of the history: number of collapsed layers. ``routing.{part}.top_set`` is the share of the tokens
with the most common choice, in the worst layer of a part."""

_LINES = 20
"""Number of progress lines in the log of a training."""

_LEFT_OUT = {"epoch", "num_input_tokens_seen", "train_runtime", "train_tokens_per_second"}
"""Entries of the trainer's log that differ between runs or have another name in the history."""


class Progress(TrainerCallback):
    """Writes ``history.jsonl`` (one line per step, without times: equal runs give equal bytes) and ``perf.json``."""

    def __init__(self, history: Path, title: str, start_step: int) -> None:
        self.history = history
        self.title = title
        self.start_step = start_step
        self.bar: tqdm[Any] | None = None
        self.started = 0.0
        self.tokens_before = 0

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self.started = time.perf_counter()
        self.tokens_before = int(state.num_input_tokens_seen)
        if not state.is_world_process_zero:
            return
        _keep_steps(self.history, self.start_step)
        if sys.stderr.isatty():
            self.bar = tqdm(total=state.max_steps, initial=self.start_step, desc=self.title, unit="step", leave=True)

    def on_log(self, args: Any, state: TrainerState, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero or not logs or "loss" not in logs:
            return
        known = {k: v for k, v in logs.items() if k not in _LEFT_OUT}
        row = {"step": state.global_step, "tokens": int(state.num_input_tokens_seen), **known}
        with self.history.open("ab") as file:
            file.write(json_line(row))
        rate = self._tokens_per_second(state)
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)
            collapsed = f", {row[LAYERS]:.0f} layers collapsed" if row.get(LAYERS) else ""
            self.bar.set_postfix_str(f"loss {row['loss']:.3f}, {rate:,.0f} tokens/s{collapsed}", refresh=False)
        every = max(1, state.max_steps // _LINES)
        if state.global_step % every == 0 or state.global_step == state.max_steps:
            elapsed = time.perf_counter() - self.started
            left = elapsed / (state.global_step - self.start_step) * (state.max_steps - state.global_step)
            log.info(
                "step %d/%d  loss %.4f  lr %.3g  %.0f tokens/s  %s left",
                *(
                    state.global_step,
                    state.max_steps,
                    row["loss"],
                    row["learning_rate"],
                    rate,
                    timedelta(seconds=int(left)),
                ),
            )

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.close()
        if state.is_world_process_zero:
            seconds = time.perf_counter() - self.started
            write_json(
                self.history.with_name("perf.json"),
                {
                    "steps": state.global_step - self.start_step,
                    "seconds": round(seconds, 3),
                    "tokens_per_second": round(self._tokens_per_second(state), 1),
                    "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
                    "processes": args.world_size,
                },
            )

    def _tokens_per_second(self, state: TrainerState) -> float:
        seconds = time.perf_counter() - self.started
        return (int(state.num_input_tokens_seen) - self.tokens_before) / max(seconds, 1e-9)


def _keep_steps(history: Path, last: int) -> None:
    """Cut the history back to the step training resumes from."""
    if history.exists():
        rows = map(json.loads, recover_lines(history))
        write_jsonl(history, takewhile(lambda row: row["step"] <= last, rows))


class CollapseWatch:
    """The share of each MoE layer's most common choice of experts, averaged over the micro batches of a step.

    Only this process's share of the batch is measured, at the cost of one small transfer a step. A dense model has no
    layers and logs nothing.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._batches = 0
        self._warned: set[str] = set()

    def add(self, model: nn.Module) -> None:
        """Add the forward pass just made."""
        for name, share in collect_collapse(model).items():
            self._sums[name] = self._sums.get(name, torch.zeros_like(share)) + share
        self._batches += 1

    def metrics(self, step: int) -> dict[str, float]:
        """The values to log for this step; warns once when a layer has collapsed, and reports once that it recovered."""
        if not self._sums:
            return {}
        means = torch.stack(list(self._sums.values())) / self._batches
        shares = dict(zip(self._sums, means.tolist(), strict=True))
        self._sums, self._batches = {}, 0
        collapsed = {name for name, share in shares.items() if share > COLLAPSE_ALARM}
        for name in sorted(collapsed - self._warned):
            log.warning(
                "step %d: the routing of %s has collapsed: %.0f %% of the tokens make the same choice of experts; "
                "raise balance_coefficient, or lower the router's learning rate (learning_rates)",
                *(step, name, 100 * shares[name]),
            )
        for name in sorted(self._warned - collapsed):
            log.info("step %d: the routing of %s has recovered (%.0f %%)", step, name, 100 * shares[name])
        self._warned = collapsed
        worst: dict[str, float] = {}
        for name, share in shares.items():
            key = f"{ROUTING}{part_of(name)}.top_set"
            worst[key] = max(share, worst.get(key, 0.0))
        return {**worst, LAYERS: float(len(collapsed))}
