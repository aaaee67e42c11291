from __future__ import annotations

import io
import os
import pickle
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image, PngImagePlugin
from PIL import ImageFile as PillowImageFile
from PIL.PngImagePlugin import PngInfo

from openmae.data.decode import CorruptImage, ImageFile, NotAnImage, Pixels, TooManyPixels, describe_error
from openmae.data.index import ImageIndex

RED, TEAL = (200, 30, 40), (20, 150, 140)


def decode(path: Path, in_chans: int = 3) -> Pixels:
    """Decode the entire image."""
    with ImageFile(path) as image_file:
        return image_file.pixels(in_chans)


def halves(mode: str = "RGB", size: tuple[int, int] = (64, 32)) -> Image.Image:
    """An image with a red left half and a teal right half."""
    image = Image.new("RGB", size, RED)
    image.paste(TEAL, (size[0] // 2, 0, *size))
    return image.quantize(8) if mode == "P" else image.convert(mode)


def corners(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the colours near the left and the right edge."""
    middle = pixels.shape[0] // 2
    return pixels[middle, 4], pixels[middle, -5]


@pytest.mark.parametrize(
    ("name", "mode", "options"),
    [
        ("a.jpg", "RGB", {"quality": 95}),
        ("a.jpg", "CMYK", {"quality": 95}),
        ("a.jpg", "RGB", {"quality": 95, "progressive": True}),
        ("a.png", "RGB", {}),
        ("a.png", "P", {}),
        ("a.png", "RGBA", {}),
        ("a.bmp", "RGB", {}),
        ("a.tif", "RGB", {"compression": "tiff_lzw"}),
        ("a.tiff", "CMYK", {}),
        ("a.webp", "RGB", {"lossless": True}),
    ],
)
@pytest.mark.parametrize("in_chans", [3, 4])
def test_colour_files(tmp_path: Path, name: str, mode: str, options: dict[str, int], in_chans: int) -> None:
    halves(mode).save(tmp_path / name, **options)
    pixels = decode(tmp_path / name, in_chans)
    assert pixels.dtype == np.uint8
    assert pixels.shape == (32, 64, in_chans)
    left, right = corners(pixels)
    np.testing.assert_allclose(left[:3], RED, atol=6)
    np.testing.assert_allclose(right[:3], TEAL, atol=6)
    assert in_chans == 3 or pixels[..., 3].min() == 255


@pytest.mark.parametrize(("name", "mode"), [("a.jpg", "L"), ("a.png", "L"), ("a.png", "LA"), ("a.tif", "L")])
@pytest.mark.parametrize("in_chans", [1, 3, 4])
def test_grey_files(tmp_path: Path, name: str, mode: str, in_chans: int) -> None:
    Image.new("L", (9, 7), 77).convert(mode).save(tmp_path / name)
    expected = np.full((7, 9, in_chans), 77)
    expected[..., 3:] = 255
    np.testing.assert_array_equal(decode(tmp_path / name, in_chans), expected)


def test_black_and_white_file(tmp_path: Path) -> None:
    Image.new("1", (9, 7), 1).save(tmp_path / "a.png")
    np.testing.assert_array_equal(decode(tmp_path / "a.png", 3), np.full((7, 9, 3), 255))


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_sixteen_bits_are_kept(tmp_path: Path, name: str) -> None:
    values = np.arange(0, 65536, 257 * 2 + 1, dtype=np.uint16)[None].repeat(3, 0)
    Image.fromarray(values).save(tmp_path / name)
    for in_chans in (1, 3, 4):
        pixels = decode(tmp_path / name, in_chans)
        assert pixels.dtype == np.float32
        assert pixels.shape == (3, values.shape[1], in_chans)
        np.testing.assert_allclose(pixels[..., 0], values / 257, rtol=1e-6)
        assert in_chans < 4 or pixels[..., 3].min() == 255


def test_transparency_turns_white_or_is_kept(tmp_path: Path) -> None:
    Image.new("RGBA", (8, 8), (200, 0, 0, 0)).save(tmp_path / "clear.png")
    Image.new("RGBA", (8, 8), (200, 0, 0, 128)).save(tmp_path / "half.webp", lossless=True)
    palette = Image.new("P", (8, 8), 0)
    palette.putpalette([200, 0, 0])
    palette.save(tmp_path / "palette.png", transparency=0)
    Image.new("LA", (8, 8), (0, 0)).save(tmp_path / "grey.png")
    for name in ("clear.png", "palette.png", "grey.png"):
        for in_chans in (1, 3):
            assert decode(tmp_path / name, in_chans).min() == 255
        assert decode(tmp_path / name, 4)[..., 3].max() == 0
    np.testing.assert_allclose(decode(tmp_path / "half.webp")[0, 0], [227, 127, 127], atol=1)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.tif", "a.webp"])
def test_exif_orientation(tmp_path: Path, name: str, orientation: int) -> None:
    upright = np.zeros((40, 64, 3), np.uint8)
    upright[:20, :32], upright[:20, 32:], upright[20:, :32] = RED, TEAL, (250, 250, 250)
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    image = Image.fromarray(upright)
    stored = image.transpose(undo[orientation]) if orientation in undo else image
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    stored.save(tmp_path / name, exif=exif, **({"quality": 95} if name == "a.jpg" else {}))
    with ImageFile(tmp_path / name) as image_file:
        assert image_file.size == (40, 64)
        box = image_file.pixels(box=(32, 0, 64, 20), at_least=(5, 8))
    height, width = box.shape[:2]
    np.testing.assert_allclose(box[height // 2, width // 2], TEAL, atol=8)
    whole = decode(tmp_path / name)
    for row, column in ((5, 5), (5, 60), (35, 5), (35, 60)):
        np.testing.assert_allclose(whole[row, column], upright[row, column], atol=8)


@pytest.mark.parametrize("in_chans", [1, 3])
@pytest.mark.parametrize(("target", "decoded"), [(32, 32), (33, 64), (64, 64), (65, 128), (200, 256)])
def test_jpeg_is_decoded_at_the_scale_that_the_crop_allows(
    tmp_path: Path, in_chans: int, target: int, decoded: int
) -> None:
    halves(size=(512, 512)).save(tmp_path / "a.jpg")
    with ImageFile(tmp_path / "a.jpg") as image_file:
        pixels = image_file.pixels(in_chans, (128, 64, 384, 320), at_least=(target, target))
    assert pixels.shape == (decoded, decoded, in_chans)


def test_image_with_broken_exif_is_read(tmp_path: Path) -> None:
    halves().save(tmp_path / "a.jpg", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff garbage")
    assert decode(tmp_path / "a.jpg").shape == (32, 64, 3)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "BMP", "TIFF", "WEBP"])
def test_upload_equals_file(tmp_path: Path, kind: str) -> None:
    halves().save(tmp_path / "a", kind)
    with (tmp_path / "a").open("rb") as file, ImageFile(Path("sent.png"), file) as image_file:
        pixels = image_file.pixels(3)
    np.testing.assert_array_equal(pixels, decode(tmp_path / "a"))


@pytest.mark.parametrize("kind", ["EPS", "PPM"])
def test_upload_in_an_unsupported_format(kind: str) -> None:
    buffer = io.BytesIO()
    halves().save(buffer, kind)
    buffer.seek(0)
    with pytest.raises(CorruptImage, match=r"not an image that can be read \(JPEG, PNG, ") as caught:
        ImageFile(Path("sent.png"), buffer)
    assert caught.value.path == Path("sent.png")


def corrupt_files(folder: Path) -> dict[str, Path]:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(buffer, "JPEG")
    contents = {
        "truncated.jpg": buffer.getvalue()[: len(buffer.getvalue()) // 2],
        "header.jpg": buffer.getvalue()[:100],
        "empty.png": b"",
        "text.png": b"not a picture",
        "zeros.bmp": bytes(1000),
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    Image.new("F", (4, 4)).save(folder / "float.tif")
    halves().save(folder / "cut.png")
    (folder / "cut.png").write_bytes((folder / "cut.png").read_bytes()[:80])
    return {name: folder / name for name in (*contents, "float.tif", "cut.png", "gone.webp")}


def test_corrupt_images(tmp_path: Path) -> None:
    for name, path in corrupt_files(tmp_path).items():
        with pytest.raises(CorruptImage) as caught:
            decode(path)
        assert caught.value.path == path, name
        assert caught.value.reason
        assert "\n" not in caught.value.reason
    with pytest.raises(
        CorruptImage, match="its pixels are 32-bit floating-point numbers, and the file does not say which"
    ):
        decode(tmp_path / "float.tif")


def test_corrupt_image_can_be_pickled() -> None:
    error = pickle.loads(pickle.dumps(CorruptImage(Path("a.png"), "cut")))
    assert (error.path, error.reason) == (Path("a.png"), "cut")


# ----------------------------------------------------------------------------------------------- depth


def tiff(
    path: Path, content: bytes, *, bits: int = 16, kind: int = 1, white_is_zero: bool = False, order: str = "<"
) -> None:
    """Write a grey TIFF of 64 x 64 pixels whose values are ``content``; ``kind`` is 1 unsigned, 2 signed, 3 float."""
    tags = {256: 64, 257: 64, 258: bits, 259: 1, 262: int(not white_is_zero), 273: 134, 277: 1, 279: len(content)}
    entries = [(tag, 4 if tag in (273, 279) else 3, value) for tag, value in sorted({**tags, 339: kind}.items())]
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "IH", 8, len(entries))
    for tag, size, value in entries:
        packed = struct.pack(order + "HH", value, 0) if size == 3 else struct.pack(order + "I", value)
        head += struct.pack(order + "HHI", tag, size, 1) + packed
    path.write_bytes((head + bytes(4)).ljust(134, b"\0") + content)


RAMP = np.arange(4096).reshape(64, 64)


@pytest.mark.parametrize("order", ["<", ">"])
def test_sixteen_bits_in_both_byte_orders(tmp_path: Path, order: str) -> None:
    tiff(tmp_path / "a.tif", (RAMP * 16).astype(f"{order}u2").tobytes(), order=order)
    np.testing.assert_allclose(decode(tmp_path / "a.tif", 1)[..., 0], RAMP * 16 / 257, rtol=1e-6)


def test_sixteen_bits_where_zero_is_white(tmp_path: Path) -> None:
    tiff(tmp_path / "a.tif", (RAMP * 16).astype("<u2").tobytes(), white_is_zero=True)
    np.testing.assert_allclose(decode(tmp_path / "a.tif", 1)[..., 0], 255 - RAMP * 16 / 257, atol=1e-4)


def test_twelve_bits_fill_the_whole_scale(tmp_path: Path) -> None:
    pairs = RAMP.reshape(-1, 2)
    packed = np.stack([pairs[:, 0] >> 4, (pairs[:, 0] & 15) << 4 | pairs[:, 1] >> 8, pairs[:, 1] & 255], axis=1)
    tiff(tmp_path / "a.tif", packed.astype(np.uint8).tobytes(), bits=12)
    pixels = decode(tmp_path / "a.tif", 1)[..., 0]
    np.testing.assert_allclose(pixels, RAMP * 255 / 4095, atol=1e-4)
    assert (pixels.min(), pixels.max()) == (0, 255)


@pytest.mark.parametrize(
    ("dtype", "kind", "words"),
    [
        ("i2", 2, "signed 16-bit integers"),
        ("i4", 2, "signed 32-bit integers"),
        ("u4", 1, "unsigned 32-bit integers"),
        ("f4", 3, "32-bit floating-point numbers"),
    ],
)
@pytest.mark.parametrize("order", ["<", ">"])
def test_values_of_unknown_range_are_refused(tmp_path: Path, dtype: str, kind: int, words: str, order: str) -> None:
    if (dtype, order) == ("u4", ">"):
        pytest.skip("Pillow does not read it")
    content = RAMP.astype(order + dtype)
    tiff(tmp_path / "a.tif", content.tobytes(), bits=8 * content.itemsize, kind=kind, order=order)
    with pytest.raises(CorruptImage) as caught:
        decode(tmp_path / "a.tif")
    assert caught.value.reason == (
        f"its pixels are {words}, and the file does not say which values are black and white; scale them to 0..65535 "
        "and save them as unsigned 16-bit integers, or to 0..255 as 8-bit"
    )


def test_tiff_that_pillow_cannot_read(tmp_path: Path) -> None:
    tiff(tmp_path / "a.tif", RAMP.astype("<f8").tobytes(), bits=64, kind=3)
    with pytest.raises(CorruptImage, match="its combination of bits, sample format and colour space is not supported"):
        decode(tmp_path / "a.tif")


# ------------------------------------------------------------------------------------ texts of a PNG


def with_text(kind: str, size: int) -> bytes:
    """Return a PNG with a text or profile of ``size`` bytes."""
    info, stream, options = PngInfo(), io.BytesIO(), {}
    text = "parameters " * (size // 11)
    if kind == "zTXt":
        info.add_text("prompt", text, zip=True)
    elif kind == "iTXt":
        info.add_itxt("prompt", text, zip=True)
    elif kind == "tEXt":
        info.add_text("prompt", text)
    elif kind == "after":
        info.add(b"zTXt", b"prompt\0\0" + zlib.compress(text.encode()), after_idat=True)
    else:
        options["icc_profile"] = bytes(size)
    halves().save(stream, "PNG", pnginfo=info, **options)
    return stream.getvalue()


@pytest.mark.parametrize("kind", ["zTXt", "iTXt", "iCCP", "after"])
def test_image_with_large_texts_is_read(tmp_path: Path, kind: str) -> None:
    (tmp_path / "a.png").write_bytes(with_text(kind, 3 << 20))
    with ImageFile(tmp_path / "a.png") as image:
        assert image.size == (32, 64)
        np.testing.assert_array_equal(image.pixels(), np.array(halves()))


@pytest.mark.parametrize("kind", ["zTXt", "iCCP"])
def test_texts_are_limited_in_memory(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert PngImagePlugin.MAX_TEXT_CHUNK <= PngImagePlugin.MAX_TEXT_MEMORY <= 64 << 20
    monkeypatch.setattr(PngImagePlugin, "MAX_TEXT_CHUNK", 10_000)
    (tmp_path / "a.png").write_bytes(with_text(kind, 20_000))
    with pytest.raises(CorruptImage, match="Decompressed data too large"):
        decode(tmp_path / "a.png")


# ------------------------------------------------------------------------------------------- sizes


def test_too_many_pixels(tmp_path: Path) -> None:
    halves(size=(1200, 1000)).save(tmp_path / "a.png")
    with pytest.raises(TooManyPixels) as caught:
        ImageFile(tmp_path / "a.png", max_pixels=1_000_000)
    reason = "it has 1200 x 1000 = 1,200,000 pixels, more than dataset.max_megapixels=1 allows"
    assert caught.value.reason == reason
    again = pickle.loads(pickle.dumps(caught.value))
    assert (type(again), again.path, again.reason) == (TooManyPixels, tmp_path / "a.png", reason)
    with ImageFile(tmp_path / "a.png", max_pixels=2_000_000) as image_file:
        assert image_file.pixels().shape == (1000, 1200, 3)


@pytest.mark.parametrize("kind", ["PNG", "GIF", "WEBP", "BMP", "TIFF"])
def test_limit_of_pillow_can_be_raised(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.BytesIO()
    halves(size=(120, 100)).save(stream, kind)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 5_000)
    with pytest.raises(Image.DecompressionBombError):
        Image.open(stream)
    with ImageFile(Path("a"), io.BytesIO(stream.getvalue()), max_pixels=12_000) as image_file:
        assert image_file.pixels(box=(1, 1, 119, 99)).shape == (98, 118, 3)
    with pytest.raises(TooManyPixels):
        ImageFile(Path("a"), io.BytesIO(stream.getvalue()), max_pixels=11_999)


def test_too_many_pixels_are_refused_before_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[PillowImageFile.ImageFile] = []
    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", decoded.append)
    header = struct.pack(">II5B", 60_000, 60_000, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + b"IHDR" + header + struct.pack(">I", zlib.crc32(b"IHDR" + header))
    with pytest.raises(TooManyPixels, match=r"60000 x 60000 = 3,600,000,000 pixels, .*max_megapixels=179 allows"):
        ImageFile(Path("bomb.png"), io.BytesIO(b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", 0) + b"IDAT"))
    assert decoded == []


# ------------------------------------------------------------------------------- pages and warnings


def several(kind: str, count: int = 3) -> io.BytesIO:
    stream = io.BytesIO()
    images = [Image.new("RGB", (24, 20), (40 * number, 90, 200)) for number in range(count)]
    images[0].save(stream, kind, save_all=True, append_images=images[1:])
    return stream


@pytest.mark.parametrize(
    ("kind", "pages"),
    [
        ("TIFF", "several pages"),
        ("GIF", "several frames"),
        ("WEBP", "several frames"),
        ("PNG", "several frames"),
        ("MPO", ""),
    ],
)
def test_the_first_page_is_read_and_the_others_are_reported(kind: str, pages: str) -> None:
    for count, said in ((3, pages), (1, "")):
        with ImageFile(Path("a"), several(kind, count)) as image_file:
            np.testing.assert_allclose(image_file.pixels()[10, 10], (0, 90, 200), atol=6)
            assert image_file.further_images == said


def test_a_gif_with_transparency_and_palette() -> None:
    stream = io.BytesIO()
    palette = Image.new("P", (8, 8), 0)
    palette.putpalette([200, 0, 0])
    palette.save(stream, "GIF", transparency=0)
    with ImageFile(Path("a"), stream) as image_file:
        assert image_file.transparent
        assert image_file.pixels(4)[..., 3].max() == 0
    assert halves("P").mode == "P"


@pytest.mark.integration
def test_pillow_warnings_are_not_shown(tmp_path: Path) -> None:
    halves().save(tmp_path / "a.jpg", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff garbage")
    program = "import sys; from openmae.data.decode import *; ImageFile(Path(sys.argv[1])).pixels()"
    command = [sys.executable, "-c", program, str(tmp_path / "a.jpg")]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stderr == ""


# ------------------------------------------------------------------------------------------- reasons


def test_special_files_are_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "endless.jpg").symlink_to("/dev/zero")
    (tmp_path / "folder.png").mkdir()
    for name, reason in (
        ("pipe.png", "it is a named pipe (FIFO), not a regular file"),
        ("endless.jpg", "it is a device, not a regular file"),
        ("folder.png", "Is a directory"),
        ("gone.png", "No such file or directory"),
    ):
        with pytest.raises(CorruptImage) as caught:
            decode(tmp_path / name)
        assert caught.value.reason == reason


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "AVIF"])
def test_large_sparse_file_is_not_read(tmp_path: Path, kind: str) -> None:
    halves().save(tmp_path / "a.png", kind)
    os.truncate(tmp_path / "a.png", 1 << 36)
    reason = (
        "the file has 68,719,476,736 bytes, more than the 2,931,108,864 that an image of dataset.max_megapixels=179"
    )
    with pytest.raises(CorruptImage, match=reason):
        decode(tmp_path / "a.png")
    with pytest.raises(CorruptImage, match=reason):
        ImageIndex(tmp_path, ("a.png",)).read(0)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "BMP", "TIFF", "WEBP", "GIF", "JPEG2000", "AVIF"])
def test_reasons_contain_no_memory_addresses(kind: str) -> None:
    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 48, 3), np.uint8)).save(stream, kind)
    for length in (1, 8, 12, 20, 40, len(stream.getvalue()) // 2):
        with (
            pytest.raises(CorruptImage) as caught,
            ImageFile(Path("a"), io.BytesIO(stream.getvalue()[:length])) as file,
        ):
            file.pixels()
        assert " at 0x" not in caught.value.reason
        assert "cannot identify" not in caught.value.reason


def test_describe_error() -> None:
    assert describe_error(OSError(f"cannot use {io.BytesIO()}")) == "cannot use the file"
    assert describe_error(FileNotFoundError(2, "No such file or directory", "/a/b")) == "No such file or directory"
    assert describe_error(IndexError("index out of range")) == "the file is damaged (IndexError: index out of range)"
    assert describe_error(AssertionError()) == "the file is damaged (AssertionError)"


def test_content_of_another_kind_is_not_an_image(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"%PDF-1.7")
    with pytest.raises(NotAnImage, match="its content is a PDF file, not an image that can be read"):
        decode(tmp_path / "a.png")


def test_heic(tmp_path: Path) -> None:
    pytest.importorskip("pillow_heif").register_heif_opener()
    halves().save(tmp_path / "a.heic", quality=95)
    pixels = decode(tmp_path / "a.heic")
    left, right = corners(pixels)
    np.testing.assert_allclose(left, RED, atol=8)
    np.testing.assert_allclose(right, TEAL, atol=8)
