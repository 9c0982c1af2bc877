"""Images from elsewhere: limits of size, time, kind and place."""

from __future__ import annotations

import base64
import functools
import io
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from PIL import Image

from mmpipe.chat import images
from mmpipe.errors import DataError
from mmpipe.sources.transfer.public_url import Limits, fetch, is_public

HERE = "127.0.0.1"


def png(size: tuple[int, int] = (3, 2)) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", size, "red").save(out, "PNG")
    return out.getvalue()


@functools.cache
def huge_png() -> bytes:
    """100 megapixels in a few kilobytes."""
    out = io.BytesIO()
    Image.new("1", (10_000, 10_000)).save(out, "PNG")
    return out.getvalue()


class Site(BaseHTTPRequestHandler):
    """What a server may do to whoever fetches an image."""

    def do_GET(self) -> None:
        getattr(self, f"get_{self.path.strip('/').partition('?')[0]}", self.get_nothing)()

    def answer(self, body: bytes, kind: str = "image/png", status: int = 200, **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def get_good(self) -> None:
        self.answer(png(), Content_Length=str(len(png())))

    def get_nothing(self) -> None:
        self.answer(b"", status=404)

    def get_page(self) -> None:
        self.answer(b"<html>", "text/html; charset=utf-8")

    def get_text(self) -> None:
        self.answer(b"hello", "image/png")

    def get_bomb(self) -> None:
        self.answer(huge_png())

    def get_large(self) -> None:
        self.answer(b"", Content_Length=str(10**9))

    def get_unstated(self) -> None:
        self.answer(b"")
        self.flood(b"x" * 65536, 0)

    def get_drip(self) -> None:
        self.answer(b"")
        self.flood(b"x", 0.02)

    def get_heads(self) -> None:
        self.flood(b"X", 0.02)

    def get_short(self) -> None:
        self.answer(png()[:20], Content_Length=str(len(png())))

    def get_garbage(self) -> None:
        self.wfile.write(b"SSH-2.0-OpenSSH\r\n\r\n")

    def get_loop(self) -> None:
        self.answer(b"", status=302, Location="/loop")

    def get_inside(self) -> None:
        self.answer(b"", status=302, Location="http://127.0.0.2:1/secret")

    def get_metadata(self) -> None:
        self.answer(b"", status=307, Location="http://169.254.169.254/latest")

    def get_file(self) -> None:
        self.answer(b"", status=302, Location="file:///etc/passwd")

    def get_moved(self) -> None:
        self.answer(b"", status=301, Location="good")

    def flood(self, piece: bytes, pause: float) -> None:
        end = time.monotonic() + 10
        try:
            while time.monotonic() < end:
                self.wfile.write(piece)
                self.wfile.flush()
                time.sleep(pause)
        except OSError:
            return

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def site() -> Iterator[str]:
    server = ThreadingHTTPServer((HERE, 0), Site)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://{HERE}:{server.server_port}"
    server.shutdown()
    server.server_close()


LIMITS = Limits(size=1 << 20, seconds=5, allowed=lambda address: address == HERE)
HASTY = Limits(size=1 << 20, seconds=0.4, allowed=LIMITS.allowed)


@pytest.mark.parametrize("path", ["good", "moved", "good?a=b c"])
def test_an_image_is_fetched(site, path):
    image = images.from_address(f"{site}/{path}", LIMITS)
    assert (image.size, image.getpixel((0, 0))) == ((3, 2), (255, 0, 0))


@pytest.mark.parametrize(
    ("path", "why"),
    [
        ("nothing", "answered 404"),
        ("page", "'text/html', not an image"),
        ("text", "none of the formats"),
        ("bomb", "more than 80000000 pixels"),
        ("large", "1000000000 bytes, more than"),
        ("unstated", "more than the 1048576 bytes"),
        ("short", "the connection failed"),
        ("garbage", "the connection failed"),
        ("loop", "more than 3 redirects"),
        ("inside", r"private network \(127.0.0.2\)"),
        ("metadata", r"private network \(169.254.169.254\)"),
        ("file", "not an http"),
    ],
)
def test_what_is_wrong_is_said(site, path, why):
    with pytest.raises(DataError, match=why):
        images.from_address(f"{site}/{path}", LIMITS)


@pytest.mark.parametrize("path", ["drip", "heads"])
def test_a_server_that_never_ends_is_left(site, path):
    start = time.monotonic()
    with pytest.raises(DataError, match=r"not done after 0.4 seconds"):
        images.from_address(f"{site}/{path}", HASTY)
    assert time.monotonic() - start < 3


def test_this_machine_is_no_place_for_images(site):
    with pytest.raises(DataError, match="private network"):
        images.from_address(f"{site}/good")


@pytest.mark.parametrize(
    "url",
    [
        "http://localhost/x",
        "http://0x7f000001/x",
        "http://2130706433/x",
        "http://[::1]/x",
        "http://[::ffff:10.0.0.1]/x",
        "http://0.0.0.0/x",
        "http://192.168.1.1/x",
    ],
)
def test_private_addresses_in_all_spellings(url):
    with pytest.raises(DataError, match="private network"):
        fetch(url)


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("ftp://example.org/x.png", "not an http"),
        ("http://user:secret@example.org/x.png", "name or password"),
        ("http://", "not an"),
        ("http://no-such-host.invalid/x.png", "the host is not known"),
        (f"http://{HERE}:1/x.png", "the connection failed"),
    ],
)
def test_addresses_that_cannot_be_fetched(url, why):
    with pytest.raises(DataError, match=why) as raised:
        fetch(url, LIMITS)
    assert "secret" not in str(raised.value)


def test_the_address_that_was_checked_is_the_one_connected_to(site, monkeypatch):
    """A name that answers otherwise when asked again (DNS rebinding) gains nothing."""
    import socket

    port = int(site.rpartition(":")[2])
    answers = iter([HERE])
    known = socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *a, **k: known(next(answers), *a, **k))
    assert fetch(f"http://rebinding.example:{port}/good", LIMITS)[1] == "image/png"


def test_public_addresses():
    public = {"93.184.216.34", "2606:2800:220:1::1"}
    private = {"10.1.2.3", "100.64.0.1", "169.254.0.1", "224.0.0.1", "fe80::1%eth0", "64:ff9b::7f00:1", "2002:7f00:1::"}
    assert {address for address in public | private if is_public(address)} == public


def data_url(content: bytes, head: str = "data:image/png;base64") -> str:
    return f"{head},{base64.b64encode(content).decode()}"


def test_images_in_data_urls():
    assert images.from_data_url(data_url(png()), 1000).decode().size == (3, 2)
    for url, why in (
        (data_url(png((300, 300)) * 9), "more than the 1000 bytes"),
        (data_url(png(), "data:text/html;base64"), "expected data:image"),
        ("data:image/png;base64,%%%", "base64 is damaged"),
        (data_url(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"), "none of the formats"),
    ):
        with pytest.raises(DataError, match=why):
            images.from_data_url(url, 1000).decode()


def test_files(tmp_path):
    with pytest.raises(DataError, match="more than 80000000 pixels"):
        images.from_data_url(data_url(huge_png()), 1 << 20).decode()
    with pytest.raises(DataError, match="no such image"):
        images.check(str(tmp_path / "none.png"))
    turned = Image.new("RGB", (6, 4))
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(tmp_path / "turned.jpg", exif=exif)
    assert images.from_anywhere(str(tmp_path / "turned.jpg")).size == (4, 6)


def test_ink_on_a_transparent_ground_stays_visible():
    out = io.BytesIO()
    drawing = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    drawing.putpixel((1, 1), (0, 0, 0, 255))
    drawing.save(out, "PNG")
    assert images.from_bytes(out.getvalue(), "drawing.png").getcolors() == [(15, (255,) * 3), (1, (0,) * 3)]
