"""What the server refuses before it works: foreign sites, files, sizes, counts, slow and broken requests; and a fuzz."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import logging
import re
import socket
import time
from collections.abc import Iterator
from typing import Any

import chat_models
import pytest
import requests
from chat_models import talk
from PIL import Image
from test_chat_server import Running, Scripted, data_url, question

from mmpipe.chat.model import ChatModel
from mmpipe.chat.queue import RequestQueue

pytest.importorskip("gradio", reason="the extra 'chat' is not installed")

JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, ChatModel]]:
    queue = RequestQueue(size=6)
    made = talk(chat_models.publish(tmp_path_factory.mktemp("served") / "model"), queue)
    yield {"tiny": made, "said": Scripted(made, "said", ["word"])}
    queue.close()


@pytest.fixture(scope="module")
def url(models: dict[str, ChatModel]) -> Iterator[str]:
    served = Running(models, idle=0.5, whole=1.0)
    yield served.url
    served.close()


def png(size: tuple[int, int] = (8, 8)) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", size).save(out, "PNG")
    return out.getvalue()


def upload(url: str, content: bytes, session: Any = requests, **headers: str) -> requests.Response:
    return session.post(f"{url}/gradio_api/upload", files={"files": ("a.png", content, "image/png")}, headers=headers)


def join(url: str, files: list[Any], session: Any = requests, **changes: Any) -> requests.Response:
    call = next(d for d in requests.get(f"{url}/config").json()["dependencies"] if len(d["inputs"]) >= 6)
    data = [{"text": "hi", "files": files}, None, 0.0, 1.0, 4, None]
    body = {"data": data, "fn_index": call["id"], "session_hash": "abc123"} | changes
    return session.post(f"{url}/gradio_api/queue/join", json=body)


def error_of(response: requests.Response) -> str:
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return str(error["message"])


# ---- files


@pytest.mark.parametrize(
    "path", ["/etc/passwd", "/proc/self/environ", "http://127.0.0.1:1/x", "../../etc/passwd", "\0"]
)
def test_no_file_of_the_machine_is_read(url, path):
    file = {"path": path, "url": path, "meta": {"_type": "gradio.FileData"}}
    assert join(url, [file]).status_code == 404
    chatbot = [{"role": "user", "content": [{"type": "file", "file": file}]}]
    data = [{"text": "hi", "files": []}, None, 0.0, 1.0, 4, None, [chatbot]]
    assert join(url, [], data=data).status_code == 422
    assert join(url, [], data=[*data[:5], [chatbot]]).status_code == 422
    for number in range(12):  # every function of the page
        asked = join(url, [], data=[file] * 5, fn_index=number, event_data=file)
        assert asked.status_code in (404, 422, 200)
    for route in ("file=", "file/", "proxy=", "stream/", "custom_component/", "call/", "run/"):
        assert requests.get(f"{url}/gradio_api/{route}{path}").status_code in (400, 403, 404, 405)


def test_an_upload_is_read_by_its_sender_only(url):
    mine, other = requests.Session(), requests.Session()
    for session in (mine, other):
        session.get(url)
    [path] = upload(url, png(), mine).json()
    assert mine.get(f"{url}/gradio_api/file={path}").content == png()
    assert other.get(f"{url}/gradio_api/file={path}").status_code == 404
    assert requests.get(f"{url}/gradio_api/file={path}").status_code == 404
    assert join(url, [{"path": path}], other).status_code == 404
    assert join(url, [{"path": path}], mine).status_code == 200
    with mine.get(f"{url}/gradio_api/queue/data?session_hash=abc123", stream=True) as events:
        completed = next(line for line in events.iter_lines() if b"process_completed" in line)
    assert json.loads(completed[6:])["success"]
    assert requests.get(f"{url}/gradio_api/queue/data?session_hash=none").status_code == 404


def test_other_routes_of_gradio_are_closed(url):
    for path in (
        "/gradio_api/info",
        "/monitoring",
        "/gradio_api/openapi.json",
        "/login",
        "/assets/../../x",
        "/svelte/a",
    ):
        assert error_of(requests.get(url + path))
    assert requests.post(f"{url}/gradio_api/component_server/", json={}).status_code == 404
    assert requests.get(f"{url}/?deep_link=/etc/passwd").status_code == 200


# ---- who may ask


def test_pages_of_other_sites_are_refused(url):
    here = url.removeprefix("http://")
    for headers in (
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://127.0.0.1:1"},
        {"Sec-Fetch-Site": "cross-site"},
        {"X-Forwarded-Host": "evil.example"},
        {"Host": "evil.example"},
        {"Host": f"{here}@evil.example"},
    ):
        for path in ("/v1/models", "/config", "/metrics", "/gradio_api/startup-events"):
            response = requests.get(url + path, headers=headers)
            assert response.status_code in (400, 403), (headers, path)
            assert error_of(response)
        assert upload(url, png(), **headers).status_code in (400, 403)
    assert requests.get(f"{url}/v1/models", headers={"Origin": url}).status_code == 200
    followed = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}
    assert requests.get(url, headers=followed).status_code == 200


def test_a_token_is_asked_for_everywhere_but_health(models):
    from mmpipe.chat.guard import Access

    served = Running(models, access=Access(("chat.example",), "secret-token"))
    try:
        for path in ("/", "/config", "/v1/models", "/metrics", "/gradio_api/startup-events", "/nowhere"):
            assert requests.get(served.url + path).status_code == 401
            assert requests.get(served.url + path, headers={"Authorization": "Bearer secret"}).status_code == 401
        assert requests.get(f"{served.url}/health").json() == {"status": "ok"}
        token = b"secret-token"
        for shown in (b"Bearer " + token, b"Basic " + base64.b64encode(b"me:" + token)):
            headers: dict[str, Any] = {"Authorization": shown, "Host": "chat.example", "Origin": "https://chat.example"}
            assert requests.get(f"{served.url}/v1/models", headers=headers).status_code == 200
        assert "secret-token" not in repr(Access((), "secret-token"))
        ascii_only = Access((), "secret")
        assert ascii_only.allows("bearer secret")
        assert ascii_only.allows("Basic " + base64.b64encode(b"me:secret").decode())
        assert not any(map(ascii_only.allows, ("", "secret", "Bearer", "Basic !", "Digest secret", "Bearer secret2")))
    finally:
        served.close()


def test_the_token_comes_from_the_environment_alone():
    from typer.testing import CliRunner

    from mmpipe.cli.main import app

    shown = re.sub(r"\x1b\[[\d;]*m", "", CliRunner().invoke(app, ["serve", "--help"]).output)
    assert "--allow-host" in shown
    assert not re.search(r"--\S*(key|token)\b(?!s)", shown)


# ---- how much


def chat(url: str, content: Any = "hi", **more: Any) -> requests.Response:
    asked = {"model": "tiny", "messages": [{"role": "user", "content": content}], "max_tokens": 2} | more
    return requests.post(f"{url}/v1/chat/completions", json=asked)


@pytest.mark.parametrize(
    "change",
    [
        {"stop": ["a", "b", "c", "d", "e"]},
        {"stop": "a" * 257},
        {"seed": 1 << 63},
        {"seed": -(1 << 63) - 1},
        {"temperature": 1e308},
        {"top_p": 0},
        {"max_tokens": 1 << 40},
        {"messages": [{"role": "user", "content": "x"}] * 1025},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}] * 1025}]},
        {"metadata": [[]] * 30_000},
    ],
)
def test_numbers_and_counts_out_of_range(url, change):
    response = chat(url, **change)
    assert response.status_code == 400
    assert error_of(response)


@pytest.mark.parametrize(
    "change", [{"seed": -1}, {"seed": -(1 << 63)}, {"temperature": 1e-45}, {"temperature": 2, "top_p": 1e-300}]
)
def test_numbers_at_the_edge_are_answered(url, change):
    assert chat(url, **change).status_code == 200


def test_long_text_is_refused_before_it_is_tokenised(url, models, monkeypatch):
    model = models["tiny"]

    def tokenise(*_: Any, **__: Any) -> None:
        raise AssertionError("tokenised")

    monkeypatch.setattr(type(model.tokenizer), "__call__", tokenise)
    monkeypatch.setattr(type(model.processor), "apply_chat_template", tokenise)
    start = time.monotonic()
    assert "at least" in error_of(chat(url, "word " * 4_000_000))
    assert time.monotonic() - start < 5


def test_a_text_of_short_tokens_is_refused_at_its_beginning(models, monkeypatch):
    from mmpipe.chat.messages import ChatError, user_message

    model, pieces = models["tiny"], []
    monkeypatch.setattr(model, "_longest_token", 10_000)
    called = type(model.tokenizer).__call__

    def counted(self: Any, text: str, **more: Any) -> Any:
        pieces.append(len(text))
        return called(self, text, **more)

    monkeypatch.setattr(type(model.tokenizer), "__call__", counted)
    with pytest.raises(ChatError, match="more than"):
        model.answer([user_message("a b " * 500_000)], chat_models.GREEDY).future.result()
    assert sum(pieces) <= 1 << 16


def test_megapixels_are_bounded_before_anything_is_decoded(url, monkeypatch):
    from mmpipe.chat import images

    def decode(*_: Any) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr(images, "decode_image", decode)
    large = data_url(Image.new("1", (5000, 100)))
    response = chat(url, question("?", *[large] * 3)[0]["content"])
    assert response.status_code == 400
    assert "megapixels" in error_of(response)


def test_a_place_is_taken_before_images_are_read(url, models, monkeypatch):
    from mmpipe.chat import images

    monkeypatch.setattr(images, "from_data_url", lambda *_: pytest.fail("read"))
    queue = models["tiny"].queue
    places = [queue.take_place() for _ in range(6)]
    try:
        response = chat(url, question("?", "data:image/png;base64,AA==")[0]["content"])
    finally:
        for place in places:
            queue.leave(place)
    assert response.status_code == 429
    assert response.headers["Retry-After"] == "5"
    assert len(queue) == 0


def test_uploads_are_bounded(models):
    from mmpipe.chat.uploads import Uploads

    served = Running(models, uploads=Uploads(total=4 * len(png()) + 3, seconds=1.5))
    try:
        session = requests.Session()
        session.get(served.url)
        assert [upload(served.url, png(), session).status_code for _ in range(2)] == [200, 503]
        others = [upload(served.url, png()).status_code for _ in range(5)]
        assert others == [200, 200, 200, 503, 503]
        time.sleep(1.6)
        assert upload(served.url, png(), session).status_code == 200
    finally:
        served.close()


def test_large_bodies_share_a_budget(models):
    from mmpipe.chat.guard import Budget

    served = Running(models, budget=Budget(1000))
    try:
        assert chat(served.url).status_code == 200
        refused = chat(served.url, "x" * 1000)
        assert (refused.status_code, refused.headers["Retry-After"]) == (503, "5")
        assert chat(served.url).status_code == 200
    finally:
        served.close()


# ---- broken and slow requests


@pytest.mark.parametrize(
    "body",
    [b"{", b"\xff\xfe", b"[" * 100_000, b'{"a":' * 100_000, b'"\\ud800"', b"null", b"1e999", b'"' + b'\\"' * 99_999],
)
def test_broken_json(url, body):
    response = requests.post(f"{url}/v1/chat/completions", data=body, headers=JSON)
    assert response.status_code == 400
    assert error_of(response)
    assert requests.post(f"{url}/gradio_api/queue/join", data=body, headers=JSON).status_code == 422


def test_errors_have_openais_form(url):
    for method, path, status in (
        ("GET", "/nowhere", 404),
        ("GET", "/v1/nowhere", 404),
        ("DELETE", "/v1/models", 405),
        ("DELETE", "/config", 405),
        ("GET", "/v1/chat/completions", 405),
        ("GET", "/assets/none.js", 404),
    ):
        response = requests.request(method, url + path)
        assert response.status_code == status
        assert error_of(response)


def raw(url: str, *pieces: bytes, seconds: float = 3) -> bytes:
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=seconds) as connection:
        for piece in pieces:
            connection.sendall(piece)
        received = b""
        with contextlib.suppress(TimeoutError):
            while piece := connection.recv(1 << 16):
                received += piece
        return received


def test_slow_and_broken_requests_end_without_a_traceback(url, monkeypatch, caplog, capfd):
    from mmpipe.chat.server import Protocol

    monkeypatch.setattr(Protocol, "head_seconds", 0.5)
    host = url.removeprefix("http://").encode()
    head = (
        b"POST /gradio_api/upload HTTP/1.1\r\nHost: " + host + b"\r\nContent-Type: multipart/form-data; boundary=b\r\n"
    )
    with caplog.at_level(logging.WARNING):
        assert b" 408 " in raw(url, b"GET / HTTP/1.1\r\nHost: ")
        assert b" 408 " in raw(url, head + b"Content-Length: 1000\r\n\r\n--b")
        assert b" 400 " in raw(url, b"\x16\x03\x01nonsense\r\n\r\n")
        assert b" 400 " in raw(url, head + b"Content-Length: 3\r\n\r\n--b")
        assert b" 413 " in raw(url, head + b"Content-Length: 99999999999\r\n\r\n")
        for form in (
            b"--b\r\nbroken",
            b"--b\r\nContent-Disposition: form-data; name=\xff; filename=\r\n\r\nx\r\n--b--\r\n",
            b"",
        ):
            whole = head + b"Connection: close\r\nContent-Length: " + str(len(form)).encode() + b"\r\n\r\n" + form
            assert b" 400 " in raw(url, whole)
        assert b" 400 " in raw(url, head.replace(b"; boundary=b", b"") + b"Content-Length: 3\r\n\r\n--b")
        for _ in range(5):  # clients that leave in the middle
            connection = socket.create_connection(tuple(url.removeprefix("http://").split(":")))  # type: ignore[arg-type]
            connection.sendall(head + b"Content-Length: 1000\r\n\r\n--b")
            connection.close()
        time.sleep(0.3)
    assert "Traceback" not in caplog.text + "".join(capfd.readouterr())


def test_health_and_metrics(url):
    assert requests.get(f"{url}/health").json() == {"status": "ok"}
    assert chat(url).status_code == 200
    shown = requests.get(f"{url}/metrics")
    assert shown.headers["content-type"].startswith("text/plain; version=0.0.4")
    figures = dict(line.rsplit(" ", 1) for line in shown.text.splitlines() if line[0] != "#")
    assert float(figures['mmpipe_requests_total{route="/v1/chat/completions",status="200"}']) >= 1
    assert float(figures["mmpipe_completion_tokens_total"]) >= 2
    assert figures["mmpipe_queue_length"] == "0"
    assert float(figures["mmpipe_answer_seconds_total"]) > 0


def test_fuzz(url):
    """A short run of perf/fuzz_server.py."""
    from perf import fuzz_server

    counts = fuzz_server.fuzz(url, "said", requests=200, seed=0)
    assert sum(counts.values()) == 200
    assert not [status for status in counts if status >= 500 and status != 503], counts


def test_a_fault_of_the_server_tells_nothing(url, models, monkeypatch):
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("secret")

    monkeypatch.setattr(models["tiny"], "_generate", fail)
    response = chat(url)
    assert response.status_code == 500
    assert "secret" not in response.text
    assert response.json()["error"]["type"] == "server_error"


@pytest.mark.slow
def test_fifty_clients_some_slow_some_gone(tmp_path):
    """A server process with 50 clients at once: its memory stays bounded, and it answers afterwards."""
    from concurrent.futures import ThreadPoolExecutor

    from perf import fuzz_server

    large = data_url(Image.effect_noise((2000, 2000), 90))

    def client(number: int) -> int:
        if number % 5 == 0:  # a reader that does not read
            host, port = url.removeprefix("http://").split(":")
            with socket.create_connection((host, int(port)), timeout=30) as connection:
                connection.sendall(f"GET /config HTTP/1.1\r\nHost: {host}\r\n\r\n".encode() * 50)
                time.sleep(3)
            return 0
        asked = {"model": "tiny@finetune", "messages": question("?", *[large] * 2), "max_tokens": 500}
        try:
            with requests.post(
                f"{url}/v1/chat/completions", json=asked | {"stream": number % 2 == 0}, timeout=60, stream=True
            ) as response:
                if number % 5 > 2:  # cut after the first piece
                    response.raw.read(20)
                else:
                    assert response.content
                return response.status_code
        except requests.ConnectionError:
            return 0

    with fuzz_server.serving() as (url, pid, log):
        assert chat(url, model="tiny@finetune").status_code == 200
        before = fuzz_server.memory(pid)
        with ThreadPoolExecutor(50) as pool:
            statuses = list(pool.map(client, range(150)))
        time.sleep(2)
        assert {*statuses} <= {0, 200, 429, 503}
        assert statuses.count(200) >= 10
        assert chat(url, model="tiny@finetune").status_code == 200
        print(statuses, before, fuzz_server.memory(pid))
        assert fuzz_server.memory(pid) - before <= 200
        assert "mmpipe_queue_length 0" in requests.get(f"{url}/metrics").text
        assert "Traceback" not in log.read_text()
