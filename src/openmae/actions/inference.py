"""``mae inference``: classes of unseen images, or embeddings and reconstructions of them."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from lightning.fabric import Fabric

from openmae.actions.checkpoint import open_checkpoint, resolve_model
from openmae.actions.evaluate import PICTURES, Request
from openmae.actions.reports import inference_report, pretrained_report
from openmae.actions.run import running
from openmae.actions.sources import open_images
from openmae.results.files import replacing, write_atomically
from openmae.results.pictures import reconstruction_grid
from openmae.spec.load import load_spec
from openmae.spec.schema import ExperimentSpec
from openmae.training.devices import build_fabric, launch, share_cores
from openmae.training.finetune import Predictions, predict
from openmae.training.pretrain import embed

TOP = 5
RESULTS, EMBEDDINGS = "results.csv", "embeddings.parquet"


def run(spec: ExperimentSpec) -> Path:
    """Run a checkpoint of either stage over the test images.

    finetune: ``results.csv`` with a row an image: path, class, probability, and the next four classes. pretrain:
    ``embeddings.parquet`` (path, vector; nothing masked, so the same at every call) and pictures of reconstructions.

    Returns:
        The file written.

    Raises:
        UserError: the request is wrong.
    """
    spec = load_spec(spec, action="inference")
    with running(spec, "inference") as running_action:
        model, info = open_checkpoint(spec, "inference")
        running_action.write_spec(spec := resolve_model(spec, info))
        index = open_images(spec.dataset.test_data_sources, "dataset.test_data_sources", labelled=False)
        request = Request(spec, running_action.folder, model, info, index, spec.batch_size("inference"))
        section = spec.inference
        fabric = build_fabric("inference", section.num_gpus, section.gpu_ids, section.num_nodes)
        launch(fabric, _classify if info.stage == "finetune" else _embed, request)
    return running_action.folder / (RESULTS if info.stage == "finetune" else EMBEDDINGS)


def _classify(fabric: Fabric, request: Request) -> None:
    share_cores(fabric)
    fabric.to_device(request.model)
    predictions = predict(fabric, request.model, request.normalise, request.loader(fabric))
    if fabric.is_global_zero:
        rows = _result_rows(predictions, request)
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(rows)
        write_atomically(request.folder / RESULTS, text.getvalue())
        inference_report(request.folder, request.info, rows)


def _result_rows(predictions: Predictions, request: Request) -> list[list[str]]:
    """A header, then a row an image: path, and the most likely classes with their probabilities."""
    names = request.info.class_names
    top = min(TOP, len(names))
    header = ["path", "class", "probability"]
    header += [column for place in range(2, top + 1) for column in (f"class_{place}", f"probability_{place}")]
    rows = [header]
    for index, shares in zip(predictions.indices, predictions.probabilities, strict=True):
        best = np.argsort(-shares, kind="stable")[:top]
        cells = [cell for label in best for cell in (names[label], f"{shares[label]:.6f}")]
        rows.append([request.index.paths[index], *cells])
    return rows


def _embed(fabric: Fabric, request: Request) -> None:
    share_cores(fabric)
    fabric.to_device(request.model)
    loader = request.loader(fabric)
    indices, vectors = embed(fabric, request.pretrain_task(), loader)
    if fabric.is_global_zero:
        _write_embeddings(request.folder / EMBEDDINGS, [request.index.paths[index] for index in indices], vectors)
        picture = request.folder / "reconstructions" / "test.png"
        reconstruction_grid(*request.pretrain_task().reconstruct(fabric, loader.first(PICTURES)), picture)
        numbers = {"images": float(len(vectors)), "dimensions": float(vectors.shape[1])}
        pretrained_report(request.folder, "inference", request.info, len(request.index), numbers, picture)


def _write_embeddings(path: Path, names: list[str], vectors: np.ndarray) -> None:
    flat = pa.array(vectors.astype(np.float32).ravel())
    columns = {"path": names, "vector": pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1])}
    with replacing(path) as temporary:
        pq.write_table(pa.table(columns), temporary)
