"""LibMoE's folders, made small in the same layout: what comes in computes what was written, and nothing is invented."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer, Phi3Config, Phi3ForCausalLM, SiglipVisionConfig, SiglipVisionModel

from mmpipe.checkpoints import layouts
from mmpipe.checkpoints.dummy_inputs import dummy_inputs
from mmpipe.checkpoints.layouts.base import BackboneFiles
from mmpipe.checkpoints.load import build_model, open_checkpoint
from mmpipe.errors import ArtifactError, ConfigError
from mmpipe.models.moe.spec import MoESettings
from mmpipe.models.moe.upcycle import logits, saved_moe_settings, upcycle
from mmpipe.models.settings import VisionLanguage
from mmpipe.models.vision_tower import saved_scales
from mmpipe.stages.construct import Construct
from mmpipe.stages.finetune import Finetune
from mmpipe.training.run import run_stage

ROUTER = {
    "topk": ("smoe", {"weight": "gate.weight"}),
    "cosine": ("smoe_cosinegating", {"weight": "gate.weight", "bias": "gate.bias"}),
    "perturbed_cosine": ("smoe_perturbed", {"weight": "gate.weight", "bias": "gate.bias"}),
    "sigmoid": ("smoe_sigmoidgating", {"weight": "gate.weight", "bias": "gate.bias"}),
    "hyper": (
        "hyperrouter",
        {
            "embedding": "hyper_embedding",
            "inner_weight": "hypernet.0.weight",
            "inner_bias": "hypernet.0.bias",
            "outer_weight": "hypernet.2.weight",
            "outer_bias": "hypernet.2.bias",
        },
    ),
    "moepp": (
        "smoe_plus_plus",
        {"weight": "gate.weight", "mixture": "experts.5.wg.weight", "constant": "experts.5.constant"},
    ),
}
CONFIG = {"model_type": "llava_phi", "scales": [1, 3], "mm_vision_tower": "openai/clip-tiny"}


@pytest.fixture
def parts(demo_files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """A tower and a tiny Phi-3."""
    monkeypatch.chdir(demo_files)
    language = tmp_path / "phi3"
    tokenizer = AutoTokenizer.from_pretrained("resources/backbones/qwen2-tiny")
    config = Phi3Config(
        vocab_size=len(tokenizer) + 8,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        initializer_range=0.2,
    )
    torch.manual_seed(3)
    Phi3ForCausalLM(config).save_pretrained(language)
    tokenizer.save_pretrained(language)
    return {"vision": Path("resources/backbones/clip-tiny"), "language": language}


def siglip(out: Path) -> Path:
    torch.manual_seed(5)
    config = SiglipVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2, image_size=48, patch_size=16
    )
    SiglipVisionModel(config).save_pretrained(out)
    shutil.copyfile("resources/backbones/clip-tiny/preprocessor_config.json", out / "preprocessor_config.json")
    return out


def dense(parts: dict[str, Path]) -> Any:
    """Our model of the parts, its projector drawn from a seed."""
    select = "full" if "siglip" in parts["vision"].name else "patch"
    how = VisionLanguage(vision="v", language="l", scales=(1, 3), feature_select=select)
    model, _ = build_model(parts, how, template="phi3", image_aspect="pad", seed=2)
    return model


def sparse(parts: dict[str, Path], router: str) -> Any:
    """The same with experts that differ."""
    model = dense(parts)
    form = {"compat": "reference"} if router != "topk" else {}
    settings = MoESettings(experts=4, top_k=2, placement="dense", router=router, router_settings=form)
    upcycle(model, settings, part="vision_tower")
    if router == "moepp":  # theirs leaves its cheap experts out where the width changes
        settings = MoESettings(experts=4, top_k=2, placement="dense")
    upcycle(model, settings, part="multi_modal_projector")
    torch.manual_seed(9)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".experts." in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def theirs(model: Any, router: str = "topk") -> dict[str, Tensor]:
    """A model's tensors under LibMoE's names."""
    named: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        name = name.removeprefix("model.language_model.").replace("model.vision_tower.", "vision_model.")
        name = name.replace("model.multi_modal_projector.", "mm_projector.")
        name = name.replace("linear_1.", "0.").replace("linear_2.", "2.")
        prefix = {"vision_model": "model.vision_tower.", "lm_head": ""}.get(name.partition(".")[0], "model.")
        found = re.fullmatch(r"(.*?)(?:mlp\.)?experts\.(up|down)_proj(_bias)?", name)
        routed = re.fullmatch(r"(.*?)(?:mlp\.)?router\.(\w+)", name)
        if found:
            place, kind = found[1], "bias" if found[3] else "weight"
            layers = ("0", "2") if "mm_projector" in place else ("fc1", "fc2")
            layer = layers[found[2] == "down"]
            for expert, value in enumerate(tensor):
                named[f"{prefix}{place}moelayer.experts.{expert}.{layer}.{kind}"] = value.clone()
        elif routed:
            of = "topk" if router == "moepp" and "mm_projector" in name else router
            named[f"{prefix}{routed[1]}moelayer.{ROUTER[of][1][routed[2]]}"] = tensor
        else:
            named[prefix + name] = tensor
    return named


def with_idle_end(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """LibMoE also trains the last block of the tower, which nothing reads."""
    numbers = {int(m[1]) for name in tensors if (m := re.search(r"vision_model\.encoder\.layers\.(\d+)", name))}
    last = max(numbers)
    return tensors | {
        name.replace(f"layers.{last}.", f"layers.{last + 1}."): tensor.clone()
        for name, tensor in tensors.items()
        if f"vision_model.encoder.layers.{last}." in name
    }


def config_of(parts: dict[str, Path], **more: Any) -> dict[str, Any]:
    written = json.loads((parts["language"] / "config.json").read_text())
    leave = ("model_type", "architectures", "dtype", "rope_parameters", "transformers_version")
    return {k: v for k, v in written.items() if k not in leave} | CONFIG | {"rope_theta": 10000.0} | more


def write_sft(out: Path, parts: dict[str, Path], model: Any, router: str) -> dict[str, Tensor]:
    out.mkdir(parents=True)
    tensors = {name: value.clone() for name, value in with_idle_end(theirs(model, router)).items()}
    torch.save(tensors, out / "pytorch_model.bin")
    AutoTokenizer.from_pretrained(parts["language"]).save_pretrained(out)
    experts = {"clip_smoe": True, "mlp_smoe": True, "moe_name": ROUTER[router][0], "num_experts": 4}
    more = {"num_selected": 2, "topk_max": 2, "topk_min": 1, "mm_projector_type": "moe"}
    (out / "config.json").write_text(json.dumps(config_of(parts, **experts, **more)))
    return tensors


def bring_in(directory: Path, parts: dict[str, Path], *roles: str) -> Any:
    stock = layouts.get("hf")
    named = {role: BackboneFiles(parts[role], stock) for role in roles}
    return layouts.get("libmoe").whole(directory, named).model


@pytest.mark.parametrize(("router", "tower"), [*((router, "clip") for router in ROUTER), ("topk", "siglip")])
def test_a_finetuned_model_computes_what_was_written(
    parts: dict[str, Path], tmp_path: Path, router: str, tower: str
) -> None:
    if tower == "siglip":
        parts["vision"] = siglip(tmp_path / "siglip-tiny")
    model = sparse(parts, router)
    write_sft(tmp_path / "sft", parts, model, router)
    found = bring_in(tmp_path / "sft", parts, "vision")
    assert saved_scales(found) == (1, 3)
    assert set(saved_moe_settings(found)) == {"vision_tower", "multi_modal_projector"}
    assert saved_moe_settings(found)["vision_tower"].router == router
    batch = dummy_inputs(model)
    torch.testing.assert_close(logits(found, batch), logits(model, batch), atol=1e-5, rtol=1e-5)


def test_a_prefinetuned_folder_of_three_files(parts: dict[str, Path], tmp_path: Path) -> None:
    model, out = dense(parts), tmp_path / "pft"
    with torch.no_grad():
        model.model.vision_tower.embeddings.patch_embedding.weight.mul_(1.5)
    tensors = with_idle_end(theirs(model))
    out.mkdir()
    prefix = "model.vision_tower."
    of_tower = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
    torch.save({n: t.clone() for n, t in of_tower.items()}, out / "clip.bin")
    torch.save({n: t for n, t in tensors.items() if "mm_projector" in n}, out / "mm_projector.bin")
    rest = {n: t for n, t in tensors.items() if "mm_projector" not in n and not n.startswith(prefix)}
    torch.save(rest, out / "pytorch_model.bin")
    AutoTokenizer.from_pretrained(parts["language"]).save_pretrained(out)
    (out / "config.json").write_text(json.dumps(config_of(parts, scales="1,3")))
    batch = dummy_inputs(model)
    found = bring_in(out, parts, "vision")
    assert torch.equal(logits(found, batch), logits(model, batch))


def test_a_pretrained_folder_is_a_projector_on_the_named_backbones(parts: dict[str, Path], tmp_path: Path) -> None:
    model, out = dense(parts), tmp_path / "pretrain"
    out.mkdir()
    torch.save({n: t for n, t in theirs(model).items() if "mm_projector" in n}, out / "mm_projector.bin")
    (out / "config.json").write_text(json.dumps(config_of(parts)))
    batch = dummy_inputs(model)
    assert torch.equal(logits(bring_in(out, parts, "vision", "language"), batch), logits(model, batch))
    with pytest.raises(ConfigError, match=r"holds no language model; name it under model\.language"):
        bring_in(out, parts, "vision")
    with pytest.raises(ConfigError, match=r"tower 'openai/clip-tiny' lies elsewhere"):
        bring_in(out, parts, "language")


def lose_an_expert(tensors: dict[str, Tensor]) -> None:
    del tensors["model.vision_tower.vision_model.encoder.layers.0.moelayer.experts.2.fc1.weight"]


def lose_a_router(tensors: dict[str, Tensor]) -> None:
    del tensors["model.mm_projector.moelayer.gate.weight"]


def lose_attention(tensors: dict[str, Tensor]) -> None:
    del tensors["model.layers.1.self_attn.qkv_proj.weight"]


def add_an_expert(tensors: dict[str, Tensor]) -> None:
    name = "model.mm_projector.moelayer.experts.{}.0.weight"
    tensors[name.format(4)] = tensors[name.format(3)].clone()


def add_a_stranger(tensors: dict[str, Tensor]) -> None:
    tensors["model.image_newline"] = torch.zeros(32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lose_an_expert, r"experts are missing: model.vision_tower.encoder.layers.0.mlp.experts.up_proj\[2\]"),
        (lose_a_router, r"missing: model.multi_modal_projector.router.weight"),
        (lose_attention, r"missing: model.language_model.layers.1.self_attn.qkv_proj.weight"),
        (add_an_expert, r"left over: model.multi_modal_projector.moelayer.experts.4.0.weight"),
        (add_a_stranger, r"left over: model.language_model.image_newline"),
    ],
)
def test_what_is_missing_or_left_over_is_named(
    parts: dict[str, Path], tmp_path: Path, change: Callable[[dict[str, Tensor]], None], message: str
) -> None:
    tensors = write_sft(tmp_path / "sft", parts, sparse(parts, "topk"), "topk")
    change(tensors)
    torch.save(tensors, tmp_path / "sft/pytorch_model.bin")
    with pytest.raises(ArtifactError, match=message):
        bring_in(tmp_path / "sft", parts, "vision")


def test_an_unknown_router_is_refused(parts: dict[str, Path], tmp_path: Path) -> None:
    write_sft(tmp_path / "sft", parts, sparse(parts, "topk"), "topk")
    path = tmp_path / "sft/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"moe_name": "smoe_perturb"}))
    with pytest.raises(ArtifactError, match="'smoe_perturb' does; did you mean 'smoe_perturbed'"):
        bring_in(tmp_path / "sft", parts, "vision")


def test_it_is_published_and_trained_further(parts: dict[str, Path], tmp_path: Path, job) -> None:
    model = sparse(parts, "hyper")
    write_sft(tmp_path / "sft", parts, model, "hyper")
    whole = replace(
        job("whole"),
        backbones={"checkpoint": tmp_path / "sft", "vision": parts["vision"]},
        layouts={"checkpoint": "libmoe"},
        vision_language=VisionLanguage(checkpoint="c", vision="v"),
        manifests=(),
    )
    run_stage(Construct(template="phi3"), whole)
    found, _, _ = open_checkpoint(whole.model_dir)
    batch = dummy_inputs(model)
    torch.testing.assert_close(logits(found, batch), logits(model, batch), atol=1e-5, rtol=1e-5)
    tuned = job("tuned", parent=whole.model_dir)
    run_stage(Finetune(data="mix", template="qwen", batch_size=4, max_steps=1, trainable=["*"]), tuned)
    assert (tuned.model_dir / "manifest.json").is_file()


def test_the_published_table_can_be_planned() -> None:
    from mmpipe.plan.plan import Plan

    root = Path(__file__).parents[2]
    plan = Plan({"recipes": ["libmoe-published-*"], "benchmarks": ["mmbench"]}, root)
    entries = [name for name, source in plan.backbones.items() if source.layout == "libmoe"]
    assert len(entries) == 3 * (2 + 5)
    stages = plan.chosen_stages()
    assert len(stages) == 3 * 6
    assert {stage.name for stage in stages} == {"construct"}
    templates = {stage.owner.split("-")[3]: stage.settings.template for stage in stages}  # type: ignore[attr-defined]
    assert templates == {"phi3": "phi3", "phi3.5": "phi35"}
    assert json.loads(plan.spec(stages[0]))["layouts"] == {"checkpoint": "libmoe"}
