"""The round trip passes what stock transformers reproduces, and nothing else."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_llava import batch, llava, processor

from mmpipe.checkpoints import read_with_hf
from mmpipe.checkpoints.dummy_inputs import dummy_rows
from mmpipe.checkpoints.roundtrip import check_roundtrip, reference
from mmpipe.checkpoints.save import load_checkpoint, save_checkpoint
from mmpipe.errors import ArtifactError
from mmpipe.models.moe.spec import MoESettings
from mmpipe.models.moe.upcycle import upcycle

SAMPLES = [batch(rows=1, padded=0, seed=seed) for seed in (1, 2)]


def test_the_round_trip_compares_eight_samples_of_different_length() -> None:
    samples = dummy_rows(llava())
    assert len(samples) == 8
    assert len({sample["input_ids"].shape[1] for sample in samples}) == 8
    assert all(sample["attention_mask"].all() for sample in samples)
    assert len({sample["pixel_values"].sum().item() for sample in samples}) == 8


@pytest.fixture
def published(tmp_path: Path):
    save_checkpoint(upcycle(llava(), MoESettings()), processor(), tmp_path)
    model, _ = load_checkpoint(tmp_path, torch.bfloat16)
    expected = reference(model, SAMPLES, max_new_tokens=4)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}, "the model is left as it was"
    assert {b.dtype for b in model.buffers() if b.is_floating_point()} == {torch.float32}
    save_checkpoint(model, processor(), tmp_path)
    return tmp_path, expected


def test_a_faithful_checkpoint_passes_and_a_changed_one_does_not(published) -> None:
    path, expected = published
    assert check_roundtrip(path, expected) <= 1e-5
    config = json.loads((path / "config.json").read_text())
    config["text_config"]["norm_topk_prob"] = False
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ArtifactError, match=r"logits of sample 0 differ by 0\.\d+"):
        check_roundtrip(path, expected)


def test_missing_tensors_do_not_pass(published) -> None:
    path, expected = published
    tensors = load_file(path / "model.safetensors")
    del tensors["language_model.model.layers.0.mlp.shared_expert.up_proj.weight"]
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ArtifactError, match=r"do not fit the model.*shared_expert.up_proj"):
        check_roundtrip(path, expected)


def test_the_reader_imports_nothing_of_ours() -> None:
    tree = ast.parse(Path(read_with_hf.__file__).read_text())
    modules = {n.module or "" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    modules |= {alias.name for n in ast.walk(tree) if isinstance(n, ast.Import) for alias in n.names}
    assert modules == {"__future__", "sys", "typing", "torch", "safetensors.torch", "transformers"}
