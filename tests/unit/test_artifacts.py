"""Artifacts appear whole or not at all, and progress belongs to one spec."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mmpipe.artifacts import manifest
from mmpipe.artifacts.files import (
    atomic_open,
    canonical_json,
    read_json,
    read_report,
    recover_lines,
    staged_directory,
    write_json,
)
from mmpipe.artifacts.state import open_state
from mmpipe.errors import ArtifactError


def files_below(path: Path) -> list[str]:
    return sorted(p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file())


def test_a_failed_write_leaves_nothing(tmp_path):
    target = tmp_path / "a.json"
    with contextlib.suppress(KeyboardInterrupt), atomic_open(target) as file:
        file.write(b"half")
        raise KeyboardInterrupt
    assert files_below(tmp_path) == []


def test_a_failed_write_leaves_the_old_file(tmp_path):
    target = tmp_path / "a.json"
    write_json(target, {"old": 1})
    with contextlib.suppress(KeyboardInterrupt), atomic_open(target) as file:
        file.write(b"half")
        raise KeyboardInterrupt
    assert json.loads(target.read_text()) == {"old": 1}


def test_a_staged_directory_replaces_the_old_files(tmp_path):
    target = tmp_path / "model"
    with staged_directory(target) as stage:
        (stage / "old.bin").write_bytes(b"1")
        (stage / "both.bin").write_bytes(b"1")
    with staged_directory(target) as stage:
        (stage / "both.bin").write_bytes(b"2")
        (stage / "deep").mkdir()
        (stage / "deep/new.bin").write_bytes(b"2")
    assert files_below(tmp_path) == ["model/both.bin", "model/deep/new.bin"]
    assert (target / "both.bin").read_bytes() == b"2"


def test_a_failed_stage_leaves_the_old_directory(tmp_path):
    target = tmp_path / "model"
    with staged_directory(target) as stage:
        (stage / "a").write_text("old")
    with contextlib.suppress(KeyboardInterrupt), staged_directory(target) as stage:
        (stage / "a").write_text("new")
        raise KeyboardInterrupt
    assert (target / "a").read_text() == "old"
    assert files_below(tmp_path) == ["model/a"]


def test_the_manifest_arrives_last(tmp_path, monkeypatch):
    order = []
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (order.append(Path(b).name), replace(a, b)))
    with staged_directory(tmp_path / "model") as stage:
        for name in ("manifest.json", "a", "z"):
            (stage / name).write_text("")
    assert order == ["a", "z", "manifest.json"]


def test_manifests_are_deterministic_and_checked(tmp_path):
    (tmp_path / "weights").write_bytes(b"12345")
    card = manifest.write(tmp_path, kind="model", spec='{"a":1}', inputs={"x": "0"}, seed=3)
    first = (tmp_path / "manifest.json").read_bytes()
    manifest.write(tmp_path, kind="model", spec='{"a":1}', inputs={"x": "0"}, seed=3)
    assert (tmp_path / "manifest.json").read_bytes() == first
    assert manifest.read(tmp_path) == json.loads(first)
    assert card["files"]["weights"]["size"] == 5
    (tmp_path / "weights").write_bytes(b"123")
    with pytest.raises(ArtifactError, match=r"weights: 3 bytes, but .* lists 5 bytes"):
        manifest.read(tmp_path)
    (tmp_path / "weights").unlink()
    with pytest.raises(ArtifactError, match="weights: missing"):
        manifest.read(tmp_path)


def test_a_directory_without_manifest_was_never_finished(tmp_path):
    with pytest.raises(ArtifactError, match="never finished"):
        manifest.read(tmp_path)


def test_state_belongs_to_one_fingerprint(tmp_path):
    state = tmp_path / "state"
    with open_state(state, "one") as resumable:
        assert not resumable
        (state / "progress").write_text("1")
    with open_state(state, "one") as resumable:
        assert resumable
        assert (state / "progress").read_text() == "1"
    with open_state(state, "two") as resumable:
        assert not resumable
        assert not (state / "progress").exists()


def test_two_runs_of_one_step_are_kept_apart(tmp_path):
    state = tmp_path / "state"
    code = (
        "import sys, pathlib\nfrom mmpipe.artifacts.state import open_state\n"
        "with open_state(pathlib.Path(sys.argv[1]), 'one'):\n    print('held', flush=True); sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(state)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(ArtifactError, match=f"another run .*{holder.pid}"), open_state(state, "one"):
            pass
        holder.kill()
    with open_state(state, "one") as resumable:
        assert resumable


def test_canonical_json_ignores_the_order_of_keys():
    assert canonical_json({"b": 1, "a": [1.0, True]}) == canonical_json({"a": [1.0, True], "b": 1})
    assert canonical_json({"a": 1}) != canonical_json({"a": True})


def test_what_a_killed_process_left_beside_the_target_goes(tmp_path):
    left = tmp_path / ".model.4194304.tmp"
    left.mkdir()
    (left / "model.safetensors").write_bytes(b"half")
    other = tmp_path / ".model-2.4194304.tmp"
    other.mkdir()
    with staged_directory(tmp_path / "model") as stage:
        (stage / "file").write_text("whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".model-2.4194304.tmp", "model"]


def test_published_files_have_the_mode_of_the_umask_and_those_of_others_keep_theirs(tmp_path):
    theirs, linked = tmp_path / "theirs", tmp_path / "linked"
    for path in (theirs, linked):
        path.write_text("")
        path.chmod(0o600)
    before = os.umask(0o027)
    try:
        with staged_directory(tmp_path / "model") as stage:
            (stage / "model.safetensors").touch(mode=0o600)  # as safetensors and temporary files are
            (stage / "symbolic").symlink_to(theirs)
            (stage / "hard").hardlink_to(linked)
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "model").iterdir()}
    assert modes == {"model.safetensors": 0o640, "symbolic": 0o600, "hard": 0o600}


def test_artifacts_of_earlier_versions_are_read_in_todays_words(tmp_path: Path) -> None:
    former = {"picture_tokens": 576, "rows": [{"measure": "picture_flops", "keep": None}, {"picture": 0}]}
    (tmp_path / "a.json").write_text(json.dumps(former))
    assert read_report(tmp_path / "a.json") == {
        "image_tokens": 576,
        "rows": [{"measure": "image_flops", "keep": None}, {"image": 0}],
    }
    assert read_json(tmp_path / "a.json") == former, "a data set may be called 'pictures'"


@pytest.mark.parametrize(
    ("content", "whole"),
    [
        (b'{"a":1}\n{"a":2}\n', b'{"a":1}\n{"a":2}\n'),
        (b'{"a":1}\n{"a":', b'{"a":1}\n'),
        (b'{"a":1}\n\x00\x00\n{"a', b'{"a":1}\n'),
        (b'{"a', b""),
        (b"", b""),
    ],
)
def test_the_torn_end_of_appended_lines_is_cut_off(content: bytes, whole: bytes, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    assert recover_lines(path, lambda line: line.startswith(b"{")) == whole.splitlines()
    assert path.read_bytes() == whole
    assert recover_lines(tmp_path / "none.jsonl") == []
