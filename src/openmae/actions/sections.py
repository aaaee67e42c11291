"""The sections of each action's ``report.html``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from lightning_fabric import Fabric

from openmae.checkpoints.format import CheckpointInfo
from openmae.data.corrupt import corrupt_files_text, describe_images
from openmae.data.index import ImageIndex, skipped_files_table
from openmae.data.loaders import EvaluationLoader
from openmae.engines.metadata import ModelCard
from openmae.evaluation.reconstructions import reconstruct
from openmae.models.mae import MaskedAutoencoder
from openmae.results.curves import save_curves
from openmae.results.images import reconstruction_grid
from openmae.results.metrics_csv import Row, read_metrics
from openmae.results.profile import Breakdown, advice, save_breakdown
from openmae.results.report import Code, Figure, Numbers, Section, Table, Text, write_report
from openmae.results.verdict import Evidence, give_verdict
from openmae.spec.describe import fields, is_used
from openmae.spec.metrics import EPOCH_TRAIN_LOSS, METRICS, informative, is_share, label
from openmae.spec.tree import flatten, nest
from openmae.spec.yaml_reader import read_file, write_text
from openmae.storage import layout
from openmae.training.pretrain import PretrainTask

PICTURES = 8  # images in a reconstruction grid

_READING = """import pyarrow.parquet as pq
import numpy as np

table = pq.read_table("embeddings.parquet")
paths = table["path"].to_pylist()
vectors = np.stack(table["vector"].to_numpy())  # [images, dimensions]
"""
_RUNNING = """import json

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

{load}
card = {{key: json.loads(text) for key, text in session.get_modelmeta().custom_metadata_map.items()}}
height, width = card["model"]["input_size"]
image = ImageOps.exif_transpose(Image.open("image.jpg"))
{convert}
share = card["crop_pct"] * min(image.width / width, image.height / height)  # central crop of the input's shape
w, h = round(width * share), round(height * share)
left, top = (image.width - w) // 2, (image.height - h) // 2
method = Image.Resampling[card["interpolation"].upper()]
image = image.resize((width, height), method, box=(left, top, left + w, top + h))
{prepare}
names = {outputs!r}
outputs = dict(zip(names, session.run(names, {{"input": images}})))
{use}
"""
_LOAD = "session = onnxruntime.InferenceSession({file!r})"
_LOAD_ENCRYPTED = """from openmae.storage.encryption import read_bytes, resolve_key

session = onnxruntime.InferenceSession(read_bytes({file!r}, resolve_key("env:NAME")))"""
_RECONSTRUCTION = (
    "Columns: original, masked, prediction, and prediction with visible patches. Predictions of normalised pixels are "
    "shown with the mean and standard deviation of the original."
)
_CURVES = (
    "Losses, accuracies, learning rate and speed over the steps. Dashed: the accuracy of always guessing the most "
    "frequent class and, in pretraining, the accuracies before the first step."
)
_PROBES = (
    "kNN and linear probe: the encoder is frozen, the probe is trained on half of the images and tested on the rest. "
    "They measure how well the embeddings separate the classes."
)
_MOST_ROWS = 50
_SHOWN = tuple(EPOCH_TRAIN_LOSS if name == "train_loss" else name for name in METRICS)  # in this order


def reconstructions(
    fabric: Fabric, task: PretrainTask, model: MaskedAutoencoder, loader: EvaluationLoader, path: Path
) -> Figure:
    """Draw reconstructions of some images to ``path``, with fixed masks. ``model`` is in eval mode."""
    shown = reconstruct(fabric, model, task.normalise, task.mask, loader.first(PICTURES))
    return Figure("Reconstructions", reconstruction_grid(*shown, path), _RECONSTRUCTION)


def train_report(
    folder: Path,
    info: CheckpointInfo,
    evidence: Evidence,
    best: str,
    recipe: Sequence[tuple[str, str]],
    figures: Sequence[Section],
    breakdown: Breakdown | None,
    *indexes: ImageIndex,
    unfinished: str = "",
) -> None:
    """Write the report of a training run: verdict, metrics, curves, figures, profile, recipe, unread files and spec.

    ``unfinished`` is empty, or says how far the run is; then there is no verdict.
    """
    rows = [informative(row, info.model.num_classes) for row in evidence.rows]
    last = {name: row[name] for row in rows for name in _SHOWN if name in row}
    sections: list[Section] = []
    if not unfinished:
        sections.append(Text("", give_verdict(evidence).replace(" %", "\N{NO-BREAK SPACE}%")))
    sections += [_numbers("Latest metrics" if unfinished else "Final metrics", last)] if last else []
    sections += [Text("", best)] if best else []
    if rows:
        curves = save_curves(rows, folder / layout.CURVES, evidence.scored)
        sections.append(Figure("Curves", curves, _CURVES))
    sections += figures
    if breakdown is not None:
        sections += _breakdown_sections(folder, breakdown)
    sections.append(Table("Recipe", ("", ""), list(recipe)))
    _write(folder, "train", _subtitle(info), sections, *indexes, unfinished=unfinished)


def best_epoch(folder: Path, metric: str, value: float | None) -> str:
    """Return the best value of the monitored metric in words, with its epoch; empty if it is unknown."""
    row = row_of_best(read_metrics(folder / layout.METRICS), metric, value)
    if value is None or row is None:
        return ""
    return f"Best {metric}: {_text(metric, value)}, epoch {row['epoch']:.0f} ({layout.BEST})"


def row_of_best(rows: Sequence[Row], metric: str, value: float | None) -> Row | None:
    """Return the first row with the best value of the monitored metric, or None if there is none."""
    column = EPOCH_TRAIN_LOSS if metric == "train_loss" else metric
    return next((row for row in rows if row["step"] and value is not None and row.get(column) == value), None)


def _breakdown_sections(folder: Path, breakdown: Breakdown) -> list[Section]:
    """Return the bottleneck of the run in words, and the profile as a figure and as a table."""
    gpu = " Phases are GPU times: work of the CPU at the same time is not counted." if breakdown.on_gpu else ""
    return [
        Text("Profile", "\n\n".join(advice(breakdown))),
        Figure("", save_breakdown(breakdown, folder / layout.PROFILE_CHART), f"{breakdown.summary}.{gpu}"),
        Table(
            "",
            ("phase", "mean, ms per step", "median", "95th percentile", "% of the time"),
            [
                (name, phase.mean_ms, phase.median_ms, phase.p95_ms, 100 * breakdown.share(name))
                for name, phase in breakdown.phases.items()
            ],
            caption="Data wait includes the first batch of an epoch; other includes drawing and logging.",
        ),
    ]


def pretrained_report(
    folder: Path, info: CheckpointInfo, index: ImageIndex, metrics: Mapping[str, float], figures: Sequence[Figure]
) -> None:
    """Write the report of an evaluated autoencoder: loss, probes if there are classes, and reconstructions."""
    sections: list[Section] = [_numbers(describe_images(index, folder), metrics)]
    if "knn_acc" in metrics:
        sections.append(Text("", _PROBES))
    _write(folder, "evaluate", _subtitle(info), [*sections, *figures], index)


def embedding_report(
    folder: Path, info: CheckpointInfo, index: ImageIndex, shape: tuple[int, ...], figures: Sequence[Figure]
) -> None:
    """Write the report of embeddings: their number, code that reads them, and reconstructions."""
    images, dimensions = shape
    sections: list[Section] = [
        Numbers(layout.EMBEDDINGS, {"images": f"{images:,}", "dimensions": f"{dimensions:,}"}),
        Code("Read the embeddings", _READING),
    ]
    _write(folder, "inference", _subtitle(info), [*sections, *figures], index)


def classifier_report(
    folder: Path,
    info: CheckpointInfo,
    index: ImageIndex,
    metrics: Mapping[str, float],
    confusion: np.ndarray,
    picture: Path,
) -> None:
    """Write the report of an evaluated classifier: accuracies, confusion matrix, and a row per class."""
    sections: list[Section] = [
        _numbers(describe_images(index, folder), informative(metrics, info.model.num_classes)),
        Figure("Confusion matrix", picture, "Rows are the true classes, columns the predicted ones."),
        class_table(confusion, info.class_names),
    ]
    _write(folder, "evaluate", _subtitle(info), sections, index)


def class_table(confusion: np.ndarray, class_names: Sequence[str]) -> Table:
    """Return images, precision, recall and F1 of each class, lowest F1 first; undefined values are shown as dashes."""
    rows: list[tuple[str, int, float | None, float | None, float | None]] = []
    for number, name in enumerate(class_names):
        right, images, guesses = (
            int(n) for n in (confusion[number, number], confusion[number].sum(), confusion[:, number].sum())
        )
        f1 = 2 * right / (images + guesses) if images + guesses else None
        rows.append((name, images, right / guesses if guesses else None, right / images if images else None, f1))
    rows.sort(key=lambda row: (row[4] is not None, row[4] or 0.0))
    return Table(
        "Classes", ("class", "images", "precision", "recall", "F1"), rows, caption="Sorted by F1, lowest first."
    )


def inference_report(
    folder: Path, info: CheckpointInfo, index: ImageIndex, rows: Sequence[Sequence[str]], sheet: Path
) -> None:
    """Write the report of classified images: examples, images per class, and the first rows of results.csv."""
    _, *found = rows
    first = [(path, best, float(p), second, float(q)) for path, best, p, second, q, *_ in found[:_MOST_ROWS]]
    counts = Counter(row[1] for row in found)
    most = sorted(((name, counts[name]) for name in info.class_names), key=lambda item: -item[1])
    sections: list[Section] = [
        Numbers(
            "Classified images",
            {"images": f"{len(found):,}", "classes predicted": str(sum(n > 0 for _, n in most))},
        ),
        Figure("Examples", sheet, "Images after preprocessing, with the most likely class and its probability."),
        Table("Predicted classes", ("class", "images"), most),
        Table(
            layout.PREDICTIONS,
            ("path", "class", "probability", "second class", "probability"),
            first,
            caption=f"The first {len(first)} of {len(found):,} rows.",
        ),
    ]
    _write(folder, "inference", _subtitle(info), sections, index)


def export_report(
    folder: Path, card: ModelCard, target: Path, rows: Sequence[tuple[str, str]], *, encrypted: bool
) -> None:
    """Write the report of an export: the differences to torch, inputs and outputs, and code that runs the file."""
    sections: list[Section] = [
        Table("The ONNX file", ("", ""), list(rows)),
        Code("Run the model", running_example(card, target.name, encrypted=encrypted)),
    ]
    _write(folder, "export", _subtitle(card.info), sections)


def engine_report(folder: Path, onnx_name: str, kpi: Mapping[str, float], rows: Sequence[tuple[str, str]]) -> None:
    """Write the report of a TensorRT engine: size, build time, settings and spec."""
    sections: list[Section] = [
        Numbers("Engine", {"MB": f"{kpi['engine_mb']:.1f}", "seconds to build": f"{kpi['build_seconds']:.1f}"}),
        Table("Build", ("", ""), list(rows)),
    ]
    _write(folder, "gen_trt_engine", onnx_name, sections)


def _subtitle(info: CheckpointInfo) -> str:
    height, width = info.model.input_size
    return f"{info.model.arch} · {info.stage} · {height} x {width} px"


def _write(
    folder: Path,
    action: str,
    subtitle: str,
    sections: Sequence[Section],
    *indexes: ImageIndex,
    unfinished: str = "",
) -> None:
    """Write the report with the files of ``indexes`` that are not read, and the options that the action may use."""
    options = flatten(read_file(folder / layout.SPEC).tree)
    used = {key: value for key, value in options.items() if key in fields() and is_used(key, action)}
    more: list[Section] = [
        *corrupt_files_text(indexes, folder),
        *skipped_files_table(indexes),
        Code("Spec", write_text(nest(used))),
    ]
    write_report(folder, f"OpenMAE {action}", [*sections, *more], subtitle=subtitle, unfinished=unfinished)


def running_example(card: ModelCard, file: str, *, encrypted: bool = False) -> str:
    """Return a script that runs an exported model with ONNX Runtime; OpenMAE decrypts it if it is encrypted."""
    convert = ['image = image.convert("RGBA")']
    if card.model.in_chans < 4:
        convert = [
            "if image.has_transparency_data:  # transparent parts become white",
            '    white = Image.new("RGBA", image.size, "white")',
            '    image = Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")',
            f'image = image.convert("{"L" if card.model.in_chans == 1 else "RGB"}")',
        ]
    prepare = ["images = np.asarray(image).reshape(1, height, width, -1)"]
    if not card.preprocessing:
        prepare.append('images = (images / 255 - card["mean"]) / card["std"]')
        prepare.append("images = images.transpose(0, 3, 1, 2).astype(np.float32)")
    if card.batch_size > 1:
        prepare.append(f"images = np.repeat(images, {card.batch_size}, axis=0)  # the batch is fixed")
    classify = 'print(card["class_names"][outputs["logits"][0].argmax()])'
    return _RUNNING.format(
        load=(_LOAD_ENCRYPTED if encrypted else _LOAD).format(file=file),
        convert="\n".join(convert),
        prepare="\n".join(prepare),
        outputs=list(card.outputs),
        use=classify if card.stage == "finetune" else 'print(outputs["features"].shape, outputs["tokens"].shape)',
    )


def _numbers(title: str, metrics: Mapping[str, float]) -> Numbers:
    known = {name: metrics[name] for name in _SHOWN if name in metrics} | dict(metrics)
    return Numbers(title, {label(name): _text(name, value) for name, value in known.items()})


def _text(name: str, value: float) -> str:
    return f"{100 * value:.1f} %" if is_share(name) else f"{value:.4f}"
