"""Batched, deterministic generation and its bookkeeping."""
