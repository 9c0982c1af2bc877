"""Which layers of a model get experts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from mmpipe.errors import ConfigError

Placement = Literal["sparse", "first_half", "second_half", "dense"] | tuple[int, ...]

_NAMED: dict[str, Callable[[int], range]] = {
    "sparse": lambda layers: range(0, layers, 2),
    "first_half": lambda layers: range(layers // 2),
    "second_half": lambda layers: range(layers // 2, layers),
    "dense": lambda layers: range(layers),
}


def layer_indices(placement: Placement, layers: int, of: str = "model") -> list[int]:
    """Indices, ascending, of the layers with experts in a model (``of`` names it) of ``layers`` layers.

    ``sparse`` is every second layer from the first on; ``dense`` is all. The names are LLaVA-MoD's.

    Raises ConfigError for explicit indices that are missing, doubled or out of range.
    """
    if isinstance(placement, str):
        return list(_NAMED[placement](layers))
    if not placement:
        raise ConfigError("placement: name at least one layer")
    if len(set(placement)) < len(placement):
        raise ConfigError(f"placement: {list(placement)} names a layer twice")
    outside = [i for i in placement if not 0 <= i < layers]
    if outside:
        raise ConfigError(f"placement: the {of} has layers 0 to {layers - 1}, not {outside}")
    return sorted(placement)
