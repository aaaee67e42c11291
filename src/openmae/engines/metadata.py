"""What a deployed model says about itself, in an ONNX file's metadata and beside an engine."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from openmae._version import __version__
from openmae.checkpoints.format import CheckpointInfo, Stage
from openmae.errors import CheckpointError
from openmae.models.build import ModelConfig

FORMAT = 1
INPUT = "input"  # the name of the one input
LOGITS, FEATURES, TOKENS = "logits", "features", "tokens"  # of the outputs
Precision = Literal["fp32", "fp16", "bf16", "int8"]


@dataclass(frozen=True)
class ModelCard:
    """Everything that a later action, or another program, needs to use an exported model.

    Attributes:
        stage: finetune (the output is ``logits`` ``[N, K]``) or pretrain (``features`` ``[N, D]``, the pooled
            embedding, and ``tokens`` ``[N, D, rows, columns]``, the last feature map).
        model: shape of the model: architecture, input size, channels.
        class_names: of the classifier, in the order of its outputs; empty for pretraining.
        mean, std: of the images, per channel, on the scale of 0 to 1.
        interpolation: of the resizing that comes before the model.
        crop_pct: share of the image's sides, after cutting to the input's aspect ratio, that is kept at the centre and
            then resized.
        preprocessing: the input is uint8 ``[N, H, W, C]`` and normalised inside; else float32 ``[N, C, H, W]``,
            normalised before.
        batch_size: N of the input; -1 for any.
        precision: of weights and arithmetic; inputs and outputs stay as they are in fp32.
        checkpoint_sha256: of the checkpoint's file.
        version: of the OpenMAE that wrote it.
    """

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
        """As a checkpoint would put it, without a spec."""
        spec = {"dataset": {"augmentation": {"interpolation": self.interpolation}}}
        return CheckpointInfo(self.stage, self.model, self.class_names, self.mean, self.std, spec, self.version)

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {"format": FORMAT, "arch": self.model.arch, **asdict(self), "model": self.model.to_dict()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ModelCard:
        """The inverse of :meth:`to_dict`.

        Raises:
            CheckpointError: the values are damaged, or a newer OpenMAE wrote them.
        """
        if not isinstance(values, Mapping):
            raise CheckpointError("The model's metadata is no mapping.", "Export the model again with mae export.")
        version = values.get("version", "unknown")
        if values.get("format") != FORMAT:
            raise CheckpointError(
                f"The model's metadata has format {values.get('format')!r} (OpenMAE {version}); this is OpenMAE "
                f"{__version__}, which reads format {FORMAT}.",
                "Export the model again with mae export.",
            )
        kept = {name: value for name, value in values.items() if name not in ("format", "arch", "model")}
        try:
            lists: dict[str, Any] = {name: tuple(kept.pop(name)) for name in ("mean", "std", "class_names")}
            return cls(model=ModelConfig.from_dict(values["model"]), **lists, **kept)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(
                f"The model's metadata (of OpenMAE {version}) is damaged or of another version: {error!r}.",
                "Export the model again with mae export.",
            ) from error

    def to_metadata(self) -> dict[str, str]:
        """For ``metadata_props`` of an ONNX file: a key a value, each as JSON."""
        return {name: json.dumps(value) for name, value in self.to_dict().items()}

    @classmethod
    def from_metadata(cls, values: Mapping[str, str]) -> ModelCard | None:
        """The inverse of :meth:`to_metadata`; None where another program wrote the file."""
        if "checkpoint_sha256" not in values or "format" not in values:
            return None
        try:
            return cls.from_dict({name: json.loads(text) for name, text in values.items() if name in _KEYS})
        except (ValueError, RecursionError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(
                f"The model's metadata is damaged: {error}.", "Export the model again with mae export."
            ) from error


_KEYS = frozenset({"format", "arch", *ModelCard.__dataclass_fields__})


def file_sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
