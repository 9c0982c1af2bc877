from __future__ import annotations

import random
import tracemalloc
from pathlib import Path

import pytest

from mmpipe.data import verify
from mmpipe.data.record_table import digest_writer, read_digests
from mmpipe.data.verify import HashSet


@pytest.mark.parametrize("bits", [1, 17])
def test_it_knows_what_a_set_knows(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "_BUCKET_BITS", bits)
    chooser, known, compact = random.Random(0), set(), HashSet()
    for _ in range(20_000):
        number = chooser.randrange(10_000)
        assert compact.add("n", number) == (number not in known)
        known.add(number)


def test_where_two_hashes_touch_is_no_third() -> None:
    compact = HashSet()
    compact.add("x")
    (bucket,) = (bucket for bucket in compact._buckets if bucket)
    bucket[:] = bucket[-3:] + bucket[:3] + bucket[-3:] + bucket[:3]  # ends and begins with halves of x
    assert bucket.find(bytes(bucket[3:9])) == 3
    assert compact.add("x")
    assert not compact.add("x")


def test_a_thing_takes_a_few_bytes() -> None:
    tracemalloc.start()
    compact = HashSet()
    before = tracemalloc.get_traced_memory()[0]
    for number in range(200_000):
        compact.add(number)
    assert (tracemalloc.get_traced_memory()[0] - before) / 200_000 < 30
    tracemalloc.stop()


def test_digests_come_back_in_order(tmp_path: Path) -> None:
    rows = [(f"{number}.png", number.to_bytes(16)) for number in range(10_000)]
    with digest_writer(tmp_path / "images.arrow") as writer:
        for name, digest in rows:
            writer.add({"name": name, "digest": digest})
    assert list(read_digests(tmp_path)) == rows
    (tmp_path / "images.arrow").rename(tmp_path / "pictures.arrow")  # as earlier versions named it
    assert list(read_digests(tmp_path)) == rows
