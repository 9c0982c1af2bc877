"""The demo from end to end: what is made, and what a person sees when something is wrong."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
from project_fixtures import REPOSITORY
from tiny_project import list_anew


def digest(directory: Path) -> dict[str, str]:
    return {
        path.relative_to(directory).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.suffix != ".lock" and path.name != "perf.json"
    }


def test_everything_declared_is_there(finished):
    comparison = json.loads((finished.root / "results/mmbench.json").read_text())
    rows = {row["checkpoint"]: row for row in comparison["rows"]}
    assert list(rows) == ["demo", "demo (shuffle_images)"]
    row = rows["demo"]
    assert row["protocol"]
    assert row["n"] >= row["units"] == 6
    assert len(row["ci95"]) == 2
    checkpoint = finished.root / row["lineage"]["checkpoint"]["path"]
    assert hashlib.sha256(checkpoint.read_bytes()).hexdigest() == row["lineage"]["checkpoint"]["sha256"]
    assert zipfile.is_zipfile(finished.root / "results/demo/submit/mmbench.xlsx")
    assert "<svg" in (finished.root / "results/demo/finetune/report/loss.svg").read_text()


def test_a_step_runs_without_snakemake(project):
    score = project.root / "results/demo/eval/mmbench/score.json"
    before = score.read_bytes()
    score.unlink()
    guide = (REPOSITORY / "docs/architecture.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", guide, re.S)
    environment = {**os.environ, "PYTHONPATH": "src", "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run([sys.executable, "-c", example], cwd=project.root, env=environment, check=True)
    assert score.read_bytes() == before


def test_the_checkpoint_loads_with_stock_classes(finished):
    code = (
        "import sys\n"
        "from transformers import AutoModelForImageTextToText, AutoProcessor\n"
        "model, info = AutoModelForImageTextToText.from_pretrained(sys.argv[1], output_loading_info=True)\n"
        "AutoProcessor.from_pretrained(sys.argv[1])\n"
        "assert type(model).__name__ == 'LlavaForConditionalGeneration'\n"
        "assert not info['missing_keys'] and not info['unexpected_keys'], info\n"
        "assert 'mmpipe' not in sys.modules\n"
    )
    path = finished.root / "results/demo/finetune/model"
    subprocess.run([sys.executable, "-c", code, str(path)], check=True)


def test_the_report_can_be_built(finished, tmp_path):
    project = finished.copy(tmp_path / "project")
    project.snakemake("results/mmbench.json", "all", "--report", "report.html")
    report = (project.root / "report.html").read_text()
    for item in ("loss.svg", "samples.html", "mmbench.html", "settings.html", "report.html"):
        assert item in report


def test_the_same_recipe_gives_the_same_bytes(finished, fresh, tmp_path):
    again = fresh.copy(tmp_path / "project")
    again.snakemake("finetuned")
    for stage in ("pretrain", "finetune"):
        folder = f"results/demo/{stage}/model"
        assert digest(again.root / folder) == digest(finished.root / folder)


def test_killed_with_everything_it_goes_on_and_ends_the_same(finished, project):
    shutil.rmtree(project.root / "results/demo/finetune")
    shutil.rmtree(project.root / "results/demo/eval")
    (project.root / "results/mmbench.json").unlink()
    command = [sys.executable, "-m", "snakemake", "--cores", "2", "results/mmbench.json"]
    with subprocess.Popen(
        command, cwd=project.root, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        checkpoint = project.root / "results/demo/finetune/state/checkpoints/checkpoint-1/complete"
        deadline = time.monotonic() + 120
        while not checkpoint.exists() and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.005)
        os.killpg(process.pid, signal.SIGKILL)
    project.snakemake("--unlock")
    assert not (project.root / "results/demo/finetune/model/manifest.json").exists()
    project.snakemake("results/mmbench.json")
    for folder in ("results/demo/finetune/model", "results/demo/eval/mmbench"):
        ours, theirs = digest(project.root / folder), digest(finished.root / folder)
        assert ours.items() <= theirs.items()
    assert (project.root / "results/mmbench.json").read_bytes() == (finished.root / "results/mmbench.json").read_bytes()


def test_smoke_runs_never_touch_real_results(project):
    before = digest(project.root / "results/demo")
    project.snakemake("results/smoke/mmbench.json")
    assert digest(project.root / "results/demo") == before
    card = json.loads((project.root / "results/smoke/demo/finetune/model/manifest.json").read_text())
    assert (card["steps"], card["smoke"]) == (2, True)


def test_a_bad_record_past_the_threshold_stops_with_its_name(project):
    annotations = project.root / "resources/datasets/digits/digits.json"
    records = json.loads(annotations.read_text())
    records[0]["image"] = "images/none.jpg"
    annotations.write_text(json.dumps(records))
    list_anew(annotations.parent)
    result = project.snakemake("results/mmbench.json", "--forcerun", "mix_data", check=False)
    assert result.returncode != 0
    assert "too many bad records" in result.stdout
    assert records[0]["id"] in result.stdout
    assert "Traceback" not in result.stdout


def test_a_bad_record_below_the_threshold_is_counted(project):
    project.edit("config/mixtures.yaml", lambda m: m["shapes-finetune"].update(max_bad=0.5))
    annotations = project.root / "resources/datasets/digits/digits.json"
    records = json.loads(annotations.read_text())
    records[0]["conversations"] = []
    annotations.write_text(json.dumps(records))
    list_anew(annotations.parent)
    project.snakemake("resources/mixtures/shapes-finetune/manifest.json")
    report = json.loads((project.root / "resources/mixtures/shapes-finetune/report.json").read_text())
    assert report["dropped"] == 1
    assert report["kept"] == report["wanted"] - 1


@pytest.mark.parametrize("words", [["why", "results/mmbench.json"]])
def test_why_says_what_changed_in_words(project, words):
    project.edit("config/recipes/demo.yaml", lambda r: r["stages"]["finetune"].update(learning_rate=0.5))
    result = subprocess.run(
        [sys.executable, "-m", "mmpipe.cli.main", *words], cwd=project.root, capture_output=True, text=True, check=True
    )
    assert "Training demo: finetune" in result.stdout
    assert "learning_rate: 0.003 -> 0.5" in result.stdout
    assert "pretrain" not in result.stdout


def test_llava_mod_runs_from_teacher_to_preferences(project):
    def choose(config):
        config["recipes"] = ["demo", "demo-mod"]
        config["benchmarks"] = [{"pope": {"data": "shapes-pope", "chunks": 2}}]

    project.edit("config/config.yaml", choose)
    jobs = project.planned("results/pope.json")
    assert "finetune" not in jobs, "the teacher is there already"
    once = ("distill_dense", "upcycle", "distill_sparse", "precompute", "gather_precomputed", "prefer")
    assert [jobs[kind] for kind in once] == [1] * 6
    project.snakemake("results/pope.json", "all")
    comparison = json.loads((project.root / "results/pope.json").read_text())
    assert [row["checkpoint"] for row in comparison["rows"]] == ["demo", "demo-mod"]
    config = json.loads((project.root / "results/demo-mod/prefer/model/config.json").read_text())
    assert config["text_config"]["model_type"] == "qwen2_moe"
    assert project.planned("results/pope.json", "all") == {}


@pytest.mark.slow
def test_libmoe_grows_experts_in_tower_and_projector(project):
    checkpoint = "results/smoke/demo-libmoe-perturbed_cosine-0/specialise"
    project.snakemake(f"{checkpoint}/model/manifest.json", f"{checkpoint}/report/loss.svg")
    config = json.loads((project.root / checkpoint / "model/config.json").read_text())
    assert config["model_type"] == "mmpipe_llava"
    assert set(config["mmpipe"]["moe"]) == {"vision_tower", "multi_modal_projector"}
    row = json.loads((project.root / checkpoint / "report/history.jsonl").read_text().splitlines()[-1])
    assert row["loss"] == pytest.approx(row["cross_entropy"] + row["router_balance"], rel=1e-4)
    assert 0.25 <= row["routing.vision_tower.load"] <= 0.5
