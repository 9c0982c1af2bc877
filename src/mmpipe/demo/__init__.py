"""The demo: synthetic images, questions and tiny backbones, all from a seed, in the formats of real data."""
