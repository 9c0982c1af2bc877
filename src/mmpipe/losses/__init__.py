"""Training losses: pure functions of tensors.

The last letters of a tensor's name are its shape, here and in the objectives of :mod:`mmpipe.training`:

* B sequences, L positions (M: the teacher's), T tokens that count, S sequences or images of these tokens;
* D and E widths of student and teacher, V and U rows of their output heads, F image features of a batch;
* R rows: positions of a batch that enter a loss; C rows of one chunk; K entries per row (choices, cached tokens);
* N experts, or image tokens where P is images.

This module does not import torch.
"""

CHUNK_BYTES = 64 * 2**20
"""Size of one chunk of float32 logits of the output head: large enough for efficient matrix products, small against the
head's weight."""

COLLAPSE_ALARM = 0.5
"""A layer's routing has collapsed when a larger share of the tokens than this has one common choice."""
