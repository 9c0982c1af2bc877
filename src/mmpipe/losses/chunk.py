"""How much of the output head is computed at once."""

CHUNK_BYTES = 64 * 2**20
"""Size of one chunk of float32 logits; large enough to keep matrix products efficient, small against the
weight."""
