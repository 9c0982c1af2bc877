"""The machine's check-up, on machines made up of a few scripts and facts."""

from __future__ import annotations

import json
import os
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest

from mmpipe.cli.main import app
from mmpipe.doctor import Machine, all_checks, examine
from mmpipe.doctor.base import Finding

REPOSITORY = Path(__file__).parents[2]
PAPER = REPOSITORY / "config/llava-1.5.yaml"
SMI = "echo '| NVIDIA-SMI {driver}   Driver Version: {driver}   CUDA Version: {cuda} |'"
CARD = {"name": "A100", "memory": 80_000_000_000, "free": 80_000_000_000, "bfloat16": True}
Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Lets a test say which programs this machine has, and what they do."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for real in ("sh", "bash", "which", "sleep", "echo"):  # Snakemake looks for some itself
        (folder / real).symlink_to(shutil.which(real) or "")
    monkeypatch.setenv("PATH", str(folder))

    def have(name: str, script: str = "true") -> None:
        (folder / name).write_text(f"#!{folder / 'sh'}\n{script}\n")
        (folder / name).chmod(0o755)

    return have


def machine(profile: str = "local", configfile: Path = REPOSITORY / "config/config.yaml", **torch: Any) -> Machine:
    """A machine with this repository; ``torch`` changes what its torch says, an A100 unless told otherwise."""
    made = Machine(REPOSITORY, profile, configfile)
    facts = {"version": "2.13.0", "cuda": "13.0", "available": True, "gpus": [CARD], "nccl": "2.27.7", "flash": None}
    made.torch = {**facts, **torch}  # type: ignore[misc]
    return made


def found(name: str, on: Machine) -> list[Finding]:
    return list(all_checks()[name.replace("_", " ")](on))


def statuses(name: str, on: Machine) -> list[str]:
    return [finding.status for finding in found(name, on)]


def test_every_failed_check_has_a_remedy(programs):
    findings = examine(machine("slurm", PAPER, gpus=[{**CARD, "bfloat16": False, "free": 1}], flash="it does not load"))
    assert {finding.topic for finding in findings} >= {"driver", "slurm", "file system", "profile"}
    assert all(finding.advice for finding in findings if finding.status != "ok"), findings


def test_a_check_that_cannot_be_carried_out_is_a_problem_and_the_others_go_on(tmp_path):
    broken = tmp_path / "config.yaml"
    broken.write_text("recipes: [nobody]\nbenchmarks: [mmbench]\n")
    findings = examine(machine(configfile=broken))
    assert [f.topic for f in findings if f.status == "problem"] == ["configuration"]
    assert len({f.topic for f in findings}) == len(all_checks())


@pytest.mark.parametrize(
    ("driver", "torch", "status"),
    [
        ("13.0", {}, "ok"),
        ("12.8", {}, "problem"),  # torch for a newer CUDA than the driver knows
        ("13.1", {"cuda": "12.8"}, "ok"),
        ("13.0", {"cuda": "13.2"}, "ok"),  # minor versions go together
        ("13.0", {"cuda": None, "available": False}, "warning"),
        ("13.0", {"available": False}, "problem"),
    ],
)
def test_driver_and_torch_are_set_side_by_side(programs, driver, torch, status):
    programs("nvidia-smi", SMI.format(driver="580.1", cuda=driver))
    (finding,) = found("driver", machine(**torch))
    assert finding.status == status
    assert "580.1" in finding.seen
    assert driver in finding.seen


def test_a_driver_that_is_not_loaded_and_a_torch_that_does_not_start(programs):
    programs("nvidia-smi", "echo 'Driver/library version mismatch' >&2; exit 18")
    (finding,) = found("driver", machine())
    assert finding.status == "problem"
    assert "mismatch" in finding.seen
    absent = Machine(REPOSITORY)
    absent.torch = {"error": "ImportError: libcudart.so"}  # type: ignore[misc]
    assert statuses("driver", absent) == ["problem"]


def test_cards_that_a_profile_hands_out_must_be_there(programs, tmp_path):
    mine = tmp_path / "profile.yaml"
    mine.write_text("cores: all\nresources: {gpu: 4}\n")
    assert statuses("gpus", machine(str(tmp_path))) == ["problem"]
    assert statuses("gpus", machine("gpu")) == ["ok"]
    none = {"cuda": None, "available": False, "gpus": []}
    assert statuses("driver", machine("gpu", **none)) == ["problem"]
    assert statuses("gpus", machine("local", PAPER, **none)) == ["warning"]
    assert statuses("gpus", machine("slurm", PAPER, **none)) == ["ok"]


def test_old_and_busy_cards_are_named():
    old = {**CARD, "name": "V100", "bfloat16": False}
    busy = {**CARD, "free": 10_000_000_000}
    seen = [f.seen for f in found("gpus", machine("local", PAPER, gpus=[old, busy])) if f.status == "warning"]
    assert len(seen) == 2
    assert "V100" in seen[0]
    assert "GPU 1: 70.0 GB" in seen[1]


def test_several_cards_need_nccl():
    assert statuses("nccl", machine(gpus=[CARD, CARD], nccl=None)) == ["problem"]
    assert statuses("nccl", machine(nccl=None)) == ["ok"]


def test_missing_flash_attention_names_its_replacement():
    (finding,) = found("flash_attention", machine(flash="the package flash-attn is not installed"))
    assert finding.status == "ok"
    assert "sdpa will be used" in finding.seen
    assert statuses("flash_attention", machine(flash="flash-attn is installed but does not load (x)")) == ["warning"]


def test_deepspeed_is_missed_only_by_those_who_want_it(programs, monkeypatch):
    import importlib.metadata

    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.19.8")
    assert statuses("deepspeed", machine(configfile=PAPER)) == ["warning"]  # no compiler
    assert statuses("deepspeed", machine()) == ["ok"]
    for tool in ("ninja", "g++", "nvcc"):
        programs(tool)
    assert statuses("deepspeed", machine(configfile=PAPER)) == ["ok"]

    def nothing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", nothing)
    assert statuses("deepspeed", machine(configfile=PAPER)) == ["warning"]
    assert statuses("deepspeed", machine()) == ["ok"]


def test_libraries_are_compared_with_project_and_lock(tmp_path):
    (tmp_path / "envs").mkdir()
    lock = tmp_path / "envs/requirements.lock"
    (tmp_path / "pyproject.toml").write_text(
        '[project]\nrequires-python = ">=3.11"\ndependencies = ["pydantic>=2", "x-y-z"]\n'
    )
    lock.write_text("# pinned\npydantic==2.0.1  # why\nx-y-z==1.0\n")
    missing, other = found("libraries", Machine(tmp_path))
    assert (missing.status, other.status) == ("problem", "warning")
    assert "x-y-z is not installed" in missing.seen
    assert "tested with 2.0.1" in other.seen
    (tmp_path / "pyproject.toml").write_text('[project]\nrequires-python = ">=9"\ndependencies = ["pydantic>=99"]\n')
    assert "needs >=99" in found("libraries", Machine(tmp_path))[0].seen
    assert statuses("python", Machine(tmp_path)) == ["problem"]


def test_what_is_still_to_be_fetched_must_fit(monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Usage(0, 0, 50e9))
    finding = found("disk", machine(configfile=PAPER))[0]
    assert finding.status == "problem"
    assert "needed" in finding.seen
    assert set(statuses("disk", machine())) == {"ok"}
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Usage(0, 0, 1e9))
    assert "warning" in statuses("disk", machine())


def test_a_disk_without_locks_is_found(tmp_path, monkeypatch):
    import fcntl

    assert statuses("file_system", Machine(tmp_path)) == ["ok", "ok"]
    assert list(tmp_path.iterdir()) == []

    def refuse(*_: Any) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    assert statuses("file_system", Machine(tmp_path)) == ["problem", "problem"]


def test_locks_that_do_not_lock_are_found(tmp_path, monkeypatch):
    import fcntl

    monkeypatch.setattr(fcntl, "flock", lambda *_: None)  # as a mount with nolock does
    assert "same lock" in found("file_system", Machine(tmp_path))[0].seen


def test_the_token_is_never_shown(monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setenv("HF_TOKEN", "hf_verysecret")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    (online,) = found("hugging_face", machine(configfile=PAPER))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    (offline,) = found("hugging_face", machine(configfile=PAPER))
    assert (online.status, offline.status) == ("ok", "problem")
    assert "with a token" in online.seen
    assert "verysecret" not in str([online, offline])
    assert statuses("hugging_face", machine()) == ["ok"]  # offline, and nothing to fetch


def test_slurm_that_is_not_there_or_does_not_answer(programs):
    assert statuses("slurm", machine("local")) == ["ok"]
    assert "problem" in statuses("slurm", machine("slurm"))
    programs("scontrol", "echo 'Slurmctld(primary) at head is DOWN'")
    assert statuses("slurm", machine("local")) == ["warning"]
    assert "problem" in statuses("slurm", machine("slurm"))


def test_a_question_has_a_time_limit(programs):
    programs("scontrol", "exec sleep 60")
    answer = machine().ask("scontrol", "ping", seconds=0.3)
    assert answer is not None
    assert answer.status is None
    assert "0.3 seconds" in answer.complaint


def test_partitions_are_read_as_sinfo_writes_them():
    from mmpipe.doctor.checks.slurm import Partition, read_partitions

    text = "gpu*|2-00:00:00|gpu:a100:8(S:0-1)|up\ngpu*|2-00:00:00|(null)|up\nfast|30:00|gpu:2,nvme:1|up\nold|infinite|(null)|down"
    assert read_partitions(text) == [Partition("gpu", True, 2880, 8), Partition("fast", False, 30, 2)]


@pytest.mark.parametrize(
    ("partition", "complaint"),
    [
        ("gpu*|2-00:00:00|gpu:a100:8|up", None),
        ("gpu*|2-00:00:00|gpu:a100:4|up", "8 GPUs a node, partition 'gpu' has 4"),
        ("gpu*|2:00:00|gpu:a100:8|up", "allows 120"),
        ("gpu|infinite|gpu:8|up", "no default partition"),
    ],
)
def test_the_recipes_must_fit_the_partition(programs, partition, complaint):
    programs("scontrol", "echo 'Slurmctld(primary) at head is UP'")
    programs("sinfo", f"echo '{partition}'")
    programs("squeue")
    problems = [f.seen for f in found("slurm", machine("slurm", PAPER)) if f.status == "problem"]
    assert bool(problems) == bool(complaint), problems
    assert any((complaint or "") in problem for problem in problems) or complaint is None


def test_profiles_are_checked_key_by_key(tmp_path):
    assert statuses("profile", machine("slurm")) == ["ok"]
    assert statuses("profile", machine("slrum")) == ["problem"]
    mine = tmp_path / "profile.yaml"
    mine.write_text("executor: slurm\nrerun-incomplet: true\ndefault-resources: {gres: 'gpu:1'}\n")
    unknown, gpus = found("profile", machine(str(tmp_path)))
    assert "rerun-incomplete" in unknown.advice
    assert "gpu_request" in gpus.advice


def test_the_command_prints_json_and_fails_on_problems(monkeypatch, tmp_path):
    from typer.testing import CliRunner

    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setattr(Machine, "torch", {"error": "no such library"})
    result = CliRunner().invoke(app, ["doctor", "--json"])
    assert result.exit_code == 1
    assert {"status": "problem", "topic": "driver"}.items() <= {
        k: v for f in json.loads(result.output) if f["topic"] == "driver" for k, v in f.items()
    }.items()
    assert os.environ.get("HF_TOKEN", "-") not in result.output or "HF_TOKEN" not in os.environ
    healthy = {
        "version": "2.13.0",
        "cuda": None,
        "available": False,
        "gpus": [],
        "nccl": None,
        "flash": "it needs a GPU",
    }
    monkeypatch.setattr(Machine, "torch", healthy)
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 0, result.output
    assert "0 problem(s)" in result.output
