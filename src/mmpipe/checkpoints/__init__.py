"""Checkpoints on disk: opened, written, and proven readable."""
