"""Whether two models see the same pixels of an image."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmpipe.errors import ConfigError

_SETTINGS = ("size", "crop_size", "do_pad", "image_mean", "image_std", "resample", "do_center_crop")


def pixel_settings(processor: Any) -> dict[str, Any]:
    """What an image processor does to an image, as it would be read back from JSON."""
    settings = processor.to_dict()
    kept: dict[str, Any] = json.loads(json.dumps({key: settings.get(key) for key in _SETTINGS}))
    return kept


def require_same_pixels(
    where: Path, ours: Mapping[str, Any], theirs: Mapping[str, Any], whose: str = "teacher"
) -> None:
    """Raise ConfigError, naming ``where``, when the other model saw other images than this stage shows.

    Arguments are what :func:`pixel_settings` gives; ``whose`` is the part the other model plays.
    """
    different = [key for key in _SETTINGS if ours.get(key) != theirs.get(key)]
    if different:
        shown = "; ".join(f"{key}: stage {ours.get(key)}, {whose} {theirs.get(key)}" for key in different)
        raise ConfigError(
            f"{where}: the {whose} was trained on other images than the stage shows ({shown}); "
            f"give the stage the {whose}'s image_aspect, or take a {whose} of the same image size"
        )
