"""A stage trains, survives being killed, and does not depend on how its batch is cut."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_project import make_job

from mmpipe.artifacts.files import read_jsonl, sha256
from mmpipe.artifacts.state import drop_progress, open_state
from mmpipe.errors import ArtifactError, ConfigError, DataError, MmpipeError
from mmpipe.stages.base import StageJob
from mmpipe.stages.finetune import Finetune
from mmpipe.stages.pretrain import Pretrain
from mmpipe.training import launch, publish, resume, trainer
from mmpipe.training.resume import ParallelLayout
from mmpipe.training.run import run_stage, work
from mmpipe.training.stop import StopSignal
from mmpipe.training.trainer import StageTrainer, split_batch

RUN = """
import sys
from pathlib import Path
from mmpipe.training.worker import read_description
from mmpipe.training.run import run_stage
stage, job = read_description(Path(sys.argv[1]))
run_stage(stage, job)
"""


def finetune(**changes: Any) -> Finetune:
    settings = {
        "data": "mix",
        "template": "qwen",
        "batch_size": 8,
        "max_steps": 8,
        "learning_rate": 1e-2,
        "hardware": {"checkpoint_every": 2},
    }
    return Finetune(**{**settings, **changes})


def hashes(directory: Path) -> dict[str, str]:
    return {path.name: sha256(path) for path in directory.iterdir() if path.name != "perf.json"}


@pytest.fixture(scope="module")
def undisturbed(demo_files: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Hashes of what an undisturbed run publishes."""
    made = make_job(tmp_path_factory.mktemp("undisturbed"), "undisturbed")
    with contextlib.chdir(demo_files):
        run_stage(finetune(), made)
    return hashes(made.model_dir) | hashes(made.report_dir)


def start(stage: Finetune, job: StageJob) -> subprocess.Popen:
    job.state_dir.mkdir(parents=True, exist_ok=True)
    description = job.state_dir.with_name("job.json")
    launch.write_description(description, stage, job)
    return subprocess.Popen([sys.executable, "-c", RUN, str(description)], env={**os.environ, "OMP_NUM_THREADS": "1"})


@pytest.mark.parametrize("at", ["checkpoint-2/complete", "checkpoint-4/trainable.safetensors", "checkpoint-8"])
def test_killed_and_run_again_it_ends_with_the_same_bytes(job, undisturbed, at):
    places = job("killed")
    made = replace(
        job("undisturbed"), model_dir=places.model_dir, state_dir=places.state_dir, report_dir=places.report_dir
    )
    with start(finetune(), made) as process:
        deadline = time.monotonic() + 60
        while not (made.state_dir / "checkpoints" / at).exists() and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
    interrupted = not (made.model_dir / "manifest.json").exists()
    run_stage(finetune(), made)
    assert hashes(made.model_dir) | hashes(made.report_dir) == undisturbed
    assert interrupted or at == "checkpoint-8"
    assert resume.last_checkpoint(made.state_dir / "checkpoints")
    drop_progress(made.model_dir)  # as the workflow does when it has accepted the outputs
    assert not (made.state_dir / "checkpoints").exists()


def losses(job: StageJob) -> torch.Tensor:
    return torch.tensor([row["loss"] for row in read_jsonl(job.report_dir / "history.jsonl")])


def test_the_loss_does_not_depend_on_how_the_batch_is_cut(job):
    whole, cut = job("whole"), job("cut")
    run_stage(finetune(), whole)
    run_stage(finetune(hardware={"micro_batch": 2}), cut)
    torch.testing.assert_close(losses(whole), losses(cut), atol=1e-5, rtol=1e-5)
    assert len(losses(whole)) == 8


def test_two_processes_train_like_one(job):
    one, two = job("one"), job("two")
    run_stage(finetune(), one)
    two.state_dir.mkdir(parents=True)
    launch.run_processes(finetune(), two, 2)
    torch.testing.assert_close(losses(one), losses(two), atol=1e-5, rtol=1e-5)
    assert (two.model_dir / "manifest.json").is_file()


def test_one_process_publishes(job, monkeypatch):
    monkeypatch.setattr(StageTrainer, "is_world_process_zero", lambda self: False)
    other = job("other")
    with open_state(other.state_dir, "fingerprint"):
        work(finetune(max_steps=1), other, StopSignal())
    assert not other.model_dir.exists()
    assert not other.report_dir.exists()


def test_nothing_is_at_its_place_until_it_is_whole(job, monkeypatch):
    made = job("run")

    def fail(out: Path, **_: Any) -> None:
        assert (out / "model.safetensors").is_file()
        assert not made.model_dir.exists()
        raise OSError("disk full")

    monkeypatch.setattr(publish.manifest, "write", fail)
    with pytest.raises(OSError, match="disk full"):
        run_stage(finetune(max_steps=1), made)
    assert not made.model_dir.exists()


def test_only_what_is_trainable_changes(job, demo_files):
    made = job("projector")
    run_stage(
        Pretrain(data="mix", batch_size=8, max_steps=2, learning_rate=0.1, template="qwen", llava_projector=True), made
    )
    assert sorted(p.name for p in made.model_dir.iterdir()) == [
        "manifest.json",
        "mm_projector.bin",
        "projector.safetensors",
    ]
    frozen = job("frozen")
    run_stage(finetune(trainable=["language_model.layers.0.*"], max_steps=2), frozen)
    after = load_file(frozen.model_dir / "model.safetensors")
    language = load_file(demo_files / "resources/backbones/qwen2-tiny/model.safetensors")
    changed = {
        name
        for name, before in language.items()
        if not torch.equal(before, after[f"language_model.{name}"][: len(before)])
    }
    assert changed
    assert all(".layers.0." in name for name in changed)


def test_the_next_stage_starts_from_the_projector(job):
    first = job("first")
    run_stage(Pretrain(data="mix", batch_size=8, max_steps=2, template="qwen"), first)
    second = job("second", parent=first.model_dir)
    run_stage(finetune(max_steps=1, learning_rate=1e-12, trainable=["lm_head.*"]), second)
    before = load_file(first.model_dir / "projector.safetensors")
    after = load_file(second.model_dir / "projector.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_smoke_runs_stop_early_and_are_marked(job):
    made = job("smoke", max_steps=2)
    run_stage(finetune(), made)
    card = json.loads((made.model_dir / "manifest.json").read_text())
    assert (card["steps"], card["smoke"]) == (2, True)


def test_a_changed_spec_starts_afresh(job):
    made = job("run")
    made.state_dir.mkdir(parents=True)
    (made.state_dir / "fingerprint.json").write_text('{"fingerprint": "of something else"}')
    (made.state_dir / "checkpoints").mkdir()
    (made.state_dir / "checkpoints/checkpoint-8").mkdir()
    (made.state_dir / "checkpoints/checkpoint-8/complete").touch()
    run_stage(finetune(max_steps=1), made)
    assert json.loads((made.model_dir / "manifest.json").read_text())["steps"] == 1


def test_a_diverging_loss_names_the_records(job):
    with pytest.raises(MmpipeError, match=r"step \d+, records shapes/.*the loss is (nan|inf)"):
        run_stage(finetune(learning_rate=1e25, max_steps=4, max_gradient_norm=0, warmup_ratio=0), job("run"))


def test_a_template_that_supervises_nothing_stops_the_stage(job):
    with pytest.raises(DataError, match=r"'qwen'.*of the text tokens are supervised"):
        run_stage(finetune(min_supervised_fraction=0.99), job("run"))


def test_a_missing_input_names_the_command(job, tmp_path):
    with pytest.raises(ArtifactError, match="snakemake"):
        run_stage(finetune(), job("run", manifests=(tmp_path / "nothing/manifest.json",)))


def test_gpus_that_are_not_there_are_an_error(job):
    if torch.cuda.device_count() >= 64:
        pytest.skip("this machine has the GPUs")
    with pytest.raises(MmpipeError, match=r"given 64 GPU\(s\), but PyTorch"):
        run_stage(finetune(), job("run", gpus=64))


@pytest.mark.parametrize(("kind", "optimizer"), [("zero2", "adamw_torch"), ("zero2_offload", "adamw_torch_fused")])
def test_the_deepspeed_configuration(job, kind, optimizer, monkeypatch):
    """Nothing is left to ``auto``: clipping is the stage's, and offloaded moments are updated by torch's fused AdamW."""
    stage = finetune(max_gradient_norm=0.3, precision="bfloat16")
    monkeypatch.setattr(trainer, "TrainingArguments", dict)
    monkeypatch.setattr(trainer.deepspeed, "join_processes", lambda on_gpu: {})
    split, layout = split_batch(8, 2, 2, on_gpu=True), ParallelLayout(kind, 2)
    told = trainer._arguments(stage, job("run", gpus=2), split, layout, 4)
    assert told["optim"] == optimizer
    assert told["deepspeed"]["gradient_clipping"] == 0.3
    assert told["deepspeed"]["train_batch_size"] == 8
    assert told["deepspeed"]["torch_autocast"]["enabled"]
    assert "auto" not in json.dumps(told["deepspeed"]).replace("torch_autocast", "")


@pytest.mark.parametrize(
    ("batch", "processes", "wanted", "expected"),
    [(128, 1, None, (128, 1)), (128, 8, 4, (4, 4)), (12, 2, 5, (3, 2)), (8, 8, 16, (1, 1))],
)
def test_the_batch_is_kept_whatever_the_processes(batch, processes, wanted, expected):
    split = split_batch(batch, processes, wanted, on_gpu=False)
    assert (split.micro, split.accumulation) == expected
    assert split.micro * split.accumulation * processes == batch


def test_a_batch_that_cannot_be_shared_is_an_error():
    with pytest.raises(ConfigError, match="batch of 10 cannot be shared evenly by 4 processes"):
        split_batch(10, 4, None, on_gpu=True)
