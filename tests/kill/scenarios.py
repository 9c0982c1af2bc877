"""The commands that the kill matrix kills: what the workflow's jobs do, on tiny files, in the current directory."""

from __future__ import annotations

import io
import os
import signal
import zipfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

STEPS = 4
COMMON: dict[str, Any] = {
    "template": "qwen",
    "batch_size": 8,
    "max_steps": STEPS,
    "learning_rate": 1e-3,
    "hardware": {"checkpoint_every": 1},
}
DENSE = Path("base/dense/model")
TRAINED = ("*/model/*", "*/report/history.jsonl")
EVALUATED = ("eval/pope/chunks/*", "eval/pope/*.json*")


@dataclass(frozen=True)
class Scenario:
    """A command that is killed, and the names under which it may show whole files only."""

    name: str
    declared: tuple[str, ...]
    work: Callable[[Path], None]
    around: Callable[[Path], AbstractContextManager[Any]] = nullcontext
    """What it needs besides the demo files, made in the folder of those."""
    processes: int = 1
    appearances: tuple[str, ...] = ()
    """Of several processes: files at whose appearance to kill."""


SCENARIOS: dict[str, Scenario] = {}


def scenario(*declared: str, **facts: Any) -> Callable[[Callable[[Path], None]], Callable[[Path], None]]:
    """Register a command under the name of its function."""

    def register(work: Callable[[Path], None]) -> Callable[[Path], None]:
        SCENARIOS[work.__name__] = Scenario(work.__name__, declared, work, **facts)
        return work

    return register


def make_everything(root: Path) -> None:
    """The demo files, with a prepared benchmark, a trained and evaluated checkpoint, and an archive to be served."""
    from tiny_project import make_demo_files

    from mmpipe.artifacts import manifest
    from mmpipe.benchmarks.prepare import prepare
    from mmpipe.benchmarks.spec import BenchmarkEntry
    from mmpipe.demo.presence import pope

    make_demo_files(root)
    data = root / "resources/datasets/pope"
    pope(data, seed=5, questions=4)
    manifest.write(data, kind="source", spec="{}", inputs={})
    prepared = root / "resources/benchmarks/pope"
    prepared.mkdir(parents=True)
    prepare(BenchmarkEntry(task="pope", data="pope"), data, prepared)
    manifest.write(prepared, kind="benchmark", spec="{}", inputs={})
    train(root / "base", "dense")
    evaluate(root / "base", DENSE)


def train(folder: Path, name: str = "run", stage: Any = None, **changes: Any) -> None:
    """Train a stage and accept its outputs, as the workflow does."""
    from tiny_project import make_job

    from mmpipe.artifacts.state import drop_progress
    from mmpipe.stages.finetune import Finetune
    from mmpipe.training.run import run_stage

    made = make_job(folder, name, **changes)
    run_stage(stage or Finetune(data="mix", **COMMON), made)
    drop_progress(made.model_dir)


def step(
    script: str, plan: Any, output: Any, rule: str = "", wildcards: dict[str, str] | None = None, **inputs: Any
) -> None:
    """One of the workflow's steps, without the log that its wrapper opens; ``output`` is a list or has names."""
    from importlib import import_module

    main = import_module(f"workflow.scripts.{script}").main
    names = {"smoke": "", "checkpoint": "run", "benchmark": "pope", "chunk": "0000-of-0001", **(wildcards or {})}
    job = SimpleNamespace(
        wildcards=SimpleNamespace(**names),
        input=Inputs(inputs),
        output=output,
        threads=1,
        resources={"gpu": 0},
        params={"reads": "", "spec": "{}"},
        rule=rule,
        log=["step.log"],
    )
    while hasattr(main, "__wrapped__"):
        main = main.__wrapped__
    main(job, plan)


class Inputs(SimpleNamespace):
    """Inputs by name and by number."""

    def __init__(self, named: dict[str, Any]) -> None:
        super().__init__(**named)
        self._all = list(named.values())

    def __getitem__(self, index: int) -> Any:
        return self._all[index]


def evaluate(folder: Path, model: Path) -> None:
    """Answer a benchmark, gather, score."""
    from mmpipe.benchmarks.spec import BenchmarkEntry

    entry = BenchmarkEntry(task="pope", data="pope", max_new_tokens=4, batch_size=2)
    logs = SimpleNamespace(spec=lambda: "", settings=None)
    plan = SimpleNamespace(benchmarks={"pope": entry}, benchmark_spec=lambda *_: "", expert_logs=logs)
    prepared, results = Path("resources/benchmarks/pope"), folder / "eval/pope"
    chunk, answers = results / "chunks/0000-of-0001.jsonl", results / "answers.jsonl"
    step("answer", plan, [chunk], checkpoint=model / "manifest.json", benchmark=prepared / "manifest.json")
    step("gather", plan, [answers], questions=prepared / "questions.jsonl", chunks=[chunk])
    scored = SimpleNamespace(per_item=results / "per_item.jsonl", score=results / "score.json")
    made_from = {"references": prepared / "references.jsonl", "answers": answers, "judge": []}
    step("score", plan, scored, checkpoint=prepared / "manifest.json", **made_from)


@scenario(*TRAINED, *EVALUATED)
def finetune(folder: Path) -> None:
    """Fine-tune a stage and evaluate it."""
    train(folder)
    evaluate(folder, folder / "run/model")


@scenario(*TRAINED)
def pretrain_and_finetune(folder: Path) -> None:
    """Both stages of a recipe, the second on the first one's projector or model."""
    from mmpipe.stages.finetune import Finetune

    train(folder, "first")
    train(folder, "second", Finetune(data="mix", **COMMON), parent=folder / "first/model")


@scenario(*TRAINED)
def experts(folder: Path) -> None:
    """Up-cycle a dense checkpoint and distil into it."""
    from mmpipe.stages.distill_sparse import DistillSparse
    from mmpipe.stages.upcycle import Upcycle

    train(folder, "sparse", Upcycle(), parent=DENSE)
    stage = DistillSparse(data="mix", teacher="teacher", **COMMON)
    train(folder, "student", stage, parent=folder / "sparse/model", references={"teacher": DENSE})


@scenario(*TRAINED)
def sparsify(folder: Path) -> None:
    """Train the predictors of a sparsified checkpoint."""
    from mmpipe.stages.sparsify import Sparsify

    sizes = {"d_model": 16, "nhead": 4, "dim_feedforward": 32}
    sparsity = {"sparse_layer": 1, "vision_keep_rate": 0.5, "output_text_len_for_training": 3, **sizes}
    train(folder, "run", Sparsify(data="mix", sparsity=sparsity, **COMMON), parent=DENSE)


def precomputed(folder: Path, kind: str, mixture: str, chunks: int, **settings: Any) -> Path:
    """Precompute outputs of the dense checkpoint in chunks and publish them."""
    from mmpipe.training.precompute import PrecomputeJob, precompute_chunk, publish

    reading = {"template": "qwen", "max_length": 2048, "image_aspect": "pad"}
    job = PrecomputeJob(
        checkpoint=DENSE,
        tokens=Path("resources/tokens", mixture),
        spec="{}",
        settings={**reading, "kind": kind, **settings},
        out=folder / "notes",
        state=folder / "state",
    )
    files = [folder / f"chunks/{index:04d}-of-{chunks:04d}.json" for index in range(chunks)]
    for file in files:
        precompute_chunk(job, file, device="cpu")
    publish(job, files)
    return job.out


@scenario("notes/**/*", "chunks/*")
def precompute(folder: Path) -> None:
    """Teacher logits in two chunks."""
    precomputed(folder, "top_k", "mix", 2, k=4)


@scenario("notes/**/*", "chunks/*", *TRAINED)
def prefer(folder: Path) -> None:
    """A preference stage with a precomputed reference."""
    from mmpipe.stages.prefer import Prefer

    notes = precomputed(folder, "log_probabilities", "pairs", 1)
    changes = {"parent": DENSE, "tokens": Path("resources/tokens/pairs"), "precomputed": {"reference": notes}}
    train(folder, "run", Prefer(data="pairs", reference="dense", **COMMON), **changes)


@scenario("mixture/**/*")
def mixture(folder: Path) -> None:
    """Verify the records of a data set and write them in one file."""
    from mmpipe.data.spec import MixtureSourceSpec, MixtureSpec

    part = MixtureSourceSpec(dataset="shapes", annotations="llava_v1_5_mix665k.json", images=".")
    plan = SimpleNamespace(mixtures={"mix": MixtureSpec(parts=[part])}, mixture_spec=lambda _: "{}")
    step("mix", plan, SimpleNamespace(manifest=folder / "mixture/manifest.json"), wildcards={"mixture": "mix"})


@scenario("tokens/**/*")
def tokenise(folder: Path) -> None:
    """Encode a mixture with a tokenizer and a template."""
    from made_tokens import TINY

    from mmpipe.models.settings import VisionLanguage

    wanted = SimpleNamespace(
        spec=lambda: "{}",
        inputs=lambda: {"mixture": Path("resources/mixtures/mix/manifest.json")},
        directories=TINY,
        vision_language=VisionLanguage(vision="clip-tiny", language="qwen2-tiny"),
        layouts={},
        encoding=SimpleNamespace(template="qwen", max_length=2048),
    )
    plan = SimpleNamespace(tokens={"mix/key": wanted}, mixtures={"mix": SimpleNamespace(max_bad=0)})
    names = {"mixture": "mix", "key": "key"}
    step("tokenise", plan, SimpleNamespace(manifest=folder / "tokens/manifest.json"), wildcards=names)


@scenario("prepared/**/*")
def prepare_benchmark(folder: Path) -> None:
    """Convert a benchmark's files into questions and references."""
    from mmpipe.benchmarks.spec import BenchmarkEntry

    entry = BenchmarkEntry(task="pope", data="pope")
    plan = SimpleNamespace(benchmark_entry=lambda *_: entry, benchmark_spec=lambda *_: "{}")
    step("prepare_benchmark", plan, SimpleNamespace(manifest=folder / "prepared/manifest.json"))


@scenario("pages/*")
def pages(folder: Path) -> None:
    """Pages and a figure of the report."""
    results, out = Path("base/eval/pope"), folder / "pages"
    prepared = {"prepared": Path("resources/benchmarks/pope/manifest.json")}
    step("show", None, [out / "training.svg"], "show_training", history=Path("base/dense/report/history.jsonl"))
    step("show", None, [out / "checkpoint.html"], "show_checkpoint", manifest=DENSE / "manifest.json")
    shown = {"answers": results / "answers.jsonl", "per_item": results / "per_item.jsonl"}
    step("show", None, [out / "samples.html"], "show_samples", **prepared, **shown)


PORT = Path("port")


@contextmanager
def file_server(_: Path) -> Iterator[None]:
    """A server of a file and an archive, in a process of its own: the killed process is forked."""
    import faulty_server

    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        served = faulty_server.FaultyServer()
        archive = io.BytesIO()
        with zipfile.ZipFile(archive, "w") as file:
            for index in range(20):
                file.writestr(zipfile.ZipInfo(f"folder/{index}.bin"), bytes([index]) * 50_000)
        served.serve("/images.zip", faulty_server.content(archive.getvalue(), etag='"zip"'))
        served.serve("/data.bin", faulty_server.content(bytes(range(256)) * 20_000))
        os.write(write, str(served.server_port).encode())
        served.serve_forever()
    PORT.write_bytes(os.read(read, 10))
    try:
        yield
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


@scenario("data/manifest.json", "data/data.bin", "data/images/**/*", around=file_server)
def download(folder: Path) -> None:
    """Fetch a file and an archive, and unpack it."""
    from mmpipe.artifacts import manifest
    from mmpipe.sources.url import Url

    os.environ.pop("HF_HUB_OFFLINE", None)  # of this process alone
    address = f"http://127.0.0.1:{PORT.read_text()}"
    files = [{"url": f"{address}/{name}", "to": name} for name in ("data.bin", "images.zip")]
    source = Url.model_validate({"files": files, "unpack": {"images.zip": "images"}})
    out = folder / "data"
    out.mkdir(parents=True, exist_ok=True)  # Snakemake makes the folder of an output
    facts = source.fetch(out, {})
    manifest.write(out, kind="source", spec="{}", inputs={}, **facts)


def _several(folder: Path, **hardware: Any) -> None:
    """Train in two processes, as on two GPUs."""
    from tiny_project import make_job

    from mmpipe.artifacts.state import drop_progress
    from mmpipe.stages.finetune import Finetune
    from mmpipe.training import launch
    from mmpipe.training.run import train as run_training

    made = replace(make_job(folder), gpus=0)
    stage = Finetune(data="mix", **{**COMMON, "hardware": {"checkpoint_every": 1, **hardware}})
    launch.run = lambda stage, job, work: launch.run_processes(stage, job, 2)
    run_training(stage, made)
    drop_progress(made.model_dir)


APPEARANCES = ("run/state/checkpoints/*", "run/state/checkpoints/*/*", "run/.model.*.tmp/*", "run/model/*")


@scenario(*TRAINED, processes=2, appearances=APPEARANCES)
def ddp(folder: Path) -> None:
    """Two processes, gloo."""
    _several(folder)


@scenario(*TRAINED, processes=2, appearances=APPEARANCES)
def zero(folder: Path) -> None:
    """Two processes, DeepSpeed's ZeRO stage 2."""
    _several(folder, deepspeed="zero2")
