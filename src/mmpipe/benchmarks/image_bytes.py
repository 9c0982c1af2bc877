"""Image bytes in the forms benchmarks ship them."""

from __future__ import annotations

import base64
import binascii
from typing import Any

from mmpipe.errors import DataError

_SIGNATURES = ((b"\xff\xd8\xff", "jpg"), (b"\x89PNG", "png"), (b"GIF8", "gif"), (b"BM", "bmp"), (b"RIFF", "webp"))


def decode_base64(text: str, where: str) -> bytes:
    """The bytes of a base64 image.

    Raises DataError, opened by ``where``, when it is not base64.
    """
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise DataError(f"{where}: the image is not base64 ({error})") from error


def hub_image(value: Any, where: str) -> bytes:
    """The bytes of an image column of a data set on the hub (``{"bytes": ..., "path": ...}``).

    Raises DataError, opened by ``where``, when there are none.
    """
    content = value.get("bytes") if isinstance(value, dict) else value
    if not isinstance(content, bytes):
        raise DataError(f"{where}: the image column holds no bytes")
    return content


def extension(content: bytes, where: str) -> str:
    """File extension by the signature of the content.

    Raises DataError, opened by ``where``, when it is no image known here.
    """
    for signature, name in _SIGNATURES:
        if content.startswith(signature):
            return name
    raise DataError(f"{where}: not a JPEG, PNG, GIF, BMP or WebP image")
