"""The sidecar of an engine, ``<engine file name>.json``, which describes how to run it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from openmae._version import __version__
from openmae.engines.metadata import ModelCard
from openmae.engines.tensorrt.backend import BackendName
from openmae.errors import CheckpointError
from openmae.models.build import validate


@dataclass(frozen=True)
class Profile:
    """The smallest, optimal and largest batch size of an engine."""

    min: int
    opt: int
    max: int

    def __str__(self) -> str:
        return str(self.max) if self.min == self.max else f"{self.min} to {self.max}, tuned for {self.opt}"


@dataclass(frozen=True)
class TensorInfo:
    """An input or output: its name, shape (-1 for any batch size) and torch dtype, such as ``float32``."""

    name: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class EngineInfo:
    """How an engine was built.

    Attributes:
        builder, builder_version: builder; an engine runs only with the version that built it.
        compute_capability: GPUs that the engine runs on, such as ``("SM89",)``.
        onnx_sha256, engine_sha256: SHA-256 of the ONNX file and of the engine, before any encryption.
        version: OpenMAE version that wrote the sidecar.
    """

    builder: BackendName
    builder_version: str
    data_type: str
    compute_capability: tuple[str, ...]
    profile: Profile
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    onnx_sha256: str
    engine_sha256: str
    version: str = __version__


def sidecar_path(engine: Path) -> Path:
    """Return the path of the sidecar of an engine."""
    return engine.with_name(f"{engine.name}.json")


def sidecar_text(card: ModelCard | None, info: EngineInfo) -> str:
    """Return the content of a sidecar; ``card`` is None for an ONNX file of another program."""
    return json.dumps({"card": card and card.to_dict(), "engine": asdict(info)}, indent=2) + "\n"


def read_sidecar(engine: Path) -> tuple[ModelCard, EngineInfo]:
    """Read the sidecar of an engine; no GPU is needed.

    Raises:
        CheckpointError: the engine or its sidecar is missing or damaged, or another program wrote its ONNX file.
    """
    card, info = read_engine_info(engine)
    if card is None:
        raise CheckpointError(
            f"{engine} was built from an ONNX file that mae export did not write, so its classes and preprocessing are "
            "unknown.",
            "Run it with NVIDIA's tools, or build an engine from an ONNX file of mae export.",
        )
    return card, info


def read_engine_info(engine: Path) -> tuple[ModelCard | None, EngineInfo]:
    """Read the sidecar of an engine; the card is None if another program wrote its ONNX file.

    Raises:
        CheckpointError: the engine or its sidecar is missing or damaged.
    """
    path = sidecar_path(engine)
    if not engine.is_file():
        raise CheckpointError(f"No engine at {engine}.", "Check the path; mae gen_trt_engine writes engines.")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        card, info = values["card"], validate(EngineInfo, values["engine"])
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{engine} has no {path.name} next to it, which describes its inputs and outputs.",
            "Copy both files, or build the engine with mae gen_trt_engine.",
        ) from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(
            f"{path} is damaged or of another version of OpenMAE: {error!r}.",
            "Build the engine again with mae gen_trt_engine.",
        ) from error
    return None if card is None else ModelCard.from_dict(card), info


def check_sidecar(engine: Path, data: bytes, info: EngineInfo) -> None:
    """Raise an error if a sidecar describes another engine than the one with this (decrypted) content.

    Raises:
        CheckpointError: it does, or one of the two files is damaged.
    """
    if hashlib.sha256(data).hexdigest() != info.engine_sha256:
        raise CheckpointError(
            f"{sidecar_path(engine)} belongs to another engine than {engine}, or one of the two is damaged.",
            "Copy both again, or build the engine again with mae gen_trt_engine.",
        )
