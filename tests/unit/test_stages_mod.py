"""Distillation, up-cycling and preference as stages: what learns, what stays, what is published."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_project import list_anew, make_job

from mmpipe.artifacts.files import read_jsonl
from mmpipe.benchmarks.base import Question
from mmpipe.checkpoints.load import open_checkpoint
from mmpipe.data.templates import get_template
from mmpipe.errors import ArtifactError, ConfigError, DataError
from mmpipe.inference.generate import Answerer
from mmpipe.losses.teacher import token_rows
from mmpipe.models.moe.collect import moe_layers
from mmpipe.settings import validate
from mmpipe.stages.base import StageJob
from mmpipe.stages.distill_dense import DistillDense
from mmpipe.stages.distill_sparse import DistillSparse
from mmpipe.stages.finetune import Finetune
from mmpipe.stages.prefer import Prefer
from mmpipe.stages.upcycle import Upcycle
from mmpipe.training import precompute
from mmpipe.training.objectives.distill_dense import LiveTeacher, resized_images
from mmpipe.training.precompute import PrecomputeJob, precompute_chunk, publish
from mmpipe.training.precomputed import PrecomputedLogProbs
from mmpipe.training.run import run_stage

COMMON = {"template": "qwen", "batch_size": 8, "max_steps": 4, "learning_rate": 1e-2}


@pytest.fixture(scope="module")
def family(demo_files: Path, tmp_path_factory: pytest.TempPathFactory, quick_readback: None) -> dict[str, StageJob]:
    """A dense checkpoint, trained a little, and its up-cycled child."""
    folder = tmp_path_factory.mktemp("family")
    with contextlib.chdir(demo_files):
        dense = make_job(folder, "dense")
        run_stage(Finetune(data="mix", **COMMON), dense)
        sparse = make_job(folder, "sparse", parent=dense.model_dir)
        run_stage(Upcycle(), sparse)
    return {"dense": dense, "sparse": sparse}


def own(job: StageJob, folder: Path) -> StageJob:
    """The job's checkpoint in a folder of the test's own, which may change it."""
    shutil.copytree(job.model_dir, folder / job.stage / "model")
    return replace(job, model_dir=folder / job.stage / "model")


@pytest.fixture
def dense(job, family, tmp_path) -> StageJob:
    """A dense checkpoint, trained a little."""
    return own(family["dense"], tmp_path)


@pytest.fixture
def sparse(job, family, tmp_path) -> StageJob:
    """Its up-cycled child."""
    return own(family["sparse"], tmp_path)


def distill(kind: type[DistillDense], job: StageJob, teacher: Path, **changes: Any) -> list[dict[str, Any]]:
    """Run a distillation stage; returns its history."""
    stage = kind(**{"data": "mix", "teacher": "teacher", **COMMON, **changes})
    run_stage(stage, replace(job, references={"teacher": teacher}))
    return read_jsonl(job.report_dir / "history.jsonl")


def work(tmp_path: Path, teacher: Path, mixture: str, settings: dict[str, Any]) -> PrecomputeJob:
    settings = {"template": "qwen", "max_length": 2048, "image_aspect": "pad", **settings}
    return PrecomputeJob(
        checkpoint=teacher,
        tokens=Path("resources/tokens", mixture),
        spec="{}",
        settings=settings,
        out=tmp_path / f"annotations-{settings['kind']}-{mixture}",
        state=tmp_path / "annotating",
    )


def written(tmp_path: Path, teacher: Path, mixture: str, settings: dict[str, Any], chunks: int = 1, **how: Any) -> Path:
    wanted = work(tmp_path, teacher, mixture, settings)
    publish(wanted, annotated(wanted, chunks, **how))
    return wanted.out


def annotated(work: PrecomputeJob, chunks: int, **how: Any) -> list[Path]:
    """Run the jobs that annotate; returns the files by which they say what they wrote."""
    files = [work.state.parent / "chunks" / f"{index:04d}-of-{chunks:04d}.json" for index in range(chunks)]
    for file in files:
        precompute_chunk(work, file, device="cpu", **how)
    return files


def with_head_of(rows: int, checkpoint: Path, out: Path) -> Path:
    """The same checkpoint with another number of rows for its vocabulary."""
    shutil.copytree(checkpoint, out)
    name = "language_model.model.embed_tokens.weight"
    tensors = load_file(out / "model.safetensors")
    longer = torch.nn.functional.pad(tensors[name], (0, 0, 0, 64), value=0.5)
    tensors[name] = longer[:rows].contiguous()
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((out / "config.json").read_text())
    config["text_config"]["vocab_size"] = rows
    (out / "config.json").write_text(json.dumps(config))
    list_anew(out)
    return out


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (DistillDense, {"teacher_cache": {}, "divergence": "reverse_kl"}, "'divergence: reverse_kl'.*teacher_cache"),
        (DistillDense, {"teacher_cache": {}, "divergence": "jsd"}, "'divergence: jsd' would be ignored"),
        (DistillDense, {"teacher_cache": {}, "temperature": 2.0}, "'temperature: 2.0'.*leave it at '1.0'"),
        (DistillDense, {"teacher_cache": {}, "tokens": "all"}, "'tokens: all'.*leave it at 'response'"),
        (DistillSparse, {"teacher_cache": {}, "compat": "reference"}, "'compat: reference' would be ignored"),
        (DistillDense, {"teacher_cache": {"kind": "sampled"}, "tail": "drop"}, "'tail: drop'.*kind 'top_k'"),
        (DistillDense, {"tail": "renormalise"}, "'tail: renormalise'.*teacher_cache"),
        (DistillDense, {"jsd_weight": 0.3}, "'jsd_weight: 0.3'.*divergence: jsd"),
        (DistillSparse, {"compat": "reference", "divergence": "jsd"}, "published loss"),
        (DistillSparse, {"compat": "reference", "temperature": 0.5}, "published loss"),
        (Prefer, {"label_smoothing": 0.1}, "belongs to 'loss_type: sigmoid', not to 'kto_pair'"),
    ],
)
def test_settings_that_would_be_ignored_are_refused(kind, settings, message):
    needed = {"data": "mix", **({"reference": "base"} if kind is Prefer else {"teacher": "base"})}
    with pytest.raises(ConfigError, match=message):
        validate(kind, needed | settings, "here")


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (DistillDense, {"teacher_cache": {}, "tail": "drop", "divergence": "forward_kl", "temperature": 1.0}),
        (DistillDense, {"teacher_cache": {"kind": "sampled"}, "tail": "bucket"}),
        (DistillDense, {"divergence": "jsd", "jsd_weight": 0.3, "temperature": 2.0, "tokens": "all"}),
        (DistillSparse, {"compat": "reference", "tokens": "all", "jsd_weight": 0.5}),
        (Prefer, {"loss_type": "sigmoid", "label_smoothing": 0.1}),
    ],
)
def test_settings_that_mean_something_are_taken(kind, settings):
    needed = {"data": "mix", **({"reference": "base"} if kind is Prefer else {"teacher": "base"})}
    validate(kind, needed | settings, "here")


def test_upcycling_publishes_a_stock_checkpoint_equal_to_its_parent(dense, sparse):
    config = json.loads((sparse.model_dir / "config.json").read_text())
    assert config["text_config"]["model_type"] == "qwen2_moe"
    assert config["text_config"]["mlp_only_layers"] == [1]
    code = (
        "import sys, torch\n"
        "from transformers import AutoModelForImageTextToText as Auto\n"
        "a, b = (Auto.from_pretrained(p) for p in sys.argv[1:])\n"
        "ids = torch.arange(5, 25)[None]\n"
        "print((a(input_ids=ids).logits - b(input_ids=ids).logits).abs().max().item())\n"
    )
    command = [sys.executable, "-c", code, str(dense.model_dir), str(sparse.model_dir)]
    difference = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert difference < 1e-5


def test_upcycling_fails_when_the_models_differ(job, dense):
    made = job("wrong", parent=dense.model_dir)
    with pytest.raises(ArtifactError, match="differs from its dense parent"):
        run_stage(Upcycle(moe={"top_k": 1}), made)
    assert not (made.model_dir / "manifest.json").exists()


def test_upcycling_needs_a_dense_parent(job, sparse):
    with pytest.raises(ConfigError, match="put a training stage before it"):
        run_stage(Upcycle(), job("first"))
    with pytest.raises(ConfigError, match="already has experts"):
        run_stage(Upcycle(), job("again", parent=sparse.model_dir))


def test_the_dense_student_comes_closer_to_its_teacher(job, dense):
    history = distill(DistillDense, job("student"), dense.model_dir, max_steps=12)
    assert history[-1]["kl"] < 0.8 * history[0]["kl"]
    assert history[0]["loss"] == pytest.approx(history[0]["kl"], rel=1e-5)
    assert "cross_entropy" not in history[0]


def test_a_student_that_is_its_teacher_has_no_divergence(job, dense):
    history = distill(DistillDense, job("same", parent=dense.model_dir), dense.model_dir, max_steps=1)
    assert history[0]["kl"] == pytest.approx(0, abs=1e-6)
    assert history[0]["teacher_entropy"] > 0


def test_the_loss_types_are_sums_of_their_parts(job, dense, sparse):
    history = distill(DistillSparse, job("student", parent=sparse.model_dir), dense.model_dir, loss_type="kd_lm")
    for row in history:
        parts = row["kl"] + row["cross_entropy"] + row["router_balance"]
        assert row["loss"] == pytest.approx(parts, rel=1e-5)


@pytest.mark.parametrize(
    ("compat", "counted", "times"),
    [("reference", True, 2), ("reference", False, 1), ("fixed", True, 1), ("fixed", False, 0)],
)
def test_router_losses_count_as_published_or_as_asked(job, dense, compat, counted, times):
    """The published code adds them to the language-modelling loss, and to the sum of both again."""
    grown = job("grown", parent=dense.model_dir)
    run_stage(Upcycle(moe={"compat": compat, "capacity_factor": 1.5}), grown)
    model, _, _ = open_checkpoint(grown.model_dir)
    (layer,) = moe_layers(model).values()
    assert layer.router.settings.second_choice == ("gumbel" if compat == "reference" else "most_likely")
    history = distill(
        DistillSparse,
        job("student", parent=grown.model_dir),
        dense.model_dir,
        compat=compat,
        router_losses=counted,
        hardware={"micro_batch": 4},
        max_steps=2,
    )
    for row in history:
        align = row["kl"] + (row["teacher_entropy"] if compat == "reference" else 0)
        expected = align + row["cross_entropy"] + times * row["router_balance"]
        assert row["router_balance"] > 0.009, "0.01 for one layer in balance"
        assert row["loss"] == pytest.approx(expected, rel=1e-5)


def test_experts_and_routers_learn_while_attention_stays(job, dense, sparse):
    made = job("student", parent=sparse.model_dir)
    distill(DistillSparse, made, dense.model_dir)
    before, after = (load_file(d.model_dir / "model.safetensors") for d in (sparse, made))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert any(".mlp.gate.weight" in name for name in changed)
    assert any(".experts.0.down_proj" in name for name in changed)
    assert any(name.startswith("multi_modal_projector") for name in changed)
    assert not [n for n in changed if ".self_attn." in n or "embed" in n or "norm" in n or "vision" in n]


def test_a_trained_sparse_student_answers_the_same_in_stock_transformers(job, dense, sparse):
    made = job("student", parent=sparse.model_dir)
    distill(DistillSparse, made, dense.model_dir)  # publishing is gated by a fresh process
    model, _, card = open_checkpoint(made.model_dir)
    assert list(moe_layers(model)) == ["language_model.layers.0.mlp"]
    assert card["kind"] == "model"


def test_the_loss_does_not_depend_on_how_the_batch_is_cut(job, dense):
    whole = distill(DistillDense, job("whole"), dense.model_dir, loss_type="kd_lm")
    cut = distill(DistillDense, job("cut"), dense.model_dir, loss_type="kd_lm", hardware={"micro_batch": 2})
    assert [row["loss"] for row in whole] == pytest.approx([row["loss"] for row in cut], rel=1e-5)


def test_a_teacher_of_a_larger_head_that_wrote_down_everything_equals_the_live_one(job, dense, tmp_path):
    other = job("other")
    run_stage(Finetune(data="mix", seed=1, **COMMON), other)
    tokens = token_rows(open_checkpoint(dense.model_dir)[1].tokenizer)
    small = with_head_of(tokens, other.model_dir, tmp_path / "small")
    large = with_head_of(tokens + 64, dense.model_dir, tmp_path / "large")
    live = distill(DistillDense, job("live", parent=small), large)
    notes = written(tmp_path, large, "mix", {"kind": "top_k", "k": tokens + 64})
    cached = distill(
        DistillDense,
        job("cached", parent=small, precomputed={"teacher": notes}),
        large,
        teacher_cache={"k": tokens + 64},
    )
    assert live[0]["kl"] > 0.01
    assert [r["kl"] for r in cached] == pytest.approx([r["kl"] for r in live], rel=2e-3)


def test_a_student_without_a_row_for_every_token_is_refused(dense, tmp_path):
    notes = PrecomputedLogProbs(written(tmp_path, dense.model_dir, "mix", {"kind": "top_k", "k": 2}))
    notes.require_rows(notes.vocabulary)
    with pytest.raises(ArtifactError, match="the student's head has 3 rows; give the student a row"):
        notes.require_rows(3)


@pytest.mark.parametrize("kind", ["top_k", "sampled"])
def test_a_student_learns_from_a_few_written_tokens(job, dense, tmp_path, kind):
    notes = written(tmp_path, dense.model_dir, "mix", {"kind": kind, "k": 8, "seed": 0})
    made = job("cached", precomputed={"teacher": notes})
    history = distill(DistillDense, made, dense.model_dir, teacher_cache={"kind": kind, "k": 8}, max_steps=10)
    assert history[-1]["kl"] < history[0]["kl"]


@pytest.mark.parametrize("kind", ["log_probabilities", "top_k", "sampled"])
def test_precomputed_logits_do_not_depend_on_the_batch(dense, tmp_path, monkeypatch, kind):
    mixture = "pairs" if kind == "log_probabilities" else "mix"
    read = PrecomputedLogProbs.log_probabilities if kind == "log_probabilities" else PrecomputedLogProbs.tokens
    found = []
    for size in (1, 3, 8):
        monkeypatch.setattr(precompute, "BATCH", size)
        settings = {"kind": kind, "k": 5, "seed": 0}
        notes = PrecomputedLogProbs(written(tmp_path / str(size), dense.model_dir, mixture, settings))
        found.append(read(notes, [3, 1, 20]))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-3, atol=1e-4)
    assert (found[0][1] < 0).all()


def test_precomputed_logits_are_the_same_bytes_in_any_number_of_chunks(dense, tmp_path, monkeypatch):
    monkeypatch.setattr(precompute, "RECORDS_PER_SHARD", 16)
    settings = {"kind": "sampled", "k": 5, "seed": 0}
    whole = written(tmp_path / "whole", dense.model_dir, "mix", settings)
    cut = written(tmp_path / "cut", dense.model_dir, "mix", settings, chunks=7, workers=1)
    names = sorted(path.relative_to(whole) for path in whole.rglob("*") if path.is_file())
    assert len(names) == 4 + 1  # 60 records, and the manifest
    assert all((whole / name).read_bytes() == (cut / name).read_bytes() for name in names)
    assert not (tmp_path / "whole/annotating").exists()


def test_a_killed_job_goes_on_with_the_next_shard(dense, tmp_path, monkeypatch):
    monkeypatch.setattr(precompute, "RECORDS_PER_SHARD", 16)
    wanted = work(tmp_path, dense.model_dir, "mix", {"kind": "top_k", "k": 5})

    def interrupted(shards, total):
        yield next(shards)
        yield next(shards)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        annotated(wanted, 1, report=interrupted)
    finished = {path: path.stat().st_mtime_ns for path in wanted.shards.iterdir()}
    assert len(finished) == 2
    # with another number of chunks too
    chunks = annotated(wanted, 2)
    assert {path: path.stat().st_mtime_ns for path in wanted.shards.iterdir()}.items() > finished.items()
    with pytest.raises(ArtifactError, match="not the chunks of 60 records"):
        publish(wanted, chunks[:1])
    next(iter(finished)).unlink()
    with pytest.raises(ArtifactError, match="missing; run the same command again"):
        publish(wanted, chunks)
    assert [chunk.exists() for chunk in chunks] == [False, True]
    publish(wanted, annotated(wanted, 2))
    assert len(PrecomputedLogProbs(wanted.out).tokens([59])[0])


def test_another_number_of_chunks_takes_what_is_published(dense, tmp_path, monkeypatch):
    monkeypatch.setattr(precompute, "RECORDS_PER_SHARD", 16)
    settings = {"kind": "top_k", "k": 5}
    out = written(tmp_path, dense.model_dir, "mix", settings)
    (out / "shards/00001-of-00004.arrow").write_bytes(bytes((out / "shards/00001-of-00004.arrow").stat().st_size))
    made = []
    write = precompute._ShardWriter.write
    monkeypatch.setattr(
        precompute._ShardWriter, "write", lambda self, name, path: (made.append(name), write(self, name, path))
    )
    before = (out / "manifest.json").read_bytes()
    written(tmp_path, dense.model_dir, "mix", settings, chunks=2)
    assert made == ["00001-of-00004.arrow"], "the damaged one alone"
    assert (out / "manifest.json").read_bytes() == before
    shutil.copytree(dense.model_dir, tmp_path / "other")
    written(tmp_path, tmp_path / "other", "mix", settings)
    assert len(made) == 1 + 4, "another checkpoint writes everything anew"


def test_a_teacher_that_saw_other_images_is_refused(job, dense, tmp_path):
    settings = {"kind": "top_k", "k": 2}
    with pytest.raises(ConfigError, match=r"dense.*do_pad: stage False, precomputing model True"):
        written(tmp_path, dense.model_dir, "mix", settings | {"image_aspect": "square"})
    notes = written(tmp_path, dense.model_dir, "mix", settings)
    made = job("student", precomputed={"teacher": notes})
    with pytest.raises(ConfigError, match=r"annotations-top_k-mix: the teacher was .* the teacher's image_aspect"):
        distill(DistillDense, made, dense.model_dir, teacher_cache={"k": 2}, image_aspect="square")


def test_a_reference_that_saw_other_images_is_refused(job, dense, tmp_path):
    notes = written(tmp_path, dense.model_dir, "pairs", {"kind": "log_probabilities"})
    made = job(
        "preferred", parent=dense.model_dir, tokens=Path("resources/tokens/pairs"), precomputed={"reference": notes}
    )
    with pytest.raises(ConfigError, match=r"annotations-log_probabilities-pairs: the reference was"):
        run_stage(Prefer(**COMMON, data="pairs", reference="dense", image_aspect="square"), made)


@pytest.mark.parametrize("loss_type", ["kto_pair", "sigmoid", "hinge", "ipo"])
def test_preferences_are_learnt_relative_to_the_reference(job, dense, tmp_path, loss_type):
    notes = written(tmp_path, dense.model_dir, "pairs", {"kind": "log_probabilities"})
    made = job(
        "preferred", parent=dense.model_dir, tokens=Path("resources/tokens/pairs"), precomputed={"reference": notes}
    )
    settings = {**COMMON, "data": "pairs", "reference": "dense", "loss_type": loss_type, "max_steps": 6}
    run_stage(Prefer(**settings), made)
    history = read_jsonl(made.report_dir / "history.jsonl")
    assert history[0]["rewards_margin"] == pytest.approx(0, abs=1e-4)
    assert history[-1]["rewards_margin"] > 0
    assert history[-1]["rewards_accuracy"] > 0.5


def test_preferring_needs_pairs(job, dense, tmp_path):
    notes = written(tmp_path, dense.model_dir, "pairs", {"kind": "log_probabilities"})
    made = job("wrong", parent=dense.model_dir, precomputed={"reference": notes})
    with pytest.raises(DataError, match="holds conversations, but the stage trains on preferences"):
        run_stage(Prefer(**COMMON, data="mix", reference="dense"), made)


def test_a_teacher_with_another_tokenizer_is_refused(job, dense):
    tokenizer = dense.model_dir / "tokenizer.json"
    text = tokenizer.read_text()
    tokenizer.write_text(text.replace("<|im_start|>", "<|im_other|>"))
    list_anew(dense.model_dir)
    with pytest.raises(ConfigError, match="do not share a vocabulary"):
        distill(DistillDense, job("student"), dense.model_dir)


def test_a_teacher_of_another_image_size_is_refused(job, dense):
    path = dense.model_dir / "preprocessor_config.json"
    content = json.loads(path.read_text())
    content["size"] = {name: pixels + 1 for name, pixels in content["size"].items()}
    path.write_text(json.dumps(content))
    list_anew(dense.model_dir)
    with pytest.raises(ConfigError, match=r"the teacher was trained on other images than.*\(size: stage"):
        distill(DistillDense, job("student"), dense.model_dir)


@pytest.mark.parametrize("tokens", [3, 5])
def test_all_tokens_need_a_teacher_with_as_many_image_tokens(dense, tokens):
    student, processor, _ = open_checkpoint(dense.model_dir)
    assert student.config.image_seq_length not in (3, 5)
    student.config.image_seq_length = tokens
    LiveTeacher(dense.model_dir, student, processor, "response")
    with pytest.raises(ConfigError, match=rf"the student {tokens}: .*tokens: response"):
        LiveTeacher(dense.model_dir, student, processor, "all")


def test_images_can_take_another_number_of_tokens():
    batch = {
        "input_ids": torch.tensor([[9, 9, 1, 2, 9, 9, 3], [9, 9, 1, 2, 0, 0, 0]]),
        "labels": torch.tensor([[-100, -100, -100, 2, -100, -100, 3], [-100, -100, -100, 2, -100, -100, -100]]),
        "attention_mask": torch.tensor([[1] * 7, [1, 1, 1, 1, 0, 0, 0]]),
    }
    seen = resized_images(batch, 9, 2, 3)
    assert seen["input_ids"].tolist() == [[9, 9, 9, 1, 2, 9, 9, 9, 3], [9, 9, 9, 1, 2, 0, 0, 0, 0]]
    assert seen["attention_mask"].sum(1).tolist() == [9, 5]
    assert (seen["labels"] != -100).sum() == (batch["labels"] != -100).sum()
    back = resized_images(seen, 9, 3, 2)
    assert back["input_ids"].tolist() == batch["input_ids"].tolist()


def test_a_single_token_image_can_be_resized():
    batch = {
        "input_ids": torch.tensor([[9, 1, 9]]),
        "labels": torch.tensor([[-100, 1, -100]]),
        "attention_mask": torch.ones(1, 3),
    }
    assert resized_images(batch, 9, 1, 2)["input_ids"].tolist() == [[9, 9, 1, 9, 9]]


def break_weights(checkpoint: Path) -> None:
    path = checkpoint / "model.safetensors"
    tensors = load_file(path)
    tensors["language_model.model.norm.weight"].fill_(torch.nan)
    save_file(tensors, path, metadata={"format": "pt"})
    list_anew(checkpoint)


def test_a_teacher_with_broken_weights_names_the_records(job, dense):
    break_weights(dense.model_dir)
    with pytest.raises(ArtifactError, match=r"step 1, records shapes/.*teacher's logits are not finite"):
        distill(DistillDense, job("student"), dense.model_dir)


@pytest.mark.parametrize("kind", ["log_probabilities", "top_k", "sampled"])
def test_broken_weights_name_the_precomputed_records(dense, tmp_path, kind):
    break_weights(dense.model_dir)
    mixture, source = ("pairs", "pairs") if kind == "log_probabilities" else ("mix", "shapes")
    with pytest.raises(ArtifactError, match=rf"dense.*, records ({source}/\S+, )+{source}/\S+: the .* not finite"):
        written(tmp_path, dense.model_dir, mixture, {"kind": kind, "k": 2, "seed": 0})


def test_a_sparse_student_answers_the_same_at_every_batch_size(job, dense, sparse, demo_files):
    made = job("student", parent=sparse.model_dir)
    distill(DistillSparse, made, dense.model_dir)
    model, processor, card = open_checkpoint(made.model_dir)
    template = get_template(card["checkpoint"]["template"], processor.tokenizer)
    answerer = Answerer(model, processor, template)
    images = sorted((demo_files / "resources/datasets/shapes").rglob("*.jpg"))[:18]
    questions = [
        Question(id=number, text="What color is drawn?" + " Say it." * (number % 3), images=(image,))
        for number, image in enumerate(images)
    ]

    def answers(batch_size: int) -> dict[int, str]:
        asked = answerer.answer(questions, batch_size=batch_size, max_new_tokens=8)
        return {answer["question_id"]: answer["text"] for answer in asked}

    alone = answers(1)
    assert len(alone) == len(questions)
    assert alone == answers(1) == answers(3) == answers(16)
