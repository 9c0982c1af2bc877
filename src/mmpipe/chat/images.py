"""Images people bring to a conversation: a file, an address, or the bytes themselves."""

from __future__ import annotations

import base64
import binascii
from pathlib import Path
from typing import TYPE_CHECKING

from mmpipe.errors import DataError

if TYPE_CHECKING:
    from PIL import Image

    from mmpipe.sources.transfer.public_url import Limits

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
"""What is decoded when it comes from elsewhere: what browsers and cameras make, and no decoder more."""
_TYPES = {f"image/{name.lower()}" for name in FORMATS} | {
    "image/jpg",
    "image/x-ms-bmp",
    "application/octet-stream",
    "binary/octet-stream",
    "",
}


def is_address(where: str) -> bool:
    """Whether ``where`` is a web address rather than a file."""
    return where.partition("://")[0].lower() in ("http", "https")


def check(where: str) -> str:
    """Raise DataError at once, before anything slow, when ``where`` is no address and no such file exists."""
    if not is_address(where) and not Path(where).expanduser().is_file():
        raise DataError(f"{where}: there is no such image (a file, or an http:// or https:// address)")
    return where


def from_anywhere(where: str, limits: Limits | None = None) -> Image.Image:
    """The image in a file or at an address, as RGB and upright. Raises DataError naming it."""
    if is_address(where):
        return from_address(where, limits)
    from mmpipe.data.images import open_image

    return open_image(Path(check(where)).expanduser(), upright=True).image


def from_address(url: str, limits: Limits | None = None) -> Image.Image:
    """Download an image within ``limits``, by default those of :class:`mmpipe.sources.transfer.public_url.Limits`."""
    from mmpipe.sources.transfer.public_url import Limits, fetch

    content, kind = fetch(url, limits or Limits())
    if kind not in _TYPES:
        raise DataError(f"{url}: the server sends '{kind}', not an image ({', '.join(FORMATS)})")
    return from_bytes(content, url)


def from_data_url(url: str, size: int) -> Image.Image:
    """The image in a ``data:image/…;base64,…`` address of at most ``size`` bytes."""
    head, comma, payload = url.partition(",")
    kind, _, encoding = head.removeprefix("data:").rpartition(";")
    if not comma or encoding != "base64" or kind.partition(";")[0].lower() not in _TYPES:
        raise DataError(f"'{head[:40]}': expected data:image/png;base64,… (or another of {', '.join(FORMATS)})")
    if len(payload) > 4 * size // 3 + 4:
        raise DataError(f"an image of more than the {size} bytes allowed; shrink it")
    try:
        content = base64.b64decode(payload, validate=True)
    except binascii.Error as error:
        raise DataError(f"'{head[:40]}': the base64 is damaged ({error})") from error
    return from_bytes(content, f"'{head[:40]}'")


def from_bytes(content: bytes, where: str) -> Image.Image:
    """Decode what came from elsewhere, as RGB and upright."""
    from mmpipe.data.images import decode_image

    return decode_image(content, where, upright=True, formats=FORMATS)
