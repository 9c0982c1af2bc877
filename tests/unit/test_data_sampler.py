from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmpipe.data.sampler import BatchPlan, Grouping, even_chunks
from mmpipe.errors import ConfigError, DataError

GROUPINGS: list[Grouping] = ["none", "length", "modality_length"]
records = st.lists(st.tuples(st.integers(1, 500), st.booleans()), min_size=1, max_size=60)
splits = st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3))
common = {"sizes": records, "split": splits, "grouping": st.sampled_from(GROUPINGS), "seed": st.integers(0, 2**31)}


def plan(sizes: list[tuple[int, bool]], split: tuple[int, int, int], grouping: Grouping, seed: int) -> BatchPlan:
    micro, accumulation, ranks = split
    return BatchPlan(
        lengths=[length for length, _ in sizes],
        has_image=[flag for _, flag in sizes],
        micro_batch=micro,
        accumulation=accumulation,
        world_size=ranks,
        grouping=grouping,
        seed=seed,
    )


def global_batch(made: BatchPlan, step: int) -> list[int]:
    return [
        record for rank in range(made.world_size) for micro_batch in made.step(step, rank) for record in micro_batch
    ]


@settings(deadline=None)
@given(**common)
def test_every_record_is_seen_in_every_epoch_and_steps_are_of_one_size(**drawn: Any) -> None:
    made = plan(**drawn)
    for epoch in range(2):
        steps = range(epoch * made.steps_per_epoch, (epoch + 1) * made.steps_per_epoch)
        seen = [record for step in steps for record in global_batch(made, step)]
        assert set(seen) == set(range(len(made.lengths)))
        assert len(seen) == made.steps_per_epoch * made.global_batch
        assert len(seen) - len(made.lengths) < made.global_batch
    for rank in range(made.world_size):
        assert [len(batch) for batch in made.step(0, rank)] == [made.micro_batch] * made.accumulation


@settings(deadline=None)
@given(**common)
def test_any_start_gives_the_same_as_going_through(**drawn: Any) -> None:
    made = plan(**drawn)
    total = 2 * made.steps_per_epoch + 1
    rank = made.world_size - 1
    whole = list(made.batches(rank, 0, total))
    assert len(whole) == len(made.batches(rank, 0, total))
    for start in {0, 1, made.steps_per_epoch, total - 1}:
        assert list(plan(**drawn).batches(rank, start, total - start)) == whole[start * made.accumulation :]


@settings(deadline=None)
@given(sizes=records, grouping=st.sampled_from(GROUPINGS), seed=st.integers(0, 99), data=st.data())
def test_global_batches_do_not_depend_on_how_they_are_divided(
    sizes: list[tuple[int, bool]], grouping: Grouping, seed: int, data: st.DataObject
) -> None:
    size = 12
    divisions = [(12, 1, 1), (3, 4, 1), (3, 2, 2), (2, 1, 6), (1, 3, 4)]
    one = plan(sizes, divisions[0], grouping, seed)
    other = plan(sizes, data.draw(st.sampled_from(divisions[1:])), grouping, seed)
    assert one.global_batch == other.global_batch == size
    # The last batch is filled from the beginning of the order, whose first records may be dealt out otherwise.
    for step in range(len(sizes) // size):
        assert sorted(global_batch(one, step)) == sorted(global_batch(other, step))


@settings(deadline=None)
@given(**common)
def test_all_but_the_last_two_batches_of_a_modality_plan_are_pure(**drawn: Any) -> None:
    made = plan(**{**drawn, "grouping": "modality_length"})
    for step in range(made.steps_per_epoch - 2):
        assert len({made.has_image[record] for record in global_batch(made, step)}) == 1


def test_length_groups_are_about_equally_long_for_every_rank() -> None:
    sizes = [(1 + (i * 37) % 200, True) for i in range(256)]

    def spread(grouping: Grouping) -> float:
        made = plan(sizes, (4, 2, 4), grouping, seed=3)
        sums = [
            [sum(made.lengths[r] for r in batch) for rank in range(4) for batch in made.step(step, rank)]
            for step in range(made.steps_per_epoch)
        ]
        return sum(max(row) - min(row) for row in sums) / len(sums)

    assert spread("length") < spread("none") / 4


def test_seed_and_epoch_change_the_order() -> None:
    sizes = [(1, True)] * 50
    orders = {tuple(plan(sizes, (5, 1, 1), "none", seed).order(epoch)) for seed in (0, 1, 2**32) for epoch in range(3)}
    assert len(orders) == 9


def test_fewer_records_than_a_batch_are_repeated() -> None:
    made = plan([(1, True)] * 3, (8, 1, 1), "none", 0)
    assert made.steps_per_epoch == 1
    assert sorted(Counter(made.step(0, 0)[0]).values()) == [2, 3, 3]


@settings(deadline=None)
@given(lengths=st.lists(st.integers(1, 100), min_size=1, max_size=40), chunks=st.integers(1, 8))
def test_even_chunks_lose_nothing(lengths: list[int], chunks: int) -> None:
    dealt = even_chunks(range(len(lengths)), lengths, chunks)
    assert sorted(record for chunk in dealt for record in chunk) == list(range(len(lengths)))
    sizes = [len(chunk) for chunk in dealt]
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"lengths": [], "has_image": []}, DataError, "there are no records"),
        ({"lengths": [1, 2]}, DataError, "2 lengths but 1 modality flags"),
        ({"lengths": [0]}, DataError, "record 0 has no length"),
        ({"micro_batch": 0}, ConfigError, "at least 1"),
        ({"world_size": 0}, ConfigError, "at least 1"),
    ],
)
def test_plans_that_make_no_sense_are_refused(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        BatchPlan(**({"lengths": [1], "has_image": [True], "micro_batch": 1} | change))


def test_a_rank_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ConfigError, match="no rank 2 among 2"):
        plan([(1, True)], (1, 1, 2), "none", 0).step(0, 2)
