"""Random requests to `mmpipe serve`, over every route and field: python perf/fuzz_server.py [REQUESTS] [SECONDS].

Starts a server of a tiny checkpoint in its own process, and prints the requests by status, and the server's memory before
and after. No status of 500 or above but 503 (busy) is expected.
"""

from __future__ import annotations

import http.client
import json
import string
import subprocess
import sys
import tempfile
import time
import urllib.request
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from hypothesis.errors import NonInteractiveExampleWarning

ROOT = Path(__file__).resolve().parents[1]
_PNG = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAMAAAACCAIAAAASFvFNAAAAEElEQVR4nGP8zwAFTDAGAwATKQED8NgHhAAAAABJRU5E"
    "rkJggg=="
)
_ROUTES = (
    *("/", "/config", "/v1/models", "/v1/models/x", "/v1/chat/completions", "/health", "/metrics", "/theme.css"),
    *("/assets/x", "/static/x", "/favicon.ico", "/robots.txt", "/manifest.json", "/login", "/monitoring", "/svelte/x"),
    *(
        f"/gradio_api/{name}"
        for name in (
            *("queue/join", "queue/data", "queue/status", "upload", "upload_progress", "cancel", "reset", "info"),
            *(
                "startup-events",
                "file=/etc/passwd",
                "file/x",
                "proxy=http://127.0.0.1/",
                "run/predict",
                "api/x",
                "call/x",
            ),
            *("stream/x", "component_server", "process_recording", "vibe-edit", "deep_link", "openapi.json", "runs"),
        )
    ),
)
_EDGES = st.sampled_from(
    [0, -1, 1, 2**31, 2**63 - 1, 2**63, 2**64, -(2**63), 10**400, 1e-45, 1e308, float("nan"), float("inf")]
)
_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | _EDGES | st.floats() | st.text(max_size=40),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=12), inner, max_size=5),
    max_leaves=12,
)
_URLS = st.sampled_from(
    [_PNG, _PNG[:60], "data:,", "file:///etc/passwd", "http://127.0.0.1/x", "http://[::1", "//", ""]
)
_PART = st.one_of(
    st.builds(lambda text: {"type": "text", "text": text}, st.text()),
    st.builds(lambda url: {"type": "image_url", "image_url": {"url": url}}, _URLS | st.text()),
    _JSON,
)
_MESSAGE = st.fixed_dictionaries(
    {
        "role": st.sampled_from(["user", "user", "assistant", "system", "developer", "tool"]),
        "content": st.text() | st.lists(_PART, max_size=4) | _JSON,
    }
)
_NUMBER = st.integers(-3, 3) | st.floats(0, 2) | _EDGES | _JSON
_OPTIONAL = {
    **dict.fromkeys(("temperature", "top_p", "max_tokens", "max_completion_tokens", "seed", "n"), _NUMBER),
    "stop": st.text() | st.lists(st.text(), max_size=6) | _JSON,
    "stream": st.booleans() | _JSON,
    "stream_options": st.just({"include_usage": True}) | _JSON,
    "tools": _JSON,
    "response_format": _JSON,
}


def _chat(model: str) -> st.SearchStrategy[Any]:
    required = {"model": st.just(model) | st.text(), "messages": st.lists(_MESSAGE, max_size=4) | _JSON}
    return st.fixed_dictionaries(required, optional=_OPTIONAL)


_FILE = st.fixed_dictionaries({"path": st.text() | st.sampled_from(["/etc/passwd", "http://127.0.0.1/"])}) | _JSON
_BOX = st.fixed_dictionaries({"text": st.text() | _JSON, "files": st.lists(_FILE, max_size=2)})
_JOIN = st.fixed_dictionaries(
    {
        "data": st.tuples(_BOX, st.none(), _NUMBER, _NUMBER, _NUMBER, _NUMBER).map(list) | st.lists(_JSON, max_size=6),
        "fn_index": st.integers(-1, 12) | _JSON,
        "session_hash": st.sampled_from(["a", "b"]) | st.text(),
    },
    optional={"event_data": _JSON, "trigger_id": _JSON, "event_id": st.text(), "simple_format": _JSON},
)
_HEADER = st.text(string.ascii_letters + string.digits + " ;=/:.\xe9", max_size=30)
_HEADERS = st.dictionaries(
    st.sampled_from(["Origin", "Authorization", "Cookie", "X-Forwarded-Host", "Sec-Fetch-Site", "Range", "Referer"]),
    _HEADER,
    max_size=1,
)


def _requests(model: str) -> st.SearchStrategy[Any]:
    """Method, path, headers and body."""
    as_json = st.just("application/json")
    encoded = lambda kind: kind.map(lambda value: json.dumps(value).encode())  # noqa: E731
    form = st.binary(max_size=200).map(
        lambda data: (
            b'--b\r\nContent-Disposition: form-data; name="files"; filename="a"\r\n\r\n' + data + b"\r\n--b--\r\n"
        )
    )
    none = st.just({})
    session = st.builds(lambda a, b: {"session_hash": a, "event_id": b, "fn_index": 1}, st.text(), st.text())
    return st.one_of(
        st.tuples(st.just("POST"), st.just("/v1/chat/completions"), none, as_json, encoded(_chat(model))),
        st.tuples(st.just("POST"), st.just("/gradio_api/queue/join"), none, as_json, encoded(_JOIN)),
        st.tuples(
            st.just("POST"),
            st.sampled_from(["/gradio_api/cancel", "/gradio_api/reset"]),
            none,
            as_json,
            encoded(session),
        ),
        st.tuples(
            st.just("POST"),
            st.just("/gradio_api/upload"),
            none,
            st.just("multipart/form-data; boundary=b") | _HEADER,
            form | st.binary(max_size=200),
        ),
        st.tuples(
            st.sampled_from(["GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH"]),
            st.sampled_from(_ROUTES) | st.text(string.printable[:94], max_size=40).map(lambda rest: f"/{rest}"),
            _HEADERS,
            as_json | _HEADER,
            st.binary(max_size=100) | encoded(_JSON),
        ),
    )


def _send(place: tuple[str, int], request: Any) -> int:
    method, path, headers, kind, body = request
    path = "".join(c if "!" <= c <= "~" else "%20" for c in path)
    connection = http.client.HTTPConnection(*place, timeout=60)
    try:
        connection.request(
            method, path, body, {"Content-Type": kind.strip(), **{k: v.strip() for k, v in headers.items()}}
        )
        response = connection.getresponse()
        status = response.status
        if not response.getheader("Content-Type", "").startswith("text/event-stream") or "v1" in path:
            response.read()
        return status
    finally:
        connection.close()


def fuzz(url: str, model: str, requests: int, seed: int, seconds: float = 1e9) -> Counter[int]:
    """Statuses of random requests; ends early after ``seconds``."""
    host, port = url.removeprefix("http://").split(":")
    counts: Counter[int] = Counter()
    end = time.monotonic() + seconds

    @_seed(seed)
    @settings(
        max_examples=requests,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(_requests(model))
    def ask(request: Any) -> None:
        if time.monotonic() < end and sum(counts.values()) < requests:
            status = _send((host, int(port)), request)
            counts[status] += 1
            if status >= 500 and status != 503:
                print(status, repr(request)[:500], file=sys.stderr)

    while sum(counts.values()) < requests and time.monotonic() < end:
        before = sum(counts.values())
        ask()
        if sum(counts.values()) == before:
            break
    return counts


_seed = seed


def memory(pid: int) -> int:
    """MB of a process."""
    line = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) >> 10


def _await(url: str) -> None:
    for _ in range(200):
        try:
            return urllib.request.urlopen(f"{url}/health").close()
        except OSError:
            time.sleep(0.1)


@contextmanager
def serving() -> Iterator[tuple[str, int, Path]]:
    """A server of a tiny checkpoint: its address, process and log."""
    sys.path.insert(0, str(ROOT / "tests" / "unit"))
    import chat_models

    with tempfile.TemporaryDirectory() as folder:
        path, log = chat_models.publish(Path(folder) / "model"), Path(folder) / "log"
        command = [sys.executable, "-m", "mmpipe.cli.main", "serve", str(path), "--port", "0", "--max-tokens", "4"]
        with (
            log.open("w") as errors,
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True) as server,
        ):
            assert server.stdout is not None
            url = next(line for line in server.stdout if line.startswith("http://")).split()[0]
            try:
                _await(url)
                yield url, server.pid, log
            finally:
                server.terminate()


def main() -> None:
    """Fuzz a server of its own."""
    total, limit = [*map(float, sys.argv[1:]), *(10_000, 1_200)[len(sys.argv) - 1 :]]
    warnings.simplefilter("ignore", NonInteractiveExampleWarning)
    with serving() as (url, pid, log):
        fuzz(url, "tiny@finetune", 300, seed=1)  # what is loaded once
        before, start = memory(pid), time.monotonic()
        counts = fuzz(url, "tiny@finetune", int(total), seed=2, seconds=limit)
        print(f"{sum(counts.values())} requests in {time.monotonic() - start:.0f} s: {dict(sorted(counts.items()))}")
        print(f"5xx but 503: {sum(n for status, n in counts.items() if status >= 500 and status != 503)}")
        print(f"memory: {before} MB before, {memory(pid)} MB after")
        print(f"tracebacks in the log: {log.read_text().count('Traceback')}")


if __name__ == "__main__":
    main()
