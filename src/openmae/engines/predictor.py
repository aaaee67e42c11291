"""Predictors: one interface to models in torch, ONNX Runtime and TensorRT."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal, Protocol

import torch
from torch import Tensor

from openmae.checkpoints.format import CheckpointInfo, read_checkpoint
from openmae.data.transforms import crop_pct
from openmae.engines.batching import as_input, device_name, run_split
from openmae.engines.metadata import INPUT, ONNX_SUFFIXES, ModelCard, file_sha256
from openmae.engines.module import DeployedModel, build_deployed
from openmae.engines.tensorrt.runtime import ENGINE_SUFFIXES, TensorRTPredictor
from openmae.engines.tensorrt.sidecar import read_sidecar, sidecar_path
from openmae.errors import SpecError
from openmae.models.normalise import Normaliser
from openmae.storage.encryption import Key, resolve_key


class Predictor(Protocol):
    """A model that is ready to run.

    Attributes:
        device: device of the outputs, and preferably of the images.
        runtime: readable name of runtime and device, such as ``torch 2.14.1, CPU``.
    """

    card: ModelCard
    device: torch.device
    runtime: str

    def __call__(self, images_BCHW: Tensor) -> dict[str, Tensor]:
        """Return the outputs by name, float32, for any number of images.

        Images are normalised here, and batches are split and padded to sizes that the model accepts. If the model takes
        uint8, float images are rounded.

        Args:
            images_BCHW: uint8, or float32 in 0..255, of the card's size, as ``read_images`` returns them.
        """
        ...


class TorchPredictor:
    """A checkpoint's model in torch; the model is built without preprocessing, since images are normalised here."""

    def __init__(self, model: DeployedModel, card: ModelCard, device: torch.device) -> None:
        assert not model.card.preprocessing
        self.card, self.device = card, device
        self.runtime = f"torch {torch.__version__}, {device_name(device)}"
        self._model = model.to(device)
        self._normalise = Normaliser(card.mean, card.std)

    @torch.inference_mode()
    def __call__(self, images_BCHW: Tensor) -> dict[str, Tensor]:
        """See ``Predictor``."""
        outputs = self._model(self._normalise(images_BCHW.to(self.device)))
        return dict(zip(self.card.outputs, outputs, strict=True))


class OnnxPredictor:
    """An ONNX file that ``mae export`` wrote, in ONNX Runtime.

    Outputs are on ``device``, but the model runs on a GPU only if onnxruntime-gpu is installed, else on the CPU.

    Raises:
        CheckpointError: the file cannot be used, or another program wrote it.
        UserError: onnx or onnxruntime is not installed.
    """

    def __init__(self, path: Path, device: torch.device, key: Key | None = None) -> None:
        from openmae.engines.onnx import read_onnx_card
        from openmae.engines.packages import onnxruntime
        from openmae.engines.session import open_session

        self.card = read_onnx_card(path, key)
        self.device = device
        self._session = open_session(path, device, key)
        where = "CUDA" if "CUDAExecutionProvider" in self._session.get_providers() else "CPU"
        self.runtime = f"ONNX Runtime {onnxruntime.__version__}, {where}"

    def __call__(self, images_BCHW: Tensor) -> dict[str, Tensor]:
        """See ``Predictor``."""
        images = as_input(images_BCHW.cpu(), self.card)
        fixed = self.card.batch_size
        return self._run(images) if fixed == -1 else run_split(self._run, images, fixed, fixed)

    def _run(self, images: Tensor) -> dict[str, Tensor]:
        found = self._session.run(list(self.card.outputs), {INPUT: images.numpy()})
        return {
            name: torch.from_numpy(array).to(self.device) for name, array in zip(self.card.outputs, found, strict=True)
        }


def open_predictor(
    path: str | Path, device: torch.device | str = "cpu", encryption_key: str | Key | None = None
) -> Predictor:
    """Open a checkpoint, an ONNX file or a TensorRT engine; see ``exported_kind``.

    A pretrained checkpoint returns embeddings, a fine-tuned one logits. ``encryption_key`` is the key of an encrypted
    file: ``env:NAME``, ``file:PATH``, or the key itself.

    Raises:
        CheckpointError: the file cannot be used.
        SpecError: a GPU, TensorRT or the key is missing.
        UserError: onnx or onnxruntime is not installed.
    """
    path, device, key = Path(path), torch.device(device), resolve_key(encryption_key)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SpecError(f"{path.name} cannot run on {device}: no CUDA GPU was found.", "Use the device cpu.")
    kind = exported_kind(path)
    if kind == "onnx":
        return OnnxPredictor(path, device, key)
    if kind == "engine":
        return TensorRTPredictor(path, device, key)
    checkpoint = read_checkpoint(path, key)
    card = card_of(checkpoint.own_info(), path)
    return TorchPredictor(build_deployed(checkpoint, card), card, device)


def card_of(info: CheckpointInfo, path: Path) -> ModelCard:
    """Return the metadata of a checkpoint's model."""
    model = info.model if info.stage == "finetune" else replace(info.model, num_classes=0)
    return ModelCard(
        stage=info.stage,
        model=model,
        mean=info.mean,
        std=info.std,
        class_names=info.class_names,
        crop_pct=crop_pct(model.input_size),
        checkpoint_sha256=file_sha256(path),
        version=info.version,
    )


def read_exported_card(path: Path, key: Key | None = None) -> ModelCard:
    """Return the metadata of an ONNX file or a TensorRT engine; no session or GPU is needed.

    Raises:
        CheckpointError: the file cannot be read, or another program wrote it.
    """
    if exported_kind(path) != "onnx":
        return read_sidecar(path)[0]
    from openmae.engines.onnx import read_onnx_card

    return read_onnx_card(path, key)


def exported_kind(path: Path) -> Literal["onnx", "engine"] | None:
    """Return the kind of an exported file by its suffix; None for a checkpoint.

    NVIDIA's SDK names an output file after its spec key, such as ``export_onnx_file``. Without a suffix, an engine is
    recognised by its sidecar, and an ONNX file by the first byte of its protobuf message.
    """
    suffix = path.suffix.lower()
    if suffix in ENGINE_SUFFIXES or (not suffix and sidecar_path(path).is_file()):
        return "engine"
    if suffix in ONNX_SUFFIXES:
        return "onnx"
    if suffix or not path.is_file():
        return None
    with path.open("rb") as file:
        return "onnx" if file.read(1) == b"\x08" else None
