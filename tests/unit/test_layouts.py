"""Checkpoints in LLaVA's layouts: imported exactly, and exported bit by bit."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import layouts_data as made
import pytest
import torch
from made_tokens import write_tokens
from safetensors.torch import load_file
from test_construct import bringing_in
from tokenizers import Tokenizer
from typer.testing import CliRunner

from mmpipe.checkpoints.layouts import _write_llava
from mmpipe.checkpoints.load import open_checkpoint
from mmpipe.cli.main import app
from mmpipe.demo.moss2 import moss2_tiny
from mmpipe.errors import ArtifactError, ConfigError
from mmpipe.models.settings import VisionLanguage
from mmpipe.stages.construct import Construct
from mmpipe.stages.pretrain import Pretrain
from mmpipe.training.run import run_stage


@pytest.fixture
def bring(job, tmp_path):
    """Bring a directory in and return where it is published."""

    def run(source: Path, *, language: Path | None = None, layouts: dict[str, str] | None = None, **changes):
        parts = {"checkpoint": source, "vision": made.BACKBONES["vision"]}
        if language:
            parts["language"] = language
        brought = bringing_in(
            job,
            source,
            f"brought-{source.name}",
            backbones=parts,
            layouts={"checkpoint": "llava", **(layouts or {})},
            vision_language=VisionLanguage(checkpoint="whole", vision="clip-tiny"),
            **changes,
        )
        run_stage(Construct(template="chatml"), brought)
        return brought.model_dir

    return run


def export(checkpoint: Path, out: Path, *options: str) -> dict[str, torch.Tensor]:
    """Write a checkpoint in LLaVA's layout by the command line and return its tensors."""
    command = ["export", str(checkpoint), str(out), "--layout", "llava", "--tower", "openai/clip-tiny", *options]
    result = CliRunner().invoke(app, command, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    if (out / "model.safetensors").is_file():
        return load_file(out / "model.safetensors")
    return torch.load(out / "pytorch_model.bin", weights_only=True)


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize(("suffix", "options"), [("bin", ("--binary",)), ("safetensors", ())])
def test_a_whole_llava_comes_in_and_goes_out_bit_by_bit(bring, job, tmp_path, suffix, options):
    before = made.whole_llava(tmp_path / "llava", suffix=suffix)
    published = bring(tmp_path / "llava")
    assert_same(export(published, tmp_path / "out", *options), before)
    old, new = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("llava", "out"))
    kept = old.keys() - {"_name_or_path"}
    assert {key: new[key] for key in kept} == {key: old[key] for key in kept}


def test_what_was_written_can_be_brought_in_again(bring, job, tmp_path):
    before = made.whole_llava(tmp_path / "llava")
    export(bring(tmp_path / "llava"), tmp_path / "out")
    again = bring(tmp_path / "out")
    assert_same(export(again, tmp_path / "again"), before)


def test_the_model_computes_what_its_parts_do(bring, job, tmp_path):
    """A tower in the checkpoint is used instead of the one it refers to, and images reach the right projector."""
    tensors = made.whole_llava(tmp_path / "llava")
    model, processor, _ = open_checkpoint(bring(tmp_path / "llava"))
    pixels = torch.randn(1, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    seen = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
    weight = {name.removeprefix("model.mm_projector."): t.float() for name, t in tensors.items() if "mm_proj" in name}
    hidden = torch.nn.functional.gelu(seen @ weight["0.weight"].T + weight["0.bias"])
    expected = hidden @ weight["2.weight"].T + weight["2.bias"]
    found = model.model.get_image_features(pixels).pooler_output
    torch.testing.assert_close(torch.cat(list(found)), expected[0], rtol=1e-5, atol=1e-5)
    name = "embeddings.patch_embedding.weight"
    trained = tensors[f"model.vision_tower.vision_tower.vision_model.{name}"].float()
    assert torch.equal(model.model.vision_tower.state_dict()[name], trained)
    assert processor.tokenizer.convert_tokens_to_ids("<image>") == model.config.image_token_id


def test_without_a_tower_the_named_one_is_used(bring, job, tmp_path):
    made.whole_llava(tmp_path / "llava", with_tower=False)
    model, _, _ = open_checkpoint(bring(tmp_path / "llava"))
    plain = made.AutoModel.from_pretrained(made.BACKBONES["vision"]).state_dict()
    assert all(torch.equal(value, plain[name]) for name, value in model.model.vision_tower.state_dict().items())


def test_names_of_moe_llava(bring, job, tmp_path):
    tensors = made.whole_llava(tmp_path / "llava")
    renamed = {
        name.replace("vision_tower.vision_tower", "image_tower.image_tower").replace(
            "mm_projector.", "mm_projector.image_spatial_proj."
        ): tensor
        for name, tensor in tensors.items()
    }
    made.write_shards(tmp_path / "llava", renamed, "bin")
    assert_same(export(bring(tmp_path / "llava"), tmp_path / "out"), tensors)


def test_a_projector_alone_stands_on_the_named_base(bring, job, tmp_path):
    base = made.llama(tmp_path / "base")
    folder = tmp_path / "projector"
    folder.mkdir()
    torch.save(made.projector(), folder / "mm_projector.bin")
    made.llava_config(folder, base)
    written = export(bring(folder, language=tmp_path / "base"), tmp_path / "out")
    expected = base.state_dict() | made.projector()
    assert_same({name: written[name] for name in expected}, expected)


def test_an_adapter_is_added_to_its_base(bring, job, tmp_path):
    base = made.llama(tmp_path / "base", torch.float32)
    changes = made.lora_adapter(tmp_path / "adapter", base)
    written = export(bring(tmp_path / "adapter", language=tmp_path / "base"), tmp_path / "out")
    for name, tensor in base.state_dict().items():
        expected = tensor + changes.get(name, torch.zeros(()))
        torch.testing.assert_close(written[name], expected, rtol=1e-6, atol=1e-6)
    assert_same({n: t for n, t in written.items() if "mm_projector" in n}, made.projector())


def test_an_adapter_may_stand_on_a_whole_llava(bring, job, tmp_path):
    tensors = made.whole_llava(tmp_path / "base")
    changes = made.lora_adapter(tmp_path / "adapter", made.llama(tmp_path / "shapes"))
    written = export(
        bring(tmp_path / "adapter", language=tmp_path / "base", layouts={"language": "llava"}), tmp_path / "out"
    )
    for name, change in changes.items():
        expected = tensors[name].float() + change
        torch.testing.assert_close(written[name].float(), expected, rtol=2e-3, atol=2e-3)


def test_llava_moss2_with_its_packed_language_model(bring, job, tmp_path):
    from mmpipe.checkpoints.layouts import get

    before = made.whole_llava(tmp_path / "llava")
    source = tmp_path / "llava"
    config = json.loads((source / "config.json").read_text())
    layout = get("moss2")
    stock = layout.config(config)
    others = {name: tensor for name, tensor in before.items() if "_tower." in name or "_projector." in name}
    packed = layout.from_stock({n: t for n, t in before.items() if n not in others}, stock) | others
    for file in source.glob("pytorch_model*"):
        file.unlink()
    torch.save(packed, source / "pytorch_model.bin")
    config |= layout.written(stock) | {"model_type": "llava_moss2"}
    (source / "config.json").write_text(json.dumps(config))
    published = bring(source)
    model, _, _ = open_checkpoint(published)
    assert model.config.text_config.model_type == "llama"
    written = export(published, tmp_path / "out", "--language", "moss2", "--binary")
    assert_same(written, packed)
    new = json.loads((tmp_path / "out/config.json").read_text())
    assert (new["model_type"], new["architectures"]) == ("llava_moss2", ["Moss2ForCausalLM"])


def test_a_packed_language_model_is_joined_aligned_and_written_as_in_the_guide(job, tmp_path):
    """The way of the recipe llava-moss2, in small: the guide's checkpoint, `mm_projector.bin`, `pytorch_model.bin`."""
    base = tmp_path / "moss2"
    base.mkdir()
    moss2_tiny(base, hidden_size=32, layers=2)
    model = {"vision": "clip-tiny", "language": "moss2-tiny"}
    facts = {
        "backbones": {"vision": made.BACKBONES["vision"], "language": base},
        "layouts": {"language": "moss2"},
        "spec": json.dumps({"stage": "construct", "model": model, "layouts": {"language": "moss2"}}),
    }
    joined = job("construct", tokens=None, manifests=(), **facts)
    run_stage(Construct(template="llava_llama_2", image_aspect="square"), joined)
    packed = load_file(base / "model.safetensors")
    written = export(joined.model_dir, tmp_path / "constructed", "--language", "moss2", "--binary")
    assert_same({name: written[name] for name in packed}, packed)
    config = json.loads((tmp_path / "constructed/config.json").read_text())
    guide = GUIDE | {"mm_vision_tower": "openai/clip-tiny", "mm_hidden_size": 32, "torch_dtype": "float32"}
    assert {key: config[key] for key in guide} == guide
    written = json.loads((tmp_path / "constructed/tokenizer.json").read_text())
    assert "<image>" not in {word["content"] for word in written["added_tokens"]}

    mixture = Path("resources/mixtures/mix")
    tokens = write_tokens(mixture, tmp_path / "tokens", {"checkpoint": joined.model_dir}, "llava_llama_2")
    aligned = job("pretrain", parent=joined.model_dir, manifests=(), tokens=tokens, **facts)
    training = {"data": "mix", "batch_size": 8, "max_steps": 1, "template": "llava_llama_2"}
    run_stage(Pretrain(**training, llava_projector=True), aligned)
    names = {path.name for path in aligned.model_dir.iterdir()}
    assert {"mm_projector.bin", "projector.safetensors"} <= names
    alone = export_projector(aligned.model_dir, tmp_path / "alone")
    assert_same(alone, torch.load(aligned.model_dir / "mm_projector.bin", weights_only=True))


def test_merges_are_written_as_the_tokenizers_that_llava_pins_reads_them(bring, job, tmp_path):
    """tokenizers 0.15 opens pairs as texts alone; pairs with blanks inside, which have no such form, stay lists."""
    made.whole_llava(tmp_path / "llava")
    published = bring(tmp_path / "llava")
    export(published, tmp_path / "out")
    merges = json.loads((tmp_path / "out/tokenizer.json").read_text())["model"]["merges"]
    assert merges
    assert all(isinstance(pair, str) and pair.count(" ") == 1 for pair in merges)
    theirs, ours = (Tokenizer.from_file(str(folder / "tokenizer.json")) for folder in (tmp_path / "out", published))
    assert theirs.encode("a red circle").ids == ours.encode("a red circle").ids
    with_blanks = {"merges": [["a", "b"], ["a b", "c"]]}
    _write_llava._join_merges(with_blanks)
    assert with_blanks == {"merges": [["a", "b"], ["a b", "c"]]}


def export_projector(checkpoint: Path, out: Path) -> dict[str, torch.Tensor]:
    result = CliRunner().invoke(app, ["export", str(checkpoint), str(out), "--layout", "llava"])
    assert result.exit_code == 0, result.output
    return torch.load(out / "mm_projector.bin", weights_only=True)


# the config.json of the LLaVA-MOSS2 guide, sizes apart
GUIDE = {
    "architectures": ["Moss2ForCausalLM"],
    "attn_implementation": "eager",
    "bias": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "model_type": "llava_moss2",
    "pad_token_id": 2,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {"factor": 2.0, "type": "dynamic"},
    "rope_theta": 1000000,
    "tie_word_embeddings": False,
    "use_cache": True,
    "freeze_mm_mlp_adapter": False,
    "freeze_mm_vision_resampler": False,
    "mm_projector_type": "mlp2x_gelu",
    "mm_resampler_type": None,
    "mm_use_im_patch_token": False,
    "mm_use_im_start_end": False,
    "mm_vision_select_feature": "patch",
    "mm_vision_select_layer": -2,
    "tune_mm_mlp_adapter": False,
    "tune_mm_vision_resampler": False,
    "unfreeze_mm_vision_tower": False,
    "use_mm_proj": True,
}


# --- what is refused ------------------------------------------------------------------------------------------------


def rewrite(source: Path, change) -> None:
    tensors = {n: t for f in source.glob("pytorch_model-*.bin") for n, t in torch.load(f, weights_only=True).items()}
    change(tensors)
    made.write_shards(source, tensors, "bin")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop("model.layers.1.mlp.up_proj.weight"), "missing: .*layers.1.mlp.up_proj"),
        (lambda t: t.pop("model.mm_projector.2.bias"), "missing: .*linear_2.bias"),
        (lambda t: t.update({"model.odd": torch.zeros(1)}), "left over: .*odd"),
        (
            lambda t: t.update({"model.norm.weight": torch.zeros(5)}),
            r"another shape.*norm.weight \(5,\), expected \(32,\)",
        ),
        (
            lambda t: t.pop("model.vision_tower.vision_tower.vision_model.post_layernorm.bias"),
            "missing: .*vision_tower.post_layernorm",
        ),
    ],
    ids=["missing", "no projector", "left over", "shape", "half a tower"],
)
def test_tensors_that_do_not_fit_are_listed(bring, job, tmp_path, change, said):
    made.whole_llava(tmp_path / "llava")
    rewrite(tmp_path / "llava", change)
    with pytest.raises(ArtifactError, match=said):
        bring(tmp_path / "llava")


def test_a_lost_shard_is_named(bring, job, tmp_path):
    made.whole_llava(tmp_path / "llava")
    (tmp_path / "llava/pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(ArtifactError, match=r"missing: pytorch_model-00002-of-00002\.bin"):
        bring(tmp_path / "llava")


@pytest.mark.parametrize(
    ("config", "error", "said"),
    [
        ({"model_type": "opt"}, ArtifactError, "'opt' is no LLaVA"),
        ({"text_config": {}}, ArtifactError, "checkpoint of transformers; leave 'layout' out"),
        ({"mm_use_im_start_end": True}, ConfigError, "mm_use_im_start_end"),
        ({"mm_vision_select_feature": "slice"}, ArtifactError, "'slice'; known: cls_patch, patch"),
    ],
)
def test_configurations_of_something_else_are_refused(bring, job, tmp_path, config, error, said):
    made.whole_llava(tmp_path / "llava", **config)
    with pytest.raises(error, match=said):
        bring(tmp_path / "llava")


def test_parts_that_lie_elsewhere_are_asked_for(job, bring, tmp_path):
    made.whole_llava(tmp_path / "llava", with_tower=False)
    with pytest.raises(ConfigError, match=r"'openai/clip-tiny' lies elsewhere.*model\.vision"):
        run_stage(Construct(), bringing_in(job, tmp_path / "llava", layouts={"checkpoint": "llava"}))
    made.lora_adapter(tmp_path / "adapter", made.llama(tmp_path / "base"))
    with pytest.raises(ConfigError, match=r"an adapter, not a whole.*model\.language.*lmsys/vicuna-tiny"):
        bring(tmp_path / "adapter")


def test_an_adapter_for_another_base_is_refused(bring, job, tmp_path):
    base = made.llama(tmp_path / "base")
    made.lora_adapter(tmp_path / "adapter", base)
    tensors = load_file(tmp_path / "adapter/adapter_model.safetensors")
    tensors["base_model.model.model.vision_tower.layers.0.q_proj.lora_A.weight"] = torch.zeros(4, 32)
    made.save_file(tensors, tmp_path / "adapter/adapter_model.safetensors")
    with pytest.raises(ArtifactError, match=r"does not fit its base.*vision_tower"):
        bring(tmp_path / "adapter", language=tmp_path / "base")


class Evil:
    def __reduce__(self):
        return os.system, ("touch /tmp/owned",)


@pytest.mark.parametrize("content", [pickle.dumps(Evil()), b"<html>not found</html>", b""])
def test_files_that_hold_anything_but_tensors_are_refused(bring, job, tmp_path, content):
    folder = tmp_path / "projector"
    folder.mkdir()
    (folder / "mm_projector.bin").write_bytes(content)
    made.llava_config(folder, made.llama(tmp_path / "base"))
    with pytest.raises(ArtifactError, match=r"mm_projector\.bin: no readable file of tensors"):
        bring(folder, language=tmp_path / "base")


def test_missing_files_are_named(job, tmp_path):
    joined = job("construct", tokens=None)
    run_stage(Construct(template="chatml"), joined)
    made_twice = ["export", str(joined.model_dir), str(tmp_path), "--layout", "llava"]
    for command, said in (
        (made_twice, "exists; name a directory that does not"),
        ([*made_twice[:2], str(tmp_path / "a"), "--layout", "lava"], "did you mean 'llava'"),
        ([*made_twice[:2], str(tmp_path / "a"), "--layout", "hf"], "nothing is written in the layout 'hf'"),
        ([*made_twice[:2], str(tmp_path / "a"), *made_twice[3:], "--language", "hf"], "none of packed"),
    ):
        with pytest.raises(ConfigError, match=said):
            CliRunner().invoke(app, command, catch_exceptions=False)
    assert not (tmp_path / "a").exists()


def test_the_error_of_a_tokenizer_names_missing_packages(monkeypatch, tmp_path):
    from mmpipe.checkpoints.layouts import base, get

    (tmp_path / "tokenizer.model").write_bytes(b"a sentencepiece model")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    monkeypatch.setattr(base, "_is_installed", lambda module: False)
    for layout in ("hf", "moss2"):
        with pytest.raises(ArtifactError, match="takes sentencepiece and protobuf: pip install sentencepiece"):
            get(layout).tokenizer(tmp_path)


def test_another_treatment_of_images_than_in_training_is_pointed_out(bring, job, tmp_path, caplog):
    made.whole_llava(tmp_path / "llava", image_aspect_ratio="square")
    bring(tmp_path / "llava")
    assert "trained with the images' aspect 'square'; the recipe says 'pad'" in caplog.text
