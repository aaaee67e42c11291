r"""Printable names: a form of file names from which the original name can be recovered, lists and counts in messages.

A file name on Linux is any sequence of bytes, but lists, tables, reports and messages hold UTF-8 text, one name per
line. So each byte of invalid UTF-8, control characters and line separators is written as ``\xhh``, and a backslash that
would look like the start of such a code as ``\x5c``. Everything else is unchanged.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

_SPECIAL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]|\\(?=x[0-9a-f]{2})")
_SURROGATE = re.compile(r"[\ud800-\udfff]")
_FORMULA = ("=", "+", "-", "@", "\t", "\r", "＝", "＋", "－", "＠", "'")
_NUMBER = re.compile(r"[+-]?\d+(\.\d*)?")
_CODE = re.compile(rb"\\x([0-9a-f]{2})")


def printable_name(name: str) -> str:
    r"""Return a file name or path as UTF-8 text on one line, such as ``caf\xe9.jpg`` for a name in Latin-1.

    >>> printable_name("caf\udce9.jpg")
    'caf\\xe9.jpg'
    """
    return _SPECIAL.sub(_codes, name)


def original_name(text: str) -> str:
    r"""Invert ``printable_name``.

    >>> original_name("caf\\xe9.jpg")
    'caf\udce9.jpg'
    """
    content = text.encode("utf-8", "surrogateescape")
    return _CODE.sub(lambda code: bytes.fromhex(code[1].decode()), content).decode("utf-8", "surrogateescape")


def encodable(text: str) -> str:
    r"""Return ``text`` with surrogates, which UTF-8 cannot encode, written as ``\xhh``."""
    return _SURROGATE.sub(_codes, text)


def spreadsheet_cell(text: str) -> str:
    """Return a CSV cell that spreadsheets do not evaluate: text that looks like a formula gets a leading apostrophe.

    Text that begins with an apostrophe gets another one, so that removing one restores it. Plain numbers such as -1 are
    unchanged. See OWASP, CSV Injection.

    >>> spreadsheet_cell("=SUM(A1)")
    "'=SUM(A1)"
    """
    return f"'{text}" if text.startswith(_FORMULA) and not _NUMBER.fullmatch(text) else text


def listed(names: Sequence[str], most: int = 3) -> str:
    """Return the first ``most`` names for a message, and how many more there are.

    >>> listed(["a", "b", "c"], most=2)
    'a, b and 1 more'
    """
    left = len(names) - most
    return ", ".join(names[:most]) + (f" and {left:,} more" if left > 0 else "")


def counted(count: int, noun: str, one: str = "", many: str = "") -> str:
    """Return a number, its noun in singular or plural, and the verb ``one`` or ``many``: ``2 images are``."""
    if count == 1:
        return f"1 {noun} {one}".rstrip()
    return f"{count:,} {noun}{'es' if noun.endswith('s') else 's'} {many}".rstrip()


def same_name(name: str) -> str:
    """Return a key that is equal for names that differ only in case or Unicode normalization."""
    return unicodedata.normalize("NFC", name).casefold()


def _codes(match: re.Match[str]) -> str:
    sign = match[0]
    escaped = "\udc80" <= sign <= "\udcff"  # how Python decodes a byte that is not valid UTF-8
    return "".join(f"\\x{byte:02x}" for byte in sign.encode("utf-8", "surrogateescape" if escaped else "surrogatepass"))
