"""Checkpoints of dense models: the names, the files, the bytes, and the errors for what does not fit."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_llava import TEXT, batch, llava, processor
from transformers import AutoProcessor, LlavaForConditionalGeneration

from mmpipe.checkpoints.layouts import _write_llava
from mmpipe.checkpoints.save import load_checkpoint, save_checkpoint
from mmpipe.data.records import Turn
from mmpipe.data.templates import get_template
from mmpipe.errors import ArtifactError
from mmpipe.models import lora, projector
from mmpipe.models.settings import LoraSettings


def contents(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in directory.iterdir()}


@pytest.mark.parametrize(
    ("kind", "tower", "tie"), [("qwen2", "clip", True), ("llama", "siglip", False), ("phi3", "clip", False)]
)
def test_saved_model_comes_back_bit_equal(tmp_path: Path, kind: str, tower: str, tie: bool) -> None:
    model = llava(kind, tower=tower, tie=tie)
    save_checkpoint(model, processor(), tmp_path / "a")
    again, its_processor = load_checkpoint(tmp_path / "a")
    assert model.state_dict().keys() == again.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name

    save_checkpoint(again, its_processor, tmp_path / "b")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_names_are_those_of_version_4(tmp_path: Path) -> None:
    save_checkpoint(llava(tie=True), processor(), tmp_path)
    names = set(load_file(tmp_path / "model.safetensors"))
    assert "language_model.model.layers.0.mlp.gate_proj.weight" in names
    assert "vision_tower.vision_model.embeddings.class_embedding" in names
    assert "multi_modal_projector.linear_1.weight" in names
    assert "language_model.lm_head.weight" not in names, "a tied head is not written twice"

    save_checkpoint(llava(tie=False), processor(), tmp_path)
    assert "language_model.lm_head.weight" in load_file(tmp_path / "model.safetensors")


@pytest.mark.parametrize("kind", TEXT)
def test_configuration_speaks_to_old_and_new_readers(tmp_path: Path, kind: str) -> None:
    save_checkpoint(llava(kind), processor(), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == ["LlavaForConditionalGeneration"]
    text = config["text_config"]
    assert text["architectures"] == [
        {"qwen2": "Qwen2ForCausalLM", "llama": "LlamaForCausalLM", "phi3": "Phi3ForCausalLM"}[kind]
    ]
    assert text["rope_theta"] == text["rope_parameters"]["rope_theta"] == 1_000_000.0
    assert "rope_scaling" not in text


def test_scaled_rope_is_stated_both_ways(tmp_path: Path) -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 2.0}
    save_checkpoint(llava("llama", rope_parameters=rope), processor(), tmp_path)
    text = json.loads((tmp_path / "config.json").read_text())["text_config"]
    assert text["rope_scaling"] == {"rope_type": "dynamic", "factor": 2.0}


def test_processor_files_serve_both_versions(tmp_path: Path) -> None:
    save_checkpoint(llava(), processor(), tmp_path)
    assert (
        json.loads((tmp_path / "preprocessor_config.json").read_text())["image_processor_type"] == "CLIPImageProcessor"
    )
    assert "image_processor" not in json.loads((tmp_path / "processor_config.json").read_text())
    tokenizer = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert not isinstance(tokenizer.get("extra_special_tokens"), list), "version 4 expects a mapping here"

    _, loaded = load_checkpoint(tmp_path)
    text = "USER: <image>\nwhat? ASSISTANT: red<|endoftext|>"
    assert loaded.tokenizer(text).input_ids == processor().tokenizer(text).input_ids
    assert loaded.chat_template == processor().chat_template
    assert loaded.tokenizer.padding_side == tokenizer["padding_side"] == "left"
    assert type(loaded.image_processor).__name__ == "CLIPImageProcessorPil"


def test_a_ragged_batch_is_answered_as_one_by_one_by_transformers_alone(tmp_path: Path) -> None:
    """The files say on which side to pad: any program that opens them with transformers gets it right."""
    save_checkpoint(llava(), processor(), tmp_path)
    reader, model = AutoProcessor.from_pretrained(tmp_path), LlavaForConditionalGeneration.from_pretrained(tmp_path)
    image = Image.new("RGB", (40, 30), "red")
    prompts = [f"USER: <image>\n{question} ASSISTANT:" for question in ("Red?", "Look closely. What do you see?", "A?")]

    def answers(*asked: str) -> list[str]:
        given = reader(images=[image] * len(asked), text=list(asked), padding=True, return_tensors="pt")
        made = model.generate(**given, max_new_tokens=6, do_sample=False)
        return reader.batch_decode(made[:, given["input_ids"].shape[1] :])

    assert answers(*prompts) == [answer for prompt in prompts for answer in answers(prompt)]


def test_the_stored_chat_template_has_no_tag_of_transformers_and_keeps_its_marks(tmp_path: Path) -> None:
    own = processor()
    own.chat_template = get_template("qwen").jinja()
    save_checkpoint(llava(), own, tmp_path)
    assert own.chat_template == get_template("qwen").jinja()
    assert "{%- generation" not in (tmp_path / "chat_template.jinja").read_text()
    own.tokenizer.chat_template = (tmp_path / "chat_template.jinja").read_text()
    turns = [Turn("user", "What?"), Turn("assistant", "That.")]
    assert get_template("tokenizer", own.tokenizer).render(turns) == get_template("qwen").render(turns)


def test_files_have_the_mode_of_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        save_checkpoint(llava(), processor(), tmp_path)
    finally:
        os.umask(before)
    assert {stat.S_IMODE(file.stat().st_mode) for file in tmp_path.iterdir()} == {0o640}


def test_what_is_written_alone_has_the_mode_of_the_umask(tmp_path: Path) -> None:
    model = llava()
    lora.add_adapters(model, LoraSettings(rank=2), seed=0)
    before = os.umask(0o027)
    try:
        lora.save(model, tmp_path / "adapter", base="")
        projector.save(model, tmp_path / projector.FILE)
        _write_llava._save({"one": torch.zeros(1)}, tmp_path / "model.safetensors", binary=False)
    finally:
        os.umask(before)
    files = list(tmp_path.rglob("*.safetensors"))
    assert len(files) == 3
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o640}


def test_half_precision_is_kept_and_widened_on_request(tmp_path: Path) -> None:
    model = llava().to(torch.bfloat16)
    save_checkpoint(model, processor(), tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    wide, _ = load_checkpoint(tmp_path, torch.float32)
    assert wide.dtype == torch.float32
    assert torch.equal(wide.lm_head.weight, model.lm_head.weight.float())


def test_generation_is_the_same_after_reloading(tmp_path: Path) -> None:
    model = llava()
    save_checkpoint(model, processor(), tmp_path)
    again, _ = load_checkpoint(tmp_path)
    rows = batch(rows=1, padded=0)
    first, second = (m.generate(**rows, max_new_tokens=6, do_sample=False) for m in (model, again))
    assert torch.equal(first, second)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("language_model.model.norm.weight"), "file lacks: model.language_model.norm.weight"),
        (lambda t: t.update({"language_model.model.extra": torch.zeros(1)}), "no place for: .*extra"),
        (lambda t: t.update({"multi_modal_projector.linear_1.bias": torch.zeros(5)}), "another shape.*linear_1.bias"),
    ],
)
def test_tensors_that_do_not_fit_are_an_error(tmp_path: Path, change, message: str) -> None:
    save_checkpoint(llava(), processor(), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ArtifactError, match=message):
        load_checkpoint(tmp_path)


def test_what_is_not_a_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"config\.json is missing"):
        load_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ArtifactError, match="'bert' model"):
        load_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": ')
    with pytest.raises(ArtifactError, match="not JSON"):
        load_checkpoint(tmp_path)


def test_damaged_weights_are_an_artifact_error(tmp_path: Path) -> None:
    save_checkpoint(llava(), processor(), tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ArtifactError, match="cannot be opened"):
        load_checkpoint(tmp_path)
