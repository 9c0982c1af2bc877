"""Orders of records against those of LLaVA's trainer, from the same random numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from reference_tokenizers import vectors

from mmpipe.data import sampler
from mmpipe.data.sampler import BatchPlan, even_chunks, length_order, modality_length_order
from mmpipe.errors import DataError

CASES = vectors("llava/samplers.json")
MODALITY = "get_modality_length_grouped_indices"


def of(function: str) -> list[dict[str, Any]]:
    return [case for case in CASES if case["fn"] == function and "error" not in case]


def name(case: dict[str, Any]) -> str:
    return "-".join(str(case.get(key, "")) for key in ("name", "batch_size", "world_size", "seed"))


def generator(case: dict[str, Any]) -> torch.Generator:
    return torch.Generator().manual_seed(case.get("generator_seed", case.get("seed")))


def modality_order(case: dict[str, Any]) -> list[int]:
    """The reference writes text-only records with a negative length."""
    lengths = [abs(length) for length in case["lengths"]]
    has_image = [length > 0 for length in case["lengths"]]
    return modality_length_order(lengths, has_image, case["batch_size"], case["world_size"], generator(case))


@pytest.mark.parametrize("case", of("split_to_even_chunks"), ids=lambda c: str(c["num_chunks"]))
def test_even_chunks(case: dict[str, Any]) -> None:
    assert even_chunks(case["indices"], case["lengths"], case["num_chunks"]) == case["out"]


@pytest.mark.parametrize("case", of("get_length_grouped_indices"), ids=name)
def test_length_order(case: dict[str, Any]) -> None:
    order = length_order(case["lengths"], case["batch_size"], case["world_size"], generator(case))
    assert order == case["out"]


@pytest.mark.parametrize("case", [c for c in of(MODALITY) if c["name"] != "all_text"], ids=name)
def test_modality_length_order(case: dict[str, Any]) -> None:
    assert modality_order(case) == case["out"]


@pytest.mark.parametrize("case", [c for c in of(MODALITY) if c["name"] == "all_text"], ids=name)
def test_modality_length_order_of_text_alone(case: dict[str, Any]) -> None:
    """The reference sorts the negative lengths, shortest first; the global batches are the same."""
    size = case["batch_size"] * case["world_size"]
    order = modality_order(case)
    assert order != case["out"]
    for start in range(0, len(order), size):
        assert set(order[start : start + size]) == set(case["out"][start : start + size])


def test_a_record_without_length_is_refused() -> None:
    (case,) = [case for case in CASES if "error" in case]
    with pytest.raises(DataError, match="record 1 has no length"):
        BatchPlan(lengths=list(map(abs, case["lengths"])), has_image=[True] * 3, micro_batch=1)


def test_a_plan_deals_out_the_reference_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampler, "epoch_seed", lambda seed, epoch: seed)
    (case,) = [c for c in of(MODALITY) if (c["name"], c["batch_size"], c["seed"]) == ("mixed", 2, 1)]
    plan = BatchPlan(
        lengths=[abs(length) for length in case["lengths"]],
        has_image=[length > 0 for length in case["lengths"]],
        micro_batch=2,
        world_size=2,
        grouping="modality_length",
        seed=1,
    )
    dealt = [plan.step(step, rank)[0] for step in range(plan.steps_per_epoch) for rank in (0, 1)]
    assert [record for micro_batch in dealt for record in micro_batch] == case["out"]
