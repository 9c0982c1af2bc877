"""Open a checkpoint with this package, in its own process; otherwise like :mod:`read_with_hf`."""

from __future__ import annotations

import sys
from pathlib import Path

from mmpipe.checkpoints.read_with_hf import write_answers
from mmpipe.checkpoints.save import load_checkpoint


def main(checkpoint: str, given: str, got: str, max_new_tokens: int, device: str) -> None:
    """See :mod:`read_with_hf`."""
    model, _ = load_checkpoint(Path(checkpoint))
    model.to(device)  # type: ignore[arg-type]
    write_answers(model, given, got, max_new_tokens, device)


if __name__ == "__main__":
    _, checkpoint, given, got, max_new_tokens, device = sys.argv
    main(checkpoint, given, got, int(max_new_tokens), device)
