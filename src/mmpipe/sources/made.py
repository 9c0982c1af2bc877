"""Synthetic entries, generated from a seed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from mmpipe.artifacts.files import staged_directory
from mmpipe.registry import load_object
from mmpipe.sources.base import Source


class Made(Source):
    """Call a maker function ``maker(out, seed=..., **options)``, named by its import path."""

    source: Literal["made"] = "made"
    maker: str
    """``package.module:function``; it writes its files into the directory given as first argument."""
    options: dict[str, Any] = {}
    """Keyword arguments of the maker."""
    seed: int = 0
    version: int = 1
    """Raised when a change of the maker's code changes its output."""

    def spec(self) -> dict[str, Any]:
        # specs have the former names of the demo's modules, so that results stay current
        package, _, rest = self.maker.partition("mmpipe.demo.")
        former = {"scenes": "pictures", "presence": "falsehoods"}
        module, _, function = rest.partition(":")
        maker = f"mmpipe.world.{former.get(module, module)}:{function}" if rest and not package else self.maker
        return super().spec() | {"maker": maker}

    def fetch(self, out: Path, locked: Mapping[str, Any] | None = None) -> dict[str, Any]:
        make = load_object(self.maker, f"maker of {out}")
        with staged_directory(out) as stage:
            make(stage, seed=self.seed, **self.options)
        return {"seed": self.seed}
