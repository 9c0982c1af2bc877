"""Progress of a training: a bar with loss, tokens/s and time left in a terminal, plain lines in the log, a history on disk."""

from __future__ import annotations

import json
import logging
import resource
import sys
import time
from itertools import takewhile
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from mmpipe.artifacts.files import json_line, recover_lines, write_json, write_jsonl
from mmpipe.training.collapse import LAYERS

log = logging.getLogger(__name__)

_LINES = 20
"""Lines a training writes into its log."""

_LEFT_OUT = {"epoch", "num_input_tokens_seen", "train_runtime", "train_tokens_per_second"}
"""What the trainer logs that differs from run to run, or that we write under another name."""


class Progress(TrainerCallback):
    """Writes ``history.jsonl`` (one line a step, no times: the same run writes the same bytes) and ``perf.json`` beside it."""

    def __init__(self, history: Path, title: str, start_step: int) -> None:
        self.history = history
        self.title = title
        self.start_step = start_step
        self.bar: tqdm[Any] | None = None
        self.started = 0.0
        self.tokens_before = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.started = time.perf_counter()
        self.tokens_before = int(state.num_input_tokens_seen)
        if not state.is_world_process_zero:
            return
        _keep_steps(self.history, self.start_step)
        if sys.stderr.isatty():
            self.bar = tqdm(total=state.max_steps, initial=self.start_step, desc=self.title, unit="step", leave=True)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
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
                *(state.global_step, state.max_steps, row["loss"], row["learning_rate"], rate, _clock(left)),
            )

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
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
    """Cut the history back to the step training goes on from."""
    if history.exists():
        rows = map(json.loads, recover_lines(history))
        write_jsonl(history, takewhile(lambda row: row["step"] <= last, rows))


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
