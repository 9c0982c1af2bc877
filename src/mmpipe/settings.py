"""The base of every typed setting."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Settings(BaseModel):
    """A group of settings as written in YAML: unknown keys are errors, values do not change after loading.

    Numbers written as YAML 1.1 strings (``2e-5``) are read as numbers.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)
