"""Published figures: what is in the catalogue can be met by a score of ours, and nothing else is shown beside it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from benchmark_layouts import LAYOUTS, VERDICTS

from mmpipe.benchmarks.base import get
from mmpipe.benchmarks.compare import compare
from mmpipe.benchmarks.published import beside
from mmpipe.cli.show import print_comparison
from mmpipe.errors import ConfigError
from mmpipe.plan.plan import Plan
from mmpipe.settings import read_mapping

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def plan() -> Plan:
    return Plan(read_mapping(REPOSITORY / "config/config.yaml"), REPOSITORY)


MEASURES = sorted(
    {
        (measure["benchmark"], measure["protocol"], measure["metric"])
        for table in read_mapping(REPOSITORY / "config/published.yaml").values()
        for measure in table["measures"].values()
    }
)


@pytest.mark.parametrize(("benchmark", "protocol", "metric"), MEASURES)
def test_what_is_published_is_measured_here_under_these_names(benchmark, protocol, metric, tmp_path):
    right = LAYOUTS[benchmark][0](tmp_path)
    task = get(benchmark)
    name, _, judge = protocol.partition("@")
    source = task.source(tmp_path)
    references = task.references(source, task.protocol(name))
    asked = list(task.questions(source, task.protocol(name)))
    answers = [
        {**q.extra, "question_id": q.id, "prompt": q.text, "text": text} for q, text in zip(asked, right, strict=False)
    ]
    replies = [{"question_id": q.id, "reply": VERDICTS.get(benchmark), "judge_model": judge} for q in asked]
    score = task.score(references, answers, name, replies if judge else None)
    assert (score.protocol, score.headline.metric) == (protocol, metric)


def score(n: int, protocol: str) -> dict:
    headline = {"metric": "accuracy", "value": 61.0, "ci95": [60.0, 62.0], "units": n}
    return {
        "benchmark": "gqa", "protocol": protocol, "n": n, "missing": 0, "unparsed": 0, "headline": headline,
    }  # fmt: skip


def test_only_the_same_measurement_stands_beside_ours(plan, tmp_path, capsys):
    published = json.loads(plan.published("gqa"))
    same = compare("gqa", {"ours": score(12578, "gqa")})
    shown = beside(same, published)
    assert {"model": "llava-v1.5-7b", "score": 62.0}.items() <= shown[0].items()
    assert {row["protocol"] for row in shown} == {"gqa"}
    assert len({row["model"] for row in shown}) == len(shown) > 8
    assert beside(compare("gqa", {"ours": score(12, "gqa")}), published) == []
    assert {row["system"][:6] for row in beside({**same, "protocol": "lmms", "metric": "exact_match"}, published)} == {
        "LibMoE"
    }
    (tmp_path / "gqa.json").write_text(json.dumps({"title": "GQA", **same, "published": shown}))
    print_comparison(tmp_path / "gqa.json")
    assert "llava-v1.5-7b" in capsys.readouterr().out


def test_a_number_that_nothing_measures_is_named(tmp_path):
    import shutil

    shutil.copytree(REPOSITORY / "config", tmp_path / "config")
    path = tmp_path / "config/published.yaml"
    path.write_text(
        path.read_text() + "\nmine:\n  system: x\n  source: https://x.org\n  measures: {}\n  models: {a: {b: 1}}\n"
    )
    with pytest.raises(ConfigError, match=r"published.yaml, entry 'mine'.*how b was measured"):
        Plan(read_mapping(tmp_path / "config/config.yaml"), tmp_path)


@pytest.mark.parametrize("name", ["libmoe", "llava-1.5", "llava-mod"])
def test_the_systems_configurations_ask_by_their_own_protocols(name):
    from mmpipe.settings import read_mapping

    plan = Plan(read_mapping(REPOSITORY / f"config/{name}.yaml"), REPOSITORY)
    asked = {
        (get(entry.task).name, get(entry.task).protocol(entry.protocol).name, entry.questions)
        for entry in (plan.benchmarks[chosen] for chosen in plan.chosen_benchmarks)
    }
    tables = [t for key, t in read_mapping(REPOSITORY / "config/published.yaml").items() if key.startswith(name)]
    measures = [m for table in tables for m in table["measures"].values() if "@" not in m["protocol"]]
    assert measures
    for measure in measures:
        assert (measure["benchmark"], measure["protocol"], measure["questions"]) in asked, measure
