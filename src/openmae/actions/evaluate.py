"""``mae evaluate``: measure the quality of a model on the validation images."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
import torch
from lightning_fabric import Fabric

from openmae.actions.load_model import TrainedModel, open_model, resolve_model
from openmae.actions.run import Run, begin_results, running, show_table, with_progress
from openmae.actions.sections import classifier_report, pretrained_report, reconstructions
from openmae.actions.sources import loader_settings, match_classes, open_images
from openmae.checkpoints.format import CheckpointInfo
from openmae.data.corrupt import describe_images
from openmae.data.index import ImageIndex
from openmae.data.loaders import EvaluationLoader
from openmae.distributed.launch import acting_precision, build_fabric, check_agreement, launch
from openmae.engines.batching import eval_transform
from openmae.errors import DataError
from openmae.evaluation.embeddings import embed
from openmae.evaluation.predictions import predict, score
from openmae.evaluation.probes import probe
from openmae.models.mae import MaskedAutoencoder
from openmae.models.normalise import Normaliser
from openmae.models.operations import has_fast_bf16
from openmae.results.confusion import save_confusion_matrix
from openmae.spec.metrics import informative
from openmae.spec.schema import ExperimentSpec
from openmae.spec.tree import get
from openmae.storage import layout
from openmae.training.pretrain import PretrainTask

Result = TypeVar("Result")

log = logging.getLogger("openmae")


@dataclass(frozen=True)
class Request:
    """The input of each process of evaluate and inference."""

    action: Literal["evaluate", "inference"]
    spec: ExperimentSpec
    folder: Path
    model: TrainedModel
    index: ImageIndex

    @property
    def title(self) -> str:
        """The title of the printed table."""
        return f"{self.info.model.arch} ({self.info.stage}) on {describe_images(self.index, self.folder)}"

    @property
    def info(self) -> CheckpointInfo:
        """The metadata of the model."""
        return self.model.info

    def loader(self, fabric: Fabric) -> EvaluationLoader:
        """Return a loader of this process's share of the images, in order.

        Raises:
            DataError: the nodes do not see the same images or the same model.
        """
        path = self.model.path
        file = f"{path.name} ({path.stat().st_size:,} bytes)"
        check_agreement(fabric, lambda: {"set of images": self.index.digest, "model": file})
        settings = loader_settings(self.spec, self.spec.batch_size(self.action), self.folder, fabric)
        return EvaluationLoader(self.index, eval_transform(self.model.card), settings)

    def pretrain_task(self, fabric: Fabric) -> PretrainTask | None:
        """Return the autoencoder on the device; None for an exported model, which has no decoder."""
        network = self.model.network
        if not isinstance(network, MaskedAutoencoder):
            return None
        fabric.to_device(network)
        return PretrainTask(
            network,
            Normaliser(self.info.mean, self.info.std),
            mask_ratio=self.info.model.mask_ratio,
            seed=self.spec.train.seed,
            monitor="val_loss",
        )

    def _precision(self) -> str:
        """Return the precision that the model was trained in, if this device computes it fast; otherwise fp32."""
        if self.model.network is None:  # an exported model has its own
            return "fp32"
        on_gpu, own = torch.cuda.is_available(), getattr(self.spec, self.action)
        sharded = get(self.info.spec, "train.distributed_strategy") == "fsdp"
        precision = acting_precision(str(get(self.info.spec, "train.precision")), sharded, on_gpu)
        if precision == "bf16" and not on_gpu and own.num_gpus * own.num_nodes > 1:
            return "fp32"  # each process would measure for itself
        if precision == "fp16" or (precision == "bf16" and has_fast_bf16(on_gpu)):
            log.info("Computing in %s, as in training.", precision)
            return precision
        return "fp32"

    def launch(self, this_run: Run, work: Callable[[Fabric, Request], Result]) -> Result:
        """Write ``experiment.yaml``, and run ``work`` on the devices of the spec."""
        section = getattr(self.spec, self.action)
        fabric = build_fabric(self.action, section.num_gpus, section.gpu_ids, section.num_nodes, self._precision())
        if this_run.leads:
            begin_results(this_run.folder, self.spec)
        return launch(fabric, work, self)


def run(spec: ExperimentSpec) -> dict[str, float]:
    """Measure a checkpoint, an ONNX file or a TensorRT engine on the validation images, and return the metrics.

    A classifier gets ``ACC_all``, ``ACC_top5``, ``val_loss``, a table of the classes and a confusion matrix. An
    autoencoder gets ``val_loss`` with fixed masks, reconstructions, and, if the images have classes, ``knn_acc`` and
    ``probe_acc``. An exported backbone cannot reconstruct, and gets only ``knn_acc`` and ``probe_acc``.

    Raises:
        UserError: the spec, the model or the data are invalid.
    """
    with running(spec, "evaluate") as this_run:
        spec = this_run.spec
        model = open_model(spec, "evaluate")
        info = model.info
        spec = resolve_model(spec, info)
        labelled = None if info.stage != "finetune" and model.network else True
        index = open_images(spec, "dataset.val_data_sources", labelled=labelled)
        if info.stage == "finetune":
            if not info.class_names:
                model = _with_class_names(model, index)
            index = match_classes(index, model.info.class_names)
        request = Request("evaluate", spec, this_run.folder, model, index)
        metrics = request.launch(this_run, _evaluate_classifier if info.stage == "finetune" else _evaluate_pretrained)
        if this_run.leads:
            shown = informative(metrics, info.model.num_classes)
            rows = [(name, f"{value:.4f}") for name, value in shown.items()]
            this_run.status.write("RUNNING", f"Evaluated on {describe_images(index, this_run.folder)}", kpi=metrics)
            show_table(request.title, rows)
    return metrics


def _with_class_names(model: TrainedModel, index: ImageIndex) -> TrainedModel:
    """Give a model without class names those of the images, as NVIDIA TAO does, if their number is the same."""
    names, count = index.class_names, model.info.model.num_classes
    if len(names) != count:
        raise DataError(
            f"dataset.val_data_sources has {len(names)} classes, but {model.path} has {count} classes without names.",
            "Give images with a folder for each class that it was trained on: classes are numbered in the order of "
            "the folder names.",
        )
    card, info = replace(model.card, class_names=names), replace(model.info, class_names=names)
    return replace(model, card=card, info=info)


def _evaluate_pretrained(fabric: Fabric, request: Request) -> dict[str, float]:
    task, loader = request.pretrain_task(fabric), request.loader(fabric)
    batches = with_progress(fabric, loader)
    if task is None:
        _, vectors, labels = embed(fabric, request.model.outputs(fabric.device), batches)
        metrics = probe(vectors, labels)
    else:
        metrics = task.validate(fabric, task.model, batches)
    if fabric.is_global_zero:
        path = request.folder / layout.RECONSTRUCTIONS / "validation.png"
        figures = [reconstructions(fabric, task, task.model, loader, path)] if task is not None else []
        pretrained_report(request.folder, request.info, request.index, metrics, figures)
    return metrics


def _evaluate_classifier(fabric: Fabric, request: Request) -> dict[str, float]:
    loader = request.loader(fabric)
    predictions = predict(fabric, request.model.outputs(fabric.device), with_progress(fabric, loader))
    metrics = score(predictions)
    if fabric.is_global_zero:
        names = request.info.class_names
        confusion = np.zeros((len(names), len(names)), dtype=np.int64)
        np.add.at(confusion, (predictions.labels, predictions.classes[:, 0]), 1)
        picture = save_confusion_matrix(confusion, names, request.folder / layout.CONFUSION_MATRIX)
        classifier_report(request.folder, request.info, request.index, metrics, confusion, picture)
    return metrics
