"""A key-value cache whose deep layers hold retained tokens only.

Layers before the sparse one cache everything. The others share :class:`Slots`: for every row, which slots
hold a token, and its position; rows differ in length. Slots that are free in every row are removed.
Shapes: B rows, W slots, M new tokens, H heads, C head size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from mmpipe.errors import ConfigError


class Slots:
    """The tokens that all pruned layers hold."""

    def __init__(self, rows: int, device: torch.device) -> None:
        self.visible_BW = torch.zeros(rows, 0, dtype=torch.bool, device=device)
        self.positions_BW = torch.zeros(rows, 0, dtype=torch.long, device=device)
        self._source_BW: Tensor | None = None
        self._unchanged = False

    @property
    def counts(self) -> list[int]:
        """Tokens each row holds in a pruned layer."""
        return self.visible_BW.sum(1).tolist()

    def plan(self, keep_BM: Tensor, positions_BM: Tensor) -> None:
        """Choose the slots and new tokens (of M) to retain; :meth:`held` applies the choice."""
        candidates = torch.cat([self.visible_BW, keep_BM], dim=1)
        positions = torch.cat([self.positions_BW, positions_BM], dim=1)
        counts_B = candidates.sum(1)
        counts = counts_B.tolist()
        self._unchanged, self._source_BW = not bool(keep_BM.any()), None
        if self._unchanged:
            return
        width = max(counts)
        if min(counts) == candidates.shape[1]:
            self.visible_BW, self.positions_BW = candidates, positions
            return
        # a stable sort brings the free slots to the end of each row
        self._source_BW = (~candidates).long().argsort(dim=1, stable=True)[:, :width]
        self.visible_BW = torch.arange(width, device=counts_B.device) < counts_B[:, None]
        self.positions_BW = positions.gather(1, self._source_BW)

    def held(self, before_BHWC: Tensor, all_BHKC: Tensor) -> Tensor:
        """The retained ones of all keys (or values): the former slots' and this pass's."""
        if self._unchanged:
            return before_BHWC
        if self._source_BW is None:
            return all_BHKC
        _, heads, _, size = all_BHKC.shape
        return all_BHKC.gather(2, self._source_BW[:, None, :, None].expand(-1, heads, -1, size))

    def clear(self) -> None:
        """Hold no tokens."""
        self.__init__(len(self.visible_BW), self.visible_BW.device)  # type: ignore[misc]

    def select(self, indices: Tensor) -> None:
        """Rows ``indices``, in that order."""
        indices = indices.to(self.visible_BW.device)
        self.visible_BW, self.positions_BW = self.visible_BW[indices], self.positions_BW[indices]


class PrunedLayer(DynamicLayer):
    """The keys and values of one pruned layer. The first such layer (``leads``) updates the common slots."""

    def __init__(self, slots: Slots, leads: bool) -> None:
        super().__init__()
        self.slots = slots
        self.leads = leads

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """All keys and values of this pass; afterwards only retained ones are cached."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        assert self.keys is not None
        assert self.values is not None
        keys = torch.cat([self.keys, key_states], dim=-2)
        values = torch.cat([self.values, value_states], dim=-2)
        self.keys, self.values = self.slots.held(self.keys, keys), self.slots.held(self.values, values)
        return keys, values

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder the rows by the surviving beams."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Rows ``indices``."""
        super().batch_select_indices(indices)
        if self.leads:
            self.slots.select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row ``repeats`` times."""
        rows = torch.arange(len(self.slots.visible_BW)).repeat_interleave(repeats)
        super().batch_repeat_interleave(repeats)
        if self.leads:
            self.slots.select(rows)

    def reset(self) -> None:
        """Hold nothing."""
        super().reset()
        if self.leads:
            self.slots.clear()

    def crop(self, tokens_to_remove: int) -> None:
        """Not possible: the slots of the last tokens are not recorded."""
        raise ConfigError(
            "a sparsified model cannot take tokens back (assisted decoding); generate without an assistant"
        )


def slots_of(cache: Any) -> Slots | None:
    """The slots of a pruned cache; None for an empty or ordinary one."""
    pruned = (layer for layer in getattr(cache, "layers", []) if isinstance(layer, PrunedLayer))
    return next((layer.slots for layer in pruned), None)


def convert_cache(cache: Any, rows: int, device: torch.device, first: int, layers: int) -> Slots:
    """Make the layers from ``first`` on of an empty ``cache`` hold retained tokens only.

    Raises ConfigError for a cache of another kind or one that holds tokens already.
    """
    if not isinstance(cache, DynamicCache):
        raise ConfigError(
            f"a sparsified model generates with transformers' dynamic cache, not with '{type(cache).__name__}'; "
            "leave cache_implementation unset"
        )
    if cache.get_seq_length():
        raise ConfigError("the cache was filled by a model that drops nothing; start with an empty one")
    slots = Slots(rows, device)
    dense = list(cache.layers[:first]) + [DynamicLayer() for _ in range(first - len(cache.layers))]
    cache.layers[:] = [*dense, *(PrunedLayer(slots, leads=i == 0) for i in range(layers - first))]
    return slots
