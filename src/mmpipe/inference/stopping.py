"""Where an answer ends."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def stop_ids(model: Any, tokenizer: PreTrainedTokenizerBase, stop: str | None) -> frozenset[int]:
    """The tokens that end an answer: the model's own, the tokenizer's end of text, and ``stop`` where it is a token."""
    configured = model.generation_config.eos_token_id
    ids = set(configured if isinstance(configured, list) else [configured])
    ids.add(tokenizer.eos_token_id)
    if stop is not None:
        token = tokenizer.convert_tokens_to_ids(stop)
        if token != tokenizer.unk_token_id:
            ids.add(token)
    return frozenset(int(i) for i in ids if i is not None)
