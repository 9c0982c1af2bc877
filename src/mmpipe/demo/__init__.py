"""The demo's made world: pictures, questions and tiny backbones, all from a seed, in the formats of the real ones."""
