"""The benchmark that docs/benchmarks.md tells people to write, written and run as it stands there."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from benchmark_layouts import images

from mmpipe.benchmarks.prepare import prepare, read_questions
from mmpipe.cli.main import main
from mmpipe.errors import ConfigError
from mmpipe.plan.plan import Plan
from mmpipe.settings import read_mapping

REPOSITORY = Path(__file__).parents[2]
PAGE = (REPOSITORY / "docs/benchmarks.md").read_text(encoding="utf-8")


def block(language: str, holding: str) -> str:
    found = re.findall(rf"```{language}\n(.*?)```", PAGE, re.S)
    return next(text for text in found if holding in text)


@pytest.fixture
def project(tmp_path, monkeypatch) -> Path:
    """A project with the benchmark of the page, its data and its entries."""
    shutil.copytree(REPOSITORY / "config", tmp_path / "config")
    (tmp_path / "colours.py").write_text(block("python", "class Colours"), encoding="utf-8")
    data = tmp_path / "data"
    images(data / "images", "1.png", "2.png")
    records = [
        {"question_id": n, "question": "Which colour?", "image": f"{n}.png", "colour": colour}
        for n, colour in ((1, "red"), (2, "blue"))
    ]
    (data / "colours.json").write_text(json.dumps(records))
    entries = yaml.safe_load(block("yaml", "my-colours"))
    entries["my-colours"]["path"] = str(data)
    for file, name in (("datasets", "my-colours"), ("benchmarks", "colours")):
        path = tmp_path / f"config/{file}.yaml"
        path.write_text(path.read_text() + "\n" + yaml.safe_dump({name: entries[name]}))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p != str(tmp_path)])
    sys.modules.pop("colours", None)
    yield tmp_path
    sys.modules.pop("colours", None)


def test_the_plan_knows_it(project):
    plan = Plan({**read_mapping(Path("config/config.yaml")), "benchmarks": ["colours"]})
    assert plan.submissions()[0].endswith("submit/colours.jsonl")
    assert json.loads(plan.benchmark_spec("colours"))["task"] == "colours:BENCHMARK"


def test_it_asks_scores_and_submits(project, capsys, monkeypatch):
    entry = Plan(read_mapping(Path("config/config.yaml"))).benchmarks["colours"]
    prepare(entry, project / "data", project / "out")
    asked = read_questions(project / "out")
    assert asked[0].text == "Which colour?\nAnswer the question using a single word or phrase."
    answers = [{"question_id": q.id, "prompt": q.text, "text": "It is red."} for q in asked]
    (project / "a.jsonl").write_text("".join(json.dumps(a) + "\n" for a in answers))
    command = ["mmpipe", "score", "colours:BENCHMARK", "--references", "data/colours.json", "--answers", "a.jsonl"]
    monkeypatch.setattr("sys.argv", command)
    with pytest.raises(SystemExit):
        main()
    result = json.loads(capsys.readouterr().out)
    assert (result["benchmark"], result["n"], result["metrics"]) == ("colours", 2, {"accuracy": 0.5})
    assert result["headline"]["method"] == "wilson"


WHOLE_STEPS = '''
from statistics import fmean

from mmpipe.benchmarks.base import SHORT_ANSWER, Benchmark, Item, Protocol, Question, key, records_of
from mmpipe.benchmarks.jsonl import read_document


class Colours(Benchmark):
    """Colours of shapes; the reply must name the right one."""

    name = "colours"
    files = {"questions": "colours.json", "images": "images"}
    protocols = (Protocol("colours", "the colour's name in the reply", max_new_tokens=8),)

    def questions(self, source, protocol):
        for record in self.references(source, protocol):
            text = record["question"] + SHORT_ANSWER
            yield Question(id=record["question_id"], text=text, images=(source.image(record["image"]),))

    def references(self, source, protocol):
        return self.parse_references([read_document(source.path("questions"))])

    def parse_references(self, documents):
        return records_of(documents, ("question_id", "question", "image", "colour"))

    def rate(self, pairs, protocol):
        items = [
            Item(
                id=pair.reference["question_id"],
                score=float(pair.reference["colour"] in pair.text.lower()),
                unit=key(pair.reference["image"]),
                answered=pair.answered,
            )
            for pair in pairs
        ]
        return items, {"accuracy": fmean(item.score for item in items)}


BENCHMARK = Colours()
'''


def test_a_benchmark_that_overrides_whole_steps_scores_the_same(project, capsys, monkeypatch):
    """As benchmarks were written before there were bases for their shapes."""
    (project / "colours.py").write_text(WHOLE_STEPS, encoding="utf-8")
    test_it_asks_scores_and_submits(project, capsys, monkeypatch)


def test_an_installed_command_line_finds_it_too(project):
    code = "from mmpipe.benchmarks.base import get; print(get('colours:BENCHMARK').name)"
    command = [sys.executable, "-P", "-c", code]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == "colours"


def test_a_task_that_is_none_is_named_with_its_entry(project):
    for task, message in (
        ("colours:Colours", "is no instance"),
        ("colour:X", "no module 'colour'"),
        ("mmbnch", "mmbench"),
    ):
        path = project / "config/benchmarks.yaml"
        original = path.read_text()
        path.write_text(original.replace("colours:BENCHMARK", task))
        with pytest.raises(ConfigError, match=f"entry 'colours'.*{message}"):
            Plan(read_mapping(Path("config/config.yaml")))
        path.write_text(original)
