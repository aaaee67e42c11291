"""The public functions of ``openmae``. Heavy packages are imported when a function is called."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from openmae.storage import layout

if TYPE_CHECKING:
    from openmae.models.mae import MaskedAutoencoder
    from openmae.spec.architectures import Family
    from openmae.spec.schema import ExperimentSpec

    Spec = str | Path | Mapping[str, Any] | ExperimentSpec


@dataclass(frozen=True, eq=False)
class TrainResult(Mapping[str, float]):
    """Metrics and files of a training run, usable as a mapping of the metrics: ``result["train_loss"]``.

    Attributes:
        folder: the results folder, ``<results_dir>/train``; a URL if ``results_dir`` is one.
        arch: the architecture.
        metrics: metrics of the last epoch: ``train_loss``, and ``val_loss`` if there are validation images. These also
            give ``ACC_all`` and ``ACC_top5`` (finetune), or ``knn_acc`` and ``probe_acc`` (pretrain, if the images have
            classes). Accuracies are in [0, 1].

    Example:
        >>> result = TrainResult("runs/digits/train", "vit_tiny_patch16", {"train_loss": 0.5})
        >>> result["train_loss"], result.backbone
        (0.5, 'runs/digits/train/backbone.safetensors')
    """

    folder: str
    arch: str
    metrics: Mapping[str, float]

    @property
    def backbone(self) -> str:
        """The backbone with timm's parameter names, written after the last epoch."""
        return f"{self.folder}/{layout.BACKBONE}"

    @property
    def best_checkpoint(self) -> str:
        """The checkpoint with the best monitored metric."""
        return f"{self.folder}/{layout.BEST}"

    @property
    def last_checkpoint(self) -> str:
        """The newest checkpoint."""
        return f"{self.folder}/{layout.latest_name(self.arch)}"

    @property
    def report(self) -> str:
        """The HTML report."""
        return f"{self.folder}/{layout.REPORT}"

    def __getitem__(self, name: str) -> float:
        return self.metrics[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.metrics)

    def __len__(self) -> int:
        return len(self.metrics)


def train(spec: Spec, overrides: Sequence[str] = (), *, restart: bool = False) -> TrainResult:
    """Pretrain or fine-tune, like ``mae train``.

    Writes checkpoints, ``backbone.safetensors``, ``metrics.csv`` and ``report.html`` to ``<results_dir>/train``. A call
    with the same results_dir resumes from the newest checkpoint, or does nothing if all epochs are trained.

    Args:
        spec: a YAML file, nested values such as ``{"train": {"num_epochs": 3}}``, or an ``ExperimentSpec``.
        overrides: config options as ``key=value``, such as ``"train.optim.lr=1e-4"``; the value is YAML.
        restart: begin a new run; an earlier one in the results folder is kept under a dated name.

    Raises:
        UserError: the spec, the data or a checkpoint cannot be used; nothing was trained. Also a ``ValueError``.
        RunError: training failed (full disk, loss that is not finite); the checkpoints are intact.
        KeyboardInterrupt: Ctrl-C; a checkpoint was written.

    Example:
        >>> result = openmae.train("spec.yaml", ["train.num_epochs=100"])
    """
    result: TrainResult = _run("train", spec, overrides, restart=restart)
    return result


def pretrain(
    images: str | Path,
    results_dir: str | Path,
    *,
    arch: str | None = None,
    image_size: int | tuple[int, int] | None = None,
    num_epochs: int | None = None,
    batch_size: int | None = None,
    learning_rate: float | None = None,
    weights: str | Path | None = None,
    val_images: str | Path | None = None,
    options: Mapping[str, Any] | None = None,
    restart: bool = False,
) -> TrainResult:
    """Pretrain a backbone on unlabelled images. An argument that is None keeps the default of its config option.

    Args:
        images: a folder, an archive or shards, as a path or a URL.
        results_dir: the run writes to ``<results_dir>/train``, and resumes from there if it was interrupted.
        arch: one of ``list_architectures()``.
        image_size: pixels of a side, or (height, width).
        num_epochs: passes over the images.
        batch_size: images per process and step.
        learning_rate: peak learning rate of the schedule.
        weights: a checkpoint to start from.
        val_images: images for the validation loss; with class folders also for kNN and linear-probe accuracy.
        options: further config options by dotted key, such as ``{"train.precision": "bf16"}``.
        restart: begin a new run; an earlier one is kept under a dated name.

    Raises:
        UserError, RunError, KeyboardInterrupt: see ``train``.

    Example:
        >>> result = openmae.pretrain("photos", "runs/photos", arch="convnextv2_atto", num_epochs=100)
    """
    return _train("pretrain", locals())


def finetune(
    images: str | Path,
    results_dir: str | Path,
    *,
    weights: str | Path | None = None,
    val_images: str | Path | None = None,
    arch: str | None = None,
    image_size: int | tuple[int, int] | None = None,
    num_epochs: int | None = None,
    batch_size: int | None = None,
    learning_rate: float | None = None,
    options: Mapping[str, Any] | None = None,
    restart: bool = False,
) -> TrainResult:
    """Fine-tune a classifier on labelled images. An argument that is None keeps the default of its config option.

    Args:
        images: class folders, or images with a ``labels.csv``.
        weights: pretrained weights, such as ``pretrain(...).backbone``. None trains from scratch.
        val_images: labelled images for accuracy, which also selects the best checkpoint.
        arch: the architecture of ``weights``.
        results_dir: the run writes to ``<results_dir>/train``, and resumes from there if it was interrupted.
        image_size: pixels of a side, or (height, width).
        num_epochs: passes over the images.
        batch_size: images per process and step.
        learning_rate: peak learning rate of the schedule.
        options: further config options by dotted key, such as ``{"dataset.augmentation.mixup": 0}``.
        restart: begin a new run; an earlier one is kept under a dated name.

    Raises:
        UserError, RunError, KeyboardInterrupt: see ``train``.

    Example:
        >>> backbone = "runs/photos/train/backbone.safetensors"
        >>> result = openmae.finetune(
        ...     "labelled/train",
        ...     "runs/classes",
        ...     weights=backbone,
        ...     val_images="labelled/val",
        ...     arch="convnextv2_atto",
        ...     num_epochs=100,
        ...     batch_size=16,
        ... )
        >>> 0 <= result["ACC_all"] <= 1
        True
    """
    return _train("finetune", locals())


def evaluate(spec: Spec, overrides: Sequence[str] = ()) -> dict[str, float]:
    """Measure ``evaluate.checkpoint`` on ``dataset.val_data_sources``, like ``mae evaluate``.

    ``spec`` and ``overrides`` are those of ``train``.

    Returns:
        ``ACC_all``, ``ACC_top5`` and ``val_loss`` of a fine-tuned checkpoint; ``val_loss`` of a pretrained one, and
        ``knn_acc`` and ``probe_acc`` if the images have classes. Accuracies are in [0, 1].

    Raises:
        UserError: the spec, the data or the checkpoint cannot be used.

    Example:
        >>> checkpoint = "evaluate.checkpoint=runs/classes/train/model_best.pth"
        >>> metrics = openmae.evaluate({}, [checkpoint, "dataset.val_data_sources=labelled/val"])
    """
    metrics: dict[str, float] = _run("evaluate", spec, overrides)
    return metrics


def inference(spec: Spec, overrides: Sequence[str] = ()) -> Path:
    """Run ``inference.checkpoint`` on ``dataset.test_data_sources``, like ``mae inference``.

    ``spec`` and ``overrides`` are those of ``train``.

    Returns:
        ``results.csv`` (path, class, probability, and the next four classes) of a fine-tuned checkpoint, or
        ``embeddings.parquet`` (path and vector) of a pretrained one.

    Raises:
        UserError: the spec, the data or the checkpoint cannot be used.

    Example:
        >>> checkpoint = "inference.checkpoint=runs/classes/train/model_best.pth"
        >>> openmae.inference({}, [checkpoint, "dataset.test_data_sources=photos"]).name
        'results.csv'
    """
    path: Path = _run("inference", spec, overrides)
    return path


def export(spec: Spec, overrides: Sequence[str] = ()) -> Path:
    """Export ``export.checkpoint`` to ONNX and verify the file, like ``mae export``.

    ``spec`` and ``overrides`` are those of ``train``.

    Returns:
        The ONNX file. Its outputs are ``logits`` (fine-tuned) or ``features`` and ``tokens`` (pretrained).

    Raises:
        UserError: the spec or the checkpoint cannot be used.
        RunError: the outputs of the file differ from those of the checkpoint; the file was removed.

    Example:
        >>> checkpoint = "export.checkpoint=runs/classes/train/model_best.pth"
        >>> openmae.export({}, [checkpoint, "export.onnx_file=model.onnx"]).name
        'model.onnx'
    """
    path: Path = _run("export", spec, overrides)
    return path


def gen_trt_engine(spec: Spec, overrides: Sequence[str] = ()) -> Path:
    """Build a TensorRT engine from an ONNX file, like ``mae gen_trt_engine``.

    ``spec`` and ``overrides`` are those of ``train``.

    Returns:
        The engine. Its description is next to it, in ``<engine>.json``.

    Raises:
        UserError: the spec or the ONNX file cannot be used, or TensorRT is not installed.
        RunError: the builder failed.

    Example:
        >>> overrides = ["gen_trt_engine.onnx_file=model.onnx", "gen_trt_engine.trt_engine=model.engine"]
        >>> openmae.gen_trt_engine({}, [*overrides, "gen_trt_engine.compute_capability=[sm_89]"]).name
        'model.engine'
    """
    path: Path = _run("gen_trt_engine", spec, overrides)
    return path


def list_architectures(family: Family | None = None) -> list[str]:
    """Return the names that ``model.arch`` accepts, of all families or of ``vit``, ``hiera`` or ``convnextv2``.

    Example:
        >>> openmae.list_architectures("vit")[:2]
        ['vit_tiny_patch16', 'vit_small_patch16']
    """
    from openmae.spec.architectures import ARCHITECTURES

    return [name for name, row in ARCHITECTURES.items() if family in (None, row.family)]


def build_autoencoder(arch: str, input_size: int | tuple[int, int] = 224, **options: Any) -> MaskedAutoencoder:
    """Build a randomly initialized masked autoencoder for a training loop of your own.

    Args:
        arch: one of ``list_architectures()``.
        input_size: pixels of a side, or (height, width).
        options: options of the config section ``model``, such as ``in_chans``, ``patch_size``, ``norm_pix_loss``,
            ``decoder_depth`` and ``decoder_embed_dim``. The defaults are those of the paper.

    Returns:
        A module whose ``forward(images_BCHW, mask)`` returns the loss and the predictions; ``random_mask`` draws masks.

    Raises:
        SpecError: an argument is not valid for the architecture.

    Example:
        >>> import torch
        >>> model = openmae.build_autoencoder("vit_tiny_patch16", 32, patch_size=8, decoder_depth=1)
        >>> mask = openmae.random_mask(torch.arange(2), seed=0, epoch=0, num_units=model.num_units, mask_ratio=0.75)
        >>> loss, predicted_BMP = model(torch.rand(2, 3, 32, 32), mask)
        >>> tuple(predicted_BMP.shape)
        (2, 12, 192)
    """
    from openmae.actions.sources import model_config
    from openmae.models.build import build_autoencoder as build
    from openmae.spec.load import load_spec

    sections = {"model": {"arch": arch, **options}, "dataset": {"augmentation": {"input_size": input_size}}}
    spec = load_spec({**sections, "train": {"recipe": "tao"}})
    return build(model_config(spec))


_KEYWORDS = {
    "images": "dataset.train_data_sources",
    "val_images": "dataset.val_data_sources",
    "results_dir": "results_dir",
    "arch": "model.arch",
    "image_size": "dataset.augmentation.input_size",
    "num_epochs": "train.num_epochs",
    "batch_size": "dataset.batch_size",
    "learning_rate": "train.optim.lr",
    "weights": "train.pretrained_model_path",
}


def _train(stage: str, arguments: Mapping[str, Any]) -> TrainResult:
    """Train with keyword arguments as overrides of the spec. Values are written as JSON, which is also YAML."""
    values = {"train.stage": stage}
    values |= {key: arguments[name] for name, key in _KEYWORDS.items() if arguments[name] is not None}
    values |= arguments["options"] or {}
    overrides = [f"{key}={json.dumps(value, default=str)}" for key, value in values.items()]
    return train({}, overrides, restart=arguments["restart"])


def _run(action: str, spec: Any, overrides: Sequence[str], **flags: bool) -> Any:
    from openmae.errors import UserError
    from openmae.main_guard import end_if_rerun
    from openmae.results.streams import guarded
    from openmae.spec.load import load_spec

    end_if_rerun()
    with guarded("stderr"):
        try:
            checked = load_spec(spec, overrides, action=action)
            result = importlib.import_module(f"openmae.actions.{action}").run(checked, **flags)
        except UserError as error:
            # the mistake is in the arguments of the call: the frames below it would only distract from that
            raise error.with_traceback(None) from error.__cause__
    if action == "train":
        return TrainResult(str(checked.results_folder(action)), checked.model.arch, result)
    return result
