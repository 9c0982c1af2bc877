"""Digests of files: remembered per version, and right whatever happened to the cache."""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path

import pytest

from mmpipe.artifacts import hashes


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(hashes, "_known", {})
    return tmp_path / "cache" / "mmpipe" / "sha256"


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files whose content was hashed."""
    files: list[str] = []
    original = hashes._compute
    monkeypatch.setattr(hashes, "_compute", lambda path: (files.append(path.name), original(path))[1])
    return files


def settled(path: Path, content: bytes) -> Path:
    """A file that was written a moment ago, not just now."""
    path.write_bytes(content)
    time.sleep(0.11)
    return path


BIG = bytes(hashes.SMALL)


def test_a_version_of_a_file_is_hashed_once(
    tmp_path: Path, cache: Path, hashed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    small, big = settled(tmp_path / "small", b"s"), settled(tmp_path / "big", BIG)
    for _ in range(2):
        assert hashes.digests([small, big, big]) == {
            path: hashlib.sha256(path.read_bytes()).hexdigest() for path in (small, big)
        }
    assert sorted(hashed) == ["big", "small"]
    monkeypatch.setattr(hashes, "_known", {})  # another process
    hashes.digests([small, big])
    assert sorted(hashed) == ["big", "small", "small"]
    assert len(list(cache.iterdir())) == 1  # small files have no entry


def test_another_content_is_another_version_whatever_its_time(tmp_path: Path, cache: Path) -> None:
    path = settled(tmp_path / "file", BIG)
    before, facts = hashes.digest(path), path.stat()
    with path.open("r+b") as file:
        file.write(b"1")
    os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    assert hashes.digest(path) == hashlib.sha256(b"1" + BIG[1:]).hexdigest() != before


def test_a_link_is_the_file_that_it_points_to(tmp_path: Path, cache: Path, hashed: list[str]) -> None:
    path = settled(tmp_path / "file", BIG)
    (tmp_path / "link").symlink_to(path)
    assert hashes.digest(tmp_path / "link") == hashes.digest(path)
    assert hashed == ["file"]


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"version": 1, "sha256": "' + "0" * 64 + '"}', "\x00\xff"])
def test_a_broken_entry_of_the_cache_is_passed_over(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, content: str
) -> None:
    path = settled(tmp_path / "file", BIG)
    right = hashes.digest(path)
    (entry,) = cache.iterdir()
    entry.write_text(content)
    monkeypatch.setattr(hashes, "_known", {})
    assert hashes.digest(path) == right


def test_a_cache_that_cannot_be_written_is_no_error(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cache").write_text("a file in place of the folder")
    path = settled(tmp_path / "file", BIG)
    right = hashlib.sha256(BIG).hexdigest()
    assert hashes.digest(path) == right
    monkeypatch.setattr(hashes, "_known", {})
    assert hashes.digest(path) == right
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    monkeypatch.setattr(hashes, "_known", {})
    assert hashes.digest(path) == right


def test_reading_in_any_case_finds_what_the_cache_does_not_know(tmp_path: Path, cache: Path, hashed: list[str]) -> None:
    path = settled(tmp_path / "file", BIG)
    hashes.digest(path)
    hashes.digest(path, cache=False)
    assert hashed == ["file", "file"]


def test_a_file_that_was_just_written_is_not_remembered(tmp_path: Path, cache: Path, hashed: list[str]) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"1")
    hashes.digest(path)
    hashes.digest(path)
    assert hashed == ["file", "file"]


def test_a_missing_file_is_an_error(tmp_path: Path, cache: Path) -> None:
    with pytest.raises(FileNotFoundError):
        hashes.digest(tmp_path / "missing")
