"""What is joined is what came in: no tensor at random, none left out, no head lost, features for every image token."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mmpipe.checkpoints.load import build_model, load_tokenizer
from mmpipe.checkpoints.save import load_checkpoint, save_checkpoint
from mmpipe.errors import ArtifactError, DataError
from mmpipe.models.llava import hidden_states
from mmpipe.stages.base import VisionLanguage

Tensors = Mapping[str, Tensor]
HOW: dict[str, Any] = {"template": "chatml", "image_aspect": "pad", "seed": 0}


@pytest.fixture
def language(demo_files: Path, tmp_path: Path) -> Path:
    copied = shutil.copytree(demo_files / "resources/backbones/qwen2-tiny", tmp_path / "language")
    (copied / "manifest.json").unlink()  # it would name the change
    return copied


def change(directory: Path, how: Callable[[Tensors], Tensors]) -> None:
    file = directory / "model.safetensors"
    tensors = {name: tensor.clone().contiguous() for name, tensor in how(load_file(file)).items()}
    save_file(tensors, file, metadata={"format": "pt"})


def configure(directory: Path, **values: Any) -> None:
    config = json.loads((directory / "config.json").read_text()) | values
    kept = {name: value for name, value in config.items() if value is not None}
    (directory / "config.json").write_text(json.dumps(kept))


def joined(demo_files: Path, language: Path) -> tuple[Any, Any]:
    parts = {"vision": demo_files / "resources/backbones/clip-tiny", "language": language}
    return build_model(parts, VisionLanguage(vision="v", language="l"), **HOW)


@pytest.mark.parametrize(
    ("how", "named"),
    [
        (lambda t: {k: v for k, v in t.items() if ".layers.1.mlp." not in k}, "layers.1.mlp"),
        (lambda t: {**t, "model.layers.9.mlp.up_proj.weight": t["model.norm.weight"]}, "layers.9.mlp"),
        (lambda t: {**t, "model.norm.weight": torch.ones(3)}, "model.norm"),
        (lambda t: {f"odd.{k}": v for k, v in t.items()}, "odd."),
        (lambda t: {**t, "lm_head.weight": t["model.embed_tokens.weight"].flip(0)}, "lm_head.weight"),
    ],
    ids=["missing", "surplus", "misshapen", "renamed", "own head under tied"],
)
def test_weights_that_are_not_the_configuration_s_are_refused_by_name(demo_files, language, how, named):
    change(language, how)
    with pytest.raises(ArtifactError, match=named):
        joined(demo_files, language)


def test_an_untied_model_without_a_head_is_refused(demo_files, language):
    configure(language, tie_word_embeddings=False)
    with pytest.raises(ArtifactError, match="lm_head"):
        joined(demo_files, language)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "base_model.model.", "_orig_mod.module."])
def test_known_prefixes_are_left_out_and_said(demo_files, language, prefix, caplog):
    plain, _ = joined(demo_files, language)
    change(language, lambda tensors: {f"{prefix}{name}": tensor for name, tensor in tensors.items()})
    model, _ = joined(demo_files, language)
    assert prefix in caplog.text
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, plain.state_dict()[name]), name


@pytest.fixture
def whole(demo_files: Path, language: Path, tmp_path: Path) -> Path:
    model, processor = joined(demo_files, language)
    out = tmp_path / "whole"
    out.mkdir()
    save_checkpoint(model, processor, out)
    return out


def test_tokens_an_image_are_counted_where_the_configuration_does_not_say(whole):
    right = load_checkpoint(whole)[0].config.image_seq_length
    configure(whole, image_seq_length=None)
    assert load_checkpoint(whole)[0].config.image_seq_length == right
    assert load_tokenizer({"checkpoint": whole}, VisionLanguage(checkpoint="c"))[1] == right


def test_another_number_of_tokens_an_image_is_refused(whole):
    configure(whole, image_seq_length=577)
    with pytest.raises(ArtifactError, match="577"):
        load_checkpoint(whole)


def test_a_head_of_its_own_in_a_whole_checkpoint_is_refused(whole):
    rows = "language_model.model.embed_tokens.weight"
    change(whole, lambda tensors: {**tensors, "language_model.lm_head.weight": tensors[rows].flip(0)})
    with pytest.raises(ArtifactError, match="lm_head"):
        load_checkpoint(whole)


@pytest.mark.parametrize("surplus", [-1, 1, None])
def test_features_are_never_repeated_or_cut_to_fit(demo_files, language, surplus):
    model, _ = joined(demo_files, language)
    places = model.config.image_seq_length
    tokens = 2 * places if surplus is None else places + surplus
    ids = torch.tensor([[model.config.image_token_id] * tokens + [5, 6]])
    size = model.config.vision_config.image_size
    batch: Any = {
        "ids": ["one"],
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.zeros(1, 3, size, size),
        "dummy_image": False,
    }
    with pytest.raises(DataError, match=f"one: {tokens} image tokens"):
        hidden_states(model, batch)
