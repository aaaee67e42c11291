"""What Pillow does not tell of a TIFF: how many pages it has, and what its grey values mean."""

from __future__ import annotations

import io
import struct
from typing import BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image, TiffImagePlugin

_MOST_PAGES = 10_000  # that are counted
_KINDS = {1: "unsigned {bits}-bit integers", 2: "signed {bits}-bit integers", 3: "{bits}-bit floating-point numbers"}
_WHITE_IS_ZERO = 0  # value of the tag PhotometricInterpretation


class Depth(NamedTuple):
    """What the grey values of a file mean.

    Attributes:
        words: what they are.
        largest: the value that is white.
        inverted: 0 is white, and ``largest`` black.
    """

    words: str
    largest: int = 65535
    inverted: bool = False


def depth_of(image: Image.Image) -> Depth:
    """Return what the values of a grey image of more than 8 bits mean; of another image the result has no meaning."""
    if not isinstance(image, TiffImagePlugin.TiffImageFile):
        return Depth("32-bit numbers")
    tags = image.tag_v2
    bits = int(tags.get(TiffImagePlugin.BITSPERSAMPLE, (16,))[0])
    kind = int(tags.get(TiffImagePlugin.SAMPLEFORMAT, (1,))[0])
    inverted = tags.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == _WHITE_IS_ZERO
    return Depth(_KINDS.get(kind, "{bits}-bit numbers of an unknown kind").format(bits=bits), 2**bits - 1, inverted)


def deep_pixels(image: Image.Image, depth: Depth) -> npt.NDArray[np.float32]:
    """Return the values of a grey image of 9 to 16 bits on the scale of 8 bits: float32 [H, W], 0 to 255."""
    grey = np.minimum(np.array(image, dtype=np.float32) / np.float32(depth.largest / 255), np.float32(255))
    return 255 - grey if depth.inverted else grey


def count_pages(file: BinaryIO) -> int:
    """Return how many pages a TIFF has, by following the chain of their headers; at most 10,000 are counted.

    Pillow would look every new page up in a list of all earlier ones.
    """
    file.seek(0)
    start = file.read(16)
    order = "<" if start[:2] == b"II" else ">"
    big = 43 in start[2:4]
    if big:
        (place,) = struct.unpack_from(f"{order}Q", start, 8)
    else:
        (place,) = struct.unpack_from(f"{order}I", start, 4)
    count, entry, pointer = ("Q", 20, "Q") if big else ("H", 12, "I")
    seen: set[int] = set()
    while place and place not in seen and len(seen) < _MOST_PAGES:
        file.seek(place)
        head = file.read(struct.calcsize(f"{order}{count}"))
        if len(head) < struct.calcsize(f"{order}{count}"):
            break
        seen.add(place)
        file.seek(struct.unpack(f"{order}{count}", head)[0] * entry, io.SEEK_CUR)
        after = file.read(struct.calcsize(f"{order}{pointer}"))
        if len(after) < struct.calcsize(f"{order}{pointer}"):
            break
        (place,) = struct.unpack(f"{order}{pointer}", after)
    return len(seen)
