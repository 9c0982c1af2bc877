"""Opening, writing and verifying checkpoints."""
