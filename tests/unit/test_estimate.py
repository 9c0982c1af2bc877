"""Estimates against counts made by hand, and against what torch really holds."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from mmpipe.estimate import flops, memory
from mmpipe.estimate import tensors as count
from mmpipe.estimate.model import Model, model_of
from mmpipe.estimate.stage import bytes_per_token, estimate, total_bytes, warnings
from mmpipe.plan.plan import Plan
from mmpipe.settings import read_mapping

REPOSITORY = Path(__file__).parents[2]
LLAMA_7B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "vocab_size": 32000,
}


def plan_of(name: str, **changes: object) -> Plan:
    return Plan({**read_mapping(REPOSITORY / f"config/{name}.yaml"), **changes}, REPOSITORY)


def test_llama_7b_has_the_published_number_of_parameters():
    # 32000 * 4096 * 2 + 32 * (4 * 4096^2 + 3 * 4096 * 11008 + 2 * 4096) + 4096
    assert sum(count.language(LLAMA_7B).values()) == 6_738_415_616


@pytest.mark.parametrize(
    ("backbone", "billions"),
    # the models' cards on the hub
    [("qwen1.5-0.5b", 0.464), ("qwen2-1.5b", 1.544), ("qwen2-7b", 7.616), ("phi-3-mini-4k-instruct", 3.821)],
)
def test_shapes_of_the_catalogue_give_the_published_sizes(backbone, billions):
    shape = read_mapping(REPOSITORY / "config/backbones.yaml")[backbone]["shape"]
    assert sum(count.language(shape).values()) / 1e9 == pytest.approx(billions, abs=5e-4)


def test_clip_large_has_the_published_number_of_parameters():
    shape = read_mapping(REPOSITORY / "config/backbones.yaml")["clip-vit-large-patch14-336"]["shape"]
    assert sum(count.tower(shape).values()) == 303_507_456


N = 7_000_000_000


@pytest.mark.parametrize(
    ("spread", "gigabytes"),
    [
        # one process: 4 + 4 + 8 bytes a parameter
        (memory.Spread(1, 0), 112),
        # eight with plain data parallelism: the gradients twice
        (memory.Spread(8, 0), 140),
        # 4 N + (4 + 8) N / 8
        (memory.Spread(8, 2), 28 + 10.5),
        # (4 + 4 + 8) N / 8
        (memory.Spread(8, 3), 14),
        (memory.Spread(8, 2, offload_optimizer=True), 28),
        (memory.Spread(8, 3, offload_optimizer=True, offload_parameters=True), 0),
    ],
)
def test_states_of_a_full_fine_tuning_of_7b_with_adam(spread, gigabytes):
    states = memory.states(N, N, 0, spread, bfloat16=False)
    assert states.total == pytest.approx(gigabytes * 1e9)


def test_bfloat16_adds_casts_and_frozen_parameters_cost_their_weights_alone():
    assert memory.states(N, N, 0, memory.Spread(), bfloat16=True).total == pytest.approx(126e9)
    frozen = memory.states(N, 10_000_000, 0, memory.Spread(), bfloat16=False)
    assert frozen.total == pytest.approx(28.12e9)
    gathered = memory.states(N, N, 200_000_000, memory.Spread(8, 3), bfloat16=True)
    assert gathered.casts == pytest.approx((2 + 4) * 0.2e9)


def test_offloaded_states_are_counted_in_cpu_ram():
    both = memory.Spread(8, 3, offload_optimizer=True, offload_parameters=True)
    assert memory.host_states(N, N, both) * 8 == pytest.approx(16 * N)
    assert memory.host_states(N, N, memory.Spread(8, 3)) == 0


def test_activations_of_a_layer_by_hand():
    # bfloat16: attention 2 * (2 * 8192 + 4096 + 4096), network 8 * 11008, norms 16 * 4096 + 4 * 4096
    assert memory.layer_bytes(LLAMA_7B, bfloat16=True) == 49152 + 88064 + 81920
    full = memory.activations(LLAMA_7B, 1000, bfloat16=True, checkpointing=False)
    assert full == pytest.approx(1000 * 32 * 219136)
    cut = memory.activations(LLAMA_7B, 1000, bfloat16=True, checkpointing=True)
    assert cut == pytest.approx(1000 * (32 * 4 * 4096 + 219136))


def test_operations_are_6nd_2nd_and_what_freezing_saves():
    work = flops.SampleWork(length=100, supervised=0, layers=1e9, trained_layers=1e9, head=0, attention_width=0)
    assert flops.training(work) == pytest.approx(6e11)
    assert flops.training(work, checkpointing=True) == pytest.approx(8e11)
    assert flops.forward(work) == pytest.approx(2e11)
    frozen = flops.SampleWork(length=100, supervised=0, layers=1e9, trained_layers=0, head=0, attention_width=0)
    assert flops.training(frozen) == pytest.approx(4e11)
    seen = flops.SampleWork(100, 0, 0, 0, 0, 0, tower=3e8, tower_tokens=576)
    assert flops.training(seen) == pytest.approx(2 * 3e8 * 576)


def test_causal_attention_counts_half_the_square():
    work = flops.SampleWork(length=10, supervised=0, layers=0, trained_layers=0, head=0, attention_width=64)
    # scores and their use: 2 * 2 * 10 * 10 * 64 / 2 forward, twice that backward
    assert flops.forward(work) == 12_800
    assert flops.training(work) == 3 * 12_800


def test_gpu_hours():
    assert flops.gpu_hours(312e12 * 3600, tflops=312, utilization=0.4) == pytest.approx(2.5)


def test_names_and_sizes_are_those_of_a_real_model(demo_files):
    from mmpipe.checkpoints.load import build_model
    from mmpipe.models.settings import VisionLanguage

    folders = {
        role: demo_files / f"resources/backbones/{name}-tiny"
        for role, name in (("vision", "clip"), ("language", "qwen2"))
    }
    built, _ = build_model(
        folders, VisionLanguage(vision="x", language="y"), template="plain", image_aspect="pad", seed=0
    )
    real = {name.removeprefix("model."): p.numel() for name, p in built.named_parameters()}
    vision, text = (json.loads((folder / "config.json").read_text()) for folder in folders.values())
    assert count.language(text) | count.tower(vision) | count.projector(vision, text) == real


def test_activations_are_about_what_autograd_keeps(demo_files):
    """Everything saved for the backward pass of a decoder, parameters apart, each storage once."""
    import torch
    from transformers import AutoModelForCausalLM

    folder = demo_files / "resources/backbones/qwen2-tiny"
    config = json.loads((folder / "config.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa").model
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        model(inputs_embeds=torch.randn(2, 256, config["hidden_size"], requires_grad=True), use_cache=False)
        estimated = memory.activations(config, 512, bfloat16=False, checkpointing=False)
    assert estimated == pytest.approx(sum(kept.values()), rel=0.35)


def test_experts_multiply_what_is_stored_and_not_what_a_token_meets():
    plan = plan_of("llava-mod")
    dense, sparse = (
        model_of(plan, plan.checkpoint(f"llava-mod-qwen1.5-0.5b@{stage}"))
        for stage in ("distill_dense", "distill_sparse")
    )
    assert isinstance(dense, Model)
    assert isinstance(sparse, Model)
    network = 3 * 1024 * 2816
    assert sparse.parameters - dense.parameters == 12 * (3 * network + 4 * 1024)
    name = "language_model.layers.0.mlp.up_proj.weight"
    assert sparse.active(name) == 2 * dense.active(name)
    assert sparse.networks == 1.5


def test_a_hopeless_run_is_named_with_what_would_help():
    plan = plan_of("llava-1.5")
    stage = plan.checkpoint("llava-1.5-7b")
    found = estimate(plan, stage)
    assert found
    assert not warnings(plan, stage, found)
    small = plan_of("llava-1.5", gpu_memory_gb=24)
    (warning,) = warnings(small, stage, found)
    assert "a GPU, the recipe's hardware has 24" in warning


def test_llava_7b_takes_about_the_published_hours():
    """8 A100 for 10 hours (README of haotian-liu/LLaVA), at 23 to 36 % of the peak."""
    plan = plan_of("llava-1.5")
    found = estimate(plan, plan.checkpoint("llava-1.5-7b"))
    assert found
    assert found.gpu_hours
    assert 50 < found.gpu_hours < 90


def test_what_is_unknown_is_not_guessed(tmp_path):
    plan = plan_of("llava-moss2")
    assert estimate(plan, plan.checkpoint("llava-moss2"), tmp_path) is None
    demo = plan_of("config")
    assert estimate(demo, demo.checkpoint("demo"), tmp_path) is None
    assert estimate(plan_of("llava-mod"), plan_of("llava-mod").checkpoint("llava-mod-qwen1.5-0.5b@upcycle")) is None


def test_a_fetched_configuration_counts_more_than_the_catalogue(tmp_path):
    plan = plan_of("llava-1.5")
    folder = tmp_path / "resources/backbones/vicuna-7b-v1.5"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(LLAMA_7B | {"num_hidden_layers": 1}))
    small, large = (model_of(plan, plan.checkpoint("llava-1.5-7b"), root) for root in (tmp_path, tmp_path / "no"))
    assert small
    assert large
    assert small.parameters < large.parameters / 8


def test_a_run_announces_what_it_trains():
    plan = plan_of("config")
    stages = plan.stages("demo")
    assert plan.announcement([], smoke=False) == ""
    assert "trains 2 stages on the CPU, in full: demo@finetune, demo@pretrain" in plan.announcement(stages, smoke=False)
    assert "2 steps each (smoke)" in plan.announcement(stages, smoke=True)


def test_precomputed_logits_take_the_estimated_disk_space(tmp_path):
    from mmpipe.training.precomputed import TOKENS

    stage = {"data": "shapes-finetune", "template": "chatml", "teacher": "demo", "teacher_cache": {"k": 64}}
    (tmp_path / "config").mkdir()
    for path in (REPOSITORY / "config").iterdir():
        (tmp_path / "config" / path.name).symlink_to(path)
    (tmp_path / "config/recipes").unlink()
    (tmp_path / "config/recipes").mkdir()
    (tmp_path / "config/recipes/demo.yaml").symlink_to(REPOSITORY / "config/recipes/demo.yaml")
    recipe = {"extends": "demo@pretrain", "stages": {"distill_dense": stage}}
    (tmp_path / "config/recipes/student.yaml").write_text(json.dumps(recipe))
    plan = Plan(read_mapping(REPOSITORY / "config/config.yaml") | {"recipes": ["student"]}, tmp_path)
    (annotation,) = plan.precomputations.values()
    assert total_bytes(plan, annotation, tmp_path) is None
    report = tmp_path / plan.precomputation_tokens(annotation).directory / "report.json"
    report.parent.mkdir(parents=True)
    report.write_text(json.dumps({"supervised_tokens": 1000}))
    entry = sum(TOKENS.field(name).type.value_type.bit_width for name in ("ids", "log_probabilities")) // 8
    assert bytes_per_token(annotation) == 64 * entry
    assert total_bytes(plan, annotation, tmp_path) == 64_000 * entry
    assert bytes_per_token(replace(annotation, settings={"kind": "log_probabilities"})) is None
