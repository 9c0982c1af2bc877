"""Memory and time of the distillation loss: ours, chunked over response positions, against the naive style.

Naive is how LLaVA-MoD computes it: both heads on all positions, float32 softmax and log-softmax, their
product, a mask for infinite entries, then the mask of the response. Both variants run forward and backward
from the same hidden states.

    python perf/distillation_loss.py                # the target: 2048 positions, a quarter supervised, V = 151,936
    python perf/distillation_loss.py --quick        # 256 positions, V = 20,000
    python perf/distillation_loss.py --dtype bfloat16

Peak memory is the high-water mark of the resident set above its level before the pass, in a fresh process for
each variant (Linux; on a GPU: the allocator's). The gradients of hidden states and head are part of it. Time
is the median of interleaved repetitions; on a CPU it is processor time, which other work on the machine
changes least.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

from mmpipe.losses.distillation import cached_distillation_loss, distillation_loss
from mmpipe.losses.language_modelling import language_modelling_loss

LIMIT = 0.15
"""Peak memory of ours over that of the naive style must not exceed this."""


def inputs(options: argparse.Namespace) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    dtype = getattr(torch, options.dtype)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator) * scale).to(options.device, dtype)

    labels = torch.full((1, options.positions), -100)
    supervised = options.positions // 4
    labels[:, -supervised:] = torch.randint(options.vocabulary, (1, supervised), generator=generator)
    return {
        "student_hidden_BLD": normal(1, options.positions, options.student_width).requires_grad_(),
        "student_head_VD": normal(options.vocabulary, options.student_width, scale=0.05).requires_grad_(),
        "teacher_hidden_BLE": normal(1, options.positions, options.teacher_width),
        "teacher_head_UE": normal(options.vocabulary, options.teacher_width, scale=0.05),
        "labels_BL": labels.to(options.device),
    }


def naive(given: dict[str, Tensor]) -> Tensor:
    student = given["student_hidden_BLD"] @ given["student_head_VD"].T
    with torch.no_grad():
        teacher = given["teacher_hidden_BLE"] @ given["teacher_head_UE"].T
        p = teacher.float().softmax(-1)
    log_q = student.float().log_softmax(-1)
    product = torch.masked_fill(p * log_q, torch.isinf(student), 0)
    mask = given["labels_BL"].roll(-1, 1).ne(-100)
    mask[:, -1] = False
    return -(product.sum(-1) * mask).sum() / mask.sum()


def ours(given: dict[str, Tensor]) -> Tensor:
    return distillation_loss(**given)[0]


def cached(given: dict[str, Tensor]) -> Tensor:
    rows = int((given["labels_BL"][:, 1:] != -100).sum())
    vocabulary = len(given["student_head_VD"])
    ids = (torch.arange(64) * 7 % vocabulary).expand(rows, 64).to(given["labels_BL"].device)
    log_p = torch.full((rows, 64), 1 / 80).log().to(ids.device)
    return cached_distillation_loss(
        given["student_hidden_BLD"], given["student_head_VD"], given["labels_BL"], ids, log_p
    )[0]


def cross_entropy(given: dict[str, Tensor]) -> Tensor:
    return language_modelling_loss(given["student_hidden_BLD"], given["student_head_VD"], given["labels_BL"])


VARIANTS = {"naive": naive, "ours": ours, "cached top-64": cached, "cross entropy": cross_entropy}


def run(name: str, given: dict[str, Tensor]) -> float:
    """Seconds of one forward and backward pass."""
    for tensor in given.values():
        tensor.grad = None
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    start = clock()
    VARIANTS[name](given).backward()
    if given["labels_BL"].is_cuda:
        torch.cuda.synchronize()
    return clock() - start


def peak(name: str, options: argparse.Namespace) -> float:
    """Extra MiB one pass needs beyond its inputs, measured in a process of its own."""
    command = [sys.executable, __file__, "--peak-of", name, "--positions", str(options.positions)]
    command += ["--vocabulary", str(options.vocabulary), "--dtype", options.dtype, "--device", options.device]
    return float(json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout))


def peak_here(name: str, options: argparse.Namespace) -> float:
    given = inputs(options)
    if options.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run(name, given)
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    small = argparse.Namespace(**vars(options) | {"positions": 8, "vocabulary": 64})
    run(name, inputs(small))  # threads and library buffers are not the loss's
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
    before = resident("VmRSS")
    run(name, given)
    return resident("VmHWM") - before


def resident(field: str) -> float:
    """MiB from Linux's account of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--positions", type=int, default=2048)
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--student-width", type=int, default=896)
    parser.add_argument("--teacher-width", type=int, default=1536)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--peak-of", choices=tuple(VARIANTS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak_of:
        print(json.dumps(peak_here(options.peak_of, options)))
        return
    if options.quick:
        options.positions, options.vocabulary = 256, 20_000

    memory = {name: peak(name, options) for name in VARIANTS}
    given = inputs(options)
    seconds: dict[str, list[float]] = {name: [] for name in VARIANTS}
    for _ in range(options.repeat):
        for name in VARIANTS:
            seconds[name].append(run(name, given))
    medians = {name: statistics.median(values) for name, values in seconds.items()}

    print(
        f"{options.positions} positions, a quarter supervised, V {options.vocabulary}, {options.dtype}, {options.device}"
    )
    print(f"{'':16}{'seconds':>10}{'/ naive':>10}{'MiB':>10}{'/ naive':>10}")
    for name in VARIANTS:
        time_ratio, memory_ratio = medians[name] / medians["naive"], memory[name] / memory["naive"]
        print(f"{name:16}{medians[name]:10.3f}{time_ratio:10.3f}{memory[name]:10.0f}{memory_ratio:10.3f}")
    ratio = memory["ours"] / memory["naive"]
    print(f"peak memory of ours / naive: {ratio:.3f} (at most {LIMIT} is asked of the full size)")


if __name__ == "__main__":
    main()
