"""Repositories of the hub, from a hub on this machine that fails as hubs do."""

from __future__ import annotations

import glob
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import faulty_server as server
import huggingface_hub
import pytest
from fake_hub import COMMIT, FakeHub
from huggingface_hub import constants
from source_entries import MEMBERS, entry, fetched, make_zip, published

from mmpipe.errors import DataError
from mmpipe.sources import hub as hub_source
from mmpipe.sources.transfer.lock import locked, write_lock

FILES = {"config.json": b"{}", "model.safetensors": bytes(range(256)) * 8, "sub/notes.txt": b"notes", "old.h5": b"h5"}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A hub of one data set, the only one that can be reached."""
    monkeypatch.chdir(tmp_path)
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):  # jobs of other tests in this process may have set them
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 1)
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 1)
    monkeypatch.setattr(hub_source, "PAUSE", 0.01)
    monkeypatch.setattr(hub_source, "ATTEMPTS", 3)
    with server.running() as host:
        monkeypatch.setenv("HF_ENDPOINT", host.url("").rstrip("/"))
        yield FakeHub(host, dict(FILES))


def repository(**settings: Any) -> Any:
    return entry(source="hub", repo="owner/name", repo_type="dataset", **settings)


def test_fetches_a_branch_and_keeps_its_commit(hub: FakeHub) -> None:
    facts = fetched(repository())
    assert published() == FILES
    assert facts["commit"] == COMMIT
    assert facts["files"]["config.json"]["size"] == 2
    assert not (Path("resources/datasets/thing/.cache")).exists()


def test_include_and_exclude(hub: FakeHub) -> None:
    fetched(repository(include=["*.json", "sub/*", "*.h5"], exclude=["*.h5"]))
    assert set(published()) == {"config.json", "sub/notes.txt"}
    assert set(hub.downloads()) == {"config.json", "sub/notes.txt"}


def test_an_include_that_matches_nothing_lists_the_files(hub: FakeHub) -> None:
    with pytest.raises(DataError, match=r"no file of owner/name matches include .*config.json"):
        fetched(repository(include=["*.tsv"]))


def test_unpacks_and_does_not_fetch_what_is_unpacked_again(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = make_zip(tmp_path / "a.zip", MEMBERS).read_bytes()
    hub.move(COMMIT, {"one.zip": archive, "two.zip": archive[:300], "list.txt": b"list"})
    source = repository(unpack={"one.zip": "images", "two.zip": "images"})
    with pytest.raises(DataError, match="archive is damaged"):
        fetched(source)
    with pytest.raises(DataError, match="archive is damaged"):
        fetched(source)
    assert "one.zip" in hub.downloads()
    assert hub.downloads().count("one.zip") <= 2, "asked for once: its head and its body"
    assert hub.downloads().count("two.zip") > hub.downloads().count("one.zip")


def test_a_fetch_ends_at_the_commit_it_began_with(hub: FakeHub, tmp_path: Path) -> None:
    archive = make_zip(tmp_path / "a.zip", MEMBERS).read_bytes()
    hub.move(COMMIT, {"a.zip": archive, "list.txt": b"old"})
    hub.host.serve(hub.path("list.txt"), server.status(404))
    source = repository(unpack={"a.zip": "."})
    with pytest.raises(DataError):
        fetched(source)
    hub.host.serve(hub.path("list.txt"), hub.give("list.txt"))
    hub.move("f" * 40, {"a.zip": archive, "list.txt": b"new"})
    assert fetched(source)["commit"] == COMMIT
    assert published()["list.txt"] == b"old"


def test_a_busy_hub_is_waited_for(hub: FakeHub) -> None:
    info = "/api/datasets/owner/name/revision/main"
    honest = hub.host.answers[info][0]
    hub.host.serve(info, server.status(503), server.status(429, Retry_After="0"), honest)
    fetched(repository())
    assert published() == FILES


def test_a_hub_that_stays_away_is_named_with_ways_around(hub: FakeHub) -> None:
    hub.host.serve("/api/datasets/owner/name/revision/main", server.status(503))
    with pytest.raises(
        DataError, match=r"owner/name: the hub did not give it in 3 attempts .*HF_ENDPOINT.*source: path"
    ):
        fetched(repository())
    assert published() == {}


def test_a_half_filled_folder_is_never_taken_for_the_snapshot(hub: FakeHub) -> None:
    """snapshot_download returns what lies in the folder when the hub does not answer."""
    hub.host.serve(hub.path("model.safetensors"), server.status(404))
    with pytest.raises(DataError):
        fetched(repository())
    for path in hub.host.answers:
        hub.host.serve(path, server.status(503))
    with pytest.raises(DataError, match="the hub did not give it"):
        fetched(repository())
    assert published() == {}


def test_a_refusal_names_the_token(hub: FakeHub) -> None:
    hub.private = True
    with pytest.raises(DataError, match=r"the hub refused owner/name at revision main .*HF_TOKEN"):
        fetched(repository())
    assert len(hub.host.seen) == 1, "asking again would not help"


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_wrong_content_is_found_and_fetched_again(hub: FakeHub, name: str) -> None:
    wrong = bytes(len(FILES[name]))
    honest = hub.give(name)
    hub.host.serve(hub.path(name), hub.give(name, wrong), hub.give(name, wrong), honest)
    fetched(repository())
    assert published() == FILES


def test_a_content_that_stays_wrong_is_refused(hub: FakeHub) -> None:
    hub.host.serve(hub.path("config.json"), hub.give("config.json", b"[]"))
    with pytest.raises(DataError, match=r"config\.json: not what the hub lists"):
        fetched(repository())
    assert published() == {}


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("config.json", partial(server.truncated, after=1)),
        ("model.safetensors", partial(server.truncated, after=1000)),
        ("model.safetensors", partial(server.stalled, after=1000, seconds=2.0)),
        ("model.safetensors", lambda body, **headers: server.status(503)),
        ("model.safetensors", lambda body, **headers: server.status(429, Retry_After="0")),
    ],
    ids=["small truncated", "truncated", "stalled", "503", "429"],
)
def test_a_transfer_that_breaks_off_is_repeated(hub: FakeHub, name: str, fault: server.Fault) -> None:
    hub.fail(name, fault)
    fetched(repository())
    assert published() == FILES


def test_a_transfer_that_never_ends_leaves_nothing_in_place(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_source, "ATTEMPTS", 1)
    hub.fail("model.safetensors", *[partial(server.truncated, after=1)] * 1000)
    with pytest.raises(DataError, match="owner/name: the hub did not give it in 1 attempts"):
        fetched(repository())
    assert published() == {}


def test_a_process_killed_while_downloading_starts_that_file_again(
    hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library goes on with no part of a file; what it left of one goes, what had come whole stays."""
    monkeypatch.setenv("HF_HUB_DOWNLOAD_TIMEOUT", "60")
    monkeypatch.setenv("HF_HUB_CACHE", "cache")
    hub.fail("model.safetensors", partial(server.stalled, after=1000, seconds=60))
    program = (
        "from pathlib import Path; from mmpipe.sources.hub import Hub;"
        "Hub(repo='owner/name', repo_type='dataset').fetch(Path('resources/datasets/thing'))"
    )
    files = Path("resources/datasets/.fetching/thing/files")
    whole = [files / name for name in FILES if name != "model.safetensors"]
    parts = f"{files}/.cache/**/*.incomplete"
    # written behind a file: without it the library takes the file for another and asks again
    whole += [files / ".cache/huggingface/download" / f"{path.relative_to(files)}.metadata" for path in whole]
    process = subprocess.Popen([sys.executable, "-c", program])
    try:
        for _ in range(1000):
            if glob.glob(parts, recursive=True) and all(path.is_file() for path in whole):
                break
            time.sleep(0.02)
    finally:
        process.kill()
        process.wait()
    left = [Path(part) for part in glob.glob(parts, recursive=True)]
    assert left
    assert published() == {}
    hub.host.seen.clear()
    kept: list[bool] = []

    def honest(body: bytes, **headers: str) -> server.Answer:
        kept.extend(path.exists() for path in left)
        return server.content(body, **headers)

    hub.fail("model.safetensors", honest)
    fetched(repository())
    assert published() == FILES
    assert set(hub.downloads()) == {"model.safetensors"}
    assert kept == [False] * len(left), "it takes room and is of no use"


def test_a_renamed_repository_is_followed(hub: FakeHub) -> None:
    hub.rename("former/title")
    source = entry(source="hub", repo="former/title", repo_type="dataset")
    assert fetched(source)["commit"] == COMMIT
    assert published() == FILES


def test_the_lock_pins_a_branch(hub: FakeHub) -> None:
    source = repository(include=["config.json"])
    fetched(source)
    Path("config").mkdir()
    write_lock({"datasets": {"thing": source}})
    assert locked("datasets", "thing") == {"commit": COMMIT}
    hub.move("f" * 40, {"config.json": b'{"new": 1}'})
    assert fetched(source, **locked("datasets", "thing"))["commit"] == COMMIT
    assert published() == {"config.json": b"{}"}
    assert fetched(source)["commit"] == "f" * 40


def test_a_commit_in_the_catalogue_counts_more_than_the_lock(hub: FakeHub) -> None:
    hub.move("f" * 40, {"config.json": b'{"new": 1}'})
    facts = fetched(repository(revision="f" * 40, include=["config.json"]), commit=COMMIT)
    assert facts["commit"] == "f" * 40


def test_the_token_comes_from_the_environment(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_canary")
    fetched(repository(include=["config.json"]))
    assert all(headers.get("authorization") == "Bearer hf_canary" for _, headers in hub.host.seen)
    everything = b"".join(path.read_bytes() for path in Path("resources").rglob("*") if path.is_file())
    assert b"hf_canary" not in everything


def test_the_library_is_the_one_this_was_written_for() -> None:
    assert int(huggingface_hub.__version__.split(".")[0]) == 2
