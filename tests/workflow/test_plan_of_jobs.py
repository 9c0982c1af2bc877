"""Which jobs Snakemake plans: from nothing, and after which change."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections import Counter

import pytest

from mmpipe.cli.why import explain
from mmpipe.errors import MmpipeError

EVALUATION = {"answer_chunk": 2, "gather_answers": 2, "score_answers": 2, "compare": 1}


def changed(*, train: list[str] = (), also: dict[str, int] | None = None) -> Counter[str]:
    """The jobs of ``results/mmbench.json`` that follow from training the stages ``train`` again."""
    return Counter({**dict.fromkeys(train, 1), **EVALUATION, **(also or {})})


def test_from_nothing(fresh):
    assert fresh.planned("results/mmbench.json") == changed(
        train=["pretrain", "finetune"],
        also={"fetch_backbone": 2, "fetch_dataset": 5, "mix_data": 2, "tokenise": 2, "prepare_benchmark": 2},
    )


def test_after_completion_there_is_nothing_to_do(finished):
    assert finished.planned("results/mmbench.json", "all") == Counter()


def test_a_learning_rate_retrains_its_stage_and_what_follows(project):
    project.edit("config/recipes/demo.yaml", lambda r: r["stages"]["finetune"].update(learning_rate=0.5))
    assert project.planned("results/mmbench.json") == changed(train=["finetune"])


def test_the_first_stage_retrains_everything_after_it(project):
    project.edit("config/recipes/demo.yaml", lambda r: r["stages"]["pretrain"].update(seed=9))
    assert project.planned("results/mmbench.json") == changed(train=["pretrain", "finetune"])


def test_two_swapped_values_are_noticed(project):
    def swap(recipe):
        stage = recipe["stages"]["finetune"]
        stage["max_steps"], stage["batch_size"] = stage["batch_size"], stage["max_steps"]

    project.edit("config/recipes/demo.yaml", swap)
    assert project.planned("results/mmbench.json") == changed(train=["finetune"])


@pytest.mark.parametrize(
    "change",
    [
        lambda recipe: recipe["hardware"].update(memory_gb=64, cpus=2, micro_batch=4),
        lambda recipe: recipe.update(description="other words"),
        lambda recipe: recipe["stages"]["finetune"].update(weight_decay=0.0),
        lambda recipe: recipe.update(stages={n: recipe["stages"][n] for n in ("pretrain", "finetune")}),
    ],
    ids=["hardware", "description", "a default written out", "order of keys"],
)
def test_what_does_not_change_the_result_runs_nothing(project, change):
    project.edit("config/recipes/demo.yaml", change)
    assert project.planned("results/mmbench.json", "all") == Counter()


def test_touched_files_and_a_fresh_clone_run_nothing(project):
    later = time.time() + 100
    for folder in ("workflow", "rules", "src", "config"):
        for path in (project.root / folder).rglob("*.*"):
            os.utime(path, (later, later))
    os.utime(project.root / "results/demo/pretrain/model/projector.safetensors", (later, later))
    assert project.planned("results/mmbench.json", "all") == Counter()


def test_a_deleted_checkpoint_runs_with_what_depends_on_it(project):
    shutil.rmtree(project.root / "results/demo/finetune")
    jobs = project.planned()
    assert "pretrain" not in jobs
    assert changed(train=["finetune"]) <= jobs


def test_a_deleted_checkpoint_is_not_missed_where_nothing_needs_it(project):
    shutil.rmtree(project.root / "results/demo/pretrain")
    assert project.planned("results/mmbench.json") == Counter()


def test_other_data_run_everything_that_saw_it(project):
    project.edit("config/datasets.yaml", lambda c: c["digits"].update(seed=7))
    assert project.planned("results/mmbench.json") == changed(
        train=["finetune"], also={"fetch_dataset": 1, "mix_data": 1, "tokenise": 1}
    )


def test_other_questions_train_nothing(project):
    project.edit("config/datasets.yaml", lambda c: c["shapes-mmbench"].update(seed=7))
    assert project.planned("results/mmbench.json") == changed(also={"fetch_dataset": 1, "prepare_benchmark": 2})


def test_another_recipe_shares_what_is_there(project):
    (project.root / "config/recipes/slow.yaml").write_text(
        "extends: demo\nstages: {finetune: {learning_rate: 1.0e-4}}\n"
    )
    project.edit("config/config.yaml", lambda c: c.update(recipes=["demo", "slow"]))
    assert project.planned("results/mmbench.json") == changed(train=["finetune"])


def test_parts_can_be_asked_for_by_name(fresh):
    assert fresh.planned("pretrained")["pretrain"] == 1
    assert "finetune" not in fresh.planned("pretrained")
    assert fresh.planned("finetuned")["finetune"] == 1
    assert fresh.planned("answers")["gather_answers"] == 2
    assert fresh.planned("scores")["score_answers"] == 2
    assert fresh.planned("submissions")["convert_submission"] == 1


def test_an_earlier_checkpoint_can_be_evaluated(project):
    jobs = project.planned("results/demo@pretrain/eval/mmbench/score.json")
    assert jobs == Counter({"answer_chunk": 1, "gather_answers": 1, "score_answers": 1})


def test_a_whole_checkpoint_is_measured_without_training(project):
    (project.root / "config/recipes/whole.yaml").write_text("model: {checkpoint: llava-1.5-7b-hf}\n")
    assert project.planned("results/whole/eval/mmbench/score.json") == Counter(
        {"fetch_backbone": 1, "construct": 1, "answer_chunk": 1, "gather_answers": 1, "score_answers": 1}
    )


def test_smoke_runs_are_planned_beside_the_real_ones(project):
    jobs = project.planned("results/smoke/mmbench.json")
    assert (jobs["pretrain"], jobs["finetune"], jobs["mix_data"]) == (1, 1, 0)


def test_a_forced_stage_retrains_what_follows(project):
    output = project.snakemake("-n", "results/mmbench.json", "--forcerun", "pretrain").stdout
    assert "Training demo: finetune" in output


@pytest.mark.parametrize("profile", ["local", "gpu", "slurm"])
def test_profiles_are_found_from_the_root(finished, profile):
    output = finished.snakemake("-n", "results/mmbench.json", "--profile", profile).stdout
    assert "Nothing to be done" in output


def test_a_mistake_in_a_recipe_stops_before_any_job(project):
    project.edit("config/recipes/demo.yaml", lambda r: r["stages"]["finetune"].update(learning_rat=1))
    result = project.snakemake("results/mmbench.json", check=False)
    assert result.returncode != 0
    assert "demo.yaml: stages.finetune: unknown key 'learning_rat'; did you mean 'learning_rate'?" in result.stdout
    assert "Traceback" not in result.stdout


@pytest.mark.parametrize("profile", [(), ("--profile", "local")])
def test_a_configuration_that_runs_code_is_refused_before_it_runs(fresh, tmp_path, monkeypatch, profile):
    ran, evil = tmp_path / "ran", tmp_path / "evil.yaml"
    evil.write_text(f"__use_yte__: true\nrecipes:\n  - ?open({str(ran)!r}, 'w') and 'demo'\nbenchmarks: [mmbench]\n")
    result = fresh.snakemake("-n", "results/mmbench.json", "--configfile", str(evil), *profile, check=False)
    assert result.returncode != 0
    assert f"{evil}: '__use_yte__' lets Snakemake run expressions of this file as Python" in result.stdout
    assert not ran.exists()
    if not profile:
        monkeypatch.chdir(fresh.root)
        with pytest.raises(MmpipeError, match=r"^.*evil\.yaml: '__use_yte__' lets .* in place of expressions$"):
            explain(["results/mmbench.json"], evil)
        assert not ran.exists()


def test_the_main_configuration_runs_no_code_under_any_profile(fresh, tmp_path):
    project, ran = fresh.copy(tmp_path / "project"), tmp_path / "ran"
    project.edit("config/config.yaml", lambda c: c.update(__use_yte__=True, recipes=[f"?open({str(ran)!r}, 'w')"]))
    result = project.snakemake("-n", "results/mmbench.json", "--workflow-profile", "none", check=False)
    assert "config/config.yaml: '__use_yte__' lets Snakemake run expressions" in result.stdout
    assert not ran.exists()
    result = project.snakemake(
        "-n", "x", "--configfile", "config/demo-moss2.yaml", "--config", "__use_yte__=1", check=False
    )
    assert "'__use_yte__' lets Snakemake run expressions" in result.stdout


def test_planning_is_quick_and_imports_nothing_heavy(fresh):
    import subprocess
    import sys

    code = (
        "import sys, yaml; sys.path.insert(0, 'src')\n"
        "from mmpipe.plan.plan import Plan\n"
        "Plan(yaml.safe_load(open('config/config.yaml')))\n"
        "print([m for m in ('torch', 'transformers', 'datasets', 'pandas', 'matplotlib') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=fresh.root, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_the_schema_of_the_configuration_is_up_to_date(fresh):
    from mmpipe.plan.schema import configuration_schema

    assert json.loads((fresh.root / "config/schema.json").read_text()) == configuration_schema(), (
        "the models changed: run 'mmpipe schema --out config/schema.json'"
    )
