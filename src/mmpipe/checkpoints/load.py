"""Opening checkpoints: a model built from its backbones, imported from elsewhere, or published here.

* :func:`build_model` joins a vision tower and a language model with a fresh projector, or imports a whole model that
  others wrote; recipes start here. :mod:`mmpipe.checkpoints.layouts` knows how the files name their tensors.
* :func:`open_checkpoint` opens what this project published: a whole model, or a projector on its base.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoTokenizer,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerBase,
)

from mmpipe.artifacts import manifest
from mmpipe.artifacts.files import read_json
from mmpipe.checkpoints import layouts as checkpoint_layouts
from mmpipe.checkpoints.layouts.base import BackboneFiles
from mmpipe.checkpoints.save import load_checkpoint
from mmpipe.errors import ArtifactError
from mmpipe.models import projector
from mmpipe.models.llava import (
    IMAGE_TOKEN,
    Aspect,
    assemble,
    greedy_generation,
    image_seq_length,
    image_tokens,
    joined_config,
    make_processor,
    max_positions,
    resize_embeddings,
    vision_tower,
    with_image_token,
)
from mmpipe.models.settings import VisionLanguage
from mmpipe.pretrained import load_pretrained
from mmpipe.settings import validate

log = logging.getLogger(__name__)

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack")


def build_model(
    backbones: Mapping[str, Path],
    settings: VisionLanguage,
    *,
    layouts: Mapping[str, str] = {},
    template: str,
    image_aspect: Aspect,
    seed: int,
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """The starting model of a recipe, and its processor.

    ``backbones`` gives checkpoint directories by role, ``layouts`` how they name their tensors. ``vision`` and
    ``language`` are joined with a fresh projector, drawn from ``seed`` with PyTorch's default for linear layers, as
    LLaVA does. A whole model of others, ``checkpoint``, is imported, on the other backbones where it refers to them;
    its tensors keep the precision of the files. Raises ArtifactError when files are missing, damaged, left over, or do
    not fit.
    """
    parts = _parts(backbones, layouts)
    with ExitStack() as checks:
        for directory in backbones.values():
            checks.enter_context(manifest.checking(directory))
        if "checkpoint" in parts:
            model, tokenizer, images = _import_checkpoint(parts, image_aspect, seed)
        else:
            model, tokenizer, images = _join_backbones(parts, settings, seed)
        processor = make_processor(tokenizer, images, model.config, template=template, image_aspect=image_aspect)
    model.generation_config = greedy_generation(model.generation_config, tokenizer, template)
    return model, processor


def _join_backbones(parts: Mapping[str, BackboneFiles], settings: VisionLanguage, seed: int) -> tuple[Any, Any, Path]:
    """The model, its tokenizer, and the directory with its image preprocessing."""
    directory, layout = parts["language"].directory, parts["language"].layout
    tokenizer = with_image_token(layout.tokenizer(directory), directory)
    language: Any = layout.language(directory, torch.float32)
    resize_embeddings(language, tokenizer, seed)
    vision: Any = vision_tower(parts["vision"].directory)
    config = joined_config(
        vision.config,
        language.config,
        image_id=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),  # type: ignore[arg-type]
        feature_layer=settings.feature_layer,
        feature_select=settings.feature_select,
    )
    model = assemble(config, vision, language, seed, settings.scales)
    model.generation_config = language.generation_config
    return model, tokenizer, parts["vision"].directory


def _import_checkpoint(parts: dict[str, BackboneFiles], image_aspect: Aspect, seed: int) -> tuple[Any, Any, Path]:
    """The same; unused rows of the vocabulary are drawn from ``seed``."""
    source = parts.pop("checkpoint")
    whole = source.layout.whole(source.directory, parts)
    if whole.image_aspect not in (None, image_aspect):
        log.warning(
            "%s was trained with the images' aspect '%s'; the recipe says '%s' (image_aspect of construct)",
            *(source, whole.image_aspect, image_aspect),
        )
    tokenizer = with_image_token(whole.tokenizer, source.directory)
    resize_embeddings(whole.model, tokenizer, seed)
    _check_tokenizer(source.directory, whole.model, tokenizer)
    return whole.model, tokenizer, whole.images


def _parts(backbones: Mapping[str, Path], layouts: Mapping[str, str]) -> dict[str, BackboneFiles]:
    return {
        role: BackboneFiles(directory, checkpoint_layouts.get(layouts.get(role, "hf")))
        for role, directory in backbones.items()
    }


def load_tokenizer(
    directories: Mapping[str, Path], settings: VisionLanguage, layouts: Mapping[str, str] = {}
) -> tuple[PreTrainedTokenizerBase, int]:
    """The tokenizer of a model, and its number of tokens per image; weights are not read.

    ``directories`` gives a published ``checkpoint``, or the ``vision`` and ``language`` backbones it is built from. Raises
    ArtifactError when their files, weights aside, are damaged.
    """
    for directory in directories.values():
        manifest.check(directory, lambda name: not name.endswith(_WEIGHTS))
    if "checkpoint" in directories:
        directory = directories["checkpoint"]
        tokenizer = load_pretrained(AutoTokenizer, directory)
        return tokenizer, image_seq_length(directory, load_pretrained(AutoConfig, directory))
    language = _parts(directories, layouts)["language"]
    config = load_pretrained(AutoConfig, directories["vision"])
    tokens = image_tokens(getattr(config, "vision_config", config), settings.feature_select)
    return with_image_token(language.layout.tokenizer(language.directory), language.directory), tokens


def language_positions(directories: Mapping[str, Path]) -> int | None:
    """The tokens for which the language model in ``directories`` (as for :func:`load_tokenizer`) has positions; None
    without a limit, and for a model type that transformers does not know."""
    config = read_json(directories.get("checkpoint", directories.get("language", Path())) / "config.json")
    config = config.get("text_config", config)
    if config.get("model_type") not in CONFIG_MAPPING:
        return None
    return max_positions(CONFIG_MAPPING[config["model_type"]].from_dict(config))


def open_checkpoint(
    directory: Path, dtype: torch.dtype = torch.float32, **placement: Any
) -> tuple[Any, Any, dict[str, Any]]:
    """Open a published checkpoint of either kind: ``(model, processor, manifest)``.

    A projector alone is joined with the checkpoint or the backbones its manifest names. ``placement`` are arguments of
    ``load_pretrained`` for other devices or precisions (``device_map``, ``quantization_config``). Files are hashed while
    they are loaded. Raises ArtifactError when files are missing, damaged, or do not fit.
    """
    card = manifest.read(directory, hashed=False)
    if card["kind"] == "projector" and "checkpoint" not in card:
        raise ArtifactError(f"{directory / manifest.NAME}: does not name what the projector was trained on")
    with manifest.checking(directory):
        if card["kind"] != "projector":
            model, processor = load_checkpoint(directory, dtype, **placement)
            _check_tokenizer(directory, model, processor.tokenizer)
            return model, processor, card
        return *_open_projector(directory, card, dtype, **placement), card


def _open_projector(directory: Path, card: Mapping[str, Any], dtype: torch.dtype, **placement: Any) -> tuple[Any, Any]:
    """The base of a projector with it, and the processor."""
    if "quantization_config" in placement:
        raise ArtifactError(
            f"{directory}: holds a projector alone, which is put on backbones in full precision; load it without "
            "--load-4bit and --load-8bit, or take a later stage of the recipe"
        )
    facts = card["checkpoint"]
    how = {"template": facts["template"], "image_aspect": facts["image_aspect"]}
    if "base" in facts:
        base = Path(facts["base"])
        model, processor, _ = open_checkpoint(base)
        processor = make_processor(processor.tokenizer, base, model.config, **how)
    else:
        model, processor = build_model(
            {role: Path(path) for role, path in facts["backbones"].items()},
            validate(VisionLanguage, card["spec"].get("model"), f"{directory / manifest.NAME}: spec.model"),
            layouts=card["spec"].get("layouts", {}),
            seed=0,
            **how,
        )
    projector.load(model, directory / projector.FILE)
    model = model.to(dtype=dtype)
    return _placed(model, placement.get("device_map")), processor


def _placed(model: Any, device_map: Any) -> Any:
    """Move a model from CPU RAM to the devices of ``device_map``."""
    if device_map is None:
        return model
    from accelerate import dispatch_model, infer_auto_device_map

    if device_map == "auto":
        device_map = infer_auto_device_map(model, no_split_module_classes=model._no_split_modules)
    return dispatch_model(model, device_map) if len(device_map) > 1 else model.to(next(iter(device_map.values())))


def preprocessor_directory(directory: Path, card: Mapping[str, Any]) -> Path:
    """The directory with the image preprocessing of a published checkpoint whose manifest is ``card``."""
    if card["kind"] != "projector":
        return directory
    facts = card["checkpoint"]
    return Path(facts["base"] if "base" in facts else facts["backbones"]["vision"])


def projector_base(directory: Path, card: Mapping[str, Any]) -> dict[str, Any]:
    """Manifest entries of a projector trained from a checkpoint: its base."""
    if card["kind"] != "projector":
        return {"base": directory.as_posix()}
    return {key: card["checkpoint"][key] for key in ("base", "backbones") if key in card["checkpoint"]}


def _check_tokenizer(directory: Path, model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise ArtifactError when the tokenizer beside a checkpoint is not the one it was trained with."""
    image_id = tokenizer.get_vocab().get(IMAGE_TOKEN)
    rows = model.get_input_embeddings().weight.shape[0]
    if image_id != model.config.image_token_id or len(tokenizer) > rows:
        raise ArtifactError(
            f"{directory}: the tokenizer does not belong to this checkpoint: '{IMAGE_TOKEN}' is {image_id}, the model "
            f"expects {model.config.image_token_id}; it has {len(tokenizer)} tokens for {rows} embedding rows. "
            "Put back the tokenizer files the checkpoint was published with"
        )
