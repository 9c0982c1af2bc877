"""Text from data on its ways out: terminal, log, CSV, pages. A hostile id must arrive as visible text on each."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from data_records import data_set, entry, mix

from mmpipe import jobs
from mmpipe.artifacts.files import write_csv, write_json
from mmpipe.chat.options import SamplingOptions
from mmpipe.chat.terminal import Terminal
from mmpipe.cli import data, doctor, show
from mmpipe.cli import main as command_line
from mmpipe.doctor.base import Finding
from mmpipe.errors import DataError
from mmpipe.escapes import csv_cell, json_text, markup, message, printable, redacted
from mmpipe.report.pages import write_page

REPOSITORY = Path(__file__).parents[2]
FORGED = "Finished jobid: 3 (Rule: finetune)"
HOSTILE = f"\x1b]0;title\x07\x1b[2J\x9b31m\u202e[/x][bold]\u2028\n{FORGED}\r"


def harmless(text: str) -> bool:
    """Whether nothing in the text is obeyed by a terminal, and nothing but our own lines begins a line."""
    signs = [sign for sign in HOSTILE if not sign.isprintable() and sign != "\n"]
    return not any(sign in text for sign in signs) and not any(line.startswith(FORGED) for line in text.splitlines())


def test_each_escape_shows_everything_and_obeys_nothing() -> None:
    for escape in (markup, message, json_text, lambda text: printable(text, line=True)):
        escaped = escape(HOSTILE + "\ud800")  # alone, it would end a worker of xdist that reports a log with it
        assert harmless(escaped)
        assert FORGED in escaped
        escaped.encode()
    assert json.loads(json_text({HOSTILE: HOSTILE})) == {HOSTILE: HOSTILE}
    assert markup("\x1b[/x]") == "␛\\[/x]"


def test_a_hostile_comparison_is_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = {"checkpoint": HOSTILE, "score": 0.9, "ci95": [0.8, 1.0], "units": 10, "control": False}
    names = dict.fromkeys(("title", "benchmark", "protocol", "metric"), "[/x]\x1b[2J")
    published = {"model": HOSTILE, "system": "[/x]", "score": 0.5}
    (tmp_path / "a.json").write_text(json.dumps({**names, "rows": [row], "published": [published]}))
    cell = {"score": 0.5, "sd": None, "against_best": None}
    ranked = {"checkpoint": HOSTILE, "cells": {"[/x]\x1b": cell}, "mean": None, "mean_rank": 1.0}
    (tmp_path / "b.json").write_text(json.dumps({"benchmarks": ["[/x]\x1b"], "rows": [ranked]}))
    for name in ("a", "b"):
        show.print_comparison(tmp_path / f"{name}.json")
        output = capsys.readouterr().out
        assert harmless(output)
        assert "[/x]" in output


def test_hostile_settings_and_findings_are_printed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from mmpipe.plan.plan import Plan
    from mmpipe.settings import read_mapping

    monkeypatch.chdir(REPOSITORY)
    plan = Plan(read_mapping(Path("config/config.yaml")))
    monkeypatch.setattr(plan, "warnings", lambda: [HOSTILE])
    source = plan.datasets["shapes-captions"].model_copy(update={"description": HOSTILE, "licence": HOSTILE})
    monkeypatch.setitem(plan.datasets, "shapes-captions", source)
    show.print_plan(plan, "demo")
    data.print_catalogue(plan, ["shapes-captions"])
    data.print_catalogue(plan)
    doctor.print_findings([Finding("ok", HOSTILE, HOSTILE, HOSTILE)])
    print(doctor.as_json([Finding("ok", HOSTILE)]))
    assert harmless(capsys.readouterr().out)


def test_a_hostile_question_is_scored_and_named(tmp_path: Path) -> None:
    rows = [
        {"index": 1 + turn * 1_000_000, "question": "?", "A": "x", "B": "y", "answer": "AB"[turn], "category": HOSTILE}
        for turn in (0, 1)
    ]
    (tmp_path / "r.jsonl").write_text("".join(json.dumps({**row, "split": "dev"}) + "\n" for row in rows))
    answers = [{"question_id": row["index"], "text": HOSTILE} for row in rows]
    (tmp_path / "good.jsonl").write_text("".join(json.dumps(row) + "\n" for row in answers))
    (tmp_path / "bad.jsonl").write_text(json.dumps({"question_id": HOSTILE, "text": "A"}) + "\n")
    for name in ("good", "bad"):
        command = ["score", "mmbench", "--references", tmp_path / "r.jsonl", "--answers", tmp_path / f"{name}.jsonl"]
        result = subprocess.run(
            [sys.executable, "-m", "mmpipe.cli.main", *map(str, command)], capture_output=True, cwd=REPOSITORY
        )
        assert harmless(result.stdout.decode() + result.stderr.decode())


def test_errors_of_the_command_line_are_harmless(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise DataError(f"bad id {HOSTILE}")

    monkeypatch.setattr(command_line, "app", fail)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    with pytest.raises(SystemExit):
        command_line.main()
    assert harmless(capsys.readouterr().err)


def run_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, work: Any) -> str:
    """The log of a job."""
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.chdir(REPOSITORY)
    config = yaml.safe_load((REPOSITORY / "config/config.yaml").read_text())
    made = {"input": [], "log": [str(tmp_path / "job.log")], "output": [str(tmp_path / "made")], "params": {}}
    snakemake = SimpleNamespace(**made, threads=1, config=config, resources={})
    with contextlib.suppress(SystemExit, ValueError):
        jobs.job(work)(snakemake)
    return (tmp_path / "job.log").read_text()


@pytest.mark.parametrize("error", [DataError, ValueError])
def test_a_log_has_no_forged_lines(
    error: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def work(snakemake: Any, plan: Any) -> None:
        logging.getLogger("mmpipe.data").info("dropped %s", HOSTILE)
        raise error(HOSTILE)

    log = run_job(tmp_path, monkeypatch, work)
    assert log.count(FORGED) >= 2
    assert harmless(log)
    assert harmless(capsys.readouterr().err)


def test_an_uncaught_error_is_harmless_too() -> None:
    code = f"from mmpipe.escapes import escape_tracebacks; escape_tracebacks(); raise ValueError({HOSTILE!a})"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "ValueError" in result.stderr
    assert harmless(result.stderr)


def test_a_hostile_record_is_one_line_of_the_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hostile = HOSTILE.replace("\ud800", "")
    made = data_set(tmp_path / "made", [entry(0), entry(1, f"{hostile}.png"), {"id": hostile, "conversations": []}])
    log = logging.getLogger("mmpipe.data").info
    text = run_job(
        tmp_path, monkeypatch, lambda *_: mix(made, tmp_path / "out", max_bad=0.9, log=lambda line: log("%s", line))
    )
    assert FORGED in text
    assert harmless(text)


def test_an_answer_in_the_terminal_is_harmless() -> None:
    completion = SimpleNamespace(text=HOSTILE, finish="stop", tokens=1)

    class Answer(list[str]):
        pass

    answer = Answer(HOSTILE)
    answer.completion = completion  # type: ignore[attr-defined]
    model = SimpleNamespace(name=HOSTILE, captions_only=False, answer=lambda *_: answer)
    out, lines = io.StringIO(), iter(["What?", f"/{HOSTILE}", "/exit"])
    Terminal(model, SamplingOptions(), out=out, read=lambda _: next(lines)).run()  # type: ignore[arg-type]
    assert not any(sign in out.getvalue() for sign in HOSTILE if not sign.isprintable() and sign != "\n")


def test_formulas_in_a_table_are_text(tmp_path: Path) -> None:
    hostile = ["=cmd|' /C calc'!A0", "+1+1", "-2+3", "@SUM(A1)", "\t=1", "\r=1", "\x1b[2J"]
    write_csv(tmp_path / "a.csv", [{"checkpoint": text, "score": -0.5} for text in hostile])
    content = (tmp_path / "a.csv").read_text()
    cells = [row["checkpoint"] for row in csv.DictReader(io.StringIO(content))]
    assert not any(cell.startswith(("=", "+", "-", "@", "\t", "\r", "\x1b")) for cell in cells)
    assert content.count(",-0.5\n") == len(hostile)
    assert [csv_cell(cell) for cell in ("-0.5", -1, None, "demo@pretrain", "a-b")] == [
        *("-0.5", -1, None, "demo@pretrain", "a-b")
    ]


def test_a_page_shows_text_as_text(tmp_path: Path) -> None:
    text = "<script>alert(1)</script>\u202e\x1b"
    sample = dict.fromkeys(("id", "prompt", "text", "parsed", "gold"), text) | {"images": [], "correct": True}
    write_page(tmp_path / "page.html", "samples", title=text, samples=[sample], total=1)
    page = (tmp_path / "page.html").read_text()
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;&lt;202E&gt;␛" in page


@pytest.mark.parametrize(
    "text",
    [
        "https://me:canary@host/a",
        "https://canary@host/a",
        "ftp://me:can@ry-canary@host/a",
        "http://host/a?token=canary",
        "http://host/a?x=1&access_token=canary&y=2",
        "http://host/a?X-Amz-Credential=canary&X-Amz-Signature=canary",
        "http://host/a?sv=1&sig=canary",
        "http://host/a?AWSAccessKeyId=canary&Signature=canary",
        "HTTPSConnectionPool(host='h', port=443): Max retries exceeded with url: /a?apikey=canary (Caused by x)",
        "GET /a%3Ftoken%3Dcanary",
        "{'Authorization': 'Bearer canary-canary'}",
        "hf_canaryCANARYcanary",
        "the value canary-of-variable",
    ],
)
def test_secrets_are_hidden(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_TOKEN", "canary-of-variable")
    for way in (redacted, message, markup, lambda text: str(DataError(text))):
        assert "canary" not in way(text).lower()


@pytest.mark.parametrize(
    "text",
    [
        "https://host/a?id=7&download=true&keyword=x",
        "a.json, record 3: key=4, token=5",
        "the e-mail me@example.org, demo@pretrain",
    ],
)
def test_what_is_no_secret_stays(text: str) -> None:
    assert redacted(text) == text


def test_hiding_does_not_depend_on_the_machine_where_results_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_TOKEN", "canary-of-variable")
    assert redacted("/canary-of-variable", environment=False) == "/canary-of-variable"
    assert os.environ["MY_TOKEN"] == "canary-of-variable"


def test_json_files_keep_what_data_hold(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"id": "\x1b\u202e"})
    assert json.loads((tmp_path / "a.json").read_text()) == {"id": "\x1b\u202e"}
