from __future__ import annotations

import io
import random
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, PngImagePlugin
from transformers import LlavaProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from mmpipe.data import images
from mmpipe.data.image_files import EmbeddedImages
from mmpipe.data.images import decode_image, encode_image, image_processor, inspect_image, open_image
from mmpipe.errors import ArtifactError, DataError

RED, BLUE = (254, 0, 0), (0, 0, 254)
SIZE = (12, 8)


def pixels(path: Path, *, upright: bool = False) -> np.ndarray:
    image = open_image(path, upright=upright).image
    assert image.mode == "RGB"
    return np.asarray(image)


def palette() -> Image.Image:
    return Image.new("RGB", SIZE, RED).convert("P", palette=Image.Palette.ADAPTIVE)


@pytest.mark.parametrize(
    ("make", "name", "notes"),
    [
        (lambda: Image.new("RGB", SIZE, RED), "a.png", ()),
        (lambda: Image.new("RGB", SIZE, RED), "a.webp", ()),
        (palette, "a.gif", ("palette made RGB",)),
        (palette, "a.png", ("palette made RGB",)),
        (lambda: Image.new("RGBA", SIZE, (*RED, 255)), "a.png", ()),
        (lambda: Image.new("CMYK", SIZE, (0, 255, 255, 0)), "a.tif", ("CMYK made RGB",)),
        (lambda: Image.new("CMYK", SIZE, (0, 255, 255, 0)), "a.jpg", ("CMYK made RGB",)),
    ],
    ids=["rgb png", "webp", "palette gif", "palette png", "opaque alpha", "cmyk tiff", "cmyk jpeg"],
)
def test_every_mode_becomes_rgb(
    tmp_path: Path, make: Callable[[], Image.Image], name: str, notes: tuple[str, ...]
) -> None:
    options = {"lossless": True} if name.endswith("webp") else {}
    make().save(tmp_path / name, **options)
    assert open_image(tmp_path / name).notes == notes
    np.testing.assert_allclose(pixels(tmp_path / name)[4, 4].astype(int), RED, atol=3)


def test_deep_grey_is_scaled_not_clipped(tmp_path: Path) -> None:
    values = np.array([[0, 257, 32896, 65535]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / "a.png")
    assert pixels(tmp_path / "a.png")[0, :, 0].tolist() == [0, 1, 128, 255]
    assert open_image(tmp_path / "a.png").notes == ("16-bit grey scaled to 8 bits",)


def chunked_png(path: Path, bits: int, colour: int, size: tuple[int, int], samples: bytes) -> Path:
    """A PNG as Pillow does not write it."""
    header = size[0].to_bytes(4) + size[1].to_bytes(4) + bytes([bits, colour, 0, 0, 0])
    chunks = [b"IHDR" + header, b"IDAT" + zlib.compress(samples), b"IEND"]
    written = [(len(c) - 4).to_bytes(4) + c + zlib.crc32(c).to_bytes(4) for c in chunks]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(written))
    return path


def test_deep_colours_are_noted(tmp_path: Path) -> None:
    path = chunked_png(tmp_path / "a.png", 16, 2, (1, 1), bytes([0, 200, 9, 100, 9, 50, 9]))
    assert open_image(path).notes == ("16-bit colours cut to 8 bits",)
    assert pixels(path).tolist() == [[[200, 100, 50]]]


def test_of_an_animation_the_first_frame_is_taken(tmp_path: Path) -> None:
    frames = [Image.new("RGB", SIZE, color) for color in (RED, BLUE)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert pixels(tmp_path / "a.gif")[0, 0].tolist() == list(RED)
    assert open_image(tmp_path / "a.gif").notes == ("several frames, first taken", "palette made RGB")


def test_content_decides_and_a_wrong_name_is_noted(tmp_path: Path) -> None:
    Image.new("RGB", SIZE, RED).save(tmp_path / "a.jpg", format="GIF")
    assert open_image(tmp_path / "a.jpg").notes == ("GIF named .jpg", "palette made RGB")
    assert inspect_image(tmp_path / "a.jpg").notes == ("GIF named .jpg", "palette made RGB")
    for name in ("bare", "photo.1234"):
        Image.new("RGB", SIZE, RED).save(tmp_path / name, format="PNG")
        assert open_image(tmp_path / name).notes == ("PNG named without suffix",)


def test_exif_orientation_is_applied_on_demand_only(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", SIZE, RED).save(tmp_path / "a.jpg", exif=exif)
    assert open_image(tmp_path / "a.jpg").notes == ("EXIF says rotated, left as stored",)
    assert pixels(tmp_path / "a.jpg").shape == (8, 12, 3)
    assert pixels(tmp_path / "a.jpg", upright=True).shape == (12, 8, 3)


def ink() -> Image.Image:
    """Black, opaque on the left alone."""
    drawing = Image.new("RGBA", SIZE, (0, 0, 0, 0))
    drawing.paste((0, 0, 0, 255), (0, 0, 6, 8))
    return drawing


def grey_with_key(mode: str, black: int, key: int) -> Image.Image:
    drawing = Image.new(mode, SIZE, key)
    drawing.paste(black, (0, 0, 6, 8))
    return drawing


@pytest.mark.parametrize(
    ("make", "name", "options"),
    [
        (ink, "a.png", {}),
        (ink, "a.tif", {}),
        (ink, "a.webp", {"lossless": True}),
        (lambda: ink().convert("LA"), "a.png", {}),
        (lambda: ink().quantize(), "a.png", {}),
        (lambda: grey_with_key("P", 0, 1), "a.gif", {"transparency": 1}),
        (lambda: grey_with_key("L", 0, 7), "a.png", {"transparency": 7}),
        (lambda: Image.merge("RGB", [grey_with_key("L", 0, 7)] * 3), "a.png", {"transparency": (7, 7, 7)}),
        (lambda: grey_with_key("I;16", 0, 300), "a.png", {"transparency": 300}),
    ],
    ids=["rgba", "tiff", "webp", "grey and alpha", "palette", "gif", "grey key", "colour key", "deep grey key"],
)
def test_transparent_pixels_are_white_and_noted(
    tmp_path: Path, make: Callable[[], Image.Image], name: str, options: dict[str, Any]
) -> None:
    make().save(tmp_path / name, **options)
    seen = pixels(tmp_path / name)
    assert (seen[4, 2].tolist(), seen[4, 9].tolist()) == ([0, 0, 0], [255, 255, 255])
    assert images.TRANSPARENT in open_image(tmp_path / name).notes
    assert images.TRANSPARENT in inspect_image(tmp_path / name).notes


def test_a_half_transparent_colour_is_blended_with_white(tmp_path: Path) -> None:
    Image.new("RGBA", SIZE, (200, 0, 0, 51)).save(tmp_path / "a.png")
    np.testing.assert_allclose(pixels(tmp_path / "a.png")[0, 0].astype(int), (244, 204, 204), atol=1)


def damaged(content: bytes, random: random.Random) -> bytes:
    """The file cut, or with up to eight bytes of its first 600 changed."""
    if random.random() < 0.3:
        return content[: random.randrange(1, len(content))]
    changed = bytearray(content)
    for _ in range(random.randint(1, 8)):
        changed[random.randrange(min(600, len(changed)))] ^= 1 << random.randrange(8)
    return bytes(changed)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP"])
def test_no_damage_ends_in_another_error(kind: str, tmp_path: Path) -> None:
    chance = random.Random(kind)
    noise = np.random.default_rng(0).integers(0, 255, (24, 40, 3), dtype=np.uint8)
    info, exif = PngImagePlugin.PngInfo(), Image.Exif()
    info.add_text("note", "text " * 50, zip=True)
    exif[0x0112] = 6
    extra = {"exif": exif} if kind in ("PNG", "JPEG", "WEBP", "TIFF") else {}
    options: dict[str, Any] = {"PNG": {"pnginfo": info}, "TIFF": {"compression": "tiff_lzw"}}.get(kind, {})
    whole = encode_image(Image.fromarray(noise), kind, **options, **extra)
    stored = EmbeddedImages(tmp_path, tmp_path)
    refused = 0
    for content in (damaged(whole, chance) for _ in range(67)):
        path = tmp_path / stored.keep(content)
        fault = inspect_image(path).fault
        refused += fault is not None
        for read in (open_image, lambda path: decode_image(path.read_bytes(), str(path), upright=True)):
            if fault:
                with suppress(DataError):
                    read(path)
            else:
                read(path)
    assert refused > 10


def test_sound_images_with_large_texts_and_profiles_are_read(tmp_path: Path) -> None:
    info = PngImagePlugin.PngInfo()
    info.add_text("workflow", "x" * 5_000_000, zip=True)
    info.add_itxt("prompt", "y" * 5_000_000, zip=True)
    profile = np.random.default_rng(0).bytes(2_000_000)
    for name, options in (("a.png", {"pnginfo": info, "icc_profile": profile}), ("a.jpg", {"icc_profile": profile})):
        Image.new("RGB", SIZE, RED).save(tmp_path / name, **options)
        assert inspect_image(tmp_path / name).fault is None
        assert pixels(tmp_path / name).shape == (8, 12, 3)


def half(content: bytes) -> bytes:
    return content[: len(content) // 2]


def broken_chunk(content: bytes) -> bytes:
    """A PNG whose compressed data are wrong."""
    place = content.index(b"IDAT") + 8
    return content[:place] + bytes(20) + content[place + 20 :]


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("a.png", half, "the image is damaged"),
        ("a.jpg", half, "the image is damaged"),
        ("a.gif", half, "the image is damaged"),
        ("a.webp", half, "the image is"),
        ("a.png", broken_chunk, "the image is damaged"),
        ("a.png", lambda content: b"", "the image is an empty file"),
        ("a.png", lambda content: b"<html>not found</html>", "the image is in no known image format"),
        ("a.png", lambda content: content[:20], "the image is"),
    ],
)
def test_damage_is_found_and_named(tmp_path: Path, name: str, damage: Callable[[bytes], bytes], message: str) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    path = tmp_path / name
    Image.fromarray(noise).save(path)
    assert inspect_image(path).fault is None
    assert inspect_image(path).width == 64
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match=message) as error:
        open_image(path)
    assert str(path) in str(error.value)
    fault = inspect_image(path).fault
    assert fault is not None
    assert message in fault


def test_inspection_returns_the_true_size_of_a_jpeg(tmp_path: Path) -> None:
    """It is decoded smaller."""
    Image.new("RGB", (801, 603), RED).save(tmp_path / "a.jpg")
    found = inspect_image(tmp_path / "a.jpg")
    assert (found.width, found.height) == (801, 603)


def test_a_missing_file_and_a_directory_are_named(tmp_path: Path) -> None:
    for path in (tmp_path / "none.png", tmp_path):
        with pytest.raises(DataError, match="the image cannot be read"):
            open_image(path)


def test_a_bomb_is_not_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("1", (400, 300)).save(tmp_path / "a.png")
    monkeypatch.setattr(images, "MAX_PIXELS", 100_000)
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(DataError, match="400x300 are more than 100000 pixels"):
        open_image(tmp_path / "a.png")


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((60_000, 10), r"60000x10, padded to a square of its longer side, would take 10\.8 GB"),
        ((10, 12_001), "padded to a square"),
        ((2010, 10), "2010x10 is more than 200 times as long as it is wide"),
        ((1, 201), "more than 200 times"),
    ],
)
def test_a_thin_image_that_preprocessing_would_blow_up_is_refused(
    tmp_path: Path, size: tuple[int, int], message: str
) -> None:
    Image.new("1", size).save(tmp_path / "a.png")
    with pytest.raises(DataError, match=message):
        open_image(tmp_path / "a.png")
    assert inspect_image(tmp_path / "a.png").fault


def test_the_thinnest_image_that_is_read_can_be_processed(tmp_path: Path) -> None:
    Image.new("RGB", (1, images.MAX_ASPECT), RED).save(tmp_path / "a.png")
    image = open_image(tmp_path / "a.png").image
    for aspect in ("pad", "square"):
        processor = image_processor(clip(tmp_path / "clip", 24), aspect)  # type: ignore[arg-type]
        assert processor(image, return_tensors="np")["pixel_values"].shape == (1, 3, 24, 24)


def test_a_bomb_that_pillow_itself_refuses(tmp_path: Path) -> None:
    chunked_png(tmp_path / "a.png", 8, 2, (60_000, 60_000), b"")
    with pytest.raises(DataError, match="decompression bomb"):
        open_image(tmp_path / "a.png")


def test_floating_point_images_are_refused(tmp_path: Path) -> None:
    Image.new("F", SIZE, 0.5).save(tmp_path / "a.tif")
    with pytest.raises(DataError, match="floating-point"):
        open_image(tmp_path / "a.tif")
    assert "floating-point" in str(inspect_image(tmp_path / "a.tif").fault)


def clip(path: Path, side: int = 24) -> Path:
    CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side}).save_pretrained(path)
    return path


def siglip(path: Path, side: int = 20) -> Path:
    SiglipImageProcessorPil(size={"height": side, "width": side}).save_pretrained(path)
    return path


def test_the_processor_takes_over_what_the_tower_wants(tmp_path: Path) -> None:
    wide = Image.new("RGB", (50, 30), RED)
    for tower, own, side in (
        (clip(tmp_path / "clip"), CLIPImageProcessorPil, 24),
        (siglip(tmp_path / "siglip"), SiglipImageProcessorPil, 20),
    ):
        square = image_processor(tower, "square")
        assert square.crop_size == {"height": side, "width": side}
        expected = own.from_pretrained(tower)(wide, return_tensors="np")["pixel_values"]
        np.testing.assert_array_equal(square(wide, return_tensors="np")["pixel_values"], expected)
        padded = image_processor(tower, "pad")(wide, return_tensors="np")["pixel_values"]
        # The border has the mean colour, which is zero after normalising but for rounding to 1/255.
        assert np.abs(padded[0, :, 0, 0]).max() < 0.02
        assert padded.shape == expected.shape


def test_the_processor_survives_being_saved(tmp_path: Path) -> None:
    from data_records import char_tokenizer

    processor = LlavaProcessor(image_processor(clip(tmp_path / "clip"), "pad"), char_tokenizer(), patch_size=14)
    processor.save_pretrained(tmp_path / "saved")
    loaded = type(processor.image_processor).from_pretrained(tmp_path / "saved")
    wide = Image.new("RGB", (50, 30), RED)
    np.testing.assert_array_equal(
        loaded(wide, return_tensors="np")["pixel_values"],
        processor.image_processor(wide, return_tensors="np")["pixel_values"],
    )


def test_a_directory_without_processor_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no image processor can be read"):
        image_processor(tmp_path, "pad")


def test_equal_files_give_equal_pixels(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (40, 30, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, format="JPEG")
    for name in ("a.jpg", "b.jpg"):
        (tmp_path / name).write_bytes(buffer.getvalue())
    np.testing.assert_array_equal(pixels(tmp_path / "a.jpg"), pixels(tmp_path / "b.jpg"))
