"""The content of a checkpoint's file, or why it has none."""

from __future__ import annotations

import json
import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from safetensors import SafetensorError, safe_open
from safetensors.torch import load

from openmae.checkpoints.unpickling import is_whole_model, load_plain
from openmae.errors import CheckpointError
from openmae.inputs import irregular

Content = dict[str, Any]
Header = dict[str, Any]

_SUFFIXES = (".pth", ".pt", ".tar", ".ckpt", ".bin", ".safetensors")
_AGAIN = "Copy or download it again, or use another checkpoint."


def check_file(path: Path) -> None:
    """Refuse what can be known to be no checkpoint without reading it.

    Raises:
        CheckpointError: the file is missing, empty, a folder, or of another kind by its name.
    """
    if path.suffix.lower() == ".onnx":
        raise CheckpointError(f"{path} is an ONNX file, not a checkpoint.", "Give the .pth file it was exported from.")
    if not path.exists():
        raise CheckpointError(
            f"No checkpoint at {path}.", "Check the path; relative paths start at the working folder."
        )
    if path.is_dir():
        if path.suffix == ".shards":
            from openmae.checkpoints.folder import sharded_error

            raise sharded_error(path)
        inside = sorted(file.name for file in path.iterdir() if file.suffix in _SUFFIXES)
        fix = f"Name one of its files: {', '.join(inside[:3])}." if inside else "Name a file; it holds no checkpoint."
        raise CheckpointError(f"{path} is a folder, not a checkpoint.", fix)
    if kind := irregular(path):
        raise CheckpointError(f"{path} is {kind}, not a checkpoint.", "Name a regular file.")
    if path.stat().st_size == 0:
        raise CheckpointError(f"{path} is empty (0 bytes).", "Copy it again, or use an earlier checkpoint.")


def read_content(path: Path, decrypted: BinaryIO | None, weights_key: str = "") -> tuple[Content, Header | None]:
    """What a checkpoint holds, and its ``"openmae"`` entry where OpenMAE wrote it.

    Args:
        path: the file, for messages and its beginning.
        decrypted: its content where it is encrypted.
        weights_key: ``state_dict`` or ``ema_state_dict``, to choose between OpenMAE's own.

    Raises:
        CheckpointError: it cannot be read; the text says why.
    """
    if _is_safetensors(path, decrypted):
        return _read_safetensors(path, decrypted)
    raw = _read_pickle(path, decrypted)
    header = raw.get("openmae")
    if not isinstance(header, Mapping):
        return raw, None
    return _own_weights(path, raw, weights_key), dict(header)


def _is_safetensors(path: Path, decrypted: BinaryIO | None) -> bool:
    """By its name, or by its beginning: the length of a JSON object, and the object."""
    if path.suffix.lower() == ".safetensors":
        return True
    start = decrypted.read(9) if decrypted else _beginning(path)[:9]
    if decrypted:
        decrypted.seek(0)
    return start[8:9] == b"{" and int.from_bytes(start[:8], "little") < 2**27


def _read_safetensors(path: Path, decrypted: BinaryIO | None) -> tuple[Content, Header | None]:
    try:
        if decrypted is not None:
            data = decrypted.read()
            length = int.from_bytes(data[:8], "little")
            metadata = json.loads(data[8 : 8 + length]).get("__metadata__") or {}
            return load(data), json.loads(metadata["openmae"]) if "openmae" in metadata else None
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
            header = (file.metadata() or {}).get("openmae")
            return tensors, json.loads(header) if header else None
    except (SafetensorError, OSError, ValueError, RecursionError, AttributeError, TypeError) as error:
        raise _damaged(path, "safetensors file", error) from error


def _read_pickle(path: Path, decrypted: BinaryIO | None) -> Content:
    try:
        raw = load_plain(decrypted or path)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        if found is None:
            raise _damaged(path, "PyTorch checkpoint", error) from error
        raise _holds_objects(path, found[1]) from error
    except Exception as error:  # foreign bytes break the reader in every way there is
        raise _damaged(path, "PyTorch checkpoint", error) from error
    if not isinstance(raw, Mapping):
        raise CheckpointError(f"{path} holds a {type(raw).__name__}, not a state dict.", "Save model.state_dict().")
    return dict(raw)


def _own_weights(path: Path, raw: Content, weights_key: str) -> Content:
    """The weights of a training checkpoint: averaged ones before plain ones, or those that are asked for."""
    if not isinstance(raw.get("state_dict"), Mapping):
        raise CheckpointError(f"{path} is a checkpoint of OpenMAE without its weights.", "Use another checkpoint.")
    held = [name for name in ("state_dict", "ema_state_dict") if raw.get(name) and isinstance(raw[name], Mapping)]
    if weights_key and weights_key not in held:
        raise CheckpointError(f"{path} has no weights under {weights_key!r}.", f"It has: {', '.join(held)}.")
    named = {**raw["state_dict"], **raw[weights_key or held[-1]]} if held else {}
    return {name: value for name, value in named.items() if str(name).startswith("model.")}


def _holds_objects(path: Path, name: str) -> CheckpointError:
    if is_whole_model(path):
        return CheckpointError(
            f"{path} holds a whole pickled model ({name}), not its state dict; it was not loaded, since such objects "
            "can run code.",
            "In the program that made it: torch.save(model.state_dict(), path).",
        )
    return CheckpointError(
        f"{path} holds {name} in addition to weights; it was not loaded, since such objects can run code.",
        "If you trust its source, save its state dict alone: torch.save({'state_dict': ...}, path).",
    )


def _damaged(path: Path, kind: str, error: Exception) -> CheckpointError:
    """The file's beginning tells a cut-off download from something else."""
    start = _beginning(path)
    if start.startswith(b"version https://git-lfs"):
        return CheckpointError(
            f"{path} is a pointer of Git LFS, not the weights themselves.", "Fetch them: git lfs pull, or download it."
        )
    text = start.decode("utf-8", errors="ignore").strip()
    if re.match(r"<(!doctype|html|\?xml|head|body)", text.lower()):
        return CheckpointError(
            f"{path} is a web page, not a checkpoint; it begins with the text {text.splitlines()[0][:24]!r}.",
            "Download the file itself: a login or an error page was saved in its place.",
        )
    if start.startswith(b"PK\x03\x04"):
        return _damaged_archive(path, error)
    if start.isascii() and (line := text.split("\n")[0][:24]).isprintable() and line:
        reason = f"is no {kind}; it begins with the text {line!r}"
    else:
        # torch would have it read in spite of all: "weights_only=False will likely succeed"
        said = type(error).__name__ if "weights_only" in str(error) else (str(error) or type(error).__name__)
        reason = f"is no {kind}, or damaged ({said.splitlines()[0]})"
    return CheckpointError(f"{path} {reason}.", _AGAIN)


def _damaged_archive(path: Path, error: Exception) -> CheckpointError:
    try:
        with zipfile.ZipFile(path) as bundle:
            inside = {name.split("/", 1)[-1] for name in bundle.namelist()}
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return CheckpointError(f"{path} is cut off or damaged ({path.stat().st_size} bytes).", _AGAIN)
    if "constants.pkl" in inside:
        return CheckpointError(
            f"{path} is a TorchScript archive, which holds a program, not a state dict.",
            "Where it was made: torch.save(torch.jit.load(path).state_dict(), other_path).",
        )
    if "data.pkl" not in inside:
        return CheckpointError(
            f"{path} is a ZIP archive, but not one that torch.save wrote.",
            "Unpack it, and name the checkpoint in it.",
        )
    if isinstance(error, ValueError) and "records" in str(error):
        return CheckpointError(f"{path}: {error}, as no file of torch.save does.", _AGAIN)
    return CheckpointError(f"{path} is cut off or damaged ({path.stat().st_size} bytes).", _AGAIN)


def _beginning(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(64)
