"""What a stage will need, by arithmetic alone: memory a GPU, CPU RAM, GPU-hours. No torch, nothing is loaded.

Bytes are decimal (1 GB = 1e9). Estimates are meant to tell a hopeless run from a reasonable one, not to fill the last
gigabyte: an allocator's waste, a fused kernel or a longer image can move them by a fifth.
"""
