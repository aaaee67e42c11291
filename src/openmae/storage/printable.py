r"""File names in text: one printable form, from which the name can be read back.

A file name on Linux is any bytes. Lists, tables, reports and messages hold UTF-8 text, one name a line. So a byte that
is not UTF-8, a control character and a line separator are written as ``\xhh``, one for each byte, and a backslash that
would be mistaken for the start of such a code is written as ``\x5c``. Every other name stays as it is.
"""

from __future__ import annotations

import re
import unicodedata

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
    r"""Return the file name or path that ``printable_name`` has written as ``text``.

    >>> original_name("caf\\xe9.jpg")
    'caf\udce9.jpg'
    """
    content = text.encode("utf-8", "surrogateescape")
    return _CODE.sub(lambda code: bytes.fromhex(code[1].decode()), content).decode("utf-8", "surrogateescape")


def encodable(text: str) -> str:
    r"""Return a text of any kind with what UTF-8 cannot hold written as ``\xhh``."""
    return _SURROGATE.sub(_codes, text)


def spreadsheet_cell(text: str) -> str:
    """Return a cell of a CSV file that no spreadsheet takes for a formula: an apostrophe is put in front of one.

    A cell that already begins with an apostrophe gets one more, so that taking one away gives the text back. A plain
    number such as -1 stays as it is. (OWASP, CSV Injection.)

    >>> spreadsheet_cell("=SUM(A1)")
    "'=SUM(A1)"
    """
    return f"'{text}" if text.startswith(_FORMULA) and not _NUMBER.fullmatch(text) else text


def cell_text(cell: str) -> str:
    """Return the text that ``spreadsheet_cell`` has written as ``cell``."""
    return cell.removeprefix("'")


def same_name(name: str) -> str:
    """Return a key that is the same for names that a person reads as the same: case and Unicode form do not count."""
    return unicodedata.normalize("NFC", name).casefold()


def _codes(match: re.Match[str]) -> str:
    sign = match[0]
    escaped = "\udc80" <= sign <= "\udcff"  # what Python makes of a byte that is not UTF-8
    return "".join(f"\\x{byte:02x}" for byte in sign.encode("utf-8", "surrogateescape" if escaped else "surrogatepass"))
