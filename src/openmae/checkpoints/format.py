"""Checkpoints in and out: read safely, match by name and shape, report what matched.

Our checkpoint file is a plain dict that ``torch.load(weights_only=True)`` reads: ``"openmae"`` holds a
:class:`CheckpointInfo` as plain values, ``"state_dict"`` the tensors behind ``model.``, ``"ema_state_dict"``
their moving average where there is one, the rest is Lightning's. ``backbone.safetensors`` holds bare timm
names, and the same plain values as JSON in its header. Other people's layouts: ``models.layouts``.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import save, save_file
from torch import Tensor, nn

from openmae._version import __version__
from openmae.checkpoints.data_config import describe
from openmae.checkpoints.files import check_file, read_content
from openmae.checkpoints.foreign_names import NamedWeights, recognise
from openmae.checkpoints.matching import LoadReport, complain, match
from openmae.checkpoints.shapes import check_header, count_classes, guess_config
from openmae.errors import CheckpointError, RunError, SpecError
from openmae.models.build import ModelConfig, build_classifier, build_feature_extractor
from openmae.storage.atomic import replacing
from openmae.storage.encryption import Key, created, resolve_key, unlocked

Stage = Literal["pretrain", "finetune"]
FORMAT = 1
_DEEPEST, _LARGEST = 50, 100_000  # levels and values of the spec in a header

log = logging.getLogger("openmae")


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

    def check(self) -> None:
        """Raise a ValueError where a field is not what it is meant to be."""
        if self.stage not in ("pretrain", "finetune"):
            raise ValueError(f"stage is {self.stage!r}")
        if not all(isinstance(name, str) for name in self.class_names):
            raise ValueError("class_names are not all text")
        if self.class_names and len(self.class_names) != self.model.num_classes:
            raise ValueError(f"{len(self.class_names)} class_names for {self.model.num_classes} classes")
        for name, numbers in (("mean", self.mean), ("std", self.std)):
            if not all(isinstance(number, int | float) and math.isfinite(number) for number in numbers):
                raise ValueError(f"{name} is {numbers!r}")
        _check_tree(self.spec)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> CheckpointInfo:
        """The inverse of :meth:`to_dict`.

        Raises:
            CheckpointError: the entry is damaged, or a newer OpenMAE wrote it.
        """
        if not isinstance(values, Mapping):
            raise CheckpointError("The 'openmae' entry is damaged: it is no mapping.", "Use another checkpoint.")
        version = values.get("version", "unknown")
        if values.get("format") != FORMAT:
            raise CheckpointError(
                f"The checkpoint has format {values.get('format')!r} (OpenMAE {version}); this is OpenMAE "
                f"{__version__}, which reads format {FORMAT}.",
                "Install the OpenMAE that wrote it, or a newer one.",
            )
        try:
            info = cls(
                stage=values["stage"],
                model=ModelConfig.from_dict(values["model"]),
                class_names=tuple(values["class_names"]),
                mean=tuple(values["mean"]),
                std=tuple(values["std"]),
                spec=values.get("spec", {}),
                begun=values.get("begun", {}),
                version=version,
            )
            info.check()
            return info
        except (KeyError, TypeError, ValueError, RecursionError) as error:
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
        return count_classes(self.weights.backbone)


def read_checkpoint(path: str | Path, key: Key | None = None, weights_key: str = "") -> Checkpoint:
    """Read a .pth, .pt, .pth.tar, .ckpt or .safetensors file; nothing in it is ever executed.

    An averaged (EMA) copy, where there is one, is read in place of the plain weights, unless ``weights_key`` names
    another entry. ``key`` opens an encrypted file.

    Raises:
        CheckpointError: missing, empty, truncated, foreign, holding classes or numbers that are not finite, saying of
            itself what its tensors do not confirm, or encrypted and not to be opened; the text says which.
    """
    path = Path(path)
    check_file(path)
    raw, header = read_content(path, unlocked(path, key), weights_key)
    try:
        info = None if header is None else CheckpointInfo.from_dict(header)
        weights = recognise(raw, "" if info else weights_key)
        _check_finite({**weights.backbone, **weights.rest})
        if info is not None:
            check_header(info.model, weights)
            weights = replace(weights, layout="OpenMAE", note="")
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error.problem}", error.fix) from error
    if weights.note:  # a choice was made for the user, who may not see less than warnings
        log.warning("%s: %s.", path, weights.note)
    return Checkpoint(path, weights, info)


def _check_tree(values: Any) -> None:
    """Raise a ValueError where plain values are nested or repeated beyond what a spec can be."""
    level, count = [values], 0
    for _ in range(_DEEPEST):
        level = [
            child
            for node in level
            if isinstance(node, Mapping | list | tuple)
            for child in (node.values() if isinstance(node, Mapping) else node)
        ]
        count += len(level)
        if not level:
            return
        if count > _LARGEST:
            raise ValueError(f"more than {_LARGEST:,} values in the spec")
    raise ValueError(f"a spec of more than {_DEEPEST} levels")


def _check_finite(tensors: Mapping[str, Tensor]) -> None:
    """Refuse weights that a diverged training has left: every output of such a model would be NaN."""
    absent = next((name for name, value in tensors.items() if value.is_meta), None)
    if absent:
        raise CheckpointError(f"{absent} has a shape, but no values.", "Save the model's state dict from a device.")
    broken = [name for name, value in tensors.items() if not _is_finite(value)]
    if broken:
        raise CheckpointError(
            f"{len(broken)} of {len(tensors)} tensors hold NaN or infinite numbers, the first is {broken[0]}.",
            "The training that wrote it has diverged: use a checkpoint from before that, or start again with a lower "
            "learning rate.",
        )


def _is_finite(value: Tensor) -> bool:
    if not value.numel() or not value.is_floating_point():
        return True
    if value.element_size() == 1:  # aminmax has no kernel for float8
        value = value.float()
    low, high = value.aminmax()  # one pass, and no copy
    return bool(low.isfinite() and high.isfinite())


def read_own(path: str | Path, key: Key | None = None) -> tuple[Checkpoint, CheckpointInfo]:
    """A checkpoint that OpenMAE wrote, and what it says about itself.

    Raises:
        CheckpointError: as ``read_checkpoint``, or another program wrote the file.
    """
    checkpoint = read_checkpoint(path, key)
    if checkpoint.info is None:
        raise refuse_foreign(checkpoint)
    return checkpoint, checkpoint.info


def refuse_foreign(checkpoint: Checkpoint) -> CheckpointError:
    """The error for a file of another program where only OpenMAE's own will do."""
    if checkpoint.num_classes:
        fix = "Export it with mae export first, or give it to mae train as train.pretrained_model_path."
    else:
        fix = "Give it to mae train as train.pretrained_model_path first."
    return CheckpointError(
        f"{checkpoint.path} holds weights of another program ({checkpoint.weights.layout} layout).", fix
    )


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
    weights_key: str = "",
) -> nn.Module:
    """A timm model in eval mode with a checkpoint's weights.

    A pretrained checkpoint gives embeddings ``[B, D]``, a fine-tuned one its class logits. ``timm.data``'s
    ``resolve_model_data_config(model)`` gives the images' size, mean, standard deviation and resizing that belong to
    it; another program's file does not say them, and gets those that the papers use.

    Args:
        checkpoint: our checkpoint or ``backbone.safetensors``, or a timm, official, transformers or TAO file.
        input_size: pixels of a side, or (height, width); None keeps the checkpoint's.
        arch: a name of the architecture table; only needed where a foreign file's shapes fit none.
        encryption_key: of an encrypted file: ``env:NAME``, ``file:PATH``, or the key itself.
        weights_key: the entry of the file to take, such as ``model_ema``, where there are several.

    Raises:
        CheckpointError: the file cannot be used, ``arch`` is not what it holds, or the model would be another function.
        SpecError: ``input_size`` does not divide into patches or mask units, or there is no key where it should be.
    """
    loaded = read_checkpoint(checkpoint, resolve_key(encryption_key), weights_key)
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
    model: Any = build(replace(config, num_classes=loaded.num_classes))
    report = load_into(model, loaded, part="everything" if loaded.info else "backbone")
    untrained = [name for name in report.fresh if name != "head" or loaded.weights.family != "convnextv2"]
    if untrained:
        raise CheckpointError(
            f"{loaded.path} lacks {', '.join(untrained)}: {config.arch} would give other outputs than the model that "
            "wrote it.",
            "Use a complete checkpoint; mae train takes this one as train.pretrained_model_path.",
        )
    describe(model, config, loaded.info)
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


def _guess_config(loaded: Checkpoint, arch: str | None) -> ModelConfig:
    try:
        return guess_config(loaded.weights, arch)
    except CheckpointError as error:
        raise CheckpointError(f"{loaded.path}: {error.problem}", error.fix) from error


def check_size(config: ModelConfig) -> None:
    """timm's ConvNeXt takes any size; ViT whole patches, Hiera whole mask units."""
    if config.architecture.family == "convnextv2" or not any(side % config.unit for side in config.input_size):
        return
    height, width = (max(1, round(side / config.unit)) * config.unit for side in config.input_size)
    raise SpecError(
        f"input_size: {config.input_size} does not divide into {config.arch}'s units of {config.unit} px.",
        f"Use ({height}, {width}).",
    )
