"""The image formats that OpenMAE reads, for folders, archives, shards, packing and serving.

A format is recognised by the first bytes of a file, never by its suffix, which only decides whether a file in a folder
or an archive counts as an image. Formats whose decoder runs another program (EPS) or that have no signature (TGA) are
not supported.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import NamedTuple

from PIL import features

SIGNATURE_BYTES = 256  # enough to recognise a format


class _Format(NamedTuple):
    """A supported format: its name in messages, its suffixes, and the ``PIL.features`` module that it needs."""

    title: str
    suffixes: tuple[str, ...]
    module: str = ""


_FORMATS: Mapping[str, _Format] = {  # by Pillow's name
    "JPEG": _Format("JPEG", (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo")),
    "PNG": _Format("PNG", (".png", ".apng")),
    "BMP": _Format("BMP", (".bmp",)),
    "TIFF": _Format("TIFF", (".tif", ".tiff")),
    "WEBP": _Format("WebP", (".webp",), "webp"),
    "GIF": _Format("GIF", (".gif",)),
    "AVIF": _Format("AVIF", (".avif",), "avif"),
    "JPEG2000": _Format("JPEG 2000", (".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx"), "jpg_2000"),
    "HEIF": _Format("HEIC", (".heic", ".heif", ".hif")),  # decoded by pillow-heif
}

_RAW = ".cr2 .cr3 .crw .nef .nrw .arw .sr2 .srf .dng .orf .rw2 .raf .pef .srw .x3f .3fr .iiq .erf .kdc .mrw"
_VECTOR = ".svg .svgz .eps .wmf .emf"
_OTHERS = (
    ".tga .psd .psb .xcf .ico .icns .cur .ppm .pgm .pbm .pnm .pfm .pcx .dds .exr .hdr .jxl .jxr .wdp .dcm .nii .fits "
    ".sgi .ras .xbm .xpm .qoi .bpg .flif .djvu"
)

_SIGNATURES = (  # signature, Pillow's name of the format
    (b"\xff\xd8\xff", "JPEG"),
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"BM", "BMP"),
    *((start, "TIFF") for start in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+", b"II\0*", b"MM*\0")),
    (b"GIF87a", "GIF"),
    (b"GIF89a", "GIF"),
    (b"\0\0\0\x0cjP  \r\n\x87\n", "JPEG2000"),
    (b"\xff\x4f\xff\x51", "JPEG2000"),
)
_AVIF_BRANDS = {b"avif", b"avis"}
_HEIF_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1"}
_OTHER_CONTENT = (  # other signatures found in files with the suffix of an image
    (b"%!PS", "a PostScript (EPS) file"),
    (b"%PDF", "a PDF file"),
    (b"8BPS", "a Photoshop file"),
    (b"PK\x03\x04", "a zip archive"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"<svg", "an SVG drawing"),
    (b"<!doctype", "a web page"),
    (b"<html", "a web page"),
    (b"<?xml", "an XML file"),
    (b"version https://git-lfs", "a Git LFS pointer (git lfs pull fetches the file)"),
    (b"\0\0\1\0", "an icon (ICO)"),
    (b"\xff\x0a", "a JPEG XL file"),
    (b"\0\0\0\x0cjxl ", "a JPEG XL file"),
    *((b"p%d" % number, "a Netpbm file (PBM, PGM, PPM)") for number in range(1, 8)),
)


def _missing_decoder(name: str) -> str:
    """Return the command that installs the decoder of a format; empty if it is installed."""
    if name == "HEIF":
        return "" if importlib.util.find_spec("pillow_heif") is not None else "pip install 'openmae[heif]'"
    module = _FORMATS[name].module
    known = {*features.modules, *features.codecs}  # an older Pillow does not have all of them
    return "" if not module or (module in known and features.check(module)) else "pip install --upgrade pillow"


_MISSING: Mapping[str, str] = {name: _missing_decoder(name) for name in _FORMATS}

READ_FORMATS: tuple[str, ...] = tuple(name for name, command in _MISSING.items() if not command)
"""Pillow's names of the formats that this installation reads."""

FORMAT_TITLES: tuple[str, ...] = tuple(_FORMATS[name].title for name in READ_FORMATS)
"""The same formats as messages and help texts name them."""

IMAGE_SUFFIXES: frozenset[str] = frozenset(suffix for name in READ_FORMATS for suffix in _FORMATS[name].suffixes)
"""Lower-case suffixes of the files that are taken for images."""

KNOWN_UNREAD_SUFFIXES: Mapping[str, str] = {
    **dict.fromkeys(_RAW.split(), "develop them to JPEG, PNG or TIFF"),
    **dict.fromkeys(_VECTOR.split(), "render them to PNG"),
    **dict.fromkeys(_OTHERS.split(), "convert them to JPEG, PNG or TIFF"),
    **{suffix: command for name, command in _MISSING.items() if command for suffix in _FORMATS[name].suffixes},
}
"""Lower-case suffixes of images that are not read, and how to make them readable."""


def recognise(start: bytes) -> str | None:
    """Return Pillow's name of the format of a file that begins with ``start``; None if it is not supported.

    The decoder may be missing in this installation; see ``READ_FORMATS``.
    """
    if start[:4] == b"RIFF" and start[8:12] == b"WEBP":
        return "WEBP"
    if start[4:8] == b"ftyp":
        box = start[8 : int.from_bytes(start[:4], "big")]
        brands = {box[:4], *(box[place : place + 4] for place in range(8, len(box), 4))}
        return "AVIF" if brands & _AVIF_BRANDS else "HEIF" if brands & _HEIF_BRANDS else None
    return next((name for signature, name in _SIGNATURES if start.startswith(signature)), None)


def why_not_read(start: bytes) -> str:
    """Return why a file that begins with ``start`` cannot be read."""
    if not start:
        return "the file is empty (0 bytes)"
    name = recognise(start)
    if name is not None:
        return f"its content is {_FORMATS[name].title}; to read it: {_MISSING[name]}"
    if not start.strip(b"\0"):
        return "the file contains only zeros"
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    other = next((f"{name}, not " for signature, name in _OTHER_CONTENT if text.startswith(signature.lower())), "not ")
    return f"its content is {other}an image that can be read ({', '.join(FORMAT_TITLES)})"
