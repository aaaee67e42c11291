"""``mae inference``: classify the test images, or compute embeddings and reconstructions of them."""

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

from openmae.actions.evaluate import Request
from openmae.actions.load_model import open_model, resolve_model
from openmae.actions.run import running, show_table, with_progress
from openmae.actions.sections import embedding_report, inference_report, reconstructions
from openmae.actions.sources import open_images
from openmae.data.image_dataset import Batch
from openmae.evaluation.embeddings import embed
from openmae.evaluation.predictions import Predictions, predict
from openmae.results.images import save_predictions
from openmae.spec.schema import ExperimentSpec
from openmae.storage import layout
from openmae.storage.atomic import replacing, write_atomically
from openmae.storage.printable import counted, printable_name, spreadsheet_cell

_SHEET = 16  # images in the contact sheet
_CLASSES = 5  # printed on the terminal


def run(spec: ExperimentSpec) -> Path:
    """Run a checkpoint, an ONNX file or a TensorRT engine on the test images, and return the file that was written.

    A classifier writes a contact sheet and ``results.csv``, a row per image: path, class, probability, and the next
    four classes. A pretrained model writes ``embeddings.parquet`` (path and vector); nothing is masked, so embeddings
    are deterministic. A pretrained checkpoint also writes reconstructions. ``printable_name`` formats the paths, and
    ``spreadsheet_cell`` escapes the cells of ``results.csv``. An unreadable image has no row, and is listed in
    ``corrupt_files.txt``.

    Raises:
        UserError: the spec, the model or the data are invalid.
    """
    with running(spec, "inference") as this_run:
        spec = this_run.spec
        model = open_model(spec, "inference")
        info = model.info
        spec = resolve_model(spec, info)
        index = open_images(spec, "dataset.test_data_sources", labelled=False)
        request = Request("inference", spec, this_run.folder, model, index)
        found = request.launch(this_run, _classify if info.stage == "finetune" else _embed)
        path = this_run.folder / (layout.PREDICTIONS if info.stage == "finetune" else layout.EMBEDDINGS)
        if this_run.leads:
            show_table(request.title, [*found.items(), ("written", str(path))])
    return path


def _classify(fabric: Fabric, request: Request) -> dict[str, str]:
    """Write the predictions; return the number of images of the most frequent classes, for the terminal."""
    loader = request.loader(fabric)
    predictions = predict(fabric, request.model.outputs(fabric.device), with_progress(fabric, loader))
    names = request.info.class_names
    counts = Counter(names[label] for label in predictions.classes[:, 0])
    if fabric.is_global_zero:
        rows = _result_rows(predictions, request)
        write_atomically(request.folder / layout.PREDICTIONS, _as_csv(rows))
        sheet = _draw_sheet(predictions, request, loader.first(_SHEET))
        inference_report(request.folder, request.info, request.index, rows, sheet)
    return _most_frequent(counts)


def _most_frequent(counts: Counter[str]) -> dict[str, str]:
    """Return the most frequent classes for the terminal; a single remaining one is shown too."""
    shown = _CLASSES if len(counts) > _CLASSES + 1 else len(counts)
    seen = {name: counted(count, "image") for name, count in counts.most_common(shown)}
    return seen if len(counts) == shown else {**seen, "...": f"{len(counts) - shown} more classes"}


def _as_csv(rows: Sequence[Sequence[str]]) -> str:
    """Return the table as CSV in which a spreadsheet reads no cell as a formula, whichever separator it uses."""
    text = io.StringIO()
    plain = csv.writer(text, lineterminator="\n")
    quoted = csv.writer(text, lineterminator="\n", quoting=csv.QUOTE_ALL)
    for row in rows:
        writer = quoted if any(sign in cell for cell in row for sign in ";|") else plain
        writer.writerow(map(spreadsheet_cell, row))
    return text.getvalue()


def _draw_sheet(predictions: Predictions, request: Request, batch: Batch) -> Path:
    places = np.searchsorted(predictions.indices, batch.indices.numpy())
    labels = [request.info.class_names[label] for label in predictions.classes[places, 0]]
    shares = predictions.probabilities[places, 0].tolist()
    pixels = batch.images.round().clamp(0, 255).byte() if batch.images.is_floating_point() else batch.images
    images = pixels.permute(0, 2, 3, 1).numpy()
    return save_predictions(images, labels, shares, request.folder / layout.PREDICTIONS_SHEET)


def _result_rows(predictions: Predictions, request: Request) -> list[list[str]]:
    """Return a header and a row per image: path, and the most likely classes with their probabilities."""
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
    """Write the embeddings; return their number and dimension, for the terminal."""
    task, loader = request.pretrain_task(fabric), request.loader(fabric)
    indices, vectors, _ = embed(fabric, request.model.outputs(fabric.device), with_progress(fabric, loader))
    if fabric.is_global_zero:
        _write_embeddings(
            request.folder / layout.EMBEDDINGS,
            [printable_name(request.index.paths[index]) for index in indices],
            vectors,
        )
        path = request.folder / layout.RECONSTRUCTIONS / "test.png"
        figures = [reconstructions(fabric, task, task.model, loader, path)] if task is not None else []
        embedding_report(request.folder, request.info, request.index, vectors.shape, figures)
    return {"embeddings": f"{len(vectors):,} embeddings of {vectors.shape[1]:,} dimensions"}


def _write_embeddings(path: Path, names: list[str], vectors: np.ndarray) -> None:
    flat = pa.array(vectors.astype(np.float32).ravel())
    columns = {"path": names, "vector": pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1])}
    with replacing(path) as temporary:
        pq.write_table(pa.table(columns), temporary)
