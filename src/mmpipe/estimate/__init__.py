"""Estimates of a stage by arithmetic alone: memory per GPU, CPU RAM, GPU-hours. No torch, no loading.

Bytes are decimal (1 GB = 1e9). Estimates should distinguish a hopeless run from a reasonable one, not fill the last
gigabyte: an allocator's waste, a fused kernel or a longer image can move them by a fifth.
"""
