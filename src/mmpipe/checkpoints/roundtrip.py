"""Round-trip check before publication: a fresh process must reproduce the outputs of the model in memory.

The files are read with stock transformers classes, without network, by a process that never imports this package; its
logits and greedy answers are compared. Predictors of a sparsified model, which stock classes do not compute, are read
back by this package, in a fresh process as well.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from mmpipe.errors import ArtifactError

_READERS = {
    "stock transformers": Path(__file__).with_name("read_with_hf.py"),
    "mmpipe": Path(__file__).with_name("read_with_mmpipe.py"),
}
_TIMEOUT = 3600
"""Seconds."""
Reader = Literal["stock transformers", "mmpipe"]


@dataclass(frozen=True)
class Reference:
    """Expected outputs of a checkpoint: samples (one row each, no padding), their logits and greedy continuations."""

    samples: list[dict[str, Tensor]]
    logits: list[Tensor]
    tokens: list[Tensor]
    max_new_tokens: int
    device: str


@torch.no_grad()
def reference(
    model: LlavaForConditionalGeneration, samples: Sequence[Mapping[str, Tensor]], *, max_new_tokens: int = 16
) -> Reference:
    """Run ``model`` on ``samples`` in evaluation mode and float32; mode and precision are restored."""
    was_training = model.training
    run: Any = model.eval()
    with _widened(model):
        here = [{name: value.to(model.device) for name, value in sample.items()} for sample in samples]
        logits = [run(**sample, use_cache=False).logits.cpu() for sample in here]
        tokens = [
            run.generate(**sample, max_new_tokens=max_new_tokens, do_sample=False, num_beams=1).cpu() for sample in here
        ]
    model.train(was_training)
    stored = [{name: value.cpu() for name, value in sample.items()} for sample in samples]
    return Reference(stored, logits, tokens, max_new_tokens, str(model.device))


@contextmanager
def _widened(model: torch.nn.Module) -> Iterator[None]:
    """Context manager: parameters in float32, exact in both directions; buffers keep their precision."""
    dtypes = {parameter: parameter.dtype for parameter in model.parameters()}
    for parameter in dtypes:
        parameter.data = parameter.data.float()
    try:
        yield
    finally:
        for parameter, dtype in dtypes.items():
            parameter.data = parameter.data.to(dtype)


def check_roundtrip(
    path: Path, expected: Reference, *, reader: Reader = "stock transformers", tolerance: float = 1e-5
) -> float:
    """Read the checkpoint ``path`` in a fresh process and compare; returns the largest difference of logits, relative
    to the largest logit when that is above one.

    Raises ArtifactError when the reader cannot read the directory, when tensors are missing or surplus, when logits
    differ by more than ``tolerance`` or an answer differs.
    """
    with tempfile.TemporaryDirectory(prefix="mmpipe-roundtrip-") as folder:
        given, got = Path(folder, "given.safetensors"), Path(folder, "got.safetensors")
        save_file(
            {f"{i}.{name}": v.contiguous() for i, sample in enumerate(expected.samples) for name, v in sample.items()},
            given,
        )
        command = [sys.executable, "-P", str(_READERS[reader]), str(path), str(given), str(got)]
        command += [str(expected.max_new_tokens), expected.device]
        environment = os.environ | {"HF_HUB_OFFLINE": "1"}
        try:
            done = subprocess.run(
                command, env=environment, capture_output=True, text=True, timeout=_TIMEOUT, check=False
            )
        except subprocess.TimeoutExpired as error:
            raise ArtifactError(f"{path}: reading it with {reader} took more than {_TIMEOUT} s") from error
        if done.returncode:
            raise ArtifactError(f"{path}: {reader} cannot use it:\n{done.stderr.strip()[-2000:]}")
        read = load_file(got)
    return _compare(f"{path}: read by {reader}", expected, read, tolerance)


def _compare(where: str, expected: Reference, read: Mapping[str, Tensor], tolerance: float) -> float:
    worst = 0.0
    for i, (logits, tokens) in enumerate(zip(expected.logits, expected.tokens, strict=True)):
        difference = ((read[f"{i}.logits"] - logits).abs().max() / logits.abs().max().clamp_min(1)).item()
        if not difference <= tolerance:
            raise ArtifactError(
                f"{where}, the logits of sample {i} differ by {difference:.3g}, more than {tolerance:g}"
            )
        if not torch.equal(read[f"{i}.tokens"], tokens):
            raise ArtifactError(
                f"{where}, sample {i} is answered {read[f'{i}.tokens'][0].tolist()}, here {tokens[0].tolist()}"
            )
        worst = max(worst, difference)
    return worst
