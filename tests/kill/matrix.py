"""Kill every kind of job again and again, and see whether the same command mends everything.

    python tests/kill/matrix.py --kills 6 --seed 0 --scenarios finetune,mixture        # prints one line of JSON

One process imports everything and forks a child for each run, so that a run costs its work and not its imports. The child
is killed with SIGKILL: at one of its file operations (Python's audit events tell them: open, rename, remove, mkdir, ...),
in the middle of writing a safetensors file, or at a moment of the clock. Where a job starts processes, all of them are
killed, the launcher alone or one worker, at a moment of the clock or as soon as a checkpoint appears.
Meanwhile and afterwards, whatever lies under a
declared name must have the bytes of the undisturbed run. Then the same command runs to the end: same bytes again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil

_TESTS = Path(__file__).parents[1]
for place in (_TESTS, _TESTS / "unit", _TESTS / "kill", _TESTS.parent / "src", _TESTS.parent):
    sys.path.insert(0, str(place))
os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", DS_ACCELERATOR="cpu")

from scenarios import SCENARIOS, Scenario, make_everything  # noqa: E402 - its folder is known only now


@dataclass(frozen=True)
class Point:
    """When to kill: before the ``index``-th file operation, in the ``index``-th safetensors file, after ``seconds``, or when
    a file that matches ``pattern`` appears."""

    kind: str
    index: int = 0
    seconds: float = 0.0
    pattern: str = ""
    victim: str = "all"
    """Of several processes: ``all``, the ``launcher`` alone or one ``worker``."""
    about: str = ""


@dataclass
class Reference:
    """The undisturbed run."""

    digests: dict[str, str]
    events: list[str]
    """Its file operations, in order."""
    files_of_tensors: int
    seconds: float


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


def digests(folder: Path, declared: tuple[str, ...]) -> dict[str, str]:
    """What lies under the declared names, and its hash."""
    found = {}
    for path in (path for pattern in declared for path in folder.glob(pattern)):
        if any(part.startswith(".") for part in path.relative_to(folder).parts):
            continue
        with suppress(FileNotFoundError, IsADirectoryError):
            found[str(path.relative_to(folder))] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def _ends(pid: int) -> int | None:
    done, status = os.waitpid(pid, os.WNOHANG)
    return status if done else None


def _strike(pid: int, victim: str, chance: random.Random) -> None:
    """Kill a job: its processes in any order, its launcher alone, or one worker."""
    below = psutil.Process(pid).children(recursive=True)
    if victim == "worker" and below:
        # of torchrun's agent and its workers, the youngest ones train
        targets = [chance.choice(below[1:] or below)]
    else:
        targets = [psutil.Process(pid), *(below if victim == "all" else [])]
        chance.shuffle(targets)
    for target in targets:
        with suppress(psutil.NoSuchProcess):
            target.kill()
    # the next command finds what the dead have left, not those that are dying
    psutil.wait_procs(below, timeout=60)


def undisturbed(scenario: Scenario, folder: Path) -> Reference:
    """Run to the end once, noting hashes, file operations and time."""
    notes = folder.with_suffix(".events")

    def work() -> None:
        events: list[str] = []
        _operations(folder, events.append)
        files = _tear(0)
        started = time.monotonic()
        scenario.work(folder)
        facts = {"events": list(events), "files": files(), "seconds": time.monotonic() - started}
        notes.write_text(json.dumps(facts))

    _, status = os.waitpid(_child(work, folder.with_suffix(".log")), 0)
    if status:
        raise SystemExit(f"{scenario.name}: {folder.with_suffix('.log').read_text()[-3000:]}")
    facts = json.loads(notes.read_text())
    found = digests(folder, scenario.declared)
    assert found, f"{scenario.name} made nothing that is declared"
    return Reference(found, facts["events"], facts["files"], facts["seconds"])


def _killed(scenario: Scenario, folder: Path, point: Point, look: Callable[[], None]) -> bool:
    """Run and die at ``point``, calling ``look`` meanwhile; whether it died."""

    def work() -> None:
        if point.kind == "operation":
            left = [point.index]

            def count(_: str) -> None:
                left[0] -= 1
                if left[0] < 0:
                    _die()

            _operations(folder, count)
        if point.kind == "torn":
            _tear(point.index)
        scenario.work(folder)

    before = set(folder.glob(point.pattern)) if point.pattern else set()
    pid, started, status, struck = _child(work, folder.with_suffix(".log")), time.monotonic(), None, False
    while status is None:
        look()
        due = point.kind == "clock" and time.monotonic() - started > point.seconds
        appeared = point.kind == "appears" and set(folder.glob(point.pattern)) - before
        if not struck and (due or appeared):
            struck = True
            _strike(pid, point.victim, random.Random(point.index))
        time.sleep(0.005 if scenario.processes > 1 else 0.02)
        status = _ends(pid)
    look()
    return struck or os.WIFSIGNALED(status)


def disturbed(scenario: Scenario, folder: Path, reference: Reference, points: list[Point]) -> dict[str, Any]:
    """Run and die at each of ``points`` in turn, then run to the end; returns what was wrong."""
    visible: set[str] = set()

    def look() -> None:
        found = digests(folder, scenario.declared)
        visible.update(name for name, digest in found.items() if digest != reference.digests.get(name))

    died = sum(_killed(scenario, folder, point, look) for point in points)
    _, status = os.waitpid(_child(lambda: scenario.work(folder), folder.with_suffix(".log")), 0)
    final = digests(folder, scenario.declared)
    names = final.keys() | reference.digests.keys()
    return {
        "scenario": scenario.name,
        "points": [f"{p.kind} {p.index or round(p.seconds, 2)} {p.about}".strip() for p in points],
        "died": died,
        "half_written": sorted(visible),
        "different": sorted(name for name in names if final.get(name) != reference.digests.get(name)),
        # as large as a model, and nobody would miss them
        "left_over": sorted(str(path.relative_to(folder)) for path in folder.rglob(".*.tmp") if path.is_dir()),
        "failed": "" if status == 0 else folder.with_suffix(".log").read_text()[-1500:],
    }


# --- choosing ------------------------------------------------------------------------------------------------------------


def aims(scenario: Scenario, reference: Reference, seed: str) -> Iterator[Point]:
    """Points without end: one aimed at each delicate moment, then the same again at other places, mixed with random ones."""
    chance = random.Random(seed)
    events = reference.events
    removal = (i for i, e in enumerate(events) if e.startswith("shutil.rmtree") and e.endswith("/checkpoints"))
    progress = next(removal, len(events))
    moments: dict[str, Callable[[int], bool]] = {
        "writing a checkpoint": lambda i: "/checkpoints/" in events[i],
        "publishing": lambda i: events[i].startswith("os.rename"),
        # files in a folder that is being removed have no path
        "removing the progress": lambda i: (
            i >= progress and events[i].startswith("os.remove ") and "/" not in events[i]
        ),
        "exporting": lambda i: bool(re.search(r"/\.[^/]*\.tmp/", events[i])),
        "evaluating": lambda i: "/eval/" in events[i],
        "any operation": lambda i: True,
    }
    places = {about: [i for i in range(len(events)) if belongs(i)] for about, belongs in moments.items()}
    while True:
        if scenario.processes > 1:
            for pattern in scenario.appearances:
                yield Point("appears", chance.randrange(1000), pattern=pattern, about=pattern)
            for victim in ("worker", "launcher", "all"):
                seconds = chance.uniform(0.3, 1) * reference.seconds
                yield Point("clock", chance.randrange(1000), seconds, victim=victim, about=f"({victim})")
            continue
        # not always in the same order: few kills of many scenarios are to meet all kinds of moments
        kinds = [about for about, found in places.items() if found]
        for about in [*chance.sample(kinds, len(kinds)), *(["torn"] if reference.files_of_tensors else []), "clock"]:
            if about == "torn":
                yield Point("torn", 1 + chance.randrange(reference.files_of_tensors), about="(half a safetensors file)")
            elif about == "clock":
                yield Point("clock", seconds=chance.uniform(0, reference.seconds), about="(any moment)")
            else:
                index = chance.choice(places[about])
                yield Point("operation", index, about=f"({about}: {events[index]})")


def rows(kills: int, seed: str, scenario: Scenario, folder: Path, a_run: int) -> Iterator[dict[str, Any]]:
    """Kill one scenario ``kills`` times, ``a_run`` times before each run to the end."""
    reference = undisturbed(scenario, folder)
    points = aims(scenario, reference, f"{seed}/{scenario.name}")
    left = kills
    while left > 0:
        shutil.rmtree(folder)
        chosen = [next(points) for _ in range(min(a_run, left))]
        left -= len(chosen)
        case = disturbed(scenario, folder, reference, chosen)
        print(json.dumps(case), file=sys.stderr, flush=True)
        yield case


@contextmanager
def _quick_readback(root: Path) -> Iterator[None]:
    """Published checkpoints are read back by processes that have the libraries already."""
    import warm_python

    from mmpipe.checkpoints import roundtrip

    (root / "warm").mkdir()
    with warm_python.started(root / "warm") as command:
        roundtrip.sys = SimpleNamespace(executable=command)  # type: ignore[assignment]
        try:
            yield
        finally:
            roundtrip.sys = sys


def run(kills: int, seed: str, names: list[str], a_run: int = 2) -> dict[str, Any]:
    """Kill ``kills`` times in all, evenly spread over the scenarios; the seed says which of them get one more."""
    import torch

    torch.set_num_threads(1)
    chance = random.Random(seed)
    shares = dict.fromkeys(names, kills // len(names))
    for name in chance.sample(names, kills % len(names)):
        shares[name] += 1
    cases: list[dict[str, Any]] = []
    with ExitStack() as cleanup:
        place = cleanup.enter_context(tempfile.TemporaryDirectory(prefix="mmpipe-kill-"))
        root = Path(place).resolve()
        files, log = root / "demo_files", root / "demo_files.log"
        files.mkdir()
        os.chdir(files)
        cleanup.enter_context(_quick_readback(root))
        _, status = os.waitpid(_child(lambda: make_everything(files), log), 0)
        if status:
            raise SystemExit(log.read_text())
        for name in (name for name in names if shares[name]):
            # the same path every time: a manifest names its inputs by theirs
            with SCENARIOS[name].around(files):
                cases += rows(shares[name], seed, SCENARIOS[name], files / f"out-{name}", a_run)
            shutil.rmtree(files / f"out-{name}")
        os.chdir("/")
    faults = ("half_written", "different", "left_over", "failed")

    def counts(chosen: list[dict[str, Any]]) -> dict[str, int]:
        return {"kills": sum(c["died"] for c in chosen), **{f: sum(bool(c[f]) for c in chosen) for f in faults}}

    each = {name: counts([case for case in cases if case["scenario"] == name]) for name in names}
    return {**counts(cases), "scenarios": each, "cases": cases}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=6)
    parser.add_argument("--seed", default="0", help="any text")
    parser.add_argument("--scenarios", default=",".join(SCENARIOS), help="names, joined by commas")
    parser.add_argument("--a-run", type=int, default=2, help="kills before each run to the end")
    chosen = parser.parse_args()
    print(json.dumps(run(chosen.kills, chosen.seed, chosen.scenarios.split(","), chosen.a_run)))


if __name__ == "__main__":
    main()
