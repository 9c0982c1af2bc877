"""Many checkpoints on many benchmarks: means, ranks that missing cells do not move, and what is noise."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from mmpipe.benchmarks.leaderboard import as_table, leaderboard, ranks
from mmpipe.benchmarks.stats import paired_difference
from mmpipe.cli.show import print_comparison
from mmpipe.errors import DataError
from mmpipe.report.pages import table_page


def items(verdicts: list[float], questions_a_unit: int = 1) -> list[dict[str, Any]]:
    return [{"question_id": n, "unit": f"u{n // questions_a_unit}", "score": v} for n, v in enumerate(verdicts)]


def score(value: float) -> dict[str, Any]:
    return {"headline": {"value": value}}


def drawn(rate: float, seed: int, n: int = 400) -> list[float]:
    generator = random.Random(seed)
    return [float(generator.random() < rate) for _ in range(n)]


def test_a_paired_difference_sees_what_unpaired_intervals_hide() -> None:
    base = drawn(0.5, 0)
    better = list(base)
    for place in [n for n, v in enumerate(base) if not v][:20]:
        better[place] = 1.0
    found = paired_difference(items(better), items(base))
    assert found.value == pytest.approx(20 / 400)
    assert 0 < found.low < 0.05 < found.high
    assert not found.within_noise
    assert paired_difference(items(drawn(0.5, 1)), items(base)).within_noise
    assert paired_difference(items(base), items(base)).within_noise


def test_questions_of_one_unit_stand_and_fall_together() -> None:
    a, b = [1.0] * 8 + [0.0] * 392, [0.0] * 400
    alone, together = (paired_difference(items(a, k), items(b, k)) for k in (1, 8))
    assert not alone.within_noise
    assert together.within_noise  # one unit of fifty: many draws are without it
    assert (alone.units, together.units) == (400, 50)


def test_other_questions_cannot_be_paired() -> None:
    with pytest.raises(DataError, match="same questions"):
        paired_difference(items([1, 0]), items([1, 0, 1]))


def test_equal_scores_share_their_rank() -> None:
    assert ranks({"a": 0.5, "b": 0.7, "c": 0.5, "d": 0.1}) == {"b": 1, "a": 2.5, "c": 2.5, "d": 4}


@pytest.fixture
def board() -> dict[str, Any]:
    good, same, bad = drawn(0.8, 1), drawn(0.8, 2), drawn(0.4, 3)
    names = ("good-0", "good-1", "same", "bad")
    verdicts = dict(zip(names, (good, good, same, bad), strict=True))
    values = {"good-0": 0.82, "good-1": 0.80, "same": 0.80, "bad": 0.40}
    scores = {"one": {n: score(values[n]) for n in names}, "two": {n: score(values[n]) for n in names}}
    every = {"one": {n: items(verdicts[n]) for n in names}, "two": {n: items(verdicts[n]) for n in names}}
    del scores["two"]["same"], every["two"]["same"]  # not run yet
    return leaderboard(scores, every, {"good-0": "good-*", "good-1": "good-*", "same": "same-*"})


def test_rows_are_families_and_a_missing_cell_moves_nothing(board: dict[str, Any]) -> None:
    rows = {row["checkpoint"]: row for row in board["rows"]}
    assert list(rows) == ["good-*", "same", "bad"]  # a family of one keeps its own name
    assert rows["good-*"]["cells"]["one"]["score"] == pytest.approx(0.81)
    assert rows["good-*"]["cells"]["one"]["sd"] == pytest.approx(0.0141421, abs=1e-6)
    assert rows["same"]["cells"]["two"] is None
    assert [rows[n]["cells"]["one"]["rank"] for n in rows] == [1, 2, 3]
    assert rows["bad"]["cells"]["two"]["rank"] == 2
    assert rows["bad"]["mean_rank"] == 2.5
    assert board["mean_over"] == ["one"]
    assert rows["bad"]["mean"] == 0.4


def test_differences_within_noise_are_marked(board: dict[str, Any]) -> None:
    cells = {row["checkpoint"]: row["cells"]["one"] for row in board["rows"]}
    assert cells["good-*"]["against_best"] is None
    assert cells["same"]["against_best"]["within_noise"]
    assert not cells["bad"]["against_best"]["within_noise"]


def test_seeds_that_differ_more_than_the_means_are_noise() -> None:
    good, bad = drawn(0.9, 1), drawn(0.6, 2)
    scores = {"b": {"x-0": score(0.9), "x-1": score(0.5), "y-0": score(0.6), "y-1": score(0.58)}}
    every = {"b": {"x-0": items(good), "x-1": items(good), "y-0": items(bad), "y-1": items(bad)}}
    family = {name: f"{name[0]}-*" for name in scores["b"]}
    cell = leaderboard(scores, every, family)["rows"][1]["cells"]["b"]
    assert cell["against_best"]["ci95"][1] < 0  # the questions tell the two apart
    assert cell["against_best"]["within_noise"]  # the seeds do not


def test_it_is_laid_out(board: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "leaderboard.json"
    path.write_text(json.dumps(board))
    table_page("leaderboard", path, tmp_path / "leaderboard.html")
    page = (tmp_path / "leaderboard.html").read_text()
    assert "within noise of the best" in page
    assert "0.810</b> ± 0.014" in page
    print_comparison(path)
    assert "~ 0.800" in capsys.readouterr().out
    table = as_table(board)
    assert len(table) == 6
    assert next(row for row in table if row["checkpoint"] == "same" and row["benchmark"] == "two")["score"] == ""
