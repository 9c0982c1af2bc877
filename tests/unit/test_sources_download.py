"""Downloads from a server that fails in every way servers do."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import faulty_server as server
import pytest
from faulty_server import FaultyServer

from mmpipe.errors import DataError
from mmpipe.sources.transfer import progress, session
from mmpipe.sources.transfer.download import Expected, Patience, download

BODY = bytes(range(256)) * 1000
DIGEST = hashlib.sha256(BODY).hexdigest()
QUICK = Patience(connect=2, read=0.3, attempts=3, pause=0.01, longest_pause=0.05)


@pytest.fixture
def host() -> Iterator[FaultyServer]:
    with server.running() as running:
        yield running


def fetch(urls: str | list[str], target: Path, **expected: object) -> dict[str, object]:
    urls = [urls] if isinstance(urls, str) else urls
    return download(urls, target, Expected(**expected), QUICK)  # type: ignore[arg-type]


def alone(target: Path) -> bool:
    """Whether nothing but the file is left, whole."""
    return target.read_bytes() == BODY and [path.name for path in target.parent.iterdir()] == [target.name]


def nothing(folder: Path) -> bool:
    return not list(folder.iterdir())


def test_gives_the_file_with_its_size_and_hash(host: FaultyServer, tmp_path: Path) -> None:
    facts = fetch(host.serve("/a", server.content(BODY)), tmp_path / "a", sha256=DIGEST, size=len(BODY))
    assert facts == {"size": len(BODY), "sha256": DIGEST}
    assert alone(tmp_path / "a")


def test_follows_redirects(host: FaultyServer, tmp_path: Path) -> None:
    host.serve("/b", server.content(BODY))
    fetch(host.serve("/a", server.redirect("/b")), tmp_path / "a")
    assert alone(tmp_path / "a")


@pytest.mark.parametrize("code", [408, 429, 500, 502, 503, 504])
def test_tries_again_after_a_passing_refusal(host: FaultyServer, tmp_path: Path, code: int) -> None:
    url = host.serve("/a", server.status(code, Retry_After="0"), server.status(code), server.content(BODY))
    fetch(url, tmp_path / "a")
    assert alone(tmp_path / "a")
    assert len(host.seen) == 3


def test_gives_up_on_a_server_that_refuses_for_ever(host: FaultyServer, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"/a: the server answered 429.*3 times in a row"):
        fetch(host.serve("/a", server.status(429)), tmp_path / "a")
    assert len(host.seen) == QUICK.attempts
    assert nothing(tmp_path)


@pytest.mark.parametrize("code", [401, 403, 404, 410])
def test_does_not_insist_on_what_is_refused_for_good(host: FaultyServer, tmp_path: Path, code: int) -> None:
    with pytest.raises(DataError, match=f"the server answered {code}"):
        fetch(host.serve("/a", server.status(code)), tmp_path / "a")
    assert len(host.seen) == 1


def test_goes_on_where_the_connection_ended(host: FaultyServer, tmp_path: Path) -> None:
    url = host.serve("/a", server.truncated(BODY, 200_000), server.content(BODY))
    fetch(url, tmp_path / "a")
    assert alone(tmp_path / "a")
    assert host.seen[1][1]["Range"] == "bytes=196608-"
    assert host.seen[1][1]["If-Range"] == '"one"'


def test_goes_on_after_a_stall(host: FaultyServer, tmp_path: Path) -> None:
    url = host.serve("/a", server.stalled(BODY, 200_000, seconds=1.0), server.content(BODY))
    fetch(url, tmp_path / "a")
    assert alone(tmp_path / "a")
    assert host.seen[1][1]["Range"] == "bytes=196608-"


def test_goes_on_in_a_later_call(host: FaultyServer, tmp_path: Path) -> None:
    (tmp_path / "a.part").write_bytes(BODY[:5000])
    note = {"url": host.url("/a"), "validator": '"one"', "total": len(BODY)}
    (tmp_path / "a.part.json").write_text(json.dumps(note))
    fetch(host.serve("/a", server.content(BODY)), tmp_path / "a")
    assert alone(tmp_path / "a")
    assert host.seen[0][1]["Range"] == "bytes=5000-"


def test_what_came_before_a_long_outage_is_kept(host: FaultyServer, tmp_path: Path) -> None:
    url = host.serve("/a", server.truncated(BODY, 200_000), server.status(503))
    with pytest.raises(DataError, match=r"503.*3 times in a row"):
        fetch(url, tmp_path / "a")
    assert not (tmp_path / "a").exists()
    host.seen.clear()
    fetch(host.serve("/a", server.content(BODY)), tmp_path / "a")
    assert alone(tmp_path / "a")
    assert host.seen[0][1]["Range"] == "bytes=196608-"


def test_starts_again_when_the_file_changed_meanwhile(host: FaultyServer, tmp_path: Path) -> None:
    old = server.truncated(b"x" * len(BODY), 200_000, etag='"old"')
    fetch(host.serve("/a", old, server.content(BODY, etag='"new"')), tmp_path / "a")
    assert alone(tmp_path / "a")


@pytest.mark.parametrize("answer", [server.content, server.spliced], ids=["knows If-Range", "does not"])
@pytest.mark.parametrize(
    "tags",
    [
        {"old": {"etag": '"old"'}, "new": {"etag": '"new"'}},
        {
            "old": {"etag": "", "Last_Modified": "Mon, 05 Feb 2024 10:00:00 GMT"},
            "new": {"etag": "", "Last_Modified": "Tue, 06 Feb 2024 10:00:00 GMT"},
        },
    ],
    ids=["ETag", "Last-Modified"],
)
def test_starts_again_when_the_file_changed_since_an_earlier_call(
    host: FaultyServer, tmp_path: Path, answer: server.Fault, tags: dict[str, dict[str, str]]
) -> None:
    """Half of one version and half of another would be of the right length."""
    url = host.serve("/a", server.truncated(b"x" * len(BODY), 200_000, **tags["old"]), server.status(503))
    with pytest.raises(DataError, match="503"):
        fetch(url, tmp_path / "a")
    host.serve("/a", answer(BODY, **tags["new"]), server.content(BODY, **tags["new"]))
    fetch(url, tmp_path / "a")
    assert alone(tmp_path / "a")


def test_restarts_a_download_without_validators(host: FaultyServer, tmp_path: Path) -> None:
    fetch(host.serve("/a", server.truncated(b"x" * len(BODY), 200_000, etag=""), server.content(BODY)), tmp_path / "a")
    assert alone(tmp_path / "a")
    assert "Range" not in host.seen[1][1]


def test_starts_again_when_the_server_cannot_go_on(host: FaultyServer, tmp_path: Path) -> None:
    url = host.serve("/a", server.truncated(BODY, 200_000), server.content(BODY, ranges=False))
    fetch(url, tmp_path / "a")
    assert alone(tmp_path / "a")


def test_starts_again_when_more_is_here_than_there(host: FaultyServer, tmp_path: Path) -> None:
    (tmp_path / "a.part").write_bytes(BODY + b"more")
    (tmp_path / "a.part.json").write_text(json.dumps({"url": host.url("/a"), "validator": '"one"', "total": 1}))
    fetch(host.serve("/a", server.content(BODY)), tmp_path / "a")
    assert alone(tmp_path / "a")


def test_a_part_without_its_note_is_not_trusted(host: FaultyServer, tmp_path: Path) -> None:
    (tmp_path / "a.part").write_bytes(b"of another file")
    fetch(host.serve("/a", server.content(BODY)), tmp_path / "a")
    assert alone(tmp_path / "a")


def test_refuses_another_content_than_expected(host: FaultyServer, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"sha256 {DIGEST}, but the catalogue says {'0' * 64}"):
        fetch(host.serve("/a", server.content(BODY)), tmp_path / "a", sha256="0" * 64)
    assert nothing(tmp_path)


def test_refuses_another_size_before_the_first_byte(host: FaultyServer, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="256000 bytes, but the catalogue says 5"):
        fetch(host.serve("/a", server.content(BODY)), tmp_path / "a", size=5)
    assert nothing(tmp_path)


def test_a_damaged_part_does_not_survive_its_hash(host: FaultyServer, tmp_path: Path) -> None:
    """A part that is wrong inside is found by the hash; the next call starts from nothing and succeeds."""
    (tmp_path / "a.part").write_bytes(b"?" * 5000)
    note = {"url": host.url("/a"), "validator": '"one"', "total": len(BODY)}
    (tmp_path / "a.part.json").write_text(json.dumps(note))
    url = host.serve("/a", server.content(BODY))
    with pytest.raises(DataError, match="sha256"):
        fetch(url, tmp_path / "a", sha256=DIGEST)
    assert nothing(tmp_path)
    fetch(url, tmp_path / "a", sha256=DIGEST)
    assert alone(tmp_path / "a")


def test_takes_the_mirror_that_has_the_right_file(host: FaultyServer, tmp_path: Path) -> None:
    urls = [
        host.serve("/gone", server.status(404)),
        host.serve("/wrong", server.content(b"another file")),
        host.serve("/right", server.content(BODY)),
    ]
    fetch(urls, tmp_path / "a", sha256=DIGEST)
    assert alone(tmp_path / "a")
    assert host.paths() == ["/gone", "/wrong", "/right"]


def test_names_every_mirror_that_failed(host: FaultyServer, tmp_path: Path) -> None:
    urls = [host.serve("/gone", server.status(404)), host.serve("/wrong", server.content(b"another"))]
    with pytest.raises(DataError, match=r"/gone: .*404.*; .*/wrong: .*sha256"):
        fetch(urls, tmp_path / "a", sha256=DIGEST)


def test_an_unreachable_server_is_an_error(tmp_path: Path) -> None:
    with server.running() as gone:
        url = gone.url("/a")
    with pytest.raises(DataError, match=r"the connection failed .*refused"):
        fetch(url, tmp_path / "a")


def test_looks_at_the_disk_before_filling_it(
    host: FaultyServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "_MARGIN", 10**18)
    with pytest.raises(DataError, match=r"/a: needs 256.0 kB below .*GB are free"):
        fetch(host.serve("/a", server.content(BODY)), tmp_path / "a")
    assert nothing(tmp_path)


def as_if_public(monkeypatch: pytest.MonkeyPatch) -> None:
    """127.0.0.1, where the server is, passes for a public address; all others are what they are."""
    real = session.network_of
    monkeypatch.setattr(session, "network_of", lambda ip: "public" if ip == "127.0.0.1" else real(ip))


@pytest.mark.parametrize(
    "to",
    [
        "http://127.0.0.2:1/a",
        "http://10.0.0.1/a",
        "http://[::1]:1/a",
        "http://[::ffff:10.0.0.1]/a",
        "http://169.254.169.254/latest/meta-data",
        "http://2130706434/a",
        "http://intranet.example/a",
        "/hop",
    ],
)
def test_a_redirect_into_a_private_network_is_not_followed(
    host: FaultyServer, tmp_path: Path, to: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    as_if_public(monkeypatch)
    known = socket.getaddrinfo

    def lookup(name: str, *rest: object, **more: object) -> object:
        return known("192.168.1.9" if name == "intranet.example" else name, *rest, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(socket, "getaddrinfo", lookup)
    host.serve("/hop", server.redirect("http://172.16.0.1/a"))
    with pytest.raises(DataError, match=r"redirects to a (private|link-local) address"):
        fetch(host.serve("/a", server.redirect(to)), tmp_path / "a")
    assert nothing(tmp_path)


def test_a_name_that_changes_its_address_after_the_check_is_refused(
    host: FaultyServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "_addresses", lambda url: ["93.184.216.34"])
    with pytest.raises(DataError, match="redirects to a private address"):
        fetch(host.serve("/a", server.content(BODY)), tmp_path / "a")
    assert host.seen == []


def test_a_private_server_may_redirect_to_another_but_not_to_metadata(host: FaultyServer, tmp_path: Path) -> None:
    host.serve("/b", server.content(BODY))
    other = f"http://localhost:{host.server_port}/b"
    fetch(host.serve("/a", server.redirect(other)), tmp_path / "here" / "a")
    assert alone(tmp_path / "here" / "a")
    with pytest.raises(DataError, match="redirects to a link-local address"):
        fetch(host.serve("/c", server.redirect("http://169.254.169.254/")), tmp_path / "c")


def test_a_body_without_end_is_not_taken(host: FaultyServer, tmp_path: Path) -> None:
    url = host.serve("/a", server.endless)
    with pytest.raises(DataError, match=r"more than 3\.0 MB; if it is meant, .*max_gb"):
        download([url], tmp_path / "a", patience=QUICK, most=3e6)
    with pytest.raises(DataError, match=r"more than 1\.0 MB"):
        fetch(url, tmp_path / "a", size=1_000_000)
    with pytest.raises(DataError, match=r"more than 1\.0 kB"):
        download([host.serve("/b", server.content(BODY))], tmp_path / "a", patience=QUICK, most=1000)
    assert nothing(tmp_path)


def test_the_disk_is_looked_at_while_a_body_without_end_comes(
    host: FaultyServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = lambda folder: SimpleNamespace(free=400_000_000 - sum(p.stat().st_size for p in tmp_path.iterdir()))  # noqa: E731
    monkeypatch.setattr(shutil, "disk_usage", usage)
    with pytest.raises(DataError, match="are free"):
        fetch(host.serve("/a", server.endless), tmp_path / "a")
    assert nothing(tmp_path)


def test_secrets_of_an_address_are_sent_and_stand_nowhere(
    host: FaultyServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MY_KEY", "canary-variable")
    path = "/a?id=7&token=canary-token&X-Amz-Signature=canary-signature&k="
    host.serve(f"{path}canary-variable", server.status(503), server.truncated(BODY, 9), server.status(404))
    url = host.url(f"{path}${{MY_KEY}}").replace("http://", "http://canary-user:canary-password@")
    dead = "http://canary-user:canary-password@127.0.0.1:9/x?sig=canary-sig"
    with caplog.at_level(logging.DEBUG, "mmpipe"), pytest.raises(DataError) as error:
        fetch([url, dead], tmp_path / "a")
    assert host.seen[0][0].endswith("canary-variable")
    assert host.seen[0][1]["Authorization"].startswith("Basic ")
    assert "id=7&token=***&X-Amz-Signature=***" in str(error.value)
    written = "".join(path.read_text(errors="replace") for path in tmp_path.rglob("*") if path.is_file())
    assert "canary" not in str(error.value) + caplog.text + written


def test_a_variable_that_is_not_set_is_named(host: FaultyServer, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="the environment variable 'NOT_SET_HERE' is not set"):
        fetch(host.url("/a?token=${NOT_SET_HERE}"), tmp_path / "a")


def test_what_came_of_an_address_with_secrets_is_resumed(host: FaultyServer, tmp_path: Path) -> None:
    url = host.serve("/a?token=canary", server.truncated(BODY, 100_000), server.content(BODY))
    fetch(url, tmp_path / "a")
    assert host.seen[1][1]["Range"] == "bytes=65536-"
