"""Early stopping of a job: a signal or a near time limit leads to a checkpoint and a clean exit.

Three sources: the SIGTERM that Slurm sends to every process when it preempts or cancels a job; SIGINT (Ctrl-C) and
SIGHUP (a closed terminal), which reach every process of Snakemake's and of which the launching process writes a file
for the ranks, as of a SIGTERM that it alone gets; and the job's time limit. The ranks agree after each step, so that
all save the same step. A second Ctrl-C ends the job at once.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from mmpipe import slurm
from mmpipe.artifacts.files import read_json, write_json
from mmpipe.errors import MmpipeError
from mmpipe.stages.base import StageJob

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments

REQUEST = "stop-requested"
"""File in the state directory that requests a stop."""
RECORD = "stopped.json"
"""File in the state directory with the step and reason of an early stop."""
TIME_LIMIT = "time limit"
SIGNALS = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)
"""The signals that request a stop."""


def heeded() -> set[signal.Signals]:
    """The signals that request a stop: SIGTERM, and those this process was not started to ignore, as by nohup, in the
    background, or below torchrun."""
    return {number for number in SIGNALS if number == signal.SIGTERM or signal.getsignal(number) != signal.SIG_IGN}


def end_at_once(number: int) -> NoReturn:
    """End this process as the signal would."""
    os._exit(128 + number)


class Stopped(MmpipeError):
    """Training was asked to stop, and stopped after writing a checkpoint."""


def require_finished(job: StageJob) -> None:
    """Raise Stopped when training stopped early; a job at its time limit requeues itself with Slurm."""
    if not (job.state_dir / RECORD).is_file():
        return
    stopped = read_json(job.state_dir / RECORD)
    message = f"{job.recipe} {job.stage}: stopped at step {stopped['step']} ({stopped['reason']}) with a checkpoint; "
    slurm_job = slurm.job_id()
    if stopped["reason"] == TIME_LIMIT and slurm_job and slurm.requeue(slurm_job):
        raise Stopped(f"{message}Slurm runs the job again, and it goes on from there")
    raise Stopped(f"{message}run the same command again, and it goes on from there")


class StopSignal:
    """Whether this process got a signal that requests a stop."""

    def __init__(self) -> None:
        self.signalled = threading.Event()
        self.reason = ""
        """The name of the first signal."""
        self._last = 0

    def receive(self, number: int) -> None:
        """Note a signal; a second SIGINT ends the process."""
        if number == signal.SIGINT == self._last:
            end_at_once(number)
        self._last = number
        self.reason = self.reason or signal.Signals(number).name
        self.signalled.set()

    def leave_if_signalled(self, state_dir: Path) -> None:
        """Raise Stopped, before the first step, when this process or the launching one got a signal."""
        if self.signalled.is_set() or (state_dir / REQUEST).exists():
            raise Stopped("stopped before the first step; run the same command again")

    @contextmanager
    def listening(self, *, leave_with_parent: bool = False) -> Iterator[StopSignal]:
        """Context manager that takes the signals of :func:`heeded` as requests to stop.

        A thread waits for the signal, because the main one may be blocked in a collective operation when
        another rank died. With ``leave_with_parent``, a SIGTERM from the parent (torchrun, after a rank failed) ends the
        process at once.
        """
        signals = heeded()
        handlers = {number: signal.signal(number, lambda got, _: self.receive(got)) for number in signals}
        before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
        done = threading.Event()
        waiting = threading.Thread(target=self._wait, args=(signals, done, leave_with_parent), daemon=True)
        waiting.start()
        try:
            yield self
        finally:
            done.set()
            waiting.join()
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def _wait(self, signals: Iterable[int], done: threading.Event, leave_with_parent: bool) -> None:
        parent = os.getppid()
        while not done.is_set():
            found = signal.sigtimedwait(signals, 0.2)
            # a process that was paused for longer gets a record of no signal (number 0) in place of None
            if found is None or found.si_signo not in signals:
                continue
            if leave_with_parent and found.si_signo == signal.SIGTERM and found.si_pid == parent:
                end_at_once(signal.SIGTERM)
            self.receive(found.si_signo)


def worker_init(number: int = 0) -> None:
    """Set up a data-loading process: it ends with the training process or at its SIGTERM, not when all processes get a
    signal."""
    die_with_parent()
    for number in (signal.SIGHUP, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=StopSignal()._wait, args=({signal.SIGTERM}, threading.Event(), True), daemon=True).start()


def die_with_parent() -> None:
    """Make the kernel kill this process when its parent dies (Linux only)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


class Deadline:
    """Decides when to stop so that a last checkpoint is written before ``end`` (seconds since the epoch).

    The reserve is two steps and two checkpoints as slow as the slowest so far, and a tenth of the time, at most two
    minutes, for everything else. Before the first checkpoint its duration is estimated from its size.
    """

    def __init__(self, end: float, checkpoint_bytes: int) -> None:
        self.end = end
        self.step = 0.0
        self.checkpoint = checkpoint_bytes / 500e6
        self.rest = min(120.0, 0.1 * max(0.0, end - time.time()))

    def near(self) -> bool:
        """Whether it is time to stop."""
        return time.time() > self.end - self.rest - 2 * self.step - 2 * self.checkpoint


def make_callback(stop_signal: StopSignal, state_dir: Path, end: float | None, checkpoint_bytes: int) -> Any:
    """A trainer callback that stops training, with a checkpoint, when any rank has a reason to.

    Its ``reason`` is why training stopped early; None when it did not.
    """
    from transformers import TrainerCallback

    class Stopper(TrainerCallback):
        reason: str | None = None

        def __init__(self) -> None:
            self.deadline = Deadline(end, checkpoint_bytes) if end else None
            self.began = time.monotonic()

        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            self.began = time.monotonic()

        def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
            if self.deadline:
                self.deadline.step = max(self.deadline.step, time.monotonic() - self.began)
            self.began = time.monotonic()
            reason = _agreed(self._own_reason(state.is_world_process_zero), args)
            if reason and state.global_step < state.max_steps:
                self.reason = reason
                control.should_save = control.should_training_stop = True

        def on_save(self, *args: Any, **kwargs: Any) -> None:
            if self.deadline:
                self.deadline.checkpoint = max(self.deadline.checkpoint, time.monotonic() - self.began)

        def on_train_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
            if self.reason and state.is_world_process_zero:
                write_json(state_dir / RECORD, {"step": state.global_step, "reason": self.reason})

        def _own_reason(self, first: bool) -> str | None:
            if stop_signal.signalled.is_set():
                return stop_signal.reason
            if first and (state_dir / REQUEST).exists():
                return (state_dir / REQUEST).read_text(encoding="ascii") or signal.SIGTERM.name
            return TIME_LIMIT if first and self.deadline and self.deadline.near() else None

    return Stopper()


_CODES = (None, TIME_LIMIT, *(number.name for number in SIGNALS))


def _agreed(reason: str | None, args: TrainingArguments) -> str | None:
    """The most urgent reason of any rank."""
    if args.world_size == 1:
        return reason
    import torch

    code = torch.tensor(_CODES.index(reason), device=args.device)
    torch.distributed.all_reduce(code, torch.distributed.ReduceOp.MAX)
    return _CODES[int(code)]
