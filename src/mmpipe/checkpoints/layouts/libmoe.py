"""LibMoE's checkpoints: a multi-scale model, dense or with experts in tower and projector.

What Fsoft-AIC/LibMoE 1.1 and 2.0 write (``moe_model/train/train.py``), distinguished by the files:

* ``pretrain/``: ``config.json`` and ``mm_projector.bin``; the recipe names the language model beside it;
* ``pft/``: language model, ``clip.bin`` (the tower, names begin with ``vision_model.``) and ``mm_projector.bin``;
* ``sft*/{router}/``: a whole model. Experts are ``...layers.3.moelayer.experts.0.fc1.weight`` in the tower and
  ``model.mm_projector.moelayer.experts.0.{0,2}.weight`` in the projector, routers ``...moelayer.gate.weight`` and more.

The tower's configuration is that of the backbone the recipe names as ``model.vision``. Its unused last block, whose
experts LibMoE trains all the same, is left out and named in the log. Routers are imported in the variant that
reproduces the published code.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmpipe.checkpoints.layouts import _names, _tensors
from mmpipe.checkpoints.layouts.base import BackboneFiles, ImportedModel, Layout
from mmpipe.checkpoints.layouts.llava import CONFIG, PROJECTOR_FILE, checkpoint_tokenizer, named_tower, text_config
from mmpipe.errors import ArtifactError, ConfigError, did_you_mean, first_of
from mmpipe.models.llava import IMAGE_TOKEN, joined_config, with_image_token
from mmpipe.models.moe.modeling_mmpipe_llava import SparseLlava, SparseLlavaConfig
from mmpipe.models.moe.spec import MoESettings

log = logging.getLogger(__name__)

TOWER_FILE = "clip.bin"
_FAMILIES = {"llava_phi": "llava_phi3", "llava_smollm": "llava_llama"}
_PREFIXES = {
    "model.vision_tower.vision_model.": _names.TOWER,
    "vision_model.": _names.TOWER,
    "model.mm_projector.0.": f"{_names.PROJECTOR}linear_1.",
    "model.mm_projector.2.": f"{_names.PROJECTOR}linear_2.",
    "model.mm_projector.": _names.PROJECTOR,
    "model.": _names.LANGUAGE,
}
_MOE = "moelayer."
_EXPERT = re.compile(r"experts\.(\d+)\.(?:fc([12])|([02]))\.(weight|bias)")


@dataclass(frozen=True)
class _Router:
    """A router of LibMoE: our equivalent, and the names of its tensors (theirs -> ours)."""

    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, str] = field(default_factory=lambda: {"gate.weight": "weight"})
    unused: tuple[str, ...] = ()
    """Stored tensors that are never used."""


_REFERENCE = {"compat": "reference"}
_BIASED = {"gate.weight": "weight", "gate.bias": "bias"}
_HYPER = {"hyper_embedding": "embedding"} | {
    f"hypernet.{number}.{kind}": f"{ours}_{kind}"
    for number, ours in ((0, "inner"), (2, "outer"))
    for kind in ("weight", "bias")
}
_SPHERE = {"expert_embeddings": "embeddings", "inp_reduction.weight": "reduction"}
_ROUTERS = {
    "smoe": _Router("topk"),
    "smoe_cosinegating": _Router("cosine", _REFERENCE, _BIASED),
    "smoe_perturbed": _Router("perturbed_cosine", _REFERENCE, _BIASED),
    "smoe_sigmoidgating": _Router("sigmoid"),
    "hyperrouter": _Router("hyper", _REFERENCE, _HYPER, unused=("gate.weight", "gate.bias")),
    "xmoe": _Router("xmoe", _REFERENCE, _SPHERE, unused=("gate.weight",)),
    "smoe_share": _Router("shared"),
    "smoe_sharev3": _Router("shared", {"scores": "sigmoid"}),
    "smoe_tcmoe": _Router("tcmoe", _REFERENCE),
    "smoe_plus_plus": _Router("moepp", _REFERENCE),
}


class LibMoE(Layout):
    """Fsoft-AIC/LibMoE, vision-language part: pretrain, pft and sft folders."""

    def whole(self, directory: Path, parts: Mapping[str, BackboneFiles]) -> ImportedModel:
        written = _tensors.read_config(directory / CONFIG)
        kind = str(written.get("model_type"))
        text, _ = text_config(directory, written | {"model_type": _FAMILIES.get(kind, kind)})
        tower = named_tower(directory, written, parts)
        tensors = _theirs(directory, parts)
        found = _moe(directory, written, tensors)
        tensors = _ours(directory, tensors, found) if found else tensors
        if not any(name.startswith(_names.TOWER) for name in tensors):
            tensors |= {f"{_names.TOWER}{name}": tensor for name, tensor in tower.state_dict().items()}
        tokenizer = with_image_token(checkpoint_tokenizer(directory, parts, None), directory)
        has_class_token = tower.config.model_type == "clip_vision_model"
        joined = joined_config(
            tower.config,
            text,
            image_id=int(tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)),  # type: ignore[arg-type]
            feature_layer=-2,  # whatever mm_vision_select_layer says, the code returns the last block's input
            feature_select="patch" if has_class_token else "full",
        )
        config = SparseLlavaConfig.from_dict(joined.to_dict())
        config.mmpipe = {"tower": {"scales": _scales(directory, written)}}
        if found:
            config.mmpipe["moe"] = {part: settings.model_dump(mode="json") for part, (settings, _) in found.items()}
        tensors = _without_idle_end(tensors, tower.config.num_hidden_layers - 1)
        model = _tensors.assemble(SparseLlava, config, tensors, directory, "auto")
        return ImportedModel(model, tokenizer, parts["vision"].directory)


def _theirs(directory: Path, parts: Mapping[str, BackboneFiles]) -> dict[str, Tensor]:
    """All tensors under our names, except experts and routers."""
    tensors: dict[str, Tensor] = {}
    for name in (TOWER_FILE, PROJECTOR_FILE):
        if (directory / name).is_file():
            tensors |= _tensors.read_file(directory / name)
    if _tensors.weight_files(directory):
        tensors |= _tensors.read_weights(directory)
    elif not tensors:
        raise ArtifactError(
            f"{directory}: no LibMoE checkpoint; expected {' or '.join(_tensors.STEMS)} (whole or in shards), or "
            f"{PROJECTOR_FILE}"
        )
    renamed = {
        _names.renamed(name, _PREFIXES): tensor for name, tensor in tensors.items() if not _names.is_buffer(name)
    }
    if not any(name.startswith(_names.LANGUAGE) for name in renamed):
        if "language" not in parts:
            raise ConfigError(f"{directory} holds no language model; name it under model.language")
        base = parts["language"]
        language = base.layout.language(base.directory, "auto")
        renamed |= {_names.to_stock(name): tensor for name, tensor in language.state_dict().items()}
    return renamed


def _scales(directory: Path, written: Mapping[str, Any]) -> list[int]:
    """The scales, from a list or a text like ``1,3``."""
    scales = written.get("scales", [1])
    scales = scales.split(",") if isinstance(scales, str) else scales
    try:
        return [int(scale) for scale in scales]
    except (TypeError, ValueError) as error:
        raise ArtifactError(f"{directory}/{CONFIG}: scales {written['scales']!r} are no whole numbers") from error


def _moe(
    directory: Path, written: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> dict[str, tuple[MoESettings, _Router]]:
    """The settings of the experts and router of each part that has some."""
    flags = {"vision_tower": "clip_smoe", "multi_modal_projector": "mlp_smoe"}
    name = str(written.get("moe_name"))
    parts = [part for part, flag in flags.items() if written.get(flag)]
    if parts and name not in _ROUTERS:
        raise ArtifactError(
            f"{directory}/{CONFIG}: no router of ours computes what '{name}' does{did_you_mean(name, _ROUTERS)}"
        )
    # MoE++ leaves its cheap experts out where the width changes
    in_projector = {"smoe_plus_plus": "smoe"}.get(name, name)
    named = {part: in_projector if part == "multi_modal_projector" else name for part in parts}
    return {part: _router(_ROUTERS[router], written, tensors) for part, router in named.items()}


def _router(router: _Router, written: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> tuple[MoESettings, _Router]:
    experts = int(written["num_experts"])
    settings, top_k = dict(router.settings), int(written["num_selected"])
    if router.name == "sigmoid" and any(key.endswith(f"{_MOE}gate.bias") for key in tensors):
        # version 1.1; the router without a bias is that of version 2.0
        router, settings = _Router("sigmoid", _REFERENCE, _BIASED), dict(_REFERENCE)
    if router.name == "hyper":
        top_k = int(written.get("topk_max", top_k))
        settings["first_k"] = int(written.get("topk_min", 1))
    if router.name == "moepp":
        last = f"experts.{experts + 1}"
        own = {f"{last}.wg.weight": "mixture", f"{last}.constant": "constant"}
        router = _Router(router.name, settings, router.tensors | own)
    found = MoESettings(
        experts=experts,
        top_k=top_k,
        placement="dense",
        router=router.name,
        router_settings=settings,
        balance_coefficient=float(written.get("balance_loss_coef", 0.0)),
        z_coefficient=float(written.get("router_z_loss_coef", 0.0)),
        balance_within="sequence",
        layer_losses="mean",
    )
    return found, router


def _ours(
    directory: Path, tensors: Mapping[str, Tensor], found: Mapping[str, tuple[MoESettings, _Router]]
) -> dict[str, Tensor]:
    """The tensors with every layer's experts as fused ones and its router under our names.

    Raises ArtifactError naming the experts' tensors that are missing. What is left over keeps its name, to be reported.
    """
    kept: dict[str, Tensor] = {}
    experts: dict[str, dict[int, Tensor]] = {}
    unused: list[str] = []
    for name, tensor in tensors.items():
        before, is_sparse, part = name.partition(_MOE)
        of = before.removeprefix("model.").partition(".")[0]
        if not is_sparse or of not in found:
            kept[name] = tensor
            continue
        settings, router = found[of]
        place = before if before == _names.PROJECTOR else f"{before}mlp."
        expert = _EXPERT.fullmatch(part)
        if part in router.tensors:
            kept[f"{place}router.{router.tensors[part]}"] = tensor
        elif part in router.unused:
            unused.append(name)
        elif expert and int(expert[1]) < settings.experts:
            second = (expert[2] or expert[3]) == "2"
            fused = f"{place}experts.{'down' if second else 'up'}_proj{'_bias' if expert[4] == 'bias' else ''}"
            experts.setdefault(fused, {})[int(expert[1])] = tensor
        else:
            kept[name] = tensor
    number = max(settings.experts for settings, _ in found.values())
    lacking = [f"{name}[{i}]" for name, those in experts.items() for i in range(number) if i not in those]
    if lacking:
        raise ArtifactError(f"{directory}: tensors of experts are missing: {first_of(lacking)}")
    if unused:
        log.info("left behind, for nothing reads it: %s", first_of(unused))
    return kept | {name: torch.stack([those[i] for i in range(number)]) for name, those in experts.items()}


def _without_idle_end(tensors: Mapping[str, Tensor], used: int) -> dict[str, Tensor]:
    """The tensors without the modules after the block whose output is projected."""
    block = re.compile(rf"{re.escape(_names.TOWER)}encoder\.layers\.(\d+)\.")
    behind = (f"{_names.TOWER}post_layernorm.", f"{_names.TOWER}head.")
    idle = [
        name for name in tensors if name.startswith(behind) or ((found := block.match(name)) and int(found[1]) >= used)
    ]
    if idle:
        log.info("left behind, for nothing reads it: %s", first_of(idle))
    return {name: tensor for name, tensor in tensors.items() if name not in set(idle)}


LAYOUT = LibMoE()
