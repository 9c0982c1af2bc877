"""Joining backbones, projector files under every name, and checkpoints that do not fit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_project import list_anew

from mmpipe.artifacts import manifest
from mmpipe.checkpoints.load import build_model, language_positions, open_checkpoint
from mmpipe.errors import ArtifactError
from mmpipe.models import projector
from mmpipe.models.llava import greedy_generation
from mmpipe.models.settings import VisionLanguage
from mmpipe.stages.finetune import Finetune
from mmpipe.training.run import run_stage

PARTS = VisionLanguage(vision="clip-tiny", language="qwen2-tiny")


@pytest.fixture
def model(demo_files):
    backbones = {
        "vision": demo_files / "resources/backbones/clip-tiny",
        "language": demo_files / "resources/backbones/qwen2-tiny",
    }
    return build_model(backbones, PARTS, template="qwen", image_aspect="pad", seed=3)[0]


def test_the_parts_are_the_backbones(demo_files, model):
    language = load_file(demo_files / "resources/backbones/qwen2-tiny/model.safetensors")
    ours = model.model.language_model.state_dict()
    for name, tensor in language.items():
        if "embed" not in name:
            assert torch.equal(ours[name.removeprefix("model.")], tensor)


def test_the_projector_depends_on_the_seed_alone(demo_files, model):
    backbones = {
        "vision": demo_files / "resources/backbones/clip-tiny",
        "language": demo_files / "resources/backbones/qwen2-tiny",
    }
    torch.rand(7)  # whatever was drawn before
    again = build_model(backbones, PARTS, template="qwen", image_aspect="pad", seed=3)[0]
    other = build_model(backbones, PARTS, template="qwen", image_aspect="pad", seed=4)[0]
    name = "multi_modal_projector.linear_1.weight"
    first = projector.state(model)[name]
    assert torch.equal(first, projector.state(again)[name])
    assert not torch.equal(first, projector.state(other)[name])


def test_projector_files_of_every_layout_are_read(model, tmp_path):
    wanted = projector.state(model)
    projector.save(model, tmp_path / "projector.safetensors")
    projector.save_llava_bin(model, tmp_path / "mm_projector.bin")
    raw = torch.load(tmp_path / "mm_projector.bin", weights_only=True)
    assert sorted(raw) == [f"model.mm_projector.{n}.{p}" for n in (0, 2) for p in ("bias", "weight")]
    deeper = {k.replace("mm_projector.", "mm_projector.image_spatial_proj."): t for k, t in raw.items()}
    torch.save(deeper, tmp_path / "moe_llava.bin")
    for name in ("projector.safetensors", "mm_projector.bin", "moe_llava.bin"):
        with torch.no_grad():
            model.model.multi_modal_projector.linear_1.weight.zero_()
        projector.load(model, tmp_path / name)
        assert all(torch.equal(tensor, projector.state(model)[key]) for key, tensor in wanted.items())


def test_a_projector_for_another_model_is_refused(model, tmp_path):
    save_file({"multi_modal_projector.linear_1.weight": torch.zeros(3, 3)}, tmp_path / "projector.safetensors")
    with pytest.raises(ArtifactError, match=r"another model.*linear_2"):
        projector.load(model, tmp_path / "projector.safetensors")


def test_a_pickle_that_runs_code_is_refused(model, tmp_path):
    class Evil:
        def __reduce__(self):
            return Path.touch, (tmp_path / "pwned",)

    torch.save({"mm_projector.0.weight": Evil()}, tmp_path / "mm_projector.bin")
    with pytest.raises(Exception, match=r"(?i)weights_only|unsupported"):
        projector.load(model, tmp_path / "mm_projector.bin")
    assert not (tmp_path / "pwned").exists()


def test_the_tokenizer_of_another_checkpoint_is_refused(job):
    made = job("finetune")
    run_stage(Finetune(data="mix", template="qwen", batch_size=8, max_steps=1), made)
    config = made.model_dir / "config.json"
    content = json.loads(config.read_text())
    content["image_token_index"] = content["image_token_index"] - 1
    config.write_text(json.dumps(content, indent=2))
    (made.model_dir / manifest.NAME).unlink()
    manifest.write(made.model_dir, kind="model", spec="{}", inputs={})
    with pytest.raises(ArtifactError, match="tokenizer does not belong to this checkpoint"):
        open_checkpoint(made.model_dir)


def test_generate_of_any_program_stops_where_the_template_ends_answers(demo_files, tmp_path):
    """Base models end with their end of text alone; a stage's own template is among the published end tokens."""
    language = tmp_path / "base"
    shutil.copytree(demo_files / "resources/backbones/qwen2-tiny", language)
    content = json.loads((language / "generation_config.json").read_text())
    eos = content["eos_token_id"][0]
    (language / "generation_config.json").write_text(json.dumps(content | {"eos_token_id": eos}))
    list_anew(language)
    backbones = {"vision": demo_files / "resources/backbones/clip-tiny", "language": language}
    for template, tokens in (("chatml", ["<|endoftext|>", "<|im_end|>"]), ("plain", ["<|endoftext|>"])):
        built, processor = build_model(backbones, PARTS, template=template, image_aspect="pad", seed=3)
        ends = built.generation_config.eos_token_id
        assert processor.tokenizer.convert_ids_to_tokens(ends if isinstance(ends, list) else [ends]) == tokens
    # a later stage with another template adds its own
    assert greedy_generation(built.generation_config, processor.tokenizer, "mpt").eos_token_id == [
        eos,
        processor.tokenizer.convert_tokens_to_ids("<|im_end|>"),
    ]


@pytest.mark.parametrize(
    ("rope", "expected"),
    [
        (None, 64),
        ({"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}, None),
        ({"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}, 256),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 1e4}, 256),
        ({"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32, "rope_theta": 1e4}, 64),
    ],
)
def test_positions_of_a_language_model_are_those_of_its_configuration(tmp_path, rope, expected):
    text = {"model_type": "qwen2", "max_position_embeddings": 64} | ({"rope_parameters": rope} if rope else {})
    for name, config in (("language", text), ("checkpoint", {"model_type": "llava", "text_config": text})):
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert language_positions({name: tmp_path}) == expected
