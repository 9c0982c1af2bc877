"""Kill a training and an evaluation again and again, and see whether the same command mends everything.

    python tests/kill/matrix.py --kills 6 --seed 0        # prints one line of JSON

One process imports everything and forks a child for each run, so that a run costs its work and not its imports. The child
is killed with SIGKILL: at one of its file operations (Python's audit events tell them: open, rename, remove, mkdir, ...),
in the middle of writing a safetensors file, or at a moment of the clock. Meanwhile and afterwards, whatever lies under a
declared name must have the bytes of the undisturbed run. Then the same command runs to the end: same bytes again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

for place in (Path(__file__).parents[1], Path(__file__).parents[2] / "src", Path(__file__).parents[2]):
    sys.path.insert(0, str(place))
os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", DS_ACCELERATOR="cpu")

DECLARED = (
    "run/model/model.safetensors",
    "run/model/projector.safetensors",
    "run/model/manifest.json",
    "run/report/history.jsonl",
    "eval/pope/chunks/0000-of-0001.jsonl",
    "eval/pope/answers.jsonl",
    "eval/pope/score.json",
    "eval/pope/per_item.jsonl",
)
"""What the rules declare as outputs, below the folder of a run."""
STEPS = 4


@dataclass(frozen=True)
class Point:
    """When to kill: before the ``index``-th file operation, in the ``index``-th safetensors file, or after ``seconds``."""

    kind: str
    index: int = 0
    seconds: float = 0.0
    about: str = ""


@dataclass
class Reference:
    """The undisturbed run."""

    digests: dict[str, str]
    events: list[str]
    """Its file operations, in order."""
    files_of_tensors: int
    seconds: float


# --- the command that is killed ----------------------------------------------------------------------------------------


def train_and_evaluate(folder: Path) -> None:
    """What Snakemake's jobs do: train a stage, answer a benchmark, gather, score; all in the current directory."""
    from tiny_project import make_job

    from mmpipe.artifacts.state import drop_progress
    from mmpipe.benchmarks.spec import BenchmarkEntry
    from mmpipe.stages.finetune import Finetune
    from mmpipe.training.run import run_stage
    from workflow.scripts import answer, gather, score

    stage = Finetune(
        data="mix", template="qwen", batch_size=8, max_steps=STEPS, learning_rate=1e-3, hardware={"checkpoint_every": 1}
    )
    made = make_job(folder)
    run_stage(stage, made)
    drop_progress(made.model_dir)  # as the workflow does when it has accepted the outputs
    entry = BenchmarkEntry(task="pope", data="pope", max_new_tokens=4, batch_size=2)
    logs = SimpleNamespace(spec=lambda: "", settings=None)
    plan: Any = SimpleNamespace(benchmarks={"pope": entry}, benchmark_spec=lambda *_: "", expert_logs=logs)
    prepared, results = Path("resources/benchmarks/pope"), folder / "eval/pope"
    chunk, answers = results / "chunks/0000-of-0001.jsonl", results / "answers.jsonl"

    def job(output: Any, **inputs: Any) -> Any:
        wildcards = SimpleNamespace(smoke="", checkpoint="run", benchmark="pope", chunk="0000-of-0001")
        settings = {"threads": 1, "resources": {"gpu": 0}, "params": {"reads": ""}}
        return SimpleNamespace(wildcards=wildcards, input=SimpleNamespace(**inputs), output=output, **settings)

    # the steps themselves, without the log that their wrapper opens
    checkpoint = folder / "run/model/manifest.json"
    answer.main.__wrapped__(job([chunk], checkpoint=checkpoint, benchmark=prepared / "manifest.json"), plan)
    gather.main.__wrapped__(job([answers], questions=prepared / "questions.jsonl", chunks=[chunk]), plan)
    score.main.__wrapped__(
        job(
            SimpleNamespace(per_item=results / "per_item.jsonl", score=results / "score.json"),
            checkpoint=Path("resources/benchmarks/pope/manifest.json"),
            references=prepared / "references.jsonl",
            answers=answers,
            judge=[],
        ),
        plan,
    )


def make_everything(root: Path) -> None:
    """The demo files, with a prepared benchmark."""
    from tiny_project import make_demo_files

    from mmpipe.artifacts import manifest
    from mmpipe.benchmarks.prepare import prepare
    from mmpipe.benchmarks.spec import BenchmarkEntry
    from mmpipe.demo.presence import pope

    make_demo_files(root)
    pope(root / "resources/datasets/pope", seed=5, questions=4)
    prepared = root / "resources/benchmarks/pope"
    prepared.mkdir(parents=True)
    prepare(BenchmarkEntry(task="pope", data="pope"), root / "resources/datasets/pope", prepared)
    manifest.write(prepared, kind="benchmark", spec="{}", inputs={})


# --- faults --------------------------------------------------------------------------------------------------------------


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _operations(folder: Path, seen: Callable[[str], None]) -> None:
    """Tell ``seen`` of every file operation of Python's below ``folder`` that changes something."""

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(arguments[1], str) and not set(arguments[1]) & set("wax+"):
            return
        if event in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "shutil.rmtree"):
            names = [str(name) for name in arguments[:2] if isinstance(name, (str, Path))]
            inside = [name for name in names if str(folder) in name or not name.startswith("/")]
            if inside:
                seen(f"{event} {' -> '.join(inside).replace(str(folder), '')}")

    sys.addaudithook(hook)


def _tear(index: int) -> Callable[[], int]:
    """Let the ``index``-th safetensors file be written by half, then die; returns a counter of such files."""
    import safetensors.torch

    whole, count = safetensors.torch.save_file, [0]

    def save_file(tensors: Any, filename: Any, *rest: Any, **more: Any) -> None:
        count[0] += 1
        whole(tensors, filename, *rest, **more)
        if count[0] == index:
            os.truncate(filename, os.path.getsize(filename) // 2)
            _die()

    for module in list(sys.modules.values()):
        for name, value in list(getattr(module, "__dict__", {}).items()):
            if value is whole:
                setattr(module, name, save_file)
    return lambda: count[0]


def _child(work: Callable[[], None], log: Path) -> int:
    """Run ``work`` in a forked process; returns its id."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        with log.open("ab") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        work()
        status = 0
    except BaseException:  # noqa: BLE001 - the child must not return into the parent's code
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


# --- looking -------------------------------------------------------------------------------------------------------------


def digests(folder: Path) -> dict[str, str]:
    """What lies under the declared names, and its hash."""
    found = {}
    for name in DECLARED:
        try:
            found[name] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
        except FileNotFoundError:
            continue
    return found


def _wrong(folder: Path, reference: dict[str, str]) -> list[str]:
    return [name for name, digest in digests(folder).items() if digest != reference[name]]


def _ends(pid: int) -> int | None:
    done, status = os.waitpid(pid, os.WNOHANG)
    return status if done else None


def undisturbed(folder: Path) -> Reference:
    """Run to the end once, noting hashes, file operations and time."""
    notes = folder.with_suffix(".events")

    def work() -> None:
        events: list[str] = []
        _operations(folder, events.append)
        files = _tear(0)
        started = time.monotonic()
        train_and_evaluate(folder)
        facts = {"events": list(events), "files": files(), "seconds": time.monotonic() - started}
        notes.write_text(json.dumps(facts))

    _, status = os.waitpid(_child(work, folder.with_suffix(".log")), 0)
    if status:
        raise SystemExit(folder.with_suffix(".log").read_text())
    facts = json.loads(notes.read_text())
    return Reference(digests(folder), facts["events"], facts["files"], facts["seconds"])


def disturbed(folder: Path, reference: Reference, points: list[Point]) -> dict[str, Any]:
    """Run and die at each of ``points`` in turn, then run to the end; returns what was wrong."""
    visible: set[str] = set()
    died = 0
    for point in points:

        def work(point: Point = point) -> None:
            if point.kind == "operation":
                left = [point.index]

                def count(_: str) -> None:
                    left[0] -= 1
                    if left[0] < 0:
                        _die()

                _operations(folder, count)
            if point.kind == "torn":
                _tear(point.index)
            train_and_evaluate(folder)

        pid, started, status = _child(work, folder.with_suffix(".log")), time.monotonic(), None
        while status is None:
            visible.update(_wrong(folder, reference.digests))
            if point.kind == "clock" and time.monotonic() - started > point.seconds:
                os.kill(pid, signal.SIGKILL)
                _, status = os.waitpid(pid, 0)
                break
            time.sleep(0.02)
            status = _ends(pid)
        died += os.WIFSIGNALED(status)
        visible.update(_wrong(folder, reference.digests))
    _, status = os.waitpid(_child(lambda: train_and_evaluate(folder), folder.with_suffix(".log")), 0)
    final = digests(folder)
    return {
        "points": [f"{p.kind} {p.index or round(p.seconds, 2)} {p.about}".strip() for p in points],
        "died": died,
        "half_written": sorted(visible),
        "different": sorted(name for name in DECLARED if final.get(name) != reference.digests[name]),
        # as large as a model, and nobody would miss them
        "left_over": sorted(str(path.relative_to(folder)) for path in folder.rglob(".*.tmp") if path.is_dir()),
        "failed": "" if status == 0 else folder.with_suffix(".log").read_text()[-1500:],
    }


# --- choosing ------------------------------------------------------------------------------------------------------------


def aims(reference: Reference, seed: int) -> Iterator[Point]:
    """Points without end: one aimed at each delicate moment, then the same again at other places, mixed with random ones."""
    chance = random.Random(seed)
    events = reference.events
    progress = next(i for i, e in enumerate(events) if e.startswith("shutil.rmtree") and e.endswith("/checkpoints"))
    moments: dict[str, Callable[[int], bool]] = {
        "writing a checkpoint": lambda i: "/checkpoints/" in events[i],
        "publishing, before the manifest": lambda i: events[i].startswith("os.rename") and "/run/model/" in events[i],
        # files in a folder that is being removed have no path
        "removing the progress": lambda i: (
            i >= progress and events[i].startswith("os.remove ") and "/" not in events[i]
        ),
        "exporting": lambda i: "/.model." in events[i],
        "evaluating": lambda i: "/eval/" in events[i],
        "any operation": lambda i: True,
    }
    while True:
        for about, belongs in moments.items():
            index = chance.choice([i for i in range(len(events)) if belongs(i)])
            yield Point("operation", index, about=f"({about}: {events[index]})")
        yield Point("torn", 1 + chance.randrange(max(1, reference.files_of_tensors)), about="(half a safetensors file)")
        yield Point("clock", seconds=chance.uniform(0, reference.seconds), about="(any moment)")


def run(kills: int, seed: int, a_run: int = 2) -> dict[str, Any]:
    """Kill ``kills`` times, ``a_run`` times before each run to the end."""
    import torch

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="mmpipe-kill-") as place:
        root = Path(place).resolve()
        (root / "demo_files").mkdir()
        _, status = os.waitpid(_child(lambda: make_everything(root / "demo_files"), root / "demo_files.log"), 0)
        if status:
            raise SystemExit((root / "demo_files.log").read_text())
        os.chdir(root / "demo_files")
        # the same path every time: a manifest names its inputs by theirs
        folder = root / "out"
        reference = undisturbed(folder)
        points = aims(reference, seed)
        cases = []
        left = kills
        while left > 0:
            shutil.rmtree(folder)
            chosen = [next(points) for _ in range(min(a_run, left))]
            left -= len(chosen)
            cases.append(disturbed(folder, reference, chosen))
            print(json.dumps(cases[-1]), file=sys.stderr, flush=True)
        os.chdir("/")
    return {
        "kills": sum(case["died"] for case in cases),
        "operations": len(reference.events),
        "seconds_undisturbed": round(reference.seconds, 2),
        "half_written": sum(bool(case["half_written"]) for case in cases),
        "different": sum(bool(case["different"]) for case in cases),
        "left_over": sum(bool(case["left_over"]) for case in cases),
        "failed": sum(bool(case["failed"]) for case in cases),
        "cases": cases,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--a-run", type=int, default=2, help="kills before each run to the end")
    chosen = parser.parse_args()
    print(json.dumps(run(chosen.kills, chosen.seed, chosen.a_run)))


if __name__ == "__main__":
    main()
