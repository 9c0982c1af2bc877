"""Entries of the catalogues: what is published, what survives an interruption, what a person is told."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import faulty_server as server
import pytest
from faulty_server import FaultyServer
from source_entries import MEMBERS, entry, fetched, make_zip, published

from mmpipe.artifacts import manifest
from mmpipe.artifacts.files import read_json, sha256
from mmpipe.errors import ConfigError, DataError
from mmpipe.sources.base import Source
from mmpipe.sources.transfer import archives, download, progress
from mmpipe.sources.transfer.lock import locked, write_lock


@pytest.fixture
def host() -> Iterator[FaultyServer]:
    with server.running() as running:
        yield running


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty project, online, with little patience."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    quick = download.Patience(connect=2, read=0.3, attempts=2, pause=0.01, longest_pause=0.02)
    monkeypatch.setattr(download, "Patience", lambda: quick)
    return tmp_path


def zipped(members: dict[str, bytes] = MEMBERS) -> bytes:
    path = make_zip(Path("made.zip"), members)
    content = path.read_bytes()
    path.unlink()
    return content


# --- url --------------------------------------------------------------------------------------------------------------


def test_url_publishes_files_and_unpacked_archives(host: FaultyServer) -> None:
    host.serve("/a.json", server.content(b"[]"))
    body = zipped()
    host.serve("/i.zip", server.content(body))
    source = entry(
        source="url",
        files=[{"url": host.url("/a.json"), "to": "a.json"}, {"url": host.url("/i.zip"), "to": "i.zip"}],
        unpack={"i.zip": "images"},
    )
    facts = fetched(source)
    assert published() == {"a.json": b"[]", **{f"images/{name}": content for name, content in MEMBERS.items()}}
    assert facts["files"] == {"a.json": {"size": 2, "sha256": sha256(Path("resources/datasets/thing/a.json"))}}
    assert facts["unpacked"]["i.zip"]["folder"] == "images"
    assert facts["unpacked"]["i.zip"]["files"] == 3
    assert facts["unpacked"]["i.zip"]["archives"]["i.zip"]["size"] == len(body)
    assert not list(Path("resources/datasets/.fetching").glob("*/")), "nothing is left of the work"
    assert manifest.read(Path("resources/datasets/thing")) == facts


def test_the_same_fetch_writes_the_same_manifest(host: FaultyServer) -> None:
    source = entry(source="url", files=[{"url": host.serve("/a", server.content(b"a")), "to": "a"}])
    assert fetched(source) == fetched(source)


def test_an_interrupted_fetch_downloads_and_unpacks_nothing_twice(
    host: FaultyServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    host.serve("/one.zip", server.content(zipped({"1": b"1"})))
    host.serve("/two.zip", server.content(zipped({"2": b"2"})))
    source = entry(
        source="url",
        files=[{"url": host.url(f"/{n}.zip"), "to": f"{n}.zip"} for n in ("one", "two")],
        unpack={"one.zip": ".", "two.zip": "."},
    )
    real, seen = archives.unpack, []

    def broken(pieces: list[Path], *arguments: Any) -> Any:
        seen.append(pieces[0].name)
        if seen == ["one.zip", "two.zip"]:
            raise KeyboardInterrupt
        return real(pieces, *arguments)

    monkeypatch.setattr(archives, "unpack", broken)
    with pytest.raises(KeyboardInterrupt):
        fetched(source)
    assert published() == {}, "nothing half-done is ever seen"
    fetched(source)
    assert published() == {"1": b"1", "2": b"2"}
    assert host.paths() == ["/one.zip", "/two.zip"]
    assert seen == ["one.zip", "two.zip", "two.zip"]


def killed_after_publishing(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fetch, but die before the notes about the fetch are removed."""
    remove = shutil.rmtree

    def killed(path: Any, **options: Any) -> None:
        if (Path(path) / "done.json").exists() and not (Path(path) / "files").exists():
            raise KeyboardInterrupt
        remove(path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            fetched(source)
    assert published() == {"a": b"a"}


def test_killed_between_publishing_and_forgetting(host: FaultyServer, monkeypatch: pytest.MonkeyPatch) -> None:
    source = entry(source="url", files=[{"url": host.serve("/a", server.content(b"a")), "to": "a"}])
    killed_after_publishing(source, monkeypatch)
    fetched(source)
    assert published() == {"a": b"a"}
    assert host.paths() == ["/a"]


def test_removed_by_a_person_after_such_a_death(host: FaultyServer, monkeypatch: pytest.MonkeyPatch) -> None:
    source = entry(source="url", files=[{"url": host.serve("/a", server.content(b"a")), "to": "a"}])
    killed_after_publishing(source, monkeypatch)
    shutil.rmtree("resources/datasets/thing")
    fetched(source)
    assert published() == {"a": b"a"}
    assert host.paths() == ["/a", "/a"]


def test_a_damaged_archive_is_fetched_anew_next_time(host: FaultyServer) -> None:
    body = zipped()
    url = host.serve("/i.zip", server.content(body[:3000], etag='"bad"'), server.content(body))
    source = entry(source="url", files=[{"url": url, "to": "i.zip"}], unpack={"i.zip": "."})
    with pytest.raises(DataError, match="run the same command again to fetch it anew"):
        fetched(source)
    assert published() == {}
    fetched(source)
    assert published() == MEMBERS


def test_an_unpack_that_matches_nothing_lists_the_files(host: FaultyServer) -> None:
    url = host.serve("/i.zip", server.content(zipped()))
    source = entry(source="url", files=[{"url": url, "to": "i.zip"}], unpack={"images.zip": "."})
    with pytest.raises(DataError, match=r"no file matches 'unpack: images.zip'; there are i\.zip"):
        fetched(source)


def test_split_and_nested_archives(host: FaultyServer) -> None:
    outer = zipped({"inner.zip": zipped({"a/b.txt": b"b"})})
    host.serve("/p1", server.content(outer[:100]))
    host.serve("/p2", server.content(outer[100:]))
    source = entry(
        source="url",
        files=[{"url": host.url(f"/p{n}"), "to": f"outer.zip.00{n}"} for n in (1, 2)],
        unpack={"outer.zip.*": ".", "inner.zip": "."},
    )
    facts = fetched(source)
    assert published() == {"a/b.txt": b"b"}
    assert list(facts["unpacked"]["outer.zip.*"]["archives"]) == ["outer.zip.001", "outer.zip.002"]


def test_the_tenth_piece_comes_after_the_ninth(host: FaultyServer) -> None:
    body = zipped({"long.txt": bytes(range(256)) * 10})
    size = len(body) // 11
    files = []
    for number in range(1, 13):
        url = host.serve(f"/{number}", server.content(body[(number - 1) * size : number * size]))
        files.append({"url": url, "to": f"images_part_{number}.zip.part"})
    fetched(entry(source="url", files=files, unpack={"images_part_*.zip.part": "."}))
    assert list(published()) == ["long.txt"]


def test_another_version_replaces_the_old_one(host: FaultyServer) -> None:
    urls = {name: host.serve(f"/{name}", server.content(name.encode())) for name in "ab"}
    fetched(entry(source="url", files=[{"url": urls["a"], "to": "a"}]))
    fetched(entry(source="url", files=[{"url": urls["b"], "to": "b"}]))
    assert published() == {"b": b"b"}


def test_a_failed_fetch_leaves_the_old_version(host: FaultyServer) -> None:
    fetched(entry(source="url", files=[{"url": host.serve("/a", server.content(b"a")), "to": "a"}]))
    with pytest.raises(DataError, match="404"):
        fetched(entry(source="url", files=[{"url": host.url("/gone"), "to": "a"}]))
    assert published() == {"a": b"a"}


def test_a_file_that_a_person_offers_is_taken_after_the_same_checks(host: FaultyServer) -> None:
    offered = Path("resources/manual/thing/a")
    offered.parent.mkdir(parents=True)
    offered.write_bytes(b"right")
    source = entry(source="url", files=[{"url": host.url("/a"), "to": "a", "sha256": sha256(offered)}])
    offered.write_bytes(b"wrong")
    with pytest.raises(DataError, match="a: the content has the sha256"):
        fetched(source)
    assert offered.read_bytes() == b"wrong", "what a person put there is theirs"
    offered.write_bytes(b"right")
    fetched(source)
    assert published() == {"a": b"right"}
    assert host.seen == []
    assert offered.exists()


def test_offline_is_an_error_that_names_the_way_out(host: FaultyServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for source in (
        entry(source="url", files=[{"url": host.url("/a"), "to": "a"}]),
        entry(source="hub", repo="owner/name"),
        entry(source="drive", files=[{"id": "0123456789", "to": "a"}]),
    ):
        with pytest.raises(DataError, match=r"HF_HUB_OFFLINE forbids the network; .*source: path"):
            fetched(source)
    assert host.seen == []


def test_needs_the_room_it_announces(host: FaultyServer) -> None:
    source = entry(source="url", files=[{"url": host.url("/a"), "to": "a"}], size_gb=1e9)
    with pytest.raises(DataError, match="are free"):
        fetched(source)
    assert host.seen == []


def test_free_disk_space_is_checked_against_the_lock(host: FaultyServer) -> None:
    source = entry(source="drive", files=[{"id": "0123456789", "to": "a"}])
    with pytest.raises(DataError, match=r"needs 5000000000\.0 GB below .*are free"):
        fetched(source, downloads={"a": {"size": 5 * 10**18, "sha256": "0" * 64}})


def test_a_long_download_logs_its_progress(
    host: FaultyServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(progress, "EVERY", 0.05)
    body = bytes(100_000)
    url = host.serve("/a", server.stalled(body, 70_000, seconds=0.2), server.content(body))
    with caplog.at_level("INFO"):
        fetched(entry(source="url", files=[{"url": url, "to": "a", "size": len(body)}]))
    assert re.search(r"thing: .* of 100\.0 kB \(\d+%\) are here, .* a second", caplog.text)


@pytest.mark.parametrize(
    ("settings", "level", "told"),
    [
        ({}, "INFO", "thing: licence not stated"),
        ({"licence": "MIT"}, "INFO", "thing: MIT"),
        ({"licence": "X", "restricted": "non-commercial"}, "WARNING", "thing: X; non-commercial"),
        ({"restricted": ["research only", "consent"]}, "WARNING", "stated; research only; consent"),
    ],
)
def test_the_licence_is_logged_when_a_fetch_begins(
    host: FaultyServer, caplog: pytest.LogCaptureFixture, settings: dict[str, Any], level: str, told: str
) -> None:
    file = {"url": host.serve("/a", server.content(b"a")), "to": "a"}
    with caplog.at_level("INFO"):
        fetched(entry(source="url", files=[file], **settings))
    assert [record.levelname for record in caplog.records if told in record.message] == [level]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"files": []}, "files"),
        ({"files": [{"url": "ftp://x/a", "to": "a"}]}, "https?"),
        ({"files": [{"url": "http://x/a", "to": "../a"}]}, "must lie inside"),
        ({"files": [{"url": "http://x/a", "to": "a", "sha256": "abc"}]}, "pattern"),
        ({"files": [{"url": "http://x/a", "to": "a"}], "unpack": {"a": "/tmp"}}, "must lie inside"),
        ({"file": []}, "unknown key"),
        ({"files": [{"url": "http://x/a", "to": "a"}], "restricted": "no"}, "restricted"),
    ],
)
def test_mistakes_in_the_catalogue_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        entry(source="url", **settings)


def test_where_a_file_comes_from_does_not_make_it_stale() -> None:
    file = {"url": "http://x/a", "to": "a"}
    plain = entry(source="url", files=[file])
    assert plain.spec() == entry(source="url", files=[{**file, "mirrors": ["http://y/a"]}]).spec()
    assert plain.spec() == entry(source="url", files=[file], licence="MIT", size_gb=3, records=5).spec()
    assert plain.spec() != entry(source="url", files=[{**file, "sha256": "0" * 64}]).spec()


@pytest.mark.parametrize("kind", ["url", "path", "joined"])
def test_what_a_person_put_into_the_place_of_an_entry_is_not_removed(host: FaultyServer, kind: str) -> None:
    theirs = Path("resources/datasets/thing/train2017")
    theirs.mkdir(parents=True)
    (theirs / "1.jpg").write_bytes(b"precious")
    Path("elsewhere").mkdir()
    settings: dict[str, Any] = {
        "url": {"files": [{"url": host.serve("/a", server.content(b"a")), "to": "a"}]},
        "path": {"path": "elsewhere"},
        "joined": {"parts": {"x": "other"}},
    }[kind]
    with pytest.raises(DataError, match=r"files that no fetch put there \(train2017.*source: path"):
        fetched(entry(source=kind, **settings))
    assert (theirs / "1.jpg").read_bytes() == b"precious"
    assert host.seen == []


def test_a_process_killed_while_downloading_goes_on_where_it_was(host: FaultyServer) -> None:
    body = bytes(range(256)) * 4000
    url = host.serve("/a", server.stalled(body, 700_000, seconds=2), server.content(body))
    program = (
        "from pathlib import Path; from mmpipe.sources.url import Url;"
        f"Url(files=[{{'url': {url!r}, 'to': 'a'}}]).fetch(Path('resources/datasets/thing'))"
    )
    part = Path("resources/datasets/.fetching/thing/files/a.part")
    process = subprocess.Popen([sys.executable, "-c", program])
    try:
        for _ in range(500):
            if part.exists() and part.stat().st_size > 600_000:
                break
            time.sleep(0.02)
    finally:
        process.kill()
        process.wait()
    assert published() == {}
    fetched(entry(source="url", files=[{"url": url, "to": "a"}]))
    assert published() == {"a": body}
    assert int(host.seen[-1][1]["Range"].removeprefix("bytes=").rstrip("-")) > 600_000


# --- the lock ---------------------------------------------------------------------------------------------------------


def test_the_lock_holds_later_fetches_to_the_first(host: FaultyServer) -> None:
    url = host.serve("/i.zip", server.content(zipped()))
    source = entry(source="url", files=[{"url": url, "to": "i.zip"}], unpack={"i.zip": "."})
    facts = fetched(source)
    Path("config").mkdir()
    assert write_lock({"datasets": {"thing": source}}) == ["datasets/thing"]
    pins = locked("datasets", "thing")
    assert pins == {"downloads": facts["unpacked"]["i.zip"]["archives"]}
    fetched(source, **pins)
    host.serve("/i.zip", server.content(zipped({"another": b"file"}), etag='"two"'))
    with pytest.raises(DataError, match=r"but config/lock.json says"):
        fetched(source, **pins)
    assert published() == MEMBERS


def test_the_lock_keeps_what_it_has_and_drops_what_is_gone(host: FaultyServer) -> None:
    source = entry(source="url", files=[{"url": host.serve("/a", server.content(b"a")), "to": "a"}])
    fetched(source)
    Path("config").mkdir()
    write_lock({"datasets": {"thing": source}})
    before = locked("datasets", "thing")
    host.serve("/a", server.content(b"changed"))
    fetched(source)
    assert write_lock({"datasets": {"thing": source, "never-fetched": source}}) == []
    assert locked("datasets", "thing") == before
    write_lock({"datasets": {}})
    assert locked("datasets", "thing") == {}


# --- manual, path, joined ---------------------------------------------------------------------------------------------


def test_manual_prints_instructions_and_then_takes_the_file() -> None:
    source = entry(
        source="manual",
        files=[{"to": "i.zip"}],
        folders=["sam"],
        how="accept the licence, then download",
        licence="research only",
        homepage="https://example.org",
        unpack={"i.zip": "images"},
    )
    place = Path("resources/manual/thing")
    with pytest.raises(DataError) as told:
        fetched(source)
    for word in (
        "research only",
        "accept the licence",
        "https://example.org",
        f"{place}/: i.zip, sam/",
        "source: path",
    ):
        assert word in str(told.value)
    (place / "sam").mkdir(parents=True)
    (place / "sam/1.jpg").write_bytes(b"1")
    (place / "i.zip").write_bytes(zipped())
    fetched(source)
    assert (place / "i.zip").exists()
    assert Path("resources/datasets/thing/sam/1.jpg").read_bytes() == b"1"
    assert Path("resources/datasets/thing/images/list.json").exists()


def test_path_adopts_a_directory_and_follows_its_changes() -> None:
    origin = Path("elsewhere")
    (origin / "folder").mkdir(parents=True)
    (origin / "a.json").write_text("[]")
    facts = fetched(entry(source="path", path=str(origin)))
    assert facts["files"]["a.json"] == {"size": 2}
    (origin / "a.json").rename(origin / "b.json")
    fetched(entry(source="path", path=str(origin)))
    names = {path.name for path in Path("resources/datasets/thing").iterdir()}
    assert names == {"b.json", "folder", manifest.NAME}
    assert (origin / "folder").is_dir(), "replacing links leaves what they lead to"


def test_path_counts_what_lies_below_so_that_adopting_again_notices_changes() -> None:
    origin = Path("elsewhere")
    (origin / "deep/er").mkdir(parents=True)
    (origin / "deep/er/1.jpg").write_bytes(b"12345")
    (origin / "list.json").write_bytes(b"[]")
    source = entry(source="path", path=str(origin))
    facts = fetched(source)
    assert facts["below"] == {"files": 2, "size": 7}
    assert fetched(source) == facts
    (origin / "deep/er/2.jpg").write_bytes(b"1")
    assert fetched(source)["below"] == {"files": 3, "size": 8}
    assert fetched(entry(source="path", path=str(origin / "list.json")), "one")["below"]["files"] == 1


def test_joined_lays_out_others_by_relative_links() -> None:
    for name, files in {"coco": ["train2017/1.jpg"], "text": ["a.json"], "more": ["val2017/2.jpg"]}.items():
        for file in files:
            path = Path("resources/datasets", name, file)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(name)
        manifest.write(Path("resources/datasets", name), kind="source", spec="{}", inputs={})
    source = entry(
        source="joined",
        parts={".": "text", "coco": ["coco", "more"], "deep/er": "coco/train2017", "one.json": "text/a.json"},
    )
    assert source.needs() == ("coco", "more", "text")
    facts = fetched(source)
    out = Path("resources/datasets/thing")
    for file in ("a.json", "coco/train2017/1.jpg", "coco/val2017/2.jpg", "deep/er/1.jpg", "one.json"):
        assert (out / file).is_file(), file
    assert facts["files"] == {}
    Path("resources").rename("moved")
    assert Path("moved/datasets/thing/coco/train2017/1.jpg").is_file()


def test_joined_names_what_is_missing_or_doubled() -> None:
    for name in "ab":
        Path("resources/datasets", name).mkdir(parents=True)
        Path("resources/datasets", name, "x.json").write_text(name)
    with pytest.raises(DataError, match="there is no resources/datasets/a/y to link to"):
        fetched(entry(source="joined", parts={"y": "a/y"}))
    with pytest.raises(DataError, match="two of the 'parts' in the catalogue want this place"):
        fetched(entry(source="joined", parts={".": ["a", "b"]}))


# --- Google Drive -----------------------------------------------------------------------------------------------------


def fake_gdown(monkeypatch: pytest.MonkeyPatch, **functions: Any) -> None:
    module = types.ModuleType("gdown")
    module.exceptions = types.SimpleNamespace(DownloadError=type("DownloadError", (Exception,), {}))  # type: ignore[attr-defined]
    for name, function in functions.items():
        setattr(module, name, function)
    monkeypatch.setitem(sys.modules, "gdown", module)


def test_drive_without_its_library_names_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gdown", None)
    with pytest.raises(DataError, match=r"mmpipe\[drive\].*drive.google.com/file/d/0123456789/view.*manual/thing"):
        fetched(entry(source="drive", files=[{"id": "0123456789", "to": "a"}]))


def test_drive_downloads_files(monkeypatch: pytest.MonkeyPatch) -> None:
    body = zipped()

    def download(id: str, output: str, **options: Any) -> str:
        assert id == "0123456789"
        Path(output).write_bytes(body)
        Path(f"{output}abc.part").write_bytes(b"left over")
        return output

    fake_gdown(monkeypatch, download=download)
    source = entry(source="drive", files=[{"id": "0123456789", "to": "i.zip"}], unpack={"i.zip": "."})
    fetched(source)
    assert published() == MEMBERS


def test_drive_downloads_folders(monkeypatch: pytest.MonkeyPatch) -> None:
    def download_folder(id: str, output: str, **options: Any) -> list[str]:
        Path(output, "sub").mkdir()
        Path(output, "sub/a.txt").write_text("a")
        return []

    fake_gdown(monkeypatch, download_folder=download_folder)
    facts = fetched(entry(source="drive", folder="0123456789"))
    assert list(facts["files"]) == ["sub/a.txt"]


def test_drive_that_refuses_names_the_way_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(**options: Any) -> str:
        raise sys.modules["gdown"].exceptions.DownloadError("too many users")

    fake_gdown(monkeypatch, download=download)
    with pytest.raises(DataError, match=r"too many users.*browser from https://drive.*manual/thing"):
        fetched(entry(source="drive", files=[{"id": "0123456789", "to": "a"}]))


def test_a_wrong_file_from_drive_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_gdown(monkeypatch, download=lambda output, **options: Path(output).write_text("quota exceeded"))
    source = entry(source="drive", files=[{"id": "0123456789", "to": "a", "sha256": "0" * 64}])
    with pytest.raises(DataError, match="sha256"):
        fetched(source)
    assert not list(Path("resources/datasets/.fetching/thing/files").iterdir())
    assert read_json(Path("resources/datasets/.fetching/thing/fingerprint.json"))


def test_secrets_of_an_address_are_in_no_file(host, workplace):
    url = host.serve("/a.zip?token=canary", server.content(b"x"))
    source = entry(source="url", files=[{"url": url, "to": "a.zip"}])
    fetched(source)
    assert published() == {"a.zip": b"x"}
    written = "".join(path.read_text(errors="replace") for path in workplace.rglob("*") if path.is_file())
    assert "canary" not in written + json.dumps(source.spec())
