"""Open a checkpoint with stock transformers; run as a script, in its own process.

``read_with_hf.py CHECKPOINT GIVEN GOT MAX_NEW_TOKENS DEVICE``: reads the samples ``{i}.{input name}`` in the
safetensors file GIVEN, writes ``{i}.logits`` and ``{i}.tokens`` to GOT. It must not import anything of this package.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor


def main(checkpoint: str, given: str, got: str, max_new_tokens: int, device: str) -> None:
    load: Any = AutoModelForImageTextToText
    model, info = load.from_pretrained(
        checkpoint, trust_remote_code=False, local_files_only=True, dtype=torch.float32, output_loading_info=True
    )
    wrong = {key: sorted(map(str, info[key])) for key in ("missing_keys", "unexpected_keys") if info[key]}
    if wrong:
        sys.exit(f"the tensors do not fit the model: {wrong}")
    AutoProcessor.from_pretrained(checkpoint, trust_remote_code=False, local_files_only=True)
    model = model.to(device).eval()
    write_answers(model, given, got, max_new_tokens, device)


@torch.no_grad()
def write_answers(model: Any, given: str, got: str, max_new_tokens: int, device: str) -> None:
    """Logits and greedy answers of ``model`` for the samples in ``given``."""
    samples: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in load_file(given, device=device).items():
        i, _, key = name.partition(".")
        samples.setdefault(i, {})[key] = tensor
    results = {}
    for i, sample in samples.items():
        results[f"{i}.logits"] = model(**sample, use_cache=False).logits.cpu().contiguous()
        tokens = model.generate(**sample, max_new_tokens=max_new_tokens, do_sample=False, num_beams=1)
        results[f"{i}.tokens"] = tokens.cpu().contiguous()
    save_file(results, got)


if __name__ == "__main__":
    _, checkpoint, given, got, max_new_tokens, device = sys.argv
    main(checkpoint, given, got, int(max_new_tokens), device)
