"""Small labelled image sets of different kinds, made from what packages ship, or by code.

``digits`` needs scikit-learn, ``photos`` also scikit-image, ``stamps`` Debian's tuxpaint-stamps-default, and ``glyphs``
fonts; ``textures`` needs nothing. All contain a folder of unlabelled images, folders of labelled ones, and a test set.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

LABELS = (5, 10, 50)  # labelled images per class
STAMPS = Path("/usr/share/tuxpaint/stamps")
FONTS = Path("/usr/share/fonts")
_STAMP_CLASSES = ("animals", "food", "household", "plants", "seasonal", "symbols", "town", "vehicles")
_LETTERS = "ABDEFGHKMNPQRSTY"
_HELD_OUT = 500

Picture = tuple[str, Image.Image, bool]  # class, image, whether it belongs to the test set


@dataclass(frozen=True)
class ImageSet:
    """A written set.

    Attributes:
        size: side of its images in pixels.
        classes: number of classes.
        folder: has ``unlabelled/``, ``labelled-N/CLASS/`` for each N of ``LABELS``, and ``held_out/CLASS/``.
    """

    name: str
    size: int
    classes: int
    folder: Path

    def labelled(self, count: int) -> Path:
        """Return the folder with ``count`` labelled images per class (fewer if the class has fewer)."""
        return self.folder / f"labelled-{count}"


def write_set(name: str, folder: Path, most: int = 2000) -> ImageSet:
    """Write one of ``SETS`` to ``folder``, unless it is there already.

    Args:
        most: the largest number of images, for a quick run.

    Raises:
        FileNotFoundError: a package that the set is made from is not installed.
    """
    size, images = SETS[name]
    done = folder / "complete.txt"
    if not done.is_file():
        _write(list(_first(images(size), most)), folder)
        done.write_text(name, encoding="utf-8")
    classes = [path for path in (folder / "held_out").iterdir() if path.is_dir()]
    return ImageSet(name, size, len(classes), folder)


def _first(images: Iterator[Picture], most: int) -> list[Picture]:
    """Return ``most`` of the images, chosen at random."""
    found = list(images)
    return [found[i] for i in np.random.default_rng(0).permutation(len(found))[:most]]


def _write(images: list[Picture], folder: Path) -> None:
    """Write shuffled images; those that are not for the test are unlabelled, and the first of each class labelled."""
    counts: dict[str, int] = {}
    tested = 0
    for number, (label, image, for_test) in enumerate(images):
        name = f"{number:05d}.png"
        if for_test:
            if tested < _HELD_OUT:
                _save(image, folder / "held_out" / label / name)
            tested += 1
            continue
        _save(image, folder / "unlabelled" / name)
        counts[label] = counts.get(label, 0) + 1
        for most in LABELS:
            if counts[label] <= most:
                _save(image, folder / f"labelled-{most}" / label / name)


def _save(image: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


def _digits(size: int) -> Iterator[Picture]:
    from sklearn.datasets import load_digits

    digits = load_digits()
    test = np.random.default_rng(1).random(len(digits.images)) < 0.28
    for scan, digit, held_out in zip(digits.images, digits.target, test, strict=True):
        pixels = (255 - scan * (255 / 16)).astype(np.uint8)
        yield str(digit), Image.fromarray(pixels).resize((size, size), Image.Resampling.BICUBIC), bool(held_out)


def _stamps(size: int) -> Iterator[Picture]:
    rng = np.random.default_rng(2)
    for label in _STAMP_CLASSES:
        files = sorted((STAMPS / label).rglob("*.png"))
        if not files:
            raise FileNotFoundError(f"{STAMPS / label} has no images: apt-get install tuxpaint-stamps-default")
        for file in files:
            drawing = Image.open(file).convert("RGBA")
            drawing.thumbnail((size, size), Image.Resampling.BICUBIC)
            square = Image.new("RGBA", (size, size), "white")
            square.alpha_composite(drawing, ((size - drawing.width) // 2, (size - drawing.height) // 2))
            yield label, square.convert("RGB"), bool(rng.random() < 0.35)


def _glyphs(size: int) -> Iterator[Picture]:
    """Yield letters of different fonts, slightly rotated; fonts of the test set are not in the training set."""
    files = sorted([*FONTS.rglob("*.ttf"), *FONTS.rglob("*.otf")])
    files = [file for file in files if not any(word in file.name for word in ("Symbol", "Dingbat", "Emoji", "Math"))]
    if len(files) < 20:
        raise FileNotFoundError(f"{FONTS} has {len(files)} fonts: apt-get install fonts-liberation2 fonts-freefont-ttf")
    families = sorted({_family(file) for file in files})
    tested = set(np.random.default_rng(3).permutation(families)[: len(families) // 3])
    rng = np.random.default_rng(4)
    for file in files:
        font = ImageFont.truetype(str(file), int(size * 0.8))
        for letter in _LETTERS:
            image = Image.new("L", (size, size), 255)
            place = tuple(size / 2 + rng.uniform(-0.05, 0.05, 2) * size)
            ImageDraw.Draw(image).text(place, letter, font=font, fill=0, anchor="mm")
            image = image.rotate(rng.uniform(-10, 10), Image.Resampling.BICUBIC, fillcolor=255)
            yield letter, image, _family(file) in tested


def _family(file: Path) -> str:
    return file.stem.split("-")[0].lower().rstrip("0123456789")[:8]


def _photos(size: int) -> Iterator[Picture]:
    """Yield crops of photos; the class is the photo, and the right part of each is for the test."""
    rng = np.random.default_rng(5)
    for label, photo in _shipped_photos():
        for _ in range(130):
            side = int(rng.uniform(0.16, 0.28) * min(photo.size))
            test = bool(rng.random() < 0.3)
            border = int(photo.width * 0.65)
            left = int(rng.integers(border, photo.width - side) if test else rng.integers(0, border - side))
            top = int(rng.integers(0, photo.height - side))
            crop = photo.crop((left, top, left + side, top + side))
            yield label, crop.resize((size, size), Image.Resampling.BICUBIC), test


def _shipped_photos() -> Iterator[tuple[str, Image.Image]]:
    try:
        import skimage
    except ImportError as error:
        raise FileNotFoundError("scikit-image is not installed: pip install scikit-image") from error
    from sklearn.datasets import load_sample_image

    shipped = Path(skimage.__file__).parent / "data"
    names = ("astronaut", "brick", "chelsea", "coffee", "coins", "grass", "gravel", "ihc", "motorcycle_left", "page")
    for name in names:
        yield name, Image.open(shipped / f"{name}.png").convert("RGB")
    for name in ("hubble_deep_field", "retina", "rocket"):
        yield name, Image.open(shipped / f"{name}.jpg").convert("RGB")
    for name in ("china", "flower"):
        yield name, Image.fromarray(load_sample_image(f"{name}.jpg"))


def _textures(size: int) -> Iterator[Picture]:
    rng = np.random.default_rng(6)
    for label, draw in _TEXTURES.items():
        for _ in range(200):
            field = draw(rng, size)
            field = (field - field.min()) / max(float(np.ptp(field)), 1e-9)
            dark, bright = rng.uniform(0, 80), rng.uniform(175, 255)
            pixels = dark + (bright - dark) * field + rng.normal(0, 5, (size, size))
            yield label, Image.fromarray(pixels.clip(0, 255).astype(np.uint8)), bool(rng.random() < 0.28)


def _grid(rng: np.random.Generator, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return coordinates, rotated, scaled and shifted at random."""
    angle, scale = rng.uniform(0, np.pi), rng.uniform(0.35, 0.9)
    y, x = np.mgrid[:size, :size] * scale + rng.uniform(0, 50, (2, 1, 1))
    return x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)


def _waves(rng: np.random.Generator, size: int) -> np.ndarray:
    return np.sin(_grid(rng, size)[0])


def _stripes(rng: np.random.Generator, size: int) -> np.ndarray:
    return np.sign(np.sin(_grid(rng, size)[0]))


def _checks(rng: np.random.Generator, size: int) -> np.ndarray:
    x, y = _grid(rng, size)
    return np.sign(np.sin(x) * np.sin(y))


def _dots(rng: np.random.Generator, size: int) -> np.ndarray:
    x, y = _grid(rng, size)
    return (np.sin(x) * np.sin(y) > 0.55).astype(float)


def _weave(rng: np.random.Generator, size: int) -> np.ndarray:
    x, y = _grid(rng, size)
    return np.where(np.sin(x / 2) * np.sin(y / 2) > 0, np.sin(x * 2), np.sin(y * 2))


def _rings(rng: np.random.Generator, size: int) -> np.ndarray:
    x, y = _grid(rng, size)
    return np.sin(np.hypot(x - x.mean() + rng.normal(0, 5), y - y.mean()))


def _cells(rng: np.random.Generator, size: int) -> np.ndarray:
    points = rng.uniform(0, size, (rng.integers(12, 30), 2))
    grid = np.mgrid[:size, :size].reshape(2, -1).T
    near = np.sort(np.linalg.norm(grid[:, None] - points, axis=2), axis=1)
    return (near[:, 1] - near[:, 0]).clip(0, 2).reshape(size, size)


def _noise(rng: np.random.Generator, size: int) -> np.ndarray:
    return rng.normal(size=(size, size))


def _clouds(rng: np.random.Generator, size: int) -> np.ndarray:
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(size), np.fft.fftfreq(size))) + 1 / size
    spectrum = np.fft.fft2(rng.normal(size=(size, size))) / frequency ** rng.uniform(1.2, 2)
    return np.real(np.fft.ifft2(spectrum))


def _bricks(rng: np.random.Generator, size: int) -> np.ndarray:
    x, y = _grid(rng, size)
    row = np.floor(y / 3)
    return ((np.mod(y, 3) > 0.6) & (np.mod(x + 3 * (row % 2), 6) > 0.6)).astype(float)


_TEXTURES: dict[str, Callable[[np.random.Generator, int], np.ndarray]] = {
    "bricks": _bricks, "cells": _cells, "checks": _checks, "clouds": _clouds, "dots": _dots, "noise": _noise,
    "rings": _rings, "stripes": _stripes, "waves": _waves, "weave": _weave,
}  # fmt: skip
#: Side in pixels, and the function that yields the images.
SETS: dict[str, tuple[int, Callable[[int], Iterator[Picture]]]] = {
    "digits": (32, _digits),
    "glyphs": (32, _glyphs),
    "photos": (64, _photos),
    "stamps": (64, _stamps),
    "textures": (32, _textures),
}
