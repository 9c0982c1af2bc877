"""Training: one engine for every stage."""
