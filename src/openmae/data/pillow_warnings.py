"""Pillow's warnings, collected for each image. Otherwise every process that decodes would print them."""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

import PIL
from PIL.Image import DecompressionBombWarning

_FOLDER = os.path.dirname(PIL.__file__)
_here = threading.local()  # .texts: where the warnings of this thread go
_shown: set[tuple[str, str, int]] = set()
_show_others = warnings.showwarning


@contextmanager
def collected(texts: list[str]) -> Iterator[None]:
    """Append what Pillow warns of in this thread to ``texts``; all other warnings are shown as ever."""
    _install()
    before = getattr(_here, "texts", None)
    _here.texts = texts
    try:
        yield
    finally:
        _here.texts = before


def _install() -> None:
    """Take the place of ``warnings.showwarning``, again where somebody else took it meanwhile."""
    global _show_others
    if warnings.showwarning is not _show:
        _show_others = warnings.showwarning
        warnings.showwarning = _show
        warnings.filterwarnings("always", module=r"PIL\.")  # or Python would tell of the first image only


def _show(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    if os.path.dirname(filename) == _FOLDER:
        texts = getattr(_here, "texts", None)
        if texts is not None:
            if not issubclass(category, DecompressionBombWarning):  # the reader has a limit of its own
                texts.append(" ".join(str(message).split()))
            return
        where = (str(message), filename, lineno)
        if where in _shown:  # of the rest of the program: once, as if there were no filter here
            return
        _shown.add(where)
    _show_others(message, category, filename, lineno, file, line)
