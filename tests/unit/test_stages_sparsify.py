"""The stage that sparsifies: what learns, what is published, and that both ways to read it give what was trained."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_project import half_without_images, make_job

from mmpipe.artifacts.files import read_jsonl
from mmpipe.benchmarks.base import Question
from mmpipe.checkpoints.load import open_checkpoint
from mmpipe.checkpoints.save import load_checkpoint
from mmpipe.data.templates import get_template
from mmpipe.errors import ArtifactError, ConfigError
from mmpipe.inference.generate import Answerer
from mmpipe.models.sparsity.hooks import get_sparsifier, set_keep_rate, without_sparsity
from mmpipe.models.sparsity.record import recording
from mmpipe.models.trainable import select
from mmpipe.stages.base import StageJob
from mmpipe.stages.finetune import Finetune
from mmpipe.stages.sparsify import Sparsify
from mmpipe.stages.upcycle import Upcycle
from mmpipe.training import publish
from mmpipe.training.run import run_stage

COMMON = {"template": "qwen", "batch_size": 8, "max_steps": 4}
SPARSITY = {
    "sparse_layer": 1,
    "vision_keep_rate": 0.5,
    "output_text_len_for_training": 3,
    "d_model": 16,
    "nhead": 4,
    "dim_feedforward": 32,
}


def sparsify(**changes: Any) -> Sparsify:
    settings = {
        "data": "mix",
        "sparsity": SPARSITY,
        "learning_rate": 1e-3,
        "learning_rates": {"language_model.sparsifier.*": 1e-2},
    }
    return Sparsify(**{**COMMON, **settings, **changes})


@pytest.fixture(scope="module")
def family(demo_files: Path, tmp_path_factory: pytest.TempPathFactory, quick_readback: None) -> dict[str, StageJob]:
    """A dense checkpoint, trained a little, and its sparsified child. Not to be changed: copy them."""
    folder = tmp_path_factory.mktemp("family")
    with contextlib.chdir(demo_files):
        dense = make_job(folder, "dense")
        run_stage(Finetune(data="mix", learning_rate=1e-2, **COMMON), dense)
        sparsified = make_job(folder, "sparsified", parent=dense.model_dir)
        run_stage(sparsify(), sparsified)
    return {"dense": dense, "sparsified": sparsified}


@pytest.fixture
def dense(job, family) -> StageJob:
    return family["dense"]


@pytest.fixture
def sparsified(job, family, tmp_path) -> StageJob:
    shutil.copytree(family["sparsified"].model_dir.parent, tmp_path / "sparsified")
    return make_job(tmp_path, "sparsified", parent=family["dense"].model_dir)


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Publish without reading back in a fresh process, which takes seconds; the family above was read back."""
    monkeypatch.setattr(publish, "_read_back", lambda model, out: None)


def images() -> list[Path]:
    return sorted(p for p in Path("resources/datasets/shapes").rglob("*") if p.suffix in (".png", ".jpg"))[:3]


def answers(job: StageJob, rate: float | str | None = "trained", **settings: Any) -> dict[Any, str]:
    """Answers of a checkpoint to a few questions."""
    model, processor, card = open_checkpoint(job.model_dir)
    if rate != "trained":
        set_keep_rate(model, rate, "test")
    template = get_template(card["checkpoint"]["template"], processor.tokenizer)
    shown = images()
    questions = [Question(id=n, text=f"What is {'really ' * (n % 3)}there?", images=(shown[n % 3],)) for n in range(9)]
    questions.append(Question(id="text", text="Two and two?"))
    questions.append(Question(id="two", text="<image> or <image>?", images=tuple(shown[:2])))
    return {
        a["question_id"]: a["text"]
        for a in Answerer(model, processor, template).answer(questions, max_new_tokens=8, **settings)
    }


def test_it_trains_and_logs_what_is_kept(sparsified) -> None:
    history = read_jsonl(sparsified.report_dir / "history.jsonl")
    assert {"cross_entropy", "image_mask_loss", "output_text_mask_loss", "image_kept", "gumbel_tau"} <= history[
        0
    ].keys()
    taus = [row["gumbel_tau"] for row in history if "gumbel_tau" in row]
    assert taus == pytest.approx([0.1 ** (step / 4) for step in range(4)], rel=1e-5)
    rate = next(row["image_kept"] for row in history if "image_kept" in row)
    distance = next(row["image_mask_loss"] for row in history if "image_mask_loss" in row)
    assert distance >= (rate - 0.5) ** 2 - 1e-6, "the mean of squares is at least the square of the mean"


def test_the_projector_is_trained_unless_it_is_frozen(sparsified, dense) -> None:
    def of(job: StageJob, part: str) -> dict[str, torch.Tensor]:
        return {k: v for k, v in load_file(job.model_dir / "model.safetensors").items() if part in k}

    before, after = of(dense, "multi_modal_projector"), of(sparsified, "multi_modal_projector")
    assert before.keys() == after.keys()
    assert not any(torch.equal(before[name], after[name]) for name in before)
    model, _, _ = open_checkpoint(sparsified.model_dir)
    names = [name for name, _ in model.named_parameters()]
    frozen = set(names) - set(select(model, ["language_model.*", "lm_head.*"]))
    assert {name for name in names if "multi_modal_projector" in name} <= frozen


def test_the_checkpoint_is_dense_for_everyone_else(sparsified) -> None:
    """A fresh process that does not know this package reads the dense model."""
    model, _, _ = open_checkpoint(sparsified.model_dir)
    with without_sparsity(model), torch.no_grad():
        ids = torch.arange(3, 40)[None]
        expected = model(input_ids=ids).logits
    save_file({"ids": ids, "logits": expected}, sparsified.report_dir / "expected.safetensors")
    code = (
        "import sys, torch; from safetensors.torch import load_file; from transformers import AutoModelForImageTextToText as A;"
        "given = load_file(sys.argv[2]); model, info = A.from_pretrained(sys.argv[1], output_loading_info=True);"
        "assert not info['unexpected_keys'] and not info['missing_keys'], info;"
        "torch.testing.assert_close(model(input_ids=given['ids']).logits, given['logits'], atol=1e-5, rtol=1e-5)"
    )
    where = str(sparsified.report_dir / "expected.safetensors")
    subprocess.run([sys.executable, "-c", code, str(sparsified.model_dir), where], check=True, capture_output=True)
    names = load_file(sparsified.model_dir / "sparsity.safetensors")
    assert {name.split(".")[0] for name in names} == {"image_score_predictor", "output_text_score_predictor"}
    assert "mmpipe" not in json.loads((sparsified.model_dir / "config.json").read_text())


@pytest.mark.parametrize("settings", [{"batch_size": 1}, {"batch_size": 16}, {"share_prefix": False}])
def test_answers_do_not_depend_on_batch_or_sharing(sparsified, settings) -> None:
    assert answers(sparsified, **settings) == answers(sparsified, batch_size=4)


def test_the_keep_rate_can_be_changed_afterwards(sparsified, dense) -> None:
    model, processor, card = open_checkpoint(sparsified.model_dir)
    for rate, kept in ((0.25, 2), (0.5, 4), (1.0, 9)):
        set_keep_rate(model, rate, "test")
        template = get_template(card["checkpoint"]["template"], processor.tokenizer)
        image = images()[0]
        with recording(model) as record:
            list(Answerer(model, processor, template).answer([Question(id=1, text="What?", images=(image,))]))
        assert sum(record.passes[0].images[0]) == kept
    assert answers(sparsified, None) == answers(sparsified, None, share_prefix=False)
    with pytest.raises(ConfigError, match="no predictors"):
        answers(dense, 0.5)


def test_resumed_it_ends_with_the_same_weights(job, dense, sparsified, monkeypatch, unread) -> None:
    made = job("again", parent=dense.model_dir)
    stage = sparsify(hardware={"checkpoint_every": 2})
    from mmpipe.training.trainer import StageTrainer

    real = StageTrainer._save_checkpoint

    def die(self, *args: Any, **kwargs: Any) -> None:
        real(self, *args, **kwargs)
        raise KeyboardInterrupt

    monkeypatch.setattr(StageTrainer, "_save_checkpoint", die)
    with pytest.raises(KeyboardInterrupt):
        run_stage(stage, made)
    monkeypatch.setattr(StageTrainer, "_save_checkpoint", real)
    run_stage(stage, made)
    for file in ("sparsity.safetensors", "model.safetensors"):
        one, other = load_file(made.model_dir / file), load_file(sparsified.model_dir / file)
        assert all(torch.equal(one[name], other[name]) for name in other)


def test_cutting_a_batch_changes_nothing(job, dense, unread) -> None:
    histories = []
    for micro in (8, 2):
        made = job(f"cut-{micro}", parent=dense.model_dir)
        run_stage(sparsify(hardware={"micro_batch": micro}), made)
        histories.append(read_jsonl(made.report_dir / "history.jsonl"))
    for whole_batch, cut in zip(*histories, strict=True):
        for key in ("cross_entropy", "image_mask_loss", "output_text_mask_loss", "image_kept", "gumbel_tau"):
            assert cut.get(key) == pytest.approx(whole_batch.get(key), rel=1e-4, abs=1e-6), key


def test_a_student_with_experts(job, dense) -> None:
    experts = job("experts", parent=dense.model_dir)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(publish, "_read_back", lambda model, out: None)
        run_stage(Upcycle(), experts)
    made = job("sparse-experts", parent=experts.model_dir)
    run_stage(sparsify(max_steps=2), made)
    model, _, _ = open_checkpoint(made.model_dir)
    assert get_sparsifier(model) is not None
    assert "router_balance" in read_jsonl(made.report_dir / "history.jsonl")[0]
    assert answers(made, batch_size=1) == answers(made, batch_size=16)


def test_damaged_predictors_are_named(sparsified) -> None:
    folder = sparsified.model_dir
    config = json.loads((folder / "sparsity.json").read_text())
    (folder / "sparsity.json").write_text(json.dumps(config | {"image_tokens": 576}))
    with pytest.raises(ArtifactError, match=r"\b576\b.*\b9\b"):
        load_checkpoint(folder)
    (folder / "sparsity.json").write_text(json.dumps(config | {"d_model": 32}))
    with pytest.raises(ArtifactError, match="size mismatch"):
        load_checkpoint(folder)
    (folder / "sparsity.json").write_text(json.dumps(config))
    (folder / "sparsity.safetensors").rename(folder / "elsewhere")
    with pytest.raises(ArtifactError, match=r"sparsity\.safetensors is missing"):
        load_checkpoint(folder)


@pytest.mark.parametrize(("requires_image", "records"), [(True, 30), (False, 60)])
def test_records_without_images_are_left_out_unless_wanted(
    job, dense, tmp_path, unread, requires_image, records
) -> None:
    """An epoch is all records with an image, once each."""
    made = half_without_images(job("half", parent=dense.model_dir), tmp_path)
    run_stage(sparsify(requires_image=requires_image, max_steps=None, batch_size=10), made)
    assert len(read_jsonl(made.report_dir / "history.jsonl")) == records // 10


def test_there_must_be_something_to_sparsify(job) -> None:
    with pytest.raises(ConfigError, match="no model to sparsify"):
        run_stage(sparsify(), job("none"))


def test_published_names_are_read(sparsified) -> None:
    file = sparsified.model_dir / "sparsity.safetensors"
    tensors = load_file(file)
    save_file({f"model.{name}": tensor for name, tensor in tensors.items()}, file)
    config = json.loads((sparsified.model_dir / "sparsity.json").read_text())
    config["picture_tokens"] = config.pop("image_tokens")
    (sparsified.model_dir / "sparsity.json").write_text(json.dumps(config))
    model, _ = load_checkpoint(sparsified.model_dir)
    state = get_sparsifier(model).state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in tensors.items())


def test_a_later_stage_keeps_the_predictors(job, sparsified, unread) -> None:
    made = job("later", parent=sparsified.model_dir)
    run_stage(Finetune(data="mix", learning_rate=1e-4, trainable=("multi_modal_projector.*",), **COMMON), made)
    one, other = (load_file(j.model_dir / "sparsity.safetensors") for j in (made, sparsified))
    assert all(torch.equal(one[name], other[name]) for name in other)
