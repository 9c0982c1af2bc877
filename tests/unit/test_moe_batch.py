"""A dense network between MoE layers gives its own output for every batch size.

The reference takes any output of length three for a tuple of a MoE layer: with a batch, or beams, of three
the answer of the first row stands in for all.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from tiny_llava import batch, llava

from mmpipe.models.moe.spec import MoESettings
from mmpipe.models.moe.upcycle import logits, upcycle

VECTORS = Path(__file__).parents[1] / "fixtures" / "vectors" / "llava_mod"


@pytest.mark.parametrize("rows", [1, 2, 3, 4])
def test_dense_layers_of_a_sparse_model(rows: int) -> None:
    case = json.loads((VECTORS / "14_batch_size_3_trap.json").read_text())
    assert case["expected"]["batch_3"]["upstream_is_correct"] is False
    inputs = case["inputs"]
    linear = torch.nn.Linear(3, 3)
    linear.weight.data, linear.bias.data = (torch.tensor(inputs["mlp_weight"]), torch.tensor(inputs["mlp_bias"]))
    x = torch.tensor(inputs["x"])[:rows]
    correct = torch.tensor(case["expected"][f"batch_{rows}"]["correct_output"])

    model = llava(layers=2, hidden_size=16)
    decoder = upcycle(model, MoESettings(placement=(0,))).model.language_model.layers[1]
    decoder.input_layernorm = decoder.post_attention_layernorm = torch.nn.Identity()
    decoder.self_attn.forward = lambda hidden_states, **_: (torch.zeros_like(hidden_states), None)
    decoder.mlp = linear
    torch.testing.assert_close(decoder(x), correct, atol=1e-6, rtol=1e-6)


def test_rows_of_a_batch_do_not_depend_on_each_other() -> None:
    model = upcycle(llava(), MoESettings()).eval()
    rows = batch(rows=4, padded=0)
    whole = logits(model, rows).view(4, 14, -1)
    for count in (1, 2, 3):
        part = logits(model, {name: value[:count] for name, value in rows.items()}).view(count, 14, -1)
        torch.testing.assert_close(part, whole[:count], atol=1e-5, rtol=1e-5)
    again = logits(copy.deepcopy(model), rows).view(4, 14, -1)
    assert torch.equal(again, whole), "two evaluations give the same answer"
