"""``mae inference``: classes of unseen images, or embeddings and reconstructions of them."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from lightning_fabric import Fabric

from openmae.actions.evaluate import PICTURES, Request
from openmae.actions.load_model import open_model, resolve_model
from openmae.actions.run import begin_results, running, show_table, watched
from openmae.actions.sections import embedding_report, inference_report
from openmae.actions.sources import open_images
from openmae.data.image_dataset import Batch
from openmae.data.index import unread_table
from openmae.distributed.launch import build_fabric, launch
from openmae.evaluation.embeddings import embed
from openmae.evaluation.predictions import Predictions, predict
from openmae.evaluation.reconstructions import reconstruct
from openmae.results.images import reconstruction_grid, save_predictions
from openmae.spec.schema import ExperimentSpec
from openmae.storage.atomic import replacing, write_atomically
from openmae.storage.printable import printable_name, spreadsheet_cell

RESULTS, EMBEDDINGS = "results.csv", "embeddings.parquet"
_SHEET = 16  # images of the contact sheet
_CLASSES = 5  # shown on the terminal


def run(spec: ExperimentSpec) -> Path:
    """Run a model of either stage over the test images: a checkpoint, an ONNX file or a TensorRT engine.

    finetune: ``results.csv`` with a row an image (path, class, probability, and the next four classes) and a contact
    sheet; cells are written by ``spreadsheet_cell``. pretrain: ``embeddings.parquet`` (path, vector; nothing masked, so
    the same at every call), and from a checkpoint pictures of reconstructions. Paths are written by ``printable_name``.
    An image that cannot be read has no row; ``corrupt_files.txt`` names it.

    Args:
        spec: as ``load_spec`` gives it for ``inference``.

    Returns:
        The file written.

    Raises:
        UserError: the request is wrong.
    """
    with running(spec, "inference") as this_run:
        spec = this_run.spec
        model = open_model(spec, "inference")
        info = model.info
        spec = resolve_model(spec, info)
        source, largest = spec.dataset.test_data_sources, spec.dataset.max_megapixels
        index = open_images(source, "dataset.test_data_sources", labelled=False, largest=largest)
        request = Request(spec, this_run.folder, model, index, spec.batch_size("inference"))
        section = spec.inference
        fabric = build_fabric("inference", section.num_gpus, section.gpu_ids, section.num_nodes)
        if this_run.leads:
            begin_results(this_run.folder, spec)
        found = launch(fabric, _classify if info.stage == "finetune" else _embed, request)
        path = this_run.folder / (RESULTS if info.stage == "finetune" else EMBEDDINGS)
        if this_run.leads:
            title = f"{info.model.arch} ({info.stage}) on {len(index):,} images"
            show_table(title, [*found.items(), ("written", str(path))])
    return path


def _classify(fabric: Fabric, request: Request) -> dict[str, str]:
    """Returns how many images the most frequent classes got."""
    loader = request.loader(fabric)
    predictions = predict(fabric, request.model.outputs(fabric.device), watched(fabric, loader))
    names = request.info.class_names
    counts = Counter(names[label] for label in predictions.classes[:, 0])
    if fabric.is_global_zero:
        rows = _result_rows(predictions, request)
        write_atomically(request.folder / RESULTS, _as_csv(rows))
        sheet = _draw_sheet(predictions, request, loader.first(_SHEET))
        inference_report(request.folder, request.info, rows, sheet, unread_table([request.index]))
    seen = {name: f"{count:,} images" for name, count in counts.most_common(_CLASSES)}
    return seen if len(counts) <= _CLASSES else {**seen, "...": f"{len(counts) - _CLASSES} more classes"}


def _as_csv(rows: Sequence[Sequence[str]]) -> str:
    """The table as CSV, of which a spreadsheet takes no cell for a formula, whatever it takes for a separator."""
    text = io.StringIO()
    plain = csv.writer(text, lineterminator="\n")
    quoted = csv.writer(text, lineterminator="\n", quoting=csv.QUOTE_ALL)
    for row in rows:
        writer = quoted if any(sign in cell for cell in row for sign in ";|") else plain
        writer.writerow(map(spreadsheet_cell, row))
    return text.getvalue()


def _draw_sheet(predictions: Predictions, request: Request, batch: Batch) -> Path:
    """Some of the images as the model saw them, each with its class and the class's probability."""
    places = np.searchsorted(predictions.indices, batch.indices.numpy())
    labels = [request.info.class_names[label] for label in predictions.classes[places, 0]]
    shares = predictions.probabilities[places, 0].tolist()
    pixels = batch.images.round().clamp(0, 255).byte() if batch.images.is_floating_point() else batch.images
    images = pixels.permute(0, 2, 3, 1).numpy()
    return save_predictions(images, labels, shares, request.folder / "predictions.png")


def _result_rows(predictions: Predictions, request: Request) -> list[list[str]]:
    """A header, then a row an image: path, and the most likely classes with their probabilities."""
    names = request.info.class_names
    top = predictions.classes.shape[1]
    header = ["path", "class", "probability"]
    header += [column for place in range(2, top + 1) for column in (f"class_{place}", f"probability_{place}")]
    rows = [header]
    for index, best, shares in zip(predictions.indices, predictions.classes, predictions.probabilities, strict=True):
        cells = [cell for label, share in zip(best, shares, strict=True) for cell in (names[label], f"{share:.6f}")]
        rows.append([printable_name(request.index.paths[index]), *cells])
    return rows


def _embed(fabric: Fabric, request: Request) -> dict[str, str]:
    """Returns how many vectors of which length there are."""
    task, loader = request.pretrain_task(fabric), request.loader(fabric)
    indices, vectors, _ = embed(fabric, request.model.outputs(fabric.device), watched(fabric, loader))
    if fabric.is_global_zero:
        _write_embeddings(
            request.folder / EMBEDDINGS, [printable_name(request.index.paths[index]) for index in indices], vectors
        )
        picture = None
        if task is not None:
            picture = request.folder / "reconstructions" / "test.png"
            shown = reconstruct(fabric, task.model, task.normalise, task.mask, loader.first(PICTURES))
            reconstruction_grid(*shown, picture)
        embedding_report(request.folder, request.info, vectors.shape, picture, unread_table([request.index]))
    return {"embeddings": f"{len(vectors):,} of {vectors.shape[1]:,} numbers each"}


def _write_embeddings(path: Path, names: list[str], vectors: np.ndarray) -> None:
    flat = pa.array(vectors.astype(np.float32).ravel())
    columns = {"path": names, "vector": pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1])}
    with replacing(path) as temporary:
        pq.write_table(pa.table(columns), temporary)
