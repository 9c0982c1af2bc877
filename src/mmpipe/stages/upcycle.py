"""Up-cycling: a dense student becomes a sparse one with equal logits, which is verified."""

from __future__ import annotations

import hashlib
from typing import Any, ClassVar

from pydantic import Field, model_validator

from mmpipe.errors import ConfigError
from mmpipe.models.moe.spec import ROUTER_VERSIONS, ModelPart, MoESettings, with_former_keys
from mmpipe.registry import source_file
from mmpipe.settings import validate
from mmpipe.stages.base import Stage


class Upcycle(Stage):
    """Copies feed-forward networks into experts and adds freshly initialised routers."""

    ON_GPUS: ClassVar[bool] = False

    moe: MoESettings = MoESettings()
    parts: dict[ModelPart, dict[str, Any]] = Field({"language_model": {}}, min_length=1)
    """The parts that get experts, each with its deviations from ``moe``:
    ``{vision_tower: {placement: dense}, multi_modal_projector: {}}``."""
    tolerance: float = 1e-5
    """Largest difference of logits between the sparse model and its dense parent, relative to the largest logit."""

    @model_validator(mode="after")
    def _known_settings(self) -> Upcycle:
        try:
            self.of_parts()
        except ConfigError as error:
            raise ValueError(str(error)) from None
        return self

    def of_parts(self) -> dict[ModelPart, MoESettings]:
        """The settings of each part that gets experts.

        A part with its own router does not inherit the ``router_settings`` of ``moe``. Raises ConfigError for settings
        that do not exist or exclude each other.
        """
        common = self.moe.model_dump(exclude_unset=True)
        found: dict[ModelPart, MoESettings] = {}
        for part, changes in self.parts.items():
            base = common | ({"router_settings": {}} if "router" in changes else {})
            found[part] = validate(MoESettings, base | changes, f"parts.{part}")
        return found

    def spec(self) -> dict[str, Any]:
        """The settings, the router settings that ``compat`` implies, and the source of user-defined routers."""
        parts = self.of_parts()
        own = sorted({its.router for its in parts.values() if ":" in its.router})
        code = {router: hashlib.sha256(source_file(router).read_bytes()).hexdigest() for router in own}
        added = {
            part: with_former_keys(its.router_options)
            for part, its in parts.items()
            if its.router_options != its.router_settings
        }
        versions = {part: ROUTER_VERSIONS[its.router] for part, its in parts.items() if its.router in ROUTER_VERSIONS}
        further = {"router_code": code, "router_options": added, "router_versions": versions}
        found = super().spec()
        for changes in found.get("parts", {}).values():
            if "router_settings" in changes:
                changes["router_settings"] = with_former_keys(changes["router_settings"])
        return found | {key: value for key, value in further.items() if value}

    def adds_experts(self) -> bool:
        return True


STAGE = Upcycle
