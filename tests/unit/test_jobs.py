"""What a person sees when a job fails: one message, in the terminal and in the log, and a status."""

from __future__ import annotations

import errno
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from mmpipe import jobs
from mmpipe.errors import DataError
from mmpipe.jobs import job, mock_snakemake
from mmpipe.plan.plan import Plan

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def snakemake(tmp_path, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    config = yaml.safe_load((REPOSITORY / "config/config.yaml").read_text())
    made = {"log": [str(tmp_path / "logs/job.log")], "input": [], "output": [str(tmp_path / "made")], "params": {}}
    return SimpleNamespace(**made, threads=1, config=config, resources={})


def failing(error: BaseException):
    @job
    def work(snakemake, plan):
        raise error

    return work


def test_what_the_user_can_mend_has_no_traceback(snakemake, capsys):
    with pytest.raises(SystemExit) as stopped:
        failing(DataError("a.json, record 3: no answer; add one"))(snakemake)
    assert stopped.value.code == 1
    assert capsys.readouterr().err == "mmpipe: a.json, record 3: no answer; add one\n"
    log = Path(snakemake.log[0]).read_text()
    assert "record 3" in log
    assert "Traceback" not in log


def test_a_full_disk_names_the_file_and_the_way_out(snakemake, capsys):
    with pytest.raises(SystemExit):
        failing(OSError(errno.ENOSPC, "No space left on device", "results/x"))(snakemake)
    message = capsys.readouterr().err
    assert "results/x" in message
    assert "free some space and run the same command again" in message


def test_a_defect_keeps_its_traceback_in_the_log(snakemake):
    with pytest.raises(ZeroDivisionError):
        failing(ZeroDivisionError("oops"))(snakemake)
    assert "Traceback" in Path(snakemake.log[0]).read_text()


def test_jobs_report_configuration_errors_too(snakemake, capsys):
    snakemake.config["recipes"] = ["dmo"]
    with pytest.raises(SystemExit):
        failing(AssertionError("never reached"))(snakemake)
    assert "did you mean 'demo'" in capsys.readouterr().err


@pytest.fixture
def here(monkeypatch):
    """The root of the project, without GPUs; what the Snakefile changes in this process is put back."""
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("PYTHONPATH", "")
    monkeypatch.setattr(sys, "path", [*sys.path])


def test_a_script_can_be_run_without_snakemake(here):
    mocked = mock_snakemake("finetune", recipe="demo", stage="finetune")
    assert mocked.output.manifest == "results/demo/finetune/model/manifest.json"
    assert mocked.input.parent == "results/demo/pretrain/model/manifest.json"
    assert mocked.params.spec == Plan(mocked.config).spec(Plan(mocked.config).stage("demo", "finetune"))
    assert mocked.log[0] == "logs/demo/finetune.log"


@pytest.mark.parametrize("script", sorted((REPOSITORY / "workflow/scripts").glob("*.py")), ids=lambda path: path.stem)
def test_each_script_names_a_job_to_try_it_with(script, here, monkeypatch):
    class Tried(Exception):
        pass

    def tried(*names, **wildcards):
        assert mock_snakemake(*names, **wildcards).output
        raise Tried

    monkeypatch.setattr(jobs, "mock_snakemake", tried)
    with pytest.raises(Tried):
        runpy.run_path(str(script), run_name="__main__")
