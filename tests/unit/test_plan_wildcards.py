"""Wildcard constraints match the names of the plan and nothing else."""

import re

import pytest

from mmpipe.plan.wildcards import one_of


@pytest.mark.parametrize(
    "names",
    [
        ["demo"],
        ["demo", "demo-moe", "demo-moe-2", "demo-mod", "demo.x", "other"],
        ["a", "ab", "abc", "b"],
        ["gqa", "gqa", "mm.bench"],
        ["x-a-0", "x-a-1", "x-b-0", "x-b-1", "y-0"],
    ],
)
def test_each_name_matches_whole_and_no_other_does(names: list[str]) -> None:
    pattern = re.compile(one_of(names) + r"(?:@[a-z]+)?")
    others = {"", "d", "dem", "demo-", "demo-m", "demo-moe-", "demoother", "mm-bench", "c", "abcd", "demo|demo-moe"}
    assert all(pattern.fullmatch(name) and pattern.fullmatch(f"{name}@pretrain") for name in names)
    assert not any(pattern.fullmatch(name) for name in others - set(names))


def test_no_name_matches_nothing() -> None:
    assert not any(re.search(one_of([]), text) for text in ("", "demo"))
