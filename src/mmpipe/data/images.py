"""Opening, inspecting, hashing and encoding images, and the image processor of a vision tower."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import mimetypes
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from PIL import ExifTags, Image, ImageOps, PngImagePlugin

from mmpipe.errors import ArtifactError, ConfigError, DataError
from mmpipe.pretrained import load_pretrained

if TYPE_CHECKING:
    from transformers import LlavaImageProcessorPil

Aspect = Literal["pad", "square"]
"""``pad``: to a square with the mean colour, then resized. ``square``: the tower's own resizing, cropping."""
MAX_PIXELS = 80_000_000
"""A larger image counts as a decompression bomb (an A3 page scanned at 600 dpi has 70 million)."""
MAX_SIDE = 12_000
"""In pixels. Padding makes a square of the longer side before anything is shrunk: this one takes 430 MB."""
MAX_ASPECT = 200
"""Longer to shorter side. A tower resizes the shorter side to its size: 336 pixels make the longer one 67,200."""

TRANSPARENT = "transparent pixels put on white"
"""The note on an image of which some pixel is not opaque."""

# Pillow refuses a PNG with a text or a colour profile of more than 1 MB. Editors write larger ones: histories, workflows.
PngImagePlugin.MAX_TEXT_CHUNK = 64 << 20
PngImagePlugin.MAX_TEXT_MEMORY = 256 << 20
# The JPEG of many cameras holds a second image, a preview.
_SAME_FORMAT = {"MPO": "JPEG"}
_PIXEL_SETTINGS = ("size", "crop_size", "do_pad", "image_mean", "image_std", "resample", "do_center_crop")
_PROCESSOR_SETTINGS = {"do_resize", "do_rescale", "rescale_factor", "do_normalize", "do_convert_rgb"}
_PROCESSOR_SETTINGS |= {*_PIXEL_SETTINGS} - {"do_pad"}
_DEEP_GREY = {"I", "I;16", "I;16B", "I;16L", "I;16N"}


@dataclass(frozen=True, slots=True)
class OpenedImage:
    """An opened image. ``notes`` are peculiarities of the file that are not errors."""

    image: Image.Image
    """Mode RGB."""
    notes: tuple[str, ...] = ()


def open_image(path: Path, *, upright: bool = False) -> OpenedImage:
    """Decode an image as RGB; equal files give equal pixels.

    The format is read from the content, not from the name. Of several frames the first is taken, transparent pixels
    are put on white, 16-bit grey is scaled to 8 bits. With ``upright`` the orientation in the EXIF data is applied;
    by default it is not, as in LLaVA.

    Raises DataError, naming the file, if it is missing, damaged, no image, or too large.
    """
    image, notes = _identify(path, _read(path))
    rgb, transparent = _pixels(image, str(path), upright=upright)
    return OpenedImage(rgb, (*notes, TRANSPARENT) if transparent else notes)


def decode_image(
    content: bytes, where: str, *, upright: bool = False, formats: tuple[str, ...] | None = None
) -> Image.Image:
    """The image in ``content`` as :func:`open_image` decodes it; ``where`` names it in messages. ``formats`` are
    Pillow's names of the only formats to read: fewer decoders for untrusted input."""
    return _pixels(_recognise(content, where, formats), where, upright=upright)[0]


def image_size(content: bytes, where: str, formats: tuple[str, ...]) -> tuple[int, int]:
    """Width and height in pixels, from the header; nothing is decoded. Raises DataError as :func:`decode_image`."""
    return _recognise(content, where, formats).size


def _pixels(image: Image.Image, where: str, *, upright: bool) -> tuple[Image.Image, bool]:
    """The decoded image as RGB, and whether it has transparent pixels."""
    try:
        image.load()
        if upright:
            with suppress(Exception):  # damaged EXIF data
                image = ImageOps.exif_transpose(image)
        return on_white(image)
    except Exception as error:  # Pillow's decoders raise errors of any type
        raise _damaged(where, error) from error


def on_white(image: Image.Image) -> tuple[Image.Image, bool]:
    """The image as RGB, transparent pixels blended with white, as image viewers show them; and whether there are any.
    The colours below transparent pixels are arbitrary, often black."""
    key = image.info.get("transparency")
    if image.mode in _DEEP_GREY:
        import numpy as np  # the interface of benchmarks loads without it

        values = np.asarray(image)
        grey = (values.clip(0, 65535) // 257).astype(np.uint8)
        clear = values == key if isinstance(key, int) else np.zeros(values.shape, bool)
        grey[clear] = 255
        return Image.fromarray(grey).convert("RGB"), bool(clear.any())
    if not image.has_transparency_data:
        return image.convert("RGB"), False
    if isinstance(key, tuple) and max(key) > 255:  # of 16-bit samples, which Pillow reduces to 8 bits
        image.info["transparency"] = tuple(sample >> 8 for sample in key)
    rgba = image.convert("RGBA")
    opaque = rgba.getchannel("A").getextrema() == (255, 255)
    canvas = Image.new("RGB", rgba.size, "white")
    canvas.paste(rgba, (0, 0), rgba)
    return canvas, not opaque


def _damaged(where: str | Path, error: Exception) -> DataError:
    return DataError(f"{where}: the image is damaged ({str(error) or type(error).__name__}); fetch it again")


@dataclass(frozen=True, slots=True)
class Inspection:
    """The result of verifying an image. ``fault`` is None when it can be trained on."""

    width: int = 0
    height: int = 0
    notes: tuple[str, ...] = ()
    fault: str | None = None
    digest: bytes = b""
    """16 bytes that identify the file's content; empty when it cannot be trained on."""


def content_digest(content: bytes) -> bytes:
    """The :attr:`Inspection.digest` of a file's content."""
    return hashlib.blake2b(content, digest_size=16).digest()


def inspect_image(path: Path) -> Inspection:
    """Decode an image to the end; faults are returned, not raised. JPEG is decoded at a fraction of
    its size, which reads the whole file in half the time."""
    try:
        content = _read(path)
        image, notes = _identify(path, content)
    except DataError as error:
        return Inspection(fault=str(error))
    width, height = image.size
    try:
        image.draft(None, (max(1, width // 8), max(1, height // 8)))
        image.load()
        if (image.has_transparency_data or image.mode in _DEEP_GREY) and on_white(image)[1]:
            notes = (*notes, TRANSPARENT)
    except Exception as error:  # noqa: BLE001 - Pillow's decoders raise errors of any type
        return Inspection(fault=str(_damaged(path, error)))
    return Inspection(width, height, notes, digest=content_digest(content))


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: the image cannot be read ({error.strerror})") from error


def _identify(path: Path, content: bytes) -> tuple[Image.Image, tuple[str, ...]]:
    """Recognise the format, without decoding."""
    image = _recognise(content, str(path), None)
    try:
        return image, _peculiarities(path, image)
    except Exception as error:  # e.g. a second frame that cannot be read
        raise _damaged(path, error) from error


def _peculiarities(path: Path, image: Image.Image) -> tuple[str, ...]:
    """The notes on a recognised image."""
    named = Image.registered_extensions().get(path.suffix.lower())
    called = path.suffix if named else "without suffix"
    odd = {
        f"{image.format} named {called}": named != _SAME_FORMAT.get(str(image.format), image.format),
        "several frames, first taken": getattr(image, "is_animated", False),
        "16-bit grey scaled to 8 bits": image.mode in _DEEP_GREY,
        "16-bit colours cut to 8 bits": image.mode not in _DEEP_GREY and _has_deep_samples(image),
        "palette made RGB": image.mode == "P",
        "CMYK made RGB": image.mode == "CMYK",
        "EXIF says rotated, left as stored": _orientation(image) != 1,
    }
    return tuple(note for note, holds in odd.items() if holds)


def _has_deep_samples(image: Image.Image) -> bool:
    """Whether the file has 16 bits per sample, which decoding reduces to eight."""
    tiles: Any = getattr(image, "tile", ())
    return any(";16" in str(tile[3]) for tile in tiles)


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation of the stored pixels; 1 is upright."""
    if "exif" not in image.info:  # otherwise Pillow decodes a PNG to find EXIF after its pixels
        return 1
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # noqa: BLE001 - damaged EXIF data
        return 1


def _recognise(content: bytes, where: str, formats: tuple[str, ...] | None) -> Image.Image:
    """Read the header of an image."""
    try:
        image = Image.open(io.BytesIO(content), formats=formats)
    except Image.UnidentifiedImageError as error:
        known = "no known image format" if formats is None else f"none of the formats {', '.join(formats)}"
        what = f"in {known}" if content else "an empty file"
        raise DataError(f"{where}: the image is {what}; fetch it again") from error
    except Image.DecompressionBombError as error:
        raise DataError(f"{where}: {error}") from error
    except Exception as error:  # Pillow's decoders raise errors of any type
        raise _damaged(where, error) from error
    if min(image.size) < 1:
        raise DataError(f"{where}: the image is damaged ({image.width}x{image.height} pixels); fetch it again")
    if image.width * image.height > MAX_PIXELS:
        raise DataError(f"{where}: {image.width}x{image.height} are more than {MAX_PIXELS} pixels; shrink it")
    longer, shorter = max(image.size), min(image.size)
    if longer > MAX_SIDE:
        raise DataError(
            f"{where}: {image.width}x{image.height}, padded to a square of its longer side, would take "
            f"{3 * longer**2 / 1e9:.1f} GB of memory; shrink it to {MAX_SIDE} pixels, or cut it"
        )
    if longer > MAX_ASPECT * shorter:
        raise DataError(
            f"{where}: {image.width}x{image.height} is more than {MAX_ASPECT} times as long as it is wide, and "
            "resizing its shorter side to what a vision tower sees would take too much memory; cut it"
        )
    if image.mode == "F":
        raise DataError(f"{where}: an image of floating-point numbers has no defined brightness; convert it")
    return image


def image_processor(vision_dir: Path, aspect: Aspect) -> LlavaImageProcessorPil:
    """The processor that turns an image into the input of the vision tower stored in ``vision_dir``. Always of one
    class, which a ``LlavaProcessor`` can hold and save, with the sizes, means and deviations of the tower's own
    ``preprocessor_config.json``; always on Pillow: the same pixels on every machine."""
    from transformers import AutoImageProcessor
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

    try:
        own = load_pretrained(AutoImageProcessor, vision_dir, backend="pil")
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{vision_dir}: no image processor can be read from it ({error})") from error
    settings = {key: value for key, value in own.to_dict().items() if key in _PROCESSOR_SETTINGS}
    settings["do_center_crop"] = bool(settings.get("do_center_crop"))
    if not settings["do_center_crop"]:
        # No cropping; `crop_size` only states the size of the result to a processor.
        settings["crop_size"] = settings["size"]
    return LlavaImageProcessorPil(**settings, do_pad=aspect == "pad")


def pixel_settings(processor: Any) -> dict[str, Any]:
    """The settings of an image processor that affect pixels, as read back from JSON."""
    settings = processor.to_dict()
    kept: dict[str, Any] = json.loads(json.dumps({key: settings.get(key) for key in _PIXEL_SETTINGS}))
    return kept


def require_same_pixels(
    where: Path, ours: Mapping[str, Any], theirs: Mapping[str, Any], whose: str = "teacher"
) -> None:
    """Raise ConfigError, naming ``where``, when two models do not get the same pixels of an image. Arguments are
    results of :func:`pixel_settings`; ``whose`` is the role of the other model."""
    different = [key for key in _PIXEL_SETTINGS if ours.get(key) != theirs.get(key)]
    if different:
        shown = "; ".join(f"{key}: stage {ours.get(key)}, {whose} {theirs.get(key)}" for key in different)
        raise ConfigError(
            f"{where}: the {whose} was trained on other images than the stage shows ({shown}); "
            f"give the stage the {whose}'s image_aspect, or take a {whose} of the same image size"
        )


def data_url(image: Image.Image | Path, kind: str = "PNG", **options: Any) -> str:
    """An image as a ``data:`` URL: a file as it is, pixels encoded as ``kind`` with Pillow's ``options``."""
    if isinstance(image, Path):
        media, content = mimetypes.guess_type(image.name)[0] or "image/jpeg", image.read_bytes()
    else:
        media, content = f"image/{kind.lower()}", encode_image(image, kind, **options)
    return f"data:{media};base64,{base64.b64encode(content).decode()}"


def encode_image(image: Image.Image, kind: str, **options: Any) -> bytes:
    """The content of an image file of Pillow's format ``kind``."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()
