"""Read PyTorch files without executing code in them: ``torch.load(weights_only=True)`` with stand-in classes.

Training scripts store more than weights: arguments with paths, numpy scalars, metrics in a ``defaultdict``. The
unpickler replaces most of these harmless types by stand-ins from this module, not the classes themselves: numpy's
``__setstate__`` trusts the flags in a file, and a ``WindowsPath`` cannot be created on Linux. All other types are
rejected by name.
"""

from __future__ import annotations

import argparse
import datetime
import math
import re
import types
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

_NUMBERS = re.compile(r"[?]|b1|[iuf][1248]|c8|c16")  # numpy's type codes of fixed-size numbers
_MODEL_CLASSES = ("torch.nn.modules.", "timm.", "transformers.", "torchvision.models.")


class NumpyDtype:
    """Stand-in for a numpy dtype: its type code (such as ``f4``) and byte order."""

    def __init__(self, code: str | bytes = "", *_: Any) -> None:
        self.code = code.decode("latin1") if isinstance(code, bytes) else str(code)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        order = state[1]
        self.code = f"{order.decode('latin1') if isinstance(order, bytes) else order}{self.code}"

    @property
    def numpy(self) -> np.dtype | None:
        """The dtype; None if it is not numeric."""
        return np.dtype(self.code) if _NUMBERS.fullmatch(self.code.lstrip("<>|=")) else None


class NumpyArray:
    """Stand-in for a numpy array; empty if the array is not numeric."""

    def __init__(self, *_: Any) -> None:
        self.array = np.empty(0)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, fortran_order, data = state
        kind = dtype.numpy
        if kind is None:
            return
        data = _bytes(data)
        if math.prod(shape) * kind.itemsize != len(data):
            raise ValueError(f"an array of shape {shape} does not have {len(data)} bytes")
        flat = np.frombuffer(data, kind).astype(kind.newbyteorder("="), copy=False)
        self.array = flat.reshape(shape, order="F" if fortran_order else "C")

    def tensor(self) -> Tensor:
        """Return the values as a tensor."""
        return torch.from_numpy(np.array(self.array, order="C"))


def load_plain(source: Path | BinaryIO, *, lazily: bool = False) -> Any:
    """Read the output of ``torch.save`` into CPU memory.

    Args:
        source: path, or a seekable stream.
        lazily: memory-map the tensors of a file instead of reading them. The file's checksums are verified first, which
            torch does not do.

    Raises:
        pickle.UnpicklingError: The file holds objects of other types; the message names the first one.
        ValueError: The file would take more memory than its own size.
        Exception: torch's reader fails in many other ways on a file that is not a checkpoint.
    """
    _check_records(source, checksums=lazily)
    with torch.serialization.safe_globals(_STAND_INS), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about TorchScript and pickle protocols
        return torch.load(source, map_location="cpu", weights_only=True, mmap=lazily)


def is_pickled_model(path: Path) -> bool:
    """Return whether a file holds a pickled module instead of a state dict, as far as torch can tell."""
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # the result only improves an error message
        return False
    return any(name.startswith(_MODEL_CLASSES) for name in names)


def _check_records(source: Path | BinaryIO, *, checksums: bool) -> None:
    """Reject compressed records, which torch never writes and which let a small file take any amount of memory."""
    if zipfile.is_zipfile(source):
        with zipfile.ZipFile(source) as bundle:
            members = bundle.infolist()
            if checksums and (damaged := bundle.testzip()):
                raise zipfile.BadZipFile(f"{damaged} has another checksum")
        size = source.stat().st_size if isinstance(source, Path) else source.seek(0, 2)
        stored = all(member.compress_type == zipfile.ZIP_STORED for member in members)
        if not stored or sum(member.file_size for member in members) > size:
            raise ValueError("its records are compressed or claim more bytes than the file has")
    if not isinstance(source, Path):
        source.seek(0)


def _scalar(dtype: NumpyDtype, data: Any = b"") -> Any:
    kind = dtype.numpy
    return None if kind is None else np.frombuffer(_bytes(data), kind, count=1)[0].item()


def _bytes(data: Any) -> bytes:
    """Return the bytes of a pickled array; reject an integer n, for which ``bytes`` would allocate n zeros."""
    if isinstance(data, str):
        return data.encode("latin1")
    if not isinstance(data, bytes | bytearray):
        raise ValueError("an array without its bytes")
    return bytes(data)


def _path(*parts: Any) -> str:
    return "/".join(str(part).rstrip("/\\") for part in parts)


def _empty_dict(*_: Any) -> dict[Any, Any]:
    return {}


def _empty_list(*_: Any) -> list[Any]:
    return []


def _nothing(*_: Any) -> None:
    """Replace the factory of a ``defaultdict`` or a scalar type, which is never called."""


def _stand_ins() -> list[Callable[..., Any] | tuple[Callable[..., Any], str]]:
    harmless: dict[Callable[..., Any], tuple[str, ...]] = {
        NumpyDtype: ("numpy.dtype",),
        NumpyArray: tuple(f"numpy.{core}.multiarray._reconstruct" for core in ("core", "_core")),
        _scalar: tuple(f"numpy.{core}.multiarray.scalar" for core in ("core", "_core")),
        _path: tuple(
            f"{module}.{kind}"
            for module in ("pathlib", "pathlib._local")
            for kind in ("Path", "PosixPath", "WindowsPath", "PurePath", "PurePosixPath", "PureWindowsPath")
        ),
        _empty_dict: ("collections.defaultdict",),
        _empty_list: ("collections.deque",),
        _nothing: (
            "numpy.ndarray",
            *(f"builtins.{kind}" for kind in ("list", "dict", "int", "float", "str", "tuple", "bool")),
            *(f"numpy.{kind}" for kind in ("float16", "float32", "float64", "int32", "int64", "uint8", "bool_")),
        ),
    }
    real: list[Callable[..., Any]] = [argparse.Namespace, types.SimpleNamespace]
    real += [datetime.datetime, datetime.date, datetime.time, datetime.timedelta, datetime.timezone]
    return [*real, *((stand_in, name) for stand_in, names in harmless.items() for name in names)]


_STAND_INS = _stand_ins()
