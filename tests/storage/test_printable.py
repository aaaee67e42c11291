from __future__ import annotations

import doctest

import pytest
from hypothesis import given
from hypothesis import strategies as st

from openmae.storage import printable
from openmae.storage.printable import encodable, original_name, printable_name


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a/b c,d;e.jpg", "a/b c,d;e.jpg"),
        ("日本🐕.jpg", "日本🐕.jpg"),
        ("C:\\x\\new.jpg", "C:\\x\\new.jpg"),
        ("caf\udce9.jpg", "caf\\xe9.jpg"),
        ("new\nline\t\x1b[2J.jpg", "new\\x0aline\\x09\\x1b[2J.jpg"),
        ("a\x85b\u2028.jpg", "a\\xc2\\x85b\\xe2\\x80\\xa8.jpg"),
        ("caf\\xe9.jpg", "caf\\x5cxe9.jpg"),
    ],
)
def test_names_have_one_printable_form(name: str, text: str) -> None:
    assert printable_name(name) == text
    assert original_name(text) == name


@given(st.binary())
def test_printable_names_are_one_line_and_can_be_reversed(content: bytes) -> None:
    name = content.decode("utf-8", "surrogateescape")
    text = printable_name(name)
    assert len((text.encode().decode() + ".").splitlines()) == 1
    assert original_name(text) == name


@given(st.text(st.characters(codec=None, exclude_categories=()), max_size=20))
def test_every_text_can_be_encoded(text: str) -> None:
    encodable(text).encode()
    printable_name(text).encode()


def test_examples_run() -> None:
    assert doctest.testmod(printable).failed == 0
