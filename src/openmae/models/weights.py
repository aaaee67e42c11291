"""Checkpoints in and out: read safely, match by name and shape, report what matched.

Our checkpoint file is a plain dict that ``torch.load(weights_only=True)`` reads: ``"openmae"`` holds a
:class:`CheckpointInfo` as plain values, ``"state_dict"`` the tensors behind ``model.``, ``"ema_state_dict"``
their moving average where there is one, the rest is Lightning's. ``backbone.safetensors`` holds bare timm
names, and the same plain values as JSON in its header. Other people's layouts: ``models.layouts``.
"""

from __future__ import annotations

import argparse
import json
import math
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save, save_file
from torch import Tensor, nn

from openmae import __version__
from openmae.errors import CheckpointError, RunError, SpecError
from openmae.inputs import irregular
from openmae.models.build import ModelConfig, build_classifier, build_feature_extractor
from openmae.models.layouts import NamedWeights, recognise
from openmae.models.matching import LoadReport, complain, likely_arch, match
from openmae.results.files import replacing
from openmae.spec.architectures import get_architecture
from openmae.storage.encryption import Key, created, resolve_key, unlocked

Stage = Literal["pretrain", "finetune"]
FORMAT = 1
BACKBONE = "backbone.safetensors"  # in a results folder
_SUFFIXES = (".pth", ".pt", ".tar", ".ckpt", ".safetensors")
_HIERA_STRIDE = 4  # px of a token


@dataclass(frozen=True)
class CheckpointInfo:
    """What our checkpoints say about themselves.

    Attributes:
        stage: pretrain or finetune.
        model: everything that fixes the model's shape.
        class_names: of the classifier, in the order of its outputs; empty for pretraining.
        mean, std: of the images, per channel, on the scale of 0 to 1.
        spec: the resolved spec as plain values.
        version: of the OpenMAE that wrote the file.
        begun: how an update's images were shared out when the run began, where that has changed since; see
            ``training.elastic``.
    """

    stage: Stage
    model: ModelConfig
    class_names: tuple[str, ...] = ()
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    spec: Mapping[str, Any] = field(default_factory=dict)
    version: str = __version__
    begun: Mapping[str, int] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain values: the ``"openmae"`` entry of a checkpoint."""
        return {
            "format": FORMAT,
            "version": self.version,
            "stage": self.stage,
            "model": self.model.to_dict(),
            "class_names": list(self.class_names),
            "mean": list(self.mean),
            "std": list(self.std),
            "spec": dict(self.spec),
            **({"begun": dict(self.begun)} if self.begun else {}),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> CheckpointInfo:
        """The inverse of :meth:`to_dict`.

        Raises:
            CheckpointError: the entry is damaged, or a newer OpenMAE wrote it.
        """
        version = values.get("version", "unknown")
        if values.get("format") != FORMAT:
            raise CheckpointError(
                f"The checkpoint has format {values.get('format')!r} (OpenMAE {version}); this is OpenMAE "
                f"{__version__}, which reads format {FORMAT}.",
                "Install the OpenMAE that wrote it, or a newer one.",
            )
        try:
            return cls(
                stage=values["stage"],
                model=ModelConfig.from_dict(values["model"]),
                class_names=tuple(values["class_names"]),
                mean=tuple(values["mean"]),
                std=tuple(values["std"]),
                spec=values.get("spec", {}),
                begun=values.get("begun", {}),
                version=version,
            )
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"The 'openmae' entry (of OpenMAE {version}) is damaged or of another version: {error!r}.",
                f"This is OpenMAE {__version__}; install the one that wrote the checkpoint.",
            ) from error


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint in memory, on the CPU.

    Attributes:
        path: the file.
        weights: tensors under timm's and our names, and the layout they came in.
        info: what the file says about itself; None for other people's.
    """

    path: Path
    weights: NamedWeights
    info: CheckpointInfo | None

    @property
    def num_classes(self) -> int:
        """Outputs of the classifier that the file holds; 0 for none."""
        head = self.weights.backbone.get("head.fc.weight", self.weights.backbone.get("head.weight"))
        return 0 if head is None else head.shape[0]


def read_checkpoint(path: str | Path, key: Key | None = None) -> Checkpoint:
    """Read a .pth, .pt, .pth.tar, .ckpt or .safetensors file; no class in it is ever executed.

    An averaged (EMA) copy, where there is one, is read in place of the plain weights. ``key`` opens an encrypted file.

    Raises:
        CheckpointError: missing, empty, truncated, foreign, holding classes, or encrypted and not to be opened; the
            text says which.
    """
    path = Path(path)
    _check_file(path)
    file = unlocked(path, key)
    raw, header = _read_safetensors(path, file) if path.suffix == ".safetensors" else _read_pickle(path, file)
    try:
        info = None if header is None else CheckpointInfo.from_dict(header)
        weights = recognise(raw)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error.problem}", error.fix) from error
    if info is not None:
        weights = replace(weights, layout="OpenMAE")
    return Checkpoint(path, weights, info)


def read_own(path: str | Path, key: Key | None = None) -> tuple[Checkpoint, CheckpointInfo]:
    """A checkpoint that OpenMAE wrote, and what it says about itself.

    Raises:
        CheckpointError: as ``read_checkpoint``, or another program wrote the file.
    """
    checkpoint = read_checkpoint(path, key)
    if checkpoint.info is None:
        raise CheckpointError(
            f"{path} holds weights of another program ({checkpoint.weights.layout} layout).",
            "Give it to mae train as train.pretrained_model_path first.",
        )
    return checkpoint, checkpoint.info


def load_into(
    model: nn.Module,
    checkpoint: Checkpoint,
    *,
    part: Literal["backbone", "everything"],
    allow_partial: bool = False,
) -> LoadReport:
    """Copy a checkpoint's weights into a masked autoencoder or a timm model.

    Position embeddings are resampled to the model's grid, the first convolution to its channels and patch.

    Args:
        model: what ``models.build`` gives.
        part: "backbone" asks for 95 % of the backbone, and takes a fitting classifier, decoder and fusion
            heads along; "everything" asks for all of the model, as evaluation does.
        allow_partial: train what is missing afresh, instead of an error; another family's file stays one.

    Raises:
        CheckpointError: too little matched; the text gives share, names, shapes and the likely architecture.
    """
    source = checkpoint.info.model if checkpoint.info else None
    report, fitted = match(model, checkpoint.weights, source, everything=part == "everything")
    if report.sufficient or (allow_partial and report.partial):
        model.load_state_dict(fitted, strict=False)
        return report
    raise CheckpointError(*complain(report, checkpoint.weights, source, checkpoint.path))


def load_backbone(
    checkpoint: str | Path,
    input_size: int | tuple[int, int] | None = None,
    arch: str | None = None,
    *,
    encryption_key: str = "",
) -> nn.Module:
    """A timm model in eval mode with a checkpoint's weights.

    A pretrained checkpoint gives embeddings ``[B, D]``, a fine-tuned one its class logits.

    Args:
        checkpoint: our checkpoint or ``backbone.safetensors``, or a timm, official or TAO file.
        input_size: pixels of a side, or (height, width); None keeps the checkpoint's.
        arch: a name of the architecture table; only needed where a foreign file's shapes fit none.
        encryption_key: of an encrypted file: ``env:NAME``, ``file:PATH``, or the key itself.

    Raises:
        CheckpointError: the file cannot be used, or ``arch`` is not what it holds.
        SpecError: ``input_size`` does not divide into patches or mask units, or there is no key where it should be.
    """
    loaded = read_checkpoint(checkpoint, resolve_key(encryption_key))
    config = loaded.info.model if loaded.info else _guess_config(loaded, arch)
    if arch is not None and arch != config.arch:
        raise CheckpointError(
            f"{loaded.path} holds {config.arch}, not {arch}.", f"Use arch={config.arch!r}, or leave arch out."
        )
    if input_size is not None:
        size = (input_size, input_size) if isinstance(input_size, int) else input_size
        config = replace(config, input_size=size)
    check_size(config)
    finetuned = loaded.info.stage == "finetune" if loaded.info else loaded.num_classes > 0
    build = build_classifier if finetuned or "fc_norm.weight" in loaded.weights.backbone else build_feature_extractor
    model = build(replace(config, num_classes=loaded.num_classes))
    load_into(model, loaded, part="everything" if loaded.info else "backbone")
    return model.eval()


def save_backbone(path: str | Path, state: Mapping[str, Tensor], info: CheckpointInfo, key: Key | None = None) -> Path:
    """Write bare timm names as safetensors, to a temporary name that is then renamed.

    Args:
        path: the file, usually ``backbone.safetensors``; a file already there survives a failure.
        state: a timm model's state dict.
        info: goes into the header as JSON.
        key: encrypts the file.

    Raises:
        RunError: the disk is full, or the folder cannot be written.
    """
    path = Path(path)
    tensors = {name: value.detach().cpu().clone(memory_format=torch.contiguous_format) for name, value in state.items()}
    metadata = {"openmae": json.dumps(info.to_dict())}
    try:
        with replacing(path) as temporary:
            if key is None:
                save_file(tensors, temporary, metadata)
            else:
                with created(temporary, key) as file:
                    file.write(save(tensors, metadata))
    except (OSError, SafetensorError) as error:
        raise RunError(f"Cannot write {path}: {error}.", "Free disk space or choose another results_dir.") from error
    return path


def _check_file(path: Path) -> None:
    if path.suffix.lower() == ".onnx":
        raise CheckpointError(f"{path} is an ONNX file, not a checkpoint.", "Give the .pth file it was exported from.")
    if not path.exists():
        raise CheckpointError(
            f"No checkpoint at {path}.", "Check the path; relative paths start at the working folder."
        )
    if kind := irregular(path):
        raise CheckpointError(f"{path} is {kind}, not a checkpoint.", "Name a regular file.")
    if path.is_dir():
        if path.suffix == ".shards":
            raise CheckpointError(
                f"{path} is a checkpoint in parts, which training alone reads.",
                f"Join it: mae checkpoint consolidate {path}",
            )
        inside = sorted(file.name for file in path.iterdir() if file.suffix in _SUFFIXES)
        fix = f"Name one of its files: {', '.join(inside[:3])}." if inside else "Name a file; it holds no checkpoint."
        raise CheckpointError(f"{path} is a folder, not a checkpoint.", fix)
    if path.stat().st_size == 0:
        raise CheckpointError(f"{path} is empty (0 bytes).", "Copy it again, or use an earlier checkpoint.")


def _read_safetensors(path: Path, decrypted: BinaryIO | None) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """(tensors, our header or None)."""
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
    except (SafetensorError, OSError, ValueError) as error:
        raise _damaged(path, "safetensors file", error) from error


def _read_pickle(path: Path, decrypted: BinaryIO | None) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """(what the file holds, our header or None); official files keep their arguments in a Namespace."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            raw = torch.load(decrypted or path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        if found is None:
            raise _damaged(path, "PyTorch checkpoint", error) from error
        raise CheckpointError(
            f"{path} holds {found[1]} besides weights; it was not loaded, since such objects can run code.",
            "If you trust its source, save its state dict alone: torch.save({'state_dict': ...}, path).",
        ) from error
    except Exception as error:  # foreign bytes break the reader in every way there is
        raise _damaged(path, "PyTorch checkpoint", error) from error
    if not isinstance(raw, Mapping):
        raise CheckpointError(f"{path} holds a {type(raw).__name__}, not a state dict.", "Save model.state_dict().")
    header = raw.get("openmae")
    if not isinstance(header, Mapping):
        return dict(raw), None
    if not isinstance(raw.get("state_dict"), Mapping):
        raise CheckpointError(f"{path} is a checkpoint of OpenMAE without its weights.", "Use another checkpoint.")
    averaged = raw.get("ema_state_dict") or {}
    named = {**raw["state_dict"], **averaged}
    return {name: value for name, value in named.items() if name.startswith("model.")}, dict(header)


def _damaged(path: Path, kind: str, error: Exception) -> CheckpointError:
    """The file's beginning tells a cut-off download from something else."""
    with path.open("rb") as file:
        start = file.read(24)
    if start.startswith(b"PK\x03\x04"):
        reason = f"is cut off or damaged ({path.stat().st_size} bytes)"
    elif start.isascii() and (text := start.decode("ascii").strip().split("\n")[0]).isprintable() and text:
        reason = f"is no {kind}; it begins with the text {text!r}"
    else:
        # torch would have it read in spite of all: "weights_only=False will likely succeed"
        said = type(error).__name__ if "weights_only" in str(error) else (str(error) or type(error).__name__)
        reason = f"is no {kind}, or damaged ({said.splitlines()[0]})"
    return CheckpointError(f"{path} {reason}.", "Copy or download it again, or use another checkpoint.")


def _guess_config(loaded: Checkpoint, arch: str | None) -> ModelConfig:
    """The model that another's file holds, from the shapes of its tensors."""
    weights = loaded.weights
    arch = arch or likely_arch(weights)
    if arch is None:
        raise CheckpointError(
            f"{loaded.path}: the weights ({weights.layout} layout) fit no architecture of the table.",
            "Name the nearest: load_backbone(path, arch=...).",
        )
    row = get_architecture(arch)
    if weights.family == "convnextv2":
        return ModelConfig(arch, in_chans=weights.backbone["stem.0.weight"].shape[1])
    kernel = weights.backbone["patch_embed.proj.weight"]
    is_vit = weights.family == "vit"
    stride = kernel.shape[-1] if is_vit else _HIERA_STRIDE
    positions = weights.backbone.get("pos_embed")
    side = 224 if positions is None else math.isqrt(positions.shape[1] - is_vit) * stride
    return ModelConfig(
        arch,
        input_size=(side, side),
        in_chans=kernel.shape[1],
        patch_size=stride if is_vit and row.family == "vit" and stride != row.mask_unit else None,
        global_pool="fc_norm.weight" in weights.backbone,
    )


def check_size(config: ModelConfig) -> None:
    """timm's ConvNeXt takes any size; ViT whole patches, Hiera whole mask units."""
    if config.architecture.family == "convnextv2" or not any(side % config.unit for side in config.input_size):
        return
    height, width = (max(1, round(side / config.unit)) * config.unit for side in config.input_size)
    raise SpecError(
        f"input_size: {config.input_size} does not divide into {config.arch}'s units of {config.unit} px.",
        f"Use ({height}, {width}).",
    )
