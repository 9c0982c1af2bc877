"""Find a checkpoint on this machine or on the hub. No torch here: a wrong name fails at once."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from mmpipe.artifacts import manifest
from mmpipe.errors import ArtifactError, did_you_mean

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w.-]+)?", re.ASCII)
_HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "merges.txt", "vocab.txt"]


@dataclass(frozen=True)
class LocalCheckpoint:
    """A checkpoint directory."""

    path: Path
    name: str
    """For display: ``recipe@stage``, a hub name, or the directory's."""
    ours: bool
    """Whether it has a manifest of mmpipe."""


def find(checkpoint: str, configfile: Path = Path("config/config.yaml")) -> LocalCheckpoint:
    """Find a checkpoint by its directory, ``recipe``, ``recipe@stage``, or ``owner/name[@revision]`` on the hub.

    A directory that exists comes first, then the recipes of the project in the working directory, then the hub, from
    which safetensors and configuration are downloaded, never code. Raises ArtifactError.
    """
    path = Path(checkpoint).expanduser()
    if path.is_dir():
        return _directory(path)
    if configfile.is_file() and "/" not in checkpoint:
        return _planned(checkpoint, configfile)
    if _HUB_ID.fullmatch(checkpoint) and not path.parent.is_dir():
        return LocalCheckpoint(_from_hub(checkpoint), checkpoint, ours=False)
    raise ArtifactError(
        f"{checkpoint}: there is no such directory, and it is neither a recipe of a project here (no {configfile}) "
        "nor a name on the hub (owner/name)"
    )


def _directory(path: Path) -> LocalCheckpoint:
    published = path / "model"
    if not (path / "config.json").is_file() and (published / manifest.NAME).is_file():
        path = published
    if not (path / manifest.NAME).is_file():
        if not (path / "config.json").is_file():
            raise ArtifactError(f"{path}: not a checkpoint: neither {manifest.NAME} nor config.json is in it")
        return LocalCheckpoint(path, path.resolve().name, ours=False)
    card = manifest.load(path / manifest.NAME)
    if "checkpoint" not in card:
        raise ArtifactError(f"{path}: holds a {card.get('kind')}, not a trained checkpoint")
    name = f"{card['recipe']}@{card['stage']}" if "recipe" in card and "stage" in card else path.resolve().name
    return LocalCheckpoint(path, name, ours=True)


def _planned(reference: str, configfile: Path) -> LocalCheckpoint:
    from mmpipe.plan.plan import Plan
    from mmpipe.settings import read_mapping

    plan = Plan(read_mapping(configfile), where=str(configfile))
    recipe = reference.partition("@")[0]
    if recipe not in plan.recipes:
        raise ArtifactError(
            f"{reference}: neither a directory nor a recipe of this project{did_you_mean(recipe, plan.recipes)}"
        )
    stage = plan.checkpoint(reference, f"checkpoint '{reference}'")
    card = stage.manifest()
    if not card.is_file():
        raise ArtifactError(f"{stage.id} is not made yet; make it: snakemake --cores all {card}")
    return LocalCheckpoint(card.parent, stage.id, ours=True)


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    repository, _, revision = name.partition("@")
    try:
        return Path(snapshot_download(repository, revision=revision or None, allow_patterns=_HUB_FILES))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        first = str(error).strip().partition("\n")[0]
        raise ArtifactError(
            f"{name}: no directory of this name, and the hub does not give it ({first}); a private one needs HF_TOKEN"
        ) from error
