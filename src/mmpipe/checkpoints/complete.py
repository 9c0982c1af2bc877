"""The gate of weights that come in: no tensor is missing, surplus or misshapen, and no output head is lost.

transformers draws missing tensors at random and leaves surplus ones out, with a line in its log.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from mmpipe.errors import ArtifactError, first_of
from mmpipe.pretrained import load_pretrained

log = logging.getLogger(__name__)

PREFIXES = ("module.", "_orig_mod.", "base_model.model.")
"""Put before every name by DistributedDataParallel, ``torch.compile`` and peft."""
_HEAD = re.compile(r"(^|\.)lm_head\.weight$")
_ROWS = re.compile(r"(^|\.)embed_tokens\.weight$")


def load_complete(kind: Any, path: Path, **options: Any) -> Any:
    """``kind.from_pretrained(path, **options)``, every tensor from the files. A known prefix of all names is left out.

    Raises ArtifactError naming the tensors for which the weights and the configuration disagree, an output head of its
    own included where the configuration says that it is tied; other errors are those of transformers.
    """
    prefix = _prefix(path)
    how: dict[str, Any] = {"output_loading_info": True, "ignore_mismatched_sizes": True}
    if prefix:
        log.warning("%s: the names of all tensors begin with '%s', which is left out", path, prefix)
        how["key_mapping"] = {f"^{re.escape(prefix)}": ""}
    model, info = load_pretrained(kind, path, **how, **options)
    kinds = {
        "missing_keys": "tensors the model needs and the file lacks",
        "unexpected_keys": "tensors the model has no place for",
        "mismatched_keys": "tensors of another shape than the configuration says",
    }
    problems = [f"{what}: {first_of(info[key])}" for key, what in kinds.items() if info[key]]
    if problems:
        raise ArtifactError(f"{path}: the weights do not fit the configuration; " + "; ".join(problems))
    if model.config.get_text_config().tie_word_embeddings:
        _require_tied_head(path)
    return model


def _prefix(path: Path) -> str:
    """What all names in the files begin with, of the known prefixes; several may follow each other."""
    names, prefix = [name for names in _tensors(path).values() for name in names], ""
    while found := next((p for p in PREFIXES if names and all(name.startswith(prefix + p) for name in names)), ""):
        prefix += found
    return prefix


def _require_tied_head(path: Path) -> None:
    """Raises ArtifactError for an output head that differs from the embeddings: joined with them, it would be lost."""
    places = {name: file for file, names in _tensors(path).items() for name in names}
    head, rows = (next(filter(pattern.search, places), None) for pattern in (_HEAD, _ROWS))
    if not head or not rows:
        return
    with safe_open(places[head], "pt") as heads, safe_open(places[rows], "pt") as embeddings:
        if torch.equal(heads.get_tensor(head), embeddings.get_tensor(rows)):
            return
    raise ArtifactError(
        f"{path}: config.json says tie_word_embeddings, but {head} differs from {rows}; set tie_word_embeddings to false "
        "to keep this head, or delete it from the file to use the embeddings"
    )


def _tensors(path: Path) -> dict[Path, list[str]]:
    """The names of the tensors in each safetensors file of a directory."""
    found = {}
    for file in sorted(Path(path).glob("model*.safetensors")):
        try:
            with safe_open(file, "pt") as opened:
                found[file] = list(opened.keys())
        except (OSError, SafetensorError):
            return {}  # transformers says what is wrong with it
    return found
