"""Images of a conversation: a file, a web address, or bytes."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from mmpipe.data.images import decode_image, image_size, open_image
from mmpipe.errors import DataError
from mmpipe.sources.transfer.public_url import Limits, fetch

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
"""Formats that are decoded from untrusted sources: those of browsers and cameras only."""
MAX_REQUEST_PIXELS = 64_000_000
"""Of all images of one conversation, each padded to a square: about 200 MB, and twice that while they are resized."""
_LIMITS = Limits()
_OTHER_TYPES = {"image/jpg", "image/x-ms-bmp", "application/octet-stream", "binary/octet-stream", ""}
_TYPES = {f"image/{name.lower()}" for name in FORMATS} | _OTHER_TYPES


def is_address(where: str) -> bool:
    """Whether ``where`` is a web address rather than a file."""
    return where.partition("://")[0].lower() in ("http", "https")


def check(where: str) -> str:
    """``where``. Raises DataError when it is neither an address nor an existing file, before anything slow."""
    if not is_address(where) and not Path(where).expanduser().is_file():
        raise DataError(f"{where}: there is no such image (a file, or an http:// or https:// address)")
    return where


def from_anywhere(where: str, limits: Limits = _LIMITS) -> Image.Image:
    """The image in a file or at an address, as RGB and upright. Raises DataError naming it."""
    if is_address(where):
        return from_address(where, limits)
    return open_image(Path(check(where)).expanduser(), upright=True).image


def from_address(url: str, limits: Limits = _LIMITS) -> Image.Image:
    """Download an image within ``limits``, and decode it."""
    return download(url, limits).decode()


def download(url: str, limits: Limits) -> EncodedImage:
    """Download an image within ``limits``."""
    content, kind = fetch(url, limits)
    if kind not in _TYPES:
        raise DataError(f"{url}: the server sends '{kind}', not an image ({', '.join(FORMATS)})")
    return EncodedImage(content, url)


@dataclass(frozen=True)
class EncodedImage:
    """An image that is decoded when its answer is generated; ``content`` is its file, or the path of one."""

    content: bytes | Path = field(repr=False)
    where: str
    """Names it in messages."""

    def read(self) -> bytes:
        """The file."""
        try:
            return self.content if isinstance(self.content, bytes) else self.content.read_bytes()
        except OSError as error:
            raise DataError(f"{self.where}: the image is no longer kept; show it again") from error

    def size(self) -> tuple[int, int]:
        """Width and height in pixels, from the header."""
        return image_size(self.read(), self.where, FORMATS)

    def decode(self) -> Image.Image:
        """RGB and upright."""
        return from_bytes(self.read(), self.where)


def require_few_pixels(images: Sequence[Image.Image | EncodedImage]) -> None:
    """Raise DataError when decoded images, padded to squares, would take more than MAX_REQUEST_PIXELS together."""
    sizes = [image.size if isinstance(image, Image.Image) else image.size() for image in images]
    if (total := sum(max(size) ** 2 for size in sizes)) > MAX_REQUEST_PIXELS:
        raise DataError(
            f"{len(sizes)} images, padded to squares, have {total / 1e6:.0f} megapixels, "
            f"{MAX_REQUEST_PIXELS / 1e6:.0f} are taken; shrink them"
        )


def from_data_url(url: str, size: int) -> EncodedImage:
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
    return EncodedImage(content, f"'{head[:40]}'")


def from_bytes(content: bytes, where: str) -> Image.Image:
    """Decode an untrusted image, as RGB and upright; ``where`` names it in messages."""
    return decode_image(content, where, upright=True, formats=FORMATS)
