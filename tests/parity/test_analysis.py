"""LibMoE's similarity of expert outputs, from numbers its own code computed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from mmpipe.analysis.families.similarity import reference_diversity

VECTOR = Path(__file__).parents[1] / "fixtures/vectors/libmoe/diversity.json"


def test_diversity_equals_libmoe() -> None:
    vector = json.loads(VECTOR.read_text())
    outputs = torch.tensor(vector["inputs"]["expert_outputs[B,N,K,D]"]).flatten(0, 1)
    assert reference_diversity(outputs).item() == pytest.approx(vector["expected"], abs=1e-7)
