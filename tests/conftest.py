"""What several tests share: a very small world, made once."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

pytest_plugins = ["project_fixtures"]

# the tests' models are so small that threads only get in each other's way
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with tiny backbones, a data set and a mixture, laid out as the rules lay them out."""
    from mmpipe.artifacts import manifest
    from mmpipe.data.mixture import build_mixture
    from mmpipe.data.spec import MixtureSpec, PartSpec
    from mmpipe.world.backbones import clip_tiny, qwen2_tiny
    from mmpipe.world.datasets import conversations

    root = tmp_path_factory.mktemp("world")
    backbones = root / "resources/backbones"
    for name, make in {
        "clip-tiny": lambda out: clip_tiny(out, hidden_size=32, layers=2, training_steps=2),
        "qwen2-tiny": lambda out: qwen2_tiny(out, hidden_size=32, layers=2),
    }.items():
        (backbones / name).mkdir(parents=True)
        make(backbones / name)
        manifest.write(backbones / name, kind="source", spec="{}", inputs={})
    shapes = root / "resources/datasets/shapes"
    conversations(shapes, seed=5, records=60)
    manifest.write(shapes, kind="source", spec="{}", inputs={})
    mixture = root / "resources/mixtures/mix"
    spec = MixtureSpec(parts=[PartSpec(dataset="shapes", annotations="llava_v1_5_mix665k.json", images=".")])
    here = Path.cwd()
    os.chdir(root)  # records name pictures relative to the working directory
    try:
        build_mixture(spec, {"shapes": Path("resources/datasets/shapes")}, mixture, log=lambda line: None)
        manifest.write(mixture, kind="mixture", spec="{}", inputs={})
    finally:
        os.chdir(here)
    return root
