from __future__ import annotations

import io
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image

from openmae.data.images import CorruptImage, Picture, decode

RED, TEAL = (200, 30, 40), (20, 150, 140)


def halves(mode: str = "RGB", size: tuple[int, int] = (64, 32)) -> Image.Image:
    """A picture that is red on its left half and teal on its right one."""
    image = Image.new("RGB", size, RED)
    image.paste(TEAL, (size[0] // 2, 0, *size))
    return image.quantize(8) if mode == "P" else image.convert(mode)


def corners(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The colours near the left and the right edge."""
    middle = pixels.shape[0] // 2
    return pixels[middle, 4], pixels[middle, -5]


# --------------------------------------------------------------------------------------------- decode


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
    with Picture(tmp_path / name) as picture:
        assert picture.size == (40, 64)
        box = picture.pixels(box=(32, 0, 64, 20), at_least=(5, 8))
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
    with Picture(tmp_path / "a.jpg") as picture:
        pixels = picture.pixels(in_chans, (128, 64, 384, 320), at_least=(target, target))
    assert pixels.shape == (decoded, decoded, in_chans)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_broken_exif_is_no_reason_to_drop_an_image(tmp_path: Path) -> None:
    halves().save(tmp_path / "a.jpg", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff garbage")
    assert decode(tmp_path / "a.jpg").shape == (32, 64, 3)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "BMP", "TIFF", "WEBP"])
def test_an_upload_is_read_as_a_file_is(tmp_path: Path, kind: str) -> None:
    halves().save(tmp_path / "a", kind)
    with (tmp_path / "a").open("rb") as file, Picture(Path("sent.png"), file) as picture:
        pixels = picture.pixels(3)
    np.testing.assert_array_equal(pixels, decode(tmp_path / "a"))


@pytest.mark.parametrize("kind", ["EPS", "PPM"])
def test_an_upload_of_another_format_is_not_tried(kind: str) -> None:
    buffer = io.BytesIO()
    halves().save(buffer, kind)
    with pytest.raises(CorruptImage, match="cannot identify") as caught:
        Picture(Path("sent.png"), buffer)
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
    with pytest.raises(CorruptImage, match="32-bit pixels have no agreed range"):
        decode(tmp_path / "float.tif")


def test_corrupt_image_travels_between_processes() -> None:
    error = pickle.loads(pickle.dumps(CorruptImage(Path("a.png"), "cut")))
    assert (error.path, error.reason) == (Path("a.png"), "cut")
