"""The demo's made world: images, questions and tiny backbones, all from a seed, in the formats of the real ones."""
