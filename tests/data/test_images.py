from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image

from openmae.data.images import (
    CorruptImage,
    ImageIndex,
    Picture,
    decode,
    find_images,
    index_images,
)
from openmae.errors import DataError

MakeImages = Callable[..., Path]

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


# ---------------------------------------------------------------------------------------------- index


def test_find_images_sorted_any_case_no_hidden(tmp_path: Path, make_images: MakeImages) -> None:
    wanted = ["B/2.JPG", "a.jpeg", "b/deep/er/1.png", "c.BMP", "d.tif", "e.tiff", "f.WebP"]
    make_images(tmp_path, [*wanted, ".hidden.png", ".git/x.png", "__MACOSX/._a.jpg", "__MACOSX/b.jpg"])
    (tmp_path / "notes.txt").touch()
    assert find_images(tmp_path) == sorted(wanted)


def test_find_images_follows_links_without_going_round(tmp_path: Path, make_images: MakeImages) -> None:
    make_images(tmp_path / "elsewhere", ["1.png"])
    make_images(tmp_path / "set", ["0.png"])
    (tmp_path / "set" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "set" / "loop").symlink_to(tmp_path / "set")
    assert find_images(tmp_path / "set") == ["0.png", "link/1.png"]


def test_class_folders(tmp_path: Path, make_images: MakeImages) -> None:
    make_images(tmp_path, ["dog/2.png", "cat/in/1.png", "cat/0.png"])
    for labelled in (True, None):
        index = index_images(tmp_path, labelled)
        assert index == ImageIndex(tmp_path, ("cat/0.png", "cat/in/1.png", "dog/2.png"), (0, 0, 1), ("cat", "dog"))
    assert index_images(tmp_path, False).labels is None
    assert index.file(2) == tmp_path / "dog/2.png"
    assert len(index) == 3


def test_wrapping_folder_is_stepped_into(tmp_path: Path, make_images: MakeImages) -> None:
    make_images(tmp_path, ["images_train/data/dog/2.png", "images_train/data/cat/1.png"])
    (tmp_path / ".openmae-complete").touch()
    index = index_images(tmp_path, True)
    assert index.root == tmp_path / "images_train/data"
    assert index.class_names == ("cat", "dog")


def test_one_class_folder(tmp_path: Path, make_images: MakeImages) -> None:
    make_images(tmp_path, ["cat/1.png", "cat/2.png"])
    assert index_images(tmp_path, True).class_names == ("cat",)
    assert index_images(tmp_path, None).labels is None


def test_loose_images_have_no_labels(tmp_path: Path, make_images: MakeImages) -> None:
    make_images(tmp_path, ["cat/1.png", "dog/1.png", "x.png"])
    assert index_images(tmp_path, None).labels is None
    with pytest.raises(DataError) as caught:
        index_images(tmp_path, True)
    assert "1 of 3 images lie outside of class folders, such as x.png; no labels.csv" in str(caught.value)
    assert "one folder per class (cat/1.jpg, dog/2.jpg), or a labels.csv with columns path,label" in str(caught.value)


def test_no_images(tmp_path: Path) -> None:
    (tmp_path / "a.svg").touch()
    with pytest.raises(DataError, match="holds no images") as caught:
        index_images(tmp_path, None)
    assert " bmp gif " in caught.value.problem


def test_labels_table(tmp_path: Path, make_images: MakeImages, caplog: pytest.LogCaptureFixture) -> None:
    make_images(tmp_path, ["x/1.png", "2.png", "3.png", "left out.png"])
    (tmp_path / "labels.csv").write_text(
        'path, label, note\n3.png,ten,b\n./2.png,9,\n"x/1.png",ten,a\n', encoding="utf-8-sig"
    )
    index = index_images(tmp_path, None)
    assert index.paths == ("2.png", "3.png", "x/1.png")
    assert index.labels == (0, 1, 1)
    assert index.class_names == ("9", "ten")
    assert "1 images are not in the table" in caplog.text


def test_integer_labels_are_ordered_by_value(tmp_path: Path, make_images: MakeImages) -> None:
    make_images(tmp_path, ["1.png", "2.png"])
    (tmp_path / "labels.csv").write_text("path,label\n1.png,10\n2.png,9\n")
    assert index_images(tmp_path, True).class_names == ("9", "10")


BAD_TABLES = {
    "missing files": (
        "path,label\n1.png,a\nb.png,a\nc.png,a\nd.png,b\ne.png,b\n",
        "names 4 of 5 files that do not exist: b.png, c.png, d.png.",
    ),
    "no header": (
        "1.png,a\n",
        "must begin with a line that names the columns path and label; found: 1.png, a",
    ),
    "empty": ("", "found: nothing"),
    "no rows": ("path,label\n", "has no rows"),
    "empty label": ("path,label\n1.png,\n", "line 2: path '1.png' and label '' must not be empty"),
    "short row": ("path,label\n1.png\n", "line 2: path '1.png' and label '' must not be empty"),
    "two labels": ("path,label\n1.png,a\n1.png,b\n", "line 3: 1.png is labelled 'b' here and 'a' above"),
    "outside": ("path,label\n../1.png,a\n", "line 2: ../1.png is not below the folder of the table"),
    "not utf-8": (b"path,label\n1.png,\xff\n", "is not a UTF-8 table"),
}


@pytest.mark.parametrize(("table", "text"), BAD_TABLES.values(), ids=BAD_TABLES.keys())
def test_bad_labels_table(tmp_path: Path, make_images: MakeImages, table: str | bytes, text: str) -> None:
    make_images(tmp_path, ["1.png"])
    (tmp_path / "labels.csv").write_bytes(table.encode() if isinstance(table, str) else table)
    with pytest.raises(DataError) as caught:
        index_images(tmp_path, True)
    assert text in str(caught.value)
    assert caught.value.fix


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
