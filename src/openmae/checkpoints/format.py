"""The checkpoint format, its reader and its writer.

Training writes dicts that ``torch.load(weights_only=True)`` can read, so they hold only tensors and plain values::

    key              value
    openmae          CheckpointInfo.to_dict(): format, version, stage, model, class_names, mean, std, spec, and begun
                     if it is set; training adds train_images, a digest of the names of the training images
    state_dict       the model's state dict, each name prefixed with "model."
    ema_state_dict   the averaged weights under the same names; only with train.ema_decay
    optimizer        AdamW's state dict
    precision        the gradient scaler's state (fp16), otherwise empty
    progress         training.state.Progress: finished epochs, batches of the current epoch and steps, best metric

With fsdp, too, tensors are complete, not sharded. ``backbone.safetensors`` holds the backbone's state dict with timm's
names, and the ``openmae`` entry as JSON in its metadata.

``openmae.format`` is 1. It increases when an older version could misread a file; files of other formats are rejected.
Entries that are added later have defaults (``model.final_norm`` is written only if it is false).

With an encryption key, the complete file is encrypted (``storage/encryption.py``); its name and size are not hidden.
"""

from __future__ import annotations

import errno
import json
import logging
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, BinaryIO, Literal

import torch
from pydantic import FiniteFloat
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save, save_file
from torch import Tensor

from openmae._version import __version__
from openmae.checkpoints.damage import check_path, damaged, first_bytes, holds_objects
from openmae.checkpoints.foreign_names import NamedWeights, recognise
from openmae.checkpoints.shapes import check_header, count_classes, guess_config
from openmae.checkpoints.unpickling import load_plain
from openmae.errors import CheckpointError, blaming
from openmae.models.build import ModelConfig, validate
from openmae.spec.architectures import get_architecture
from openmae.storage.atomic import disk_errors, replacing
from openmae.storage.encryption import Key, created, unlocked

Stage = Literal["pretrain", "finetune"]
Content = dict[str, Any]

FORMAT = 1
_MAX_DEPTH, _MAX_VALUES = 50, 100_000  # of the spec in a header
_TRANSIENT = (errno.EACCES, errno.EIO, errno.ESTALE, errno.ENOMEM, errno.ETIMEDOUT)  # of a disk, network or machine

log = logging.getLogger("openmae")


@dataclass(frozen=True)
class CheckpointInfo:
    """The ``openmae`` entry of a checkpoint.

    Attributes:
        class_names: classes in the order of the classifier's outputs; empty for pretraining.
        mean: mean of the images per channel, on a scale of 0 to 1.
        std: standard deviation of the images per channel, on the same scale.
        spec: the resolved spec as plain values.
        begun: batch layout at the start of the run, if it has changed since; see ``training.elastic``.
    """

    stage: Stage
    model: ModelConfig
    class_names: tuple[str, ...] = ()
    mean: tuple[FiniteFloat, ...] = ()
    std: tuple[FiniteFloat, ...] = ()
    spec: Mapping[str, Any] = field(default_factory=dict)
    version: str = __version__
    begun: Mapping[str, int] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for a checkpoint."""
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
        """Read the values that :meth:`to_dict` returns.

        Raises:
            CheckpointError: The entry is damaged, or has another format.
        """
        if not isinstance(values, Mapping):
            raise CheckpointError("The 'openmae' entry is damaged: it is not a mapping.", "Use another checkpoint.")
        version = values.get("version", "unknown")
        if values.get("format") != FORMAT:
            raise CheckpointError(
                f"The checkpoint has format {values.get('format')!r} (OpenMAE {version}); this is OpenMAE "
                f"{__version__}, which reads format {FORMAT}.",
                "Install the version that wrote it, or a newer one.",
            )
        try:
            known = {item.name for item in fields(cls)}
            info = validate(cls, {name: value for name, value in values.items() if name in known})
            get_architecture(info.model.arch)
            if info.class_names and len(info.class_names) != info.model.num_classes:
                raise ValueError(f"{len(info.class_names)} class_names for {info.model.num_classes} classes")
            _check_tree(info.spec)
            return info
        except ValueError as error:
            raise CheckpointError(
                f"The 'openmae' entry (OpenMAE {version}) is damaged or of another version: {error}.",
                f"This is OpenMAE {__version__}; install the version that wrote the checkpoint.",
            ) from error


@dataclass(frozen=True)
class Checkpoint:
    """The weights in a file, on the CPU.

    Attributes:
        path: the file.
        weights: tensors under timm's and OpenMAE's names.
        info: the file's ``openmae`` entry; None if another program wrote the file.
        progress: its ``progress`` entry, not validated; None if training cannot resume from the file.
    """

    path: Path
    weights: NamedWeights
    info: CheckpointInfo | None
    progress: Any = None

    @property
    def num_classes(self) -> int:
        """Number of outputs of the classifier in the file; 0 if it has none."""
        return count_classes(self.weights.backbone)

    def own_info(self) -> CheckpointInfo:
        """Return the ``openmae`` entry.

        Raises:
            CheckpointError: Another program wrote the file.
        """
        if self.info is not None:
            return self.info
        fix = "Give it to mae train as train.pretrained_model_path first."
        if self.num_classes:
            fix = "Export it with mae export first, or give it to mae train as train.pretrained_model_path."
        raise CheckpointError(
            f"{self.path} holds weights written by another program ({self.weights.layout} layout).", fix
        )

    def config(self, arch: str | None = None) -> ModelConfig:
        """Return the model's configuration from the file's header, or else from the shapes of its tensors.

        If the shapes fit no architecture, ``arch`` is assumed.

        Raises:
            CheckpointError: The tensors fit no architecture.
        """
        if self.info is not None:
            return self.info.model
        with blaming(str(self.path)):
            return guess_config(self.weights, arch)


def read_checkpoint(path: str | Path, key: Key | None = None, weights_key: str = "") -> Checkpoint:
    """Read the weights in a .pth, .pt, .pth.tar, .ckpt or .safetensors file without executing anything in it.

    Args:
        path: the file.
        key: key of an encrypted file.
        weights_key: entry to read, such as ``model_ema``. By default, averaged weights are preferred to plain ones.

    Raises:
        CheckpointError: The file is missing, damaged, of an unknown layout, encrypted with another key, holds arbitrary
            objects or non-finite values, or its header does not match its tensors.
        OSError: The file temporarily cannot be read.
    """
    path = Path(path)
    content, header = _read_file(path, key)
    with blaming(str(path)):
        info = None if header is None else CheckpointInfo.from_dict(header)
        if info is None:
            weights = recognise(content, weights_key)
        else:
            weights = recognise(_own_weights(content, weights_key) if "openmae" in content else content)
            weights = replace(weights, layout="OpenMAE", note="")
        _check_finite({**weights.backbone, **weights.rest})
        if info is not None:
            check_header(info.model, weights)
    if weights.note:  # a warning, since the choice was made for the user
        log.warning("%s: %s.", path, weights.note)
    return Checkpoint(path, weights, info, content.get("progress") if info else None)


def read_config(path: str | Path, key: Key | None = None, weights_key: str = "") -> ModelConfig:
    """Return the configuration of the model in a file that ``read_checkpoint`` can read, without its notices.

    Raises:
        CheckpointError: The file cannot be read, or its tensors fit no architecture.
        OSError: The file temporarily cannot be read.
    """
    content, header = _read_file(Path(path), key)
    if header is not None:
        return CheckpointInfo.from_dict(header).model
    return guess_config(recognise(content, weights_key))


def read_training_state(path: Path, key: Key | None = None, *, lazily: bool = False) -> Content:
    """Read the state that training resumes from: the dict described at the top of this module.

    With ``lazily``, tensors of an unencrypted file are memory-mapped after its checksums are verified.

    Raises:
        CheckpointError: The file cannot be read, or holds weights only.
        OSError: The file temporarily cannot be read.
    """
    content, _ = _read_file(path, key, lazily=lazily)
    if not {"openmae", "progress", "optimizer"} <= content.keys():
        raise CheckpointError(
            f"{path} holds no training state, so training cannot resume from it.",
            "Give it as train.pretrained_model_path to start from its weights.",
        )
    return content


def write_checkpoint(payload: Mapping[str, Any], path: Path, key: Key | None = None) -> None:
    """Write the dict described at the top of this module, with tensors on the CPU, and flush it to disk.

    ``path`` is a temporary path: ``CheckpointFolder`` renames the file when it is complete.

    Raises:
        OSError: The disk is full or cannot be written.
        RuntimeError: The same, as torch reports it.
    """
    with created(path, key) as file:
        torch.save(dict(payload), file)


def save_backbone(path: str | Path, state: Mapping[str, Tensor], info: CheckpointInfo, key: Key | None = None) -> Path:
    """Write a backbone as a safetensors file, replacing ``path`` only when it is complete; return the path.

    ``state`` is a timm model's state dict; ``info`` is written to the metadata.

    Raises:
        RunError: The disk is full or cannot be written.
    """
    path = Path(path)
    tensors = {name: value.detach().cpu().clone(memory_format=torch.contiguous_format) for name, value in state.items()}
    metadata = {"openmae": json.dumps(info.to_dict())}
    with disk_errors(path, key="results_dir"), replacing(path) as temporary:
        if key is None:
            save_file(tensors, temporary, metadata)
        else:
            with created(temporary, key) as file:
                file.write(save(tensors, metadata))
    return path


def _read_file(path: Path, key: Key | None, *, lazily: bool = False) -> tuple[Content, Mapping[str, Any] | None]:
    """Return the content of a file, and its ``openmae`` entry if OpenMAE wrote it."""
    check_path(path)
    file = unlocked(path, key)
    if _is_safetensors(path, file):
        return _read_safetensors(path, file)
    try:
        content = load_plain(file or path, lazily=lazily and file is None)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        raise holds_objects(path, found[1]) if found else damaged(path, "PyTorch checkpoint", error) from error
    except Exception as error:  # the reader fails in many ways on files that are not checkpoints
        if isinstance(error, MemoryError | CheckpointError) or getattr(error, "errno", None) in _TRANSIENT:
            raise
        raise damaged(path, "PyTorch checkpoint", error) from error
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not a state dict.", "Save model.state_dict().")
    header = content.get("openmae")
    return dict(content), header if isinstance(header, Mapping) else None


def _is_safetensors(path: Path, file: BinaryIO | None) -> bool:
    """Recognise safetensors by the suffix, or by the first bytes: the length of a JSON object, then the object."""
    if path.suffix.lower() == ".safetensors":
        return True
    start = file.read(9) if file else first_bytes(path)[:9]
    if file:
        file.seek(0)
    return start[8:9] == b"{" and int.from_bytes(start[:8], "little") < 2**27


def _read_safetensors(path: Path, file: BinaryIO | None) -> tuple[Content, Mapping[str, Any] | None]:
    try:
        if file is not None:
            data = file.read()
            tensors, length = load(data), int.from_bytes(data[:8], "little")
            metadata = json.loads(data[8 : 8 + length]).get("__metadata__") or {}
        else:
            with safe_open(path, framework="pt") as opened:
                tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (it is no dict)
                metadata = opened.metadata() or {}
        return tensors, json.loads(metadata["openmae"]) if "openmae" in metadata else None
    except (SafetensorError, OSError, ValueError, RecursionError, AttributeError, TypeError) as error:
        raise damaged(path, "safetensors file", error) from error


def _own_weights(content: Content, weights_key: str) -> Content:
    """Select the weights of a training checkpoint: the requested ones, or else averaged ones, or else plain ones."""
    if not isinstance(content.get("state_dict"), Mapping):
        raise CheckpointError("the checkpoint holds no weights.", "Use another checkpoint.")
    held = [name for name in ("state_dict", "ema_state_dict") if isinstance(content.get(name), Mapping)]
    if weights_key and weights_key not in held:
        raise CheckpointError(f"there are no weights under {weights_key!r}.", f"It has: {', '.join(held)}.")
    chosen = {**content["state_dict"], **content[weights_key or held[-1]]}
    return {name: value for name, value in chosen.items() if str(name).startswith("model.")}


def _check_tree(values: Any) -> None:
    """Raise a ValueError if plain values are nested too deeply, or too many, to be a spec."""
    level, count = [values], 0
    for _ in range(_MAX_DEPTH):
        level = [
            child
            for node in level
            if isinstance(node, Mapping | list | tuple)
            for child in (node.values() if isinstance(node, Mapping) else node)
        ]
        count += len(level)
        if not level:
            return
        if count > _MAX_VALUES:
            raise ValueError(f"more than {_MAX_VALUES:,} values in the spec")
    raise ValueError(f"a spec of more than {_MAX_DEPTH} levels")


def _check_finite(tensors: Mapping[str, Tensor]) -> None:
    """Raise an error if weights have no values, or are not finite because the run diverged."""
    absent = next((name for name, value in tensors.items() if value.is_meta), None)
    if absent:
        raise CheckpointError(f"{absent} has a shape, but no values.", "Save the model's state dict from a device.")
    broken = [name for name, value in tensors.items() if not is_finite(value)]
    if broken:
        raise CheckpointError(
            f"{len(broken)} of {len(tensors)} tensors hold NaN or infinite values, the first is {broken[0]}.",
            "The run that wrote it has diverged: use an earlier checkpoint, or start again with a lower learning rate.",
        )


def is_finite(value: Tensor) -> bool:
    """Return whether a tensor has neither NaN nor infinite values."""
    if not value.numel() or not value.is_floating_point():
        return True
    if value.element_size() == 1:  # aminmax has no kernel for float8
        value = value.float()
    low, high = value.aminmax()  # one pass, no copy
    return bool(low.isfinite() and high.isfinite())
