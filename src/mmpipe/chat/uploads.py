"""Uploaded images: a private folder of bounded size, where each file can be read by the browser that sent it only."""

from __future__ import annotations

import atexit
import functools
import re
import secrets
import shutil
import tempfile
import threading
import time
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass
from pathlib import Path

from starlette.datastructures import Headers, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from mmpipe.chat import images
from mmpipe.chat.protocol import RequestError

MAX_FILE = 20 << 20
"""Bytes of an uploaded file at most."""
MAX_FILES = 16
_HOUR = 3600


@functools.cache
def folder() -> Path:
    """The private folder of this process; removed at its end."""
    made = Path(tempfile.mkdtemp(prefix="mmpipe-serve-")).resolve()
    atexit.register(shutil.rmtree, made, ignore_errors=True)
    return made


@dataclass(frozen=True)
class _Upload:
    owner: str
    size: int
    time: float


class Uploads:
    """Files by path. ``total`` bounds the bytes of all, a quarter of it those of one owner; kept for ``seconds``."""

    def __init__(self, total: int = 512 << 20, seconds: float = _HOUR) -> None:
        self._total, self._seconds = total, seconds
        self._files: dict[str, _Upload] = {}
        self._lock = threading.Lock()

    def save(self, owner: str, name: str, content: bytes) -> str:
        """Store an image; returns its path. Raises RequestError when there is no room or it is no image."""
        if len(content) > MAX_FILE:
            raise RequestError(413, f"an image of more than the {MAX_FILE} bytes allowed; shrink it")
        images.EncodedImage(content, "the upload").size()
        path = (
            folder()
            / secrets.token_hex(16)
            / (re.sub(r"[^\w.-]", "_", name, flags=re.ASCII).strip(".")[-80:] or "image")
        )
        with self._lock:
            self._expire()
            mine = sum(file.size for file in self._files.values() if file.owner == owner)
            kept = sum(file.size for file in self._files.values())
            if mine + len(content) > self._total // 4 or kept + len(content) > self._total:
                raise RequestError(503, f"no room for more uploads; they are deleted after {self._seconds:g} seconds")
            self._files[str(path)] = _Upload(owner, len(content), time.monotonic())
        path.parent.mkdir(mode=0o700)
        path.write_bytes(content)
        return str(path)

    def find(self, owner: str, path: str) -> Path:
        """A file of ``owner``. Raises RequestError: whether it exists for another one is not told."""
        with self._lock:
            self._expire()
            file = self._files.get(path)
        if file is None or not secrets.compare_digest(file.owner, owner) or not Path(path).is_file():
            raise RequestError(404, "no such file was uploaded from here, or it is no longer kept; upload it again")
        return Path(path)

    def _expire(self) -> None:
        limit = time.monotonic() - self._seconds
        for path in [path for path, file in self._files.items() if file.time < limit]:
            del self._files[path]
            shutil.rmtree(Path(path).parent, ignore_errors=True)


async def parse_upload(headers: Mapping[str, str], body: bytes) -> list[tuple[str, bytes]]:
    """Names and contents of the files of a form. Raises RequestError."""

    async def whole() -> AsyncGenerator[bytes, None]:
        yield body

    try:
        parser = MultiPartParser(Headers(headers), whole(), max_files=MAX_FILES, max_fields=4)
        form = await parser.parse()
    except (MultiPartException, ValueError, LookupError, OSError) as error:
        raise RequestError(400, "the form with the files is damaged") from error
    try:
        files = [value for _, value in form.multi_items() if isinstance(value, UploadFile)]
        if not files:
            raise RequestError(400, "the form holds no file, or is cut")
        return [(file.filename or "image", await file.read()) for file in files]
    finally:
        await form.close()
