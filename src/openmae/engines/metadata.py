"""Metadata of a deployed model, stored in an ONNX file and next to a TensorRT engine."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict

from openmae._version import __version__
from openmae.checkpoints.format import CheckpointInfo, Stage
from openmae.errors import CheckpointError
from openmae.models.build import ModelConfig, validate
from openmae.spec.architectures import get_architecture

FORMAT = 1
INPUT = "input"  # name of the only input
LOGITS, FEATURES, TOKENS = "logits", "features", "tokens"  # names of outputs
ONNX_SUFFIXES = (".onnx",)
Precision = Literal["fp32", "fp16", "bf16", "int8"]
_AGAIN = "Export the model again with mae export."


@dataclass(frozen=True)
class ModelCard:
    """Metadata that other actions and programs need to use an exported model.

    Attributes:
        stage: finetune (output ``logits`` ``[N, K]``) or pretrain (outputs ``features`` ``[N, D]``, the pooled
            embedding, and ``tokens`` ``[N, D, rows, columns]``, the last feature map).
        model: architecture, input size and channels.
        class_names: classes in the order of the outputs; empty for pretraining.
        mean, std: statistics of the images per channel, on a scale of 0 to 1.
        crop_pct: share of the image's sides, after cropping to the input's aspect ratio, that the centre crop keeps.
        preprocessing: the input is uint8 ``[N, H, W, C]`` and the model normalises it; otherwise the input is
            normalised float32 ``[N, C, H, W]``.
        batch_size: N of the input; -1 for any.
        precision: precision of weights and arithmetic; the types of inputs and outputs do not depend on it.
        version: OpenMAE version that wrote the metadata.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    stage: Stage
    model: ModelConfig
    mean: tuple[float, ...]
    std: tuple[float, ...]
    class_names: tuple[str, ...] = ()
    interpolation: Literal["bilinear", "bicubic"] = "bicubic"
    crop_pct: float = 0.875
    preprocessing: bool = False
    batch_size: int = -1
    precision: Precision = "fp32"
    checkpoint_sha256: str = ""
    version: str = __version__

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of the outputs."""
        return (LOGITS,) if self.stage == "finetune" else (FEATURES, TOKENS)

    @property
    def info(self) -> CheckpointInfo:
        """Equivalent ``openmae`` entry of a checkpoint, with the known part of its spec."""
        spec = {"dataset": {"augmentation": {"interpolation": self.interpolation}}}
        return CheckpointInfo(self.stage, self.model, self.class_names, self.mean, self.std, spec, self.version)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {"format": FORMAT, "arch": self.model.arch, **asdict(self), "model": self.model.to_dict()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ModelCard:
        """Read the values that ``to_dict`` returns.

        Raises:
            CheckpointError: the values are damaged or have another format.
        """
        if not isinstance(values, Mapping):
            raise CheckpointError("The model's metadata is not a mapping.", _AGAIN)
        version = values.get("version", "unknown")
        if values.get("format") != FORMAT:
            raise CheckpointError(
                f"The model's metadata has format {values.get('format')!r} (OpenMAE {version}); this is OpenMAE "
                f"{__version__}, which reads format {FORMAT}.",
                _AGAIN,
            )
        try:
            card = validate(cls, {name: value for name, value in values.items() if name not in ("format", "arch")})
            get_architecture(card.model.arch)
            return card
        except ValueError as error:
            raise CheckpointError(
                f"The model's metadata (of OpenMAE {version}) is damaged or of another version: {error}.", _AGAIN
            ) from error

    def to_metadata(self) -> dict[str, str]:
        """Return the ``metadata_props`` of an ONNX file, each value as JSON."""
        return {name: json.dumps(value) for name, value in self.to_dict().items()}

    @classmethod
    def from_metadata(cls, values: Mapping[str, str]) -> ModelCard | None:
        """Read the ``metadata_props`` of an ONNX file; return None if another program wrote it."""
        if "checkpoint_sha256" not in values or "format" not in values:
            return None
        try:
            own = {name: json.loads(text) for name, text in values.items() if name in _KEYS}
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"The model's metadata is damaged: {error}.", _AGAIN) from error
        return cls.from_dict(own)


_KEYS = frozenset({"format", "arch", *ModelCard.__dataclass_fields__})


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
