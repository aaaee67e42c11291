"""How many pages a TIFF has."""

from __future__ import annotations

import io
import struct
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from openmae.data.decode import Picture
from openmae.data.tiff import count_pages


@settings(max_examples=20, deadline=None)
@given(count=st.integers(1, 12), big=st.booleans())
def test_pages_are_counted_as_pillow_counts_them(count: int, big: bool) -> None:
    stream = io.BytesIO()
    images = [Image.new("L", (4, 4), number) for number in range(count)]
    images[0].save(stream, "TIFF", save_all=True, append_images=images[1:], big_tiff=big)
    with Image.open(stream) as image:
        assert count_pages(stream) == count == image.n_frames


def chain(places: list[int]) -> io.BytesIO:
    """Empty headers of 6 bytes, one behind the other, each of which names the number of the next."""
    body = b"".join(struct.pack("<HI", 0, 8 + 6 * place if place >= 0 else 0) for place in places)
    return io.BytesIO(struct.pack("<2sHI", b"II", 42, 8) + body)


def test_a_circle_of_pages_ends() -> None:
    assert count_pages(chain([1, 2, 0])) == 3
    assert count_pages(chain([0])) == 1
    assert count_pages(chain([1, 2, -1])) == 3


def test_a_chain_without_end_is_counted_up_to_a_limit() -> None:
    assert count_pages(chain([number + 1 for number in range(50_000)])) == 10_000


@pytest.mark.parametrize("cut", [1, 7, 10, 60])
def test_what_is_cut_short_is_never_counted_twice(cut: int) -> None:
    stream = io.BytesIO()
    Image.new("L", (4, 4)).save(stream, "TIFF", save_all=True, append_images=[Image.new("L", (4, 4))])
    with Picture(Path("a"), io.BytesIO(stream.getvalue())) as picture:
        picture.pixels()
        picture._file = io.BytesIO(stream.getvalue()[:cut])
        assert picture.pages == ""
