"""Atomic download of one file over HTTP(S).

Added to ``requests``, as pooch, fsspec and the internal downloader of huggingface_hub do not offer all of it: resuming
an interrupted download (only if the file has not changed on the server), retries after refusals and stalls, several
addresses, guarded redirects, a limit of the size, and verification before the file gets its name.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import requests
from tqdm import tqdm
from urllib3.exceptions import HTTPError, InvalidHeader
from urllib3.util import Retry

from mmpipe.artifacts.files import read_object, sync, write_json
from mmpipe.errors import DataError, MmpipeError
from mmpipe.escapes import redacted, with_variables
from mmpipe.sources.transfer.progress import check_space, format_size
from mmpipe.sources.transfer.session import GuardedSession
from mmpipe.sources.transfer.staging import Expected

log = logging.getLogger(__name__)
_CHUNK = 1 << 16
"""Bytes between writes: the most that an interruption loses."""
_LOOK_EVERY = 64 << 20
"""Bytes of a body of unknown length between two checks of the free disk space."""
_PASSING = {408, 425, 429, 500, 502, 503, 504}
"""Temporary HTTP errors."""


_ANY_FILE = Expected()


@dataclass(frozen=True)
class Patience:
    """Timeouts in seconds and number of attempts. Progress resets the count."""

    connect: float = 30
    read: float = 60
    """A transfer without a byte for this time has stalled."""
    attempts: int = 8
    pause: float = 1
    """Before the second attempt; doubled each time."""
    longest_pause: float = 300


class _Interrupted(MmpipeError):
    """A failed transfer that may succeed when retried."""

    def __init__(self, why: str, wait: float = 0) -> None:
        super().__init__(why)
        self.wait = wait
        """The server's ``Retry-After``, in seconds."""


class _Refused(MmpipeError):
    """A permanent refusal of an address."""


class _Exhausted(MmpipeError):
    """All attempts at an address failed; its partial file can be resumed later."""


def download(
    urls: Sequence[str],
    target: Path,
    expected: Expected = _ANY_FILE,
    patience: Patience | None = None,
    most: float = 200e9,
) -> dict[str, Any]:
    """Download ``target`` from the first working of ``urls``; returns its ``size`` and ``sha256``. Bytes go to
    ``target.part``, which a later call resumes, also after all attempts of this one failed. ``${NAME}`` in an address is
    the environment's value. Raises DataError, naming every address, without its secrets, and its error, when none gives
    the expected file; a file of more than ``most`` bytes is not taken."""
    patience = patience or Patience()
    part = target.with_name(f"{target.name}.part")
    part.parent.mkdir(parents=True, exist_ok=True)
    faults: list[str] = []
    for url in urls:
        try:
            _persist(url, part, expected, patience, most)
            facts = expected.check(part, url)
        except (_Refused, _Exhausted, DataError) as fault:
            if not isinstance(fault, _Exhausted):
                _forget(part)
            log.warning("%s", redacted(str(fault)))
            faults.append(str(fault))
            continue
        sync(part)
        part.replace(target)
        _note(part).unlink(missing_ok=True)
        return facts
    raise DataError("; ".join(faults))


def _persist(url: str, part: Path, expected: Expected, patience: Patience, most: float) -> None:
    """Retry until the file is complete; stops after ``patience.attempts`` attempts in a row without a new byte."""
    fruitless = 0
    while True:
        before = _size(part)
        try:
            return _transfer(url, part, expected, patience, most)
        except _Interrupted as fault:
            fruitless = 0 if _size(part) > before else fruitless + 1
            if fruitless >= patience.attempts:
                raise _Exhausted(f"{url}: {fault}, {fruitless} times in a row") from fault
            pause = min(patience.pause * 2**fruitless, patience.longest_pause)
            log.warning("%s: %s; trying again", redacted(url), redacted(str(fault)))
            time.sleep(max(pause, min(fault.wait, patience.longest_pause)))


def _transfer(url: str, part: Path, expected: Expected, patience: Patience, most: float) -> None:
    """One request. Raises _Interrupted or _Refused."""
    have = _resumable(url, part, expected)
    # Encodings would change the length by which completeness is checked.
    headers = {"Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
        if validator := read_object(_note(part)).get("validator"):
            headers["If-Range"] = validator
    log.info("downloading %s%s", redacted(url), f" from byte {have}" if have else "")
    try:
        place = with_variables(url)
    except KeyError as error:
        raise _Refused(f"{url}: the environment variable {error} is not set") from None
    settings: dict[str, Any] = {"headers": headers, "stream": True, "timeout": (patience.connect, patience.read)}
    try:
        with GuardedSession() as session, session.get(place, **settings) as response:
            if response.status_code == 416 and have:
                _forget(part)
                raise _Interrupted("the server has less of the file than is here already")
            answer = f"the server answered {response.status_code} {response.reason}"
            if response.status_code in _PASSING:
                raise _Interrupted(answer, _asked_wait(response))
            if response.status_code >= 400:
                raise _Refused(f"{url}: {answer}")
            _receive(response, url, part, have, expected, most)
    except DataError as error:
        raise _Refused(f"{url}: {str(error).removeprefix(f'{redacted(url)}: ')}") from error
    except (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError) as error:
        raise _Interrupted(f"the connection failed ({_reason(error)})") from error
    except requests.RequestException as error:
        raise _Refused(f"{url}: {error}") from error


def _receive(response: requests.Response, url: str, part: Path, have: int, expected: Expected, most: float) -> None:
    """Append the body to the partial file; if the server starts from the beginning, so does the file."""
    resumed = response.status_code == 206
    if resumed and _start(response) != have:
        _forget(part)
        raise _Interrupted("the server sent another part of the file than it was asked for")
    note = read_object(_note(part)) if resumed else {}
    # some servers ignore ``If-Range``
    if resumed and note["url"] == _shown(url) and _validator(response) not in (None, note["validator"]):
        _forget(part)
        raise _Interrupted("the file changed since the first part of it came")
    done = have if resumed else 0
    length = response.headers.get("Content-Length")
    total = done + int(length) if length and not response.headers.get("Content-Encoding") else None
    if None not in (total, expected.size) and total != expected.size:
        raise _Refused(f"{url}: {total} bytes, but {expected.says} says {expected.size}")
    check_space(part.parent, (total or 0) - done, url)
    write_json(_note(part), {"url": _shown(url), "validator": _validator(response), "total": total})
    limit = expected.size or most
    too_large = f"more than {format_size(limit)}"
    if not expected.size:
        too_large += "; if it is meant, give the file's 'size', or raise the entry's 'max_gb'"
    if (total or 0) > limit:
        raise _Refused(f"{url}: {too_large}")
    bar = tqdm(total=total, initial=done, unit="B", unit_scale=True, desc=part.stem[-40:], disable=None)
    with part.open("ab" if resumed else "wb") as file, bar:
        for chunk in response.iter_content(_CHUNK):
            before, done = done, done + len(chunk)
            if done > limit:
                raise _Refused(f"{url}: {too_large}")
            if total is None and done // _LOOK_EVERY > before // _LOOK_EVERY:
                check_space(part.parent, _LOOK_EVERY, url)
            file.write(chunk)
            bar.update(len(chunk))
    if total is not None and _size(part) != total:
        raise _Interrupted(f"the connection ended after {_size(part)} of {total} bytes")


def _resumable(url: str, part: Path, expected: Expected) -> int:
    """The byte to resume from: 0 unless the server or a hash can show that the file is unchanged."""
    if not part.is_file() or not _note(part).is_file():
        return 0
    try:
        note = read_object(_note(part))
    except ValueError:
        return 0
    same = note["url"] == _shown(url) and note["validator"]
    return _size(part) if same or expected.sha256 else 0


def _validator(response: requests.Response) -> str | None:
    """The version of the file: a strong entity tag, else the time of the last change."""
    tag = response.headers.get("ETag", "")
    return tag if tag.startswith('"') else response.headers.get("Last-Modified")


def _start(response: requests.Response) -> int | None:
    """The first byte of a partial answer (``Content-Range: bytes 5-9/10``)."""
    unit, _, place = response.headers.get("Content-Range", "").partition(" ")
    first = place.partition("-")[0]
    return int(first) if unit == "bytes" and first.isdigit() else None


def _asked_wait(response: requests.Response) -> float:
    value = response.headers.get("Retry-After")
    try:
        return Retry().parse_retry_after(value) if value else 0
    except InvalidHeader:
        return 0


def _reason(error: requests.RequestException) -> str:
    """The innermost cause in words; requests wraps it several times."""
    cause = error.args[0] if error.args else error
    while isinstance(cause, HTTPError) and getattr(cause, "reason", None):
        cause = cause.reason  # type: ignore[attr-defined]
    return str(cause)


def _shown(url: str) -> str:
    """The address as the note has it."""
    return redacted(url, environment=False)


def _note(part: Path) -> Path:
    """The file beside the part with its address and version."""
    return part.with_name(f"{part.name}.json")


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _forget(part: Path) -> None:
    part.unlink(missing_ok=True)
    _note(part).unlink(missing_ok=True)
