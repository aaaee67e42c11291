"""PyTorch files read without running anything in them: ``torch.load(weights_only=True)`` and inert stand-ins.

Training scripts store more than tensors beside their weights: arguments with paths, numpy scalars, metrics in a
``defaultdict``. For these harmless types the unpickler gets the stand-ins of this module, never the classes themselves:
numpy's own ``__setstate__`` trusts the flags that a file gives it, and a ``WindowsPath`` cannot be made on Linux.
Everything else is refused by name.
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

_NUMBERS = re.compile(r"[?]|b1|[iuf][1248]|c8|c16")  # numpy's codes of fixed-size numbers
_MODEL_CLASSES = ("torch.nn.modules.", "timm.", "transformers.", "torchvision.models.")


class NumpyDtype:
    """A numpy dtype in a file: the code and the byte order, and nothing else of what its state may claim.

    Args:
        code: such as ``f4``.
    """

    def __init__(self, code: str | bytes = "", *_: Any) -> None:
        self.code = code.decode("latin1") if isinstance(code, bytes) else str(code)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        order = state[1]
        self.code = f"{order.decode('latin1') if isinstance(order, bytes) else order}{self.code}"

    @property
    def numpy(self) -> np.dtype | None:
        """The dtype; None where it is not one of numbers."""
        return np.dtype(self.code) if _NUMBERS.fullmatch(self.code.lstrip("<>|=")) else None


class NumpyArray:
    """A numpy array in a file; what is not an array of numbers is empty."""

    def __init__(self, *_: Any) -> None:
        self.array = np.empty(0)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, by_columns, data = state
        kind = dtype.numpy
        if kind is None:
            return
        data = _bytes(data)
        if math.prod(shape) * kind.itemsize != len(data):
            raise ValueError(f"an array of shape {shape} does not have {len(data)} bytes")
        flat = np.frombuffer(data, kind).astype(kind.newbyteorder("="), copy=False)
        self.array = flat.reshape(shape, order="F" if by_columns else "C")

    def tensor(self) -> Tensor:
        """The values as a tensor."""
        return torch.from_numpy(np.array(self.array, order="C"))


def load_plain(source: Path | BinaryIO) -> Any:
    """Read what ``torch.save`` wrote, on the CPU.

    Raises:
        pickle.UnpicklingError: it holds objects of other types; the text names the first.
        ValueError: it would take more memory than the file has bytes.
        Exception: foreign bytes break torch's reader in every way there is.
    """
    _check_members(source)
    with torch.serialization.safe_globals(_STAND_INS), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of TorchScript and pickle protocols; errors say what matters
        return torch.load(source, map_location="cpu", weights_only=True)


def is_whole_model(path: Path) -> bool:
    """Whether a file holds a pickled module rather than its state dict, as far as torch can tell."""
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # only a reason for an error is looked for
        return False
    return any(name.startswith(_MODEL_CLASSES) for name in names)


def _check_members(source: Path | BinaryIO) -> None:
    """Torch stores without compression; a small file could otherwise claim any amount of memory."""
    if not isinstance(source, Path) and not source.seekable():
        return
    if zipfile.is_zipfile(source):
        with zipfile.ZipFile(source) as bundle:
            members = bundle.infolist()
        size = source.stat().st_size if isinstance(source, Path) else source.seek(0, 2)
        stored = all(member.compress_type == zipfile.ZIP_STORED for member in members)
        if not stored or sum(member.file_size for member in members) > size:
            raise ValueError("its records are compressed or claim more bytes than the file has")
    if not isinstance(source, Path):
        source.seek(0)


def _scalar(dtype: NumpyDtype, data: Any = b"") -> Any:
    kind = dtype.numpy
    if kind is None:
        return None
    return np.frombuffer(_bytes(data), kind, count=1)[0].item()


def _bytes(data: Any) -> bytes:
    """Return the bytes of a pickled array; ``bytes`` of an integer would be as many zeros."""
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
    """What a factory of a ``defaultdict`` or a scalar type stands for: nobody calls it."""


def _stand_ins() -> list[Callable[..., Any] | tuple[Callable[..., Any], str]]:
    inert: dict[Callable[..., Any], tuple[str, ...]] = {
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
    return [*real, *((stand_in, name) for stand_in, names in inert.items() for name in names)]


_STAND_INS = _stand_ins()
