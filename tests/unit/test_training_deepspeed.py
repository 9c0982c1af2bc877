"""DeepSpeed trains what plain training trains, over two processes on a CPU."""

from __future__ import annotations

import importlib.util
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mmpipe.artifacts.files import read_jsonl, sha256
from mmpipe.checkpoints.load import open_checkpoint
from mmpipe.errors import ConfigError
from mmpipe.models.moe.collect import moe_layers
from mmpipe.models.moe.spec import MoESettings
from mmpipe.stages.base import Hardware, StageJob
from mmpipe.stages.distill_sparse import DistillSparse
from mmpipe.stages.finetune import Finetune
from mmpipe.stages.prefer import Prefer
from mmpipe.stages.sparsify import Sparsify
from mmpipe.stages.upcycle import Upcycle
from mmpipe.training import launch
from mmpipe.training.precompute import PrecomputeJob, precompute_chunk, publish
from mmpipe.training.run import run_stage, work
from mmpipe.training.stop import StopSignal

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed"),
]


def finetune(**changes: Any) -> Finetune:
    settings = {
        "data": "mix",
        "template": "qwen",
        "batch_size": 8,
        "max_steps": 4,
        "learning_rate": 1e-2,
        "hardware": {"checkpoint_every": 2},
    }
    return Finetune(**{**settings, **changes})


def losses(job: StageJob) -> torch.Tensor:
    return torch.tensor([row["loss"] for row in read_jsonl(job.report_dir / "history.jsonl")])


def on_two(stage: Finetune, job: StageJob) -> None:
    job.state_dir.mkdir(parents=True, exist_ok=True)
    launch.run_processes(stage, job, 2)


@pytest.mark.parametrize("kind", ["zero2", "zero3"])
def test_two_processes_with_deepspeed_train_like_one_without(job, kind):
    one, two = job("one"), job("two")
    run_stage(finetune(), one)
    on_two(finetune(hardware={"deepspeed": kind, "checkpoint_every": 2}), two)
    torch.testing.assert_close(losses(one), losses(two), atol=1e-5, rtol=1e-5)
    ours, theirs = (load_file(made.model_dir / "model.safetensors") for made in (one, two))
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], atol=1e-3, rtol=1e-3)


def test_gradients_are_clipped_with_deepspeed_as_without(job):
    """To a norm at which AdamW's epsilon counts: otherwise its steps hardly depend on the length of gradients."""
    clipped = {"max_gradient_norm": 1e-8, "max_steps": 2, "warmup_ratio": 0}
    one, two, free = job("one"), job("two"), job("free")
    run_stage(finetune(**clipped), one)
    run_stage(finetune(**clipped | {"max_gradient_norm": 0}), free)
    on_two(finetune(**clipped, hardware={"deepspeed": "zero2"}), two)
    torch.testing.assert_close(losses(one), losses(two), atol=1e-5, rtol=1e-5)
    assert abs(losses(one)[1] - losses(free)[1]) > 1e-3


def test_in_bfloat16_frozen_bytes_stay_and_trained_weights_are_float32(job):
    trained = "language_model.layers.1."
    parent, made = job("parent"), job("made")
    run_stage(finetune(max_steps=1), parent)
    stage = finetune(max_steps=2, precision="bfloat16", trainable=[f"{trained}*"], hardware={"deepspeed": "zero3"})
    on_two(stage, replace(made, parent=parent.model_dir))
    before, after = (load_file(run.model_dir / "model.safetensors") for run in (parent, made))
    assert before.keys() == after.keys()
    learnt = {name for name in after if not torch.equal(before[name], after[name])}
    assert learnt == {name for name in after if ".layers.1." in name and name.startswith("language_model")}
    for name in learnt:
        assert after[name].dtype == torch.float32
        assert not torch.equal(after[name], after[name].bfloat16().float()), f"{name} was kept in 16 bits"


@pytest.mark.parametrize("kind", ["zero2", "zero3"])
def test_a_sparse_student_learns_from_a_teacher_and_resumes_exactly(job, demo_files, kind):
    """Experts under stage 3, a teacher nothing spreads, and the same bytes after an interruption."""
    teacher, sparse = job("teacher"), job("sparse")
    run_stage(finetune(max_steps=1), teacher)
    run_stage(
        Upcycle(moe=MoESettings(experts=4, top_k=2, placement="dense")), replace(sparse, parent=teacher.model_dir)
    )
    stage = DistillSparse(
        data="mix", template="qwen", teacher="t", batch_size=8, max_steps=4, learning_rate=1e-2,
        hardware={"deepspeed": kind, "checkpoint_every": 2, "gradient_checkpointing": True},
    )  # fmt: skip
    facts = {"parent": sparse.model_dir, "references": {"teacher": teacher.model_dir}}
    plain, whole, halved = (job(name, **facts) for name in ("plain", "whole", "halved"))
    # balance losses are means over what is computed at once, so the same four samples at once
    run_stage(stage.model_copy(update={"hardware": Hardware(micro_batch=4)}), plain)
    on_two(stage, whole)
    torch.testing.assert_close(losses(plain), losses(whole), atol=1e-5, rtol=1e-5)
    shutil.rmtree(whole.state_dir / "checkpoints" / "checkpoint-4")
    shutil.copytree(whole.state_dir, halved.state_dir)
    on_two(stage, halved)
    assert sha256(halved.model_dir / "model.safetensors") == sha256(whole.model_dir / "model.safetensors")
    model, _, _ = open_checkpoint(halved.model_dir)
    assert len(moe_layers(model)) == 2


@pytest.mark.parametrize("kind", [None, "zero2"])
def test_the_two_passes_of_a_preference_step_train_on_two_processes(job, tmp_path, kind):
    """Each parameter is used twice a step, under checkpointing and whatever spreads it."""
    dense, sparse, notes = job("dense"), job("sparse"), tmp_path / "notes"
    run_stage(finetune(max_steps=1), dense)
    run_stage(Upcycle(moe=MoESettings(placement="dense", capacity_factor=0.6)), replace(sparse, parent=dense.model_dir))
    settings = {"kind": "log_probabilities", "template": "qwen", "max_length": 2048, "image_aspect": "pad"}
    reference = PrecomputeJob(
        dense.model_dir, Path("resources/tokens/pairs"), "{}", settings, notes, state=tmp_path / "annotating"
    )
    chunk = tmp_path / "chunks" / "0000-of-0001.json"
    precompute_chunk(reference, chunk, device="cpu")
    publish(reference, [chunk])
    stage = Prefer(
        data="pairs", template="qwen", reference="r", batch_size=8, max_steps=3, learning_rate=1e-2,
        hardware={"deepspeed": kind, "gradient_checkpointing": True},
    )  # fmt: skip
    facts = {"parent": sparse.model_dir, "tokens": Path("resources/tokens/pairs"), "precomputed": {"reference": notes}}
    one, two = job("one", **facts), job("two", **facts)
    # capacity, balance and the means of kto_pair are of what is computed at once
    run_stage(stage.model_copy(update={"hardware": Hardware(micro_batch=4)}), one)
    on_two(stage, two)
    torch.testing.assert_close(losses(one), losses(two), atol=1e-5, rtol=1e-5)


def test_predictors_learn_under_stage_3(job):
    """The drawing of masks, and hooks on layers whose weights are elsewhere until they run."""
    dense = job("dense")
    run_stage(finetune(max_steps=1), dense)
    stage = Sparsify(
        data="mix", template="qwen", batch_size=8, max_steps=3, learning_rate=1e-3,
        sparsity={"sparse_layer": 1, "d_model": 16, "nhead": 2, "dim_feedforward": 32},
    )  # fmt: skip
    one, two = job("one", parent=dense.model_dir), job("two", parent=dense.model_dir)
    run_stage(stage, one)
    on_two(stage.model_copy(update={"hardware": Hardware(deepspeed="zero3")}), two)
    torch.testing.assert_close(losses(one), losses(two), atol=1e-4, rtol=1e-4)
    ours, theirs = (load_file(made.model_dir / "sparsity.safetensors") for made in (one, two))
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], atol=1e-3, rtol=1e-3)


def test_a_checkpoint_in_pieces_is_not_resumed_in_another_way(job):
    made = job("run")
    on_two(finetune(hardware={"deepspeed": "zero2", "checkpoint_every": 2}), made)
    shutil.rmtree(made.state_dir / "checkpoints" / "checkpoint-4")
    with pytest.raises(ConfigError, match=r"written by 2 process\(es\) with zero2, and now the stage runs with 1"):
        work(finetune(), made, StopSignal())
