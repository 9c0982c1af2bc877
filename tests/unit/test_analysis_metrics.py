"""The metrics of routing on arrays small enough to count by hand."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from mmpipe.analysis.base import Layer, MetricInput, families, read_layers
from mmpipe.analysis.expert_log import GENERATED, SCHEMA, TEXT, merge
from mmpipe.analysis.families.balance import (
    load_ratio,
    most_common_expert_set,
    normalised_entropy,
    selection_entropy,
    variation,
)
from mmpipe.analysis.families.change import any_change, matched, set_change, slot_change
from mmpipe.analysis.families.coactivation import coactivation
from mmpipe.analysis.families.confidence import first_share, margin, weight_entropy
from mmpipe.analysis.families.drift import relative_change, row_cosine
from mmpipe.analysis.families.frequency import selection_counts
from mmpipe.analysis.families.modality import divergence
from mmpipe.analysis.families.similarity import pairwise_cosine, reference_diversity
from mmpipe.artifacts.files import write_csv
from mmpipe.losses.routing import most_common_set_share

CHOICES = np.array([[0, 1], [1, 0], [0, 1], [2, 3]])
DONE = np.ones_like(CHOICES, bool)
TIMES = np.array([1, 1, 2, 1])


def test_selection_counts_weigh_shared_tokens_and_skip_what_does_nothing() -> None:
    assert selection_counts(CHOICES, DONE, TIMES, 5).tolist() == [4, 4, 1, 1, 0]
    done = DONE.copy()
    done[3] = False
    assert selection_counts(CHOICES, done, TIMES, 5).tolist() == [4, 4, 0, 0, 0]


def test_entropy_and_balance() -> None:
    assert selection_entropy(np.array([3, 3, 3, 3])) == pytest.approx(2.0)
    assert selection_entropy(np.array([5, 0, 0, 0])) == 0
    # a dead expert lowers the normalised entropy: log2 3 / log2 4
    assert normalised_entropy(np.array([2, 2, 2, 0])) == pytest.approx(math.log2(3) / 2)
    assert load_ratio(np.array([6, 2, 0, 0])) == 3
    assert variation(np.array([3, 1])) == pytest.approx(0.5)


def test_the_most_common_choice_is_ordered() -> None:
    assert most_common_expert_set(CHOICES, TIMES) == ((0, 1), pytest.approx(3 / 5))
    assert most_common_expert_set(CHOICES, np.ones(4)) == ((0, 1), 0.5)
    as_tensor = most_common_set_share(torch.tensor(CHOICES).repeat_interleave(torch.tensor(TIMES), 0), 4)
    assert as_tensor.item() == pytest.approx(3 / 5)
    assert most_common_set_share(torch.zeros(0, 2, dtype=torch.int64), 4).item() == 0


def test_coactivation_counts_pairs_whatever_their_order() -> None:
    pairs = coactivation(CHOICES, DONE, TIMES, 4)
    assert pairs[0, 1] == pairs[1, 0] == 4
    assert pairs[2, 3] == 1
    assert pairs.trace() == pairs[0, 2] == 0
    twice = np.array([[1, 1]])
    assert coactivation(twice, np.ones_like(twice, bool), np.ones(1), 4).sum() == 0


def test_confidence() -> None:
    even, sure, signed = [0.5, 0.5], [1.0, 0.0], [0.6, -0.2]
    one = np.ones(1)
    assert weight_entropy(np.array([even]), one) == pytest.approx(math.log(2))
    assert weight_entropy(np.array([sure]), one) == 0
    assert margin(np.array([even]), one) == 0
    assert margin(np.array([sure]), one) == 1
    assert margin(np.array([signed]), one) == pytest.approx(0.5)
    assert margin(np.array([[0.3], [0.9]]), np.ones(2)) == 1  # one expert a token
    assert first_share(np.array([even, sure]), np.array([1, 3])) == pytest.approx(0.875)
    # LibMoE's formula with its 1e-9 gives the same to six digits
    w = np.array([[0.7, 0.2, 0.4], [0.1, 0.1, 0.3]])
    q = w / w.sum(1, keepdims=True)
    assert weight_entropy(w, np.ones(2)) == pytest.approx((-(q * np.log(q + 1e-9)).sum(1)).mean(), abs=1e-6)


def test_change_rates() -> None:
    before = np.array([[0, 1], [0, 1], [0, 1]])
    after = np.array([[0, 1], [1, 0], [0, 2]])
    one = np.ones(3)
    assert slot_change(before, after, one) == pytest.approx((0 + 1 + 0.5) / 3)
    assert set_change(before, after, one) == pytest.approx((0 + 0 + 0.5) / 3)
    assert any_change(before, after, one) == pytest.approx(2 / 3)
    assert any_change(before, after, np.array([4, 1, 1])) == pytest.approx(2 / 6)


def layer(question: list[int], position: list[int], kind: list[int]) -> Layer:
    n = len(question)
    ones = np.ones(n, np.int64)
    return Layer(
        part="language_model", layer=0, experts=4, question_T=np.array(question), times_T=ones,
        scale_T=ones, position_T=np.array(position), kind_T=np.array(kind),
        indices_TK=np.arange(n)[:, None], weights_TK=np.ones((n, 1)),
    )  # fmt: skip


def test_only_the_same_token_of_the_same_question_is_compared() -> None:
    a = layer([0, 0, 1, 1], [0, 1, 0, 1], [TEXT, TEXT, TEXT, GENERATED])
    b = layer([0, 1, 1, 1, 2], [1, 0, 1, 2, 0], [TEXT, TEXT, GENERATED, GENERATED, TEXT])
    rows_a, rows_b = matched(a, b)
    assert list(zip(rows_a.tolist(), rows_b.tolist(), strict=True)) == [(1, 0), (2, 1)]


def test_divergence_between_groups() -> None:
    assert divergence(np.array([[5, 5], [50, 50]])) == 0
    assert divergence(np.array([[5, 0], [0, 7]])) == pytest.approx(1)
    assert divergence(np.array([[5, 0, 0], [0, 7, 0], [0, 0, 1]])) == pytest.approx(math.log2(3))
    assert divergence(np.array([[5, 1], [0, 0]])) == 0  # a group without tokens says nothing


def test_drift() -> None:
    w = np.array([[1.0, 0.0], [0.0, 2.0]])
    assert relative_change(w, w) == 0
    assert relative_change(w, 2 * w) == pytest.approx(1)
    assert row_cosine(w, 3 * w) == pytest.approx(1)
    assert row_cosine(w, w[::-1]) == 0


def test_similarity_of_copies_and_of_strangers() -> None:
    same = torch.ones(2, 3, 4)
    assert pairwise_cosine(same).item() == pytest.approx(1)
    assert reference_diversity(same).item() == pytest.approx(1 - 1 / 3)
    assert pairwise_cosine(torch.eye(3)[None]).item() == 0
    assert pairwise_cosine(torch.ones(2, 1, 4)).item() == 0


# ---- families on a made log


def made_log(path: Path, choices: list[list[int]]) -> Path:
    import json

    import pyarrow as pa

    n = len(choices)
    columns = {
        "question": list(range(n)), "question_id": [f"q{i}" for i in range(n)], "shared_by": [1] * n,
        "part": ["language_model"] * n, "layer": [2] * n, "scale": [1] * n, "position": [0] * n,
        "kind": ["image", "text"] * (n // 2), "experts": choices, "weights": [[0.75, 0.25]] * n,
    }  # fmt: skip
    arrays = [pa.array(columns[field.name]).cast(field.type) for field in SCHEMA]
    places = json.dumps([["language_model", 2, 4]])
    pq.write_table(pa.Table.from_arrays(arrays, schema=SCHEMA.with_metadata({"places": places})), path)
    return path


def read(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def test_every_family_of_logs_makes_a_table_and_a_figure(tmp_path: Path) -> None:
    folders = [tmp_path / f"results/r@{name}/eval/pope" for name in ("upcycle", "tuned")]
    for folder, choices in zip(folders, ([[0, 1], [2, 3]] * 5, [[0, 1], [3, 2]] * 5), strict=True):
        folder.mkdir(parents=True)
        made_log(folder / "experts.parquet", choices)
    sources = [MetricInput.of(folder / "experts.parquet") for folder in folders]
    assert [(s.checkpoint, s.benchmark) for s in sources] == [("r@upcycle", "pope"), ("r@tuned", "pope")]
    tables = {}
    for name in ("frequency", "balance", "coactivation", "confidence", "modality", "change", "benchmarks"):
        family = families()[name]
        rows = family.table(sources)
        write_csv(tmp_path / f"{name}.csv", rows)
        family.draw(rows, tmp_path / f"{name}.svg")
        first = (tmp_path / f"{name}.svg").read_bytes()
        family.draw(rows, tmp_path / f"{name}.svg")
        assert (tmp_path / f"{name}.svg").read_bytes() == first, "a figure must not change by itself"
        tables[name] = read(tmp_path / f"{name}.csv")
    assert [row["share"] for row in tables["frequency"]] == ["0.25"] * 4
    assert tables["balance"][0]["top_set_share"] == "0.5"
    assert tables["balance"][0]["collapsed"] == "False"  # exactly one half is no alarm
    assert float(tables["confidence"][0]["margin"]) == 0.5
    assert tables["modality"][0]["divergence_bits"] == "1"
    change = {row["checkpoint"]: row for row in tables["change"]}
    assert change["r@upcycle"]["slot_change"] == ""
    assert (change["r@tuned"]["slot_change"], change["r@tuned"]["set_change"]) == ("0.5", "0")
    assert change["r@upcycle"]["saturation"] == "1"


def test_entropy_of_allocation_counts_all_choices_and_first_choices_beside_it(tmp_path: Path) -> None:
    path = made_log(tmp_path / "experts.parquet", [[0, 1], [2, 3]] * 5)
    row = families()["balance"].table([MetricInput(path, "c", "b")])[0]
    assert row["entropy_normalised"] == pytest.approx(1), "four experts alike"
    assert row["first_choice_entropy_normalised"] == pytest.approx(0.5), "two of four"


def test_a_collapsed_layer_is_marked(tmp_path: Path) -> None:
    path = made_log(tmp_path / "experts.parquet", [[1, 0]] * 6 + [[2, 3]] * 4)
    row = families()["balance"].table([MetricInput(path, "c", "b")])[0]
    assert (row["top_set"], row["top_set_share"], row["collapsed"]) == ("1 0", 0.6, True)
    families()["balance"].draw([row], tmp_path / "b.svg")
    assert "collapsed" in (tmp_path / "b.svg").read_text()


def test_an_empty_log_has_no_layers(tmp_path: Path) -> None:
    assert merge([], tmp_path / "none.parquet") == 0
    assert list(read_layers(tmp_path / "none.parquet")) == []
