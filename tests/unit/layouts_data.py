"""Checkpoints in the layouts of others, made small; call everything below the tests' demo files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModel, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from mmpipe.checkpoints.load import build_model
from mmpipe.checkpoints.save import save_checkpoint
from mmpipe.models.settings import VisionLanguage

BACKBONES = {"vision": Path("resources/backbones/clip-tiny"), "language": Path("resources/backbones/qwen2-tiny")}
HIDDEN, VISION_HIDDEN = 32, 32


def tiny_model(seed: int = 0) -> tuple[Any, Any]:
    """The demo's model with a projector drawn from ``seed``."""
    return build_model(
        BACKBONES,
        VisionLanguage(vision="clip-tiny", language="qwen2-tiny"),
        template="chatml",
        image_aspect="pad",
        seed=seed,
    )


def stock_checkpoint(out: Path, dtype: Any) -> Any:
    """Write a checkpoint of transformers without a manifest, as from the hub; returns its model."""
    model, processor = tiny_model(seed=3)
    save_checkpoint(model.to(dtype), processor, out)
    return model


# --- LLaVA's own layouts --------------------------------------------------------------------------------------------


def llama(out: Path, dtype: torch.dtype = torch.float16) -> LlamaForCausalLM:
    """Write a tiny Llama whose vocabulary has no row to spare, and return it."""
    tokenizer = AutoTokenizer.from_pretrained(BACKBONES["language"])
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=HIDDEN,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        initializer_range=0.2,
    )
    torch.manual_seed(7)
    model = LlamaForCausalLM(config).to(dtype)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return model


def projector(seed: int = 1, dtype: torch.dtype = torch.float16) -> dict[str, Tensor]:
    """A projector under LLaVA's names."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "0.weight": (HIDDEN, VISION_HIDDEN),
        "0.bias": (HIDDEN,),
        "2.weight": (HIDDEN, HIDDEN),
        "2.bias": (HIDDEN,),
    }
    return {
        f"model.mm_projector.{name}": torch.randn(shape, generator=generator).to(dtype)
        for name, shape in shapes.items()
    }


def tower(dtype: torch.dtype = torch.float16) -> dict[str, Tensor]:
    """The demo's tower, a little changed by training, under LLaVA's names."""
    model = AutoModel.from_pretrained(BACKBONES["vision"])
    prefix = "model.vision_tower.vision_tower.vision_model."
    return {f"{prefix}{name}": (1.5 * tensor).to(dtype).contiguous() for name, tensor in model.state_dict().items()}


def llava_config(out: Path, language: LlamaForCausalLM, **changes: Any) -> None:
    """LLaVA-1.5's ``config.json``."""
    text = {
        key: getattr(language.config, key)
        for key in (
            *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
            *("num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "hidden_act"),
            *("eos_token_id", "pad_token_id", "bos_token_id", "initializer_range"),
        )
    }
    config = {
        **text,
        "_name_or_path": "./checkpoints/llava-tiny",
        "architectures": ["LlavaLlamaForCausalLM"],
        "image_aspect_ratio": "pad",
        "mm_hidden_size": VISION_HIDDEN,
        "mm_projector_type": "mlp2x_gelu",
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2,
        "mm_vision_tower": "openai/clip-tiny",
        "model_type": "llava_llama",
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
    }
    (out / "config.json").write_text(json.dumps(config | changes))


def copy_tokenizer(out: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(BACKBONES["language"] / name, out / name)


def write_shards(out: Path, tensors: Mapping[str, Tensor], suffix: str, shards: int = 2) -> None:
    """Weights as transformers shards them: ``pytorch_model-00001-of-00002.bin`` and its index."""
    stem = {"bin": "pytorch_model", "safetensors": "model"}[suffix]
    names = sorted(tensors)
    where = {name: f"{stem}-{1 + i % shards:05d}-of-{shards:05d}.{suffix}" for i, name in enumerate(names)}
    for file in set(where.values()):
        part = {name: tensors[name].contiguous() for name in names if where[name] == file}
        torch.save(part, out / file) if suffix == "bin" else save_file(part, out / file)
    (out / f"{stem}.{suffix}.index.json").write_text(json.dumps({"weight_map": where}))


def whole_llava(out: Path, *, suffix: str = "bin", with_tower: bool = True, **config: Any) -> dict[str, Tensor]:
    """Write a whole LLaVA in shards and return its tensors."""
    out.mkdir(parents=True)
    language = llama(out)
    for file in ("model.safetensors", "config.json"):
        (out / file).unlink()
    tensors = {name: tensor.detach().clone() for name, tensor in language.state_dict().items()}
    tensors |= projector() | (tower() if with_tower else {})
    write_shards(out, tensors, suffix)
    llava_config(out, language, **config)
    return tensors


def lora_adapter(out: Path, language: LlamaForCausalLM, rank: int = 4) -> dict[str, Tensor]:
    """Write a LoRA directory as LLaVA does and return the change of each weight it stands for."""
    out.mkdir(parents=True)
    generator = torch.Generator().manual_seed(2)
    tensors, changes = {}, {}
    for name, weight in language.state_dict().items():
        if "_proj.weight" not in name:
            continue
        a = 0.3 * torch.randn(rank, weight.shape[1], generator=generator)
        b = 0.3 * torch.randn(weight.shape[0], rank, generator=generator)
        module = f"base_model.model.{name.removesuffix('.weight')}"
        tensors |= {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}
        changes[name] = b @ a * (8 / rank)
    save_file(tensors, out / "adapter_model.safetensors")
    leaves = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    adapter = {
        "base_model_name_or_path": "lmsys/vicuna-tiny",
        "bias": "none",
        "lora_alpha": 8,
        "lora_dropout": 0.05,
        "peft_type": "LORA",
        "r": rank,
        "target_modules": leaves,
        "task_type": "CAUSAL_LM",
    }
    (out / "adapter_config.json").write_text(json.dumps(adapter))
    rest = {f"base_model.model.{name}": tensor for name, tensor in projector().items()}
    torch.save(rest, out / "non_lora_trainables.bin")
    llava_config(out, language)
    return changes
