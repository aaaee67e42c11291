"""Names of the files that OpenMAE writes to the folders of an action, a job and a search.

A training run writes to its results folder::

    status.json  metrics.csv  experiment.yaml  report.html  curves.png  corrupt_files.txt
    model_epoch_003_step_00120.pth ...   numbered checkpoints
    vit_base_patch16_latest.pth          link to the newest numbered checkpoint
    model_best.pth                       the best by the monitored metric
    backbone.safetensors                 the encoder, with timm's names
    reconstructions/last.png             some images, after the last epoch
    reconstructions/epoch_0010.png ...   the same images at several epochs, and progress.png with all of them

Files whose names begin with a dot are temporary or internal, and are neither listed nor uploaded.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

# every action
STATUS = "status.json"
METRICS = "metrics.csv"
SPEC = "experiment.yaml"
REPORT = "report.html"
CORRUPT_LIST = "corrupt_files.txt"
RECONSTRUCTIONS = "reconstructions"  # a folder of images
CURVES, PROFILE_CHART = "curves.png", "profile.png"
PROFILE = "profile.json"
RECONSTRUCTIONS_LAST, RECONSTRUCTIONS_PROGRESS = "last.png", "progress.png"  # in RECONSTRUCTIONS

# train
BEST = "model_best.pth"
BACKBONE = "backbone.safetensors"
WEIGHTS_SUFFIX = ".pth"
SHARDED = "model_epoch_*.shards"  # folders that earlier versions wrote under fsdp
UNREADABLE, SUPERSEDED, DIVERGED = ".unreadable", ".superseded", ".diverged"  # appended to a checkpoint set aside

# inference, evaluate, export, gen_trt_engine
PREDICTIONS = "results.csv"
PREDICTIONS_SHEET = "predictions.png"
EMBEDDINGS = "embeddings.parquet"
CONFUSION_MATRIX = "confusion_matrix.png"
COMPANIONS = {  # suffix of a model file -> suffixes appended to its name for files that belong to it
    ".onnx": (".data",),
    ".engine": (".json",),
    ".plan": (".json",),
    ".trt": (".json",),
}

# dataset check
DUPLICATES_LIST, REMARKS_LIST = "duplicate_files.txt", "remarks.txt"
DATASET_CHART = "dataset.png"

# automl
STUDY = "study.db"
BEST_SPEC = "best.yaml"
CHARTS = "pictures"  # a folder of images
CHECKPOINTS_DELETED = "checkpoints_deleted.txt"  # explains why a trial no longer has checkpoints

# a job's folder
JOB_RECORD, JOB_SPEC, JOB_LOG = "job.json", "spec.yaml", "log.txt"

# internal
LOCK, LOCK_HOLDER = ".openmae.lock", ".openmae.lock.json"
UPLOAD_RECORD = ".openmae-uploaded.json"

_CHECKPOINT = re.compile(r"model_epoch_(?P<epoch>\d+)_step_(?P<step>\d+)\.pth")
_RECONSTRUCTION = re.compile(r"epoch_(?P<epoch>\d+)\.png")
_WEIGHTS = re.compile(r"\.pth(\.|$)")


class Position(NamedTuple):
    """Progress of a training run when it wrote a checkpoint; later positions compare greater."""

    epoch: int
    step: int


def checkpoint_name(epoch: int, step: int) -> str:
    """Return the name of a numbered checkpoint.

    >>> checkpoint_name(3, 120)
    'model_epoch_003_step_00120.pth'
    """
    return f"model_epoch_{epoch:03d}_step_{step:05d}{WEIGHTS_SUFFIX}"


def checkpoint_progress(name: str) -> Position | None:
    """Return the epoch and step in the name of a numbered checkpoint; None for any other name."""
    found = _CHECKPOINT.fullmatch(name)
    return Position(int(found["epoch"]), int(found["step"])) if found else None


def reconstruction_name(epoch: int) -> str:
    """Return the name of the image with the reconstructions after an epoch, counted from 1."""
    return f"epoch_{epoch:04d}.png"


def reconstruction_epoch(name: str) -> int | None:
    """Return the epoch in the name of such an image; None for any other name."""
    found = _RECONSTRUCTION.fullmatch(name)
    return int(found["epoch"]) if found else None


def sort_checkpoints(names: Iterable[str]) -> list[str]:
    """Return the names of the numbered checkpoints among ``names``, oldest first."""
    found = [(progress, name) for name in names if (progress := checkpoint_progress(name))]
    return [name for _, name in sorted(found)]


def is_numbered(name: str) -> bool:
    """Return whether a name is that of a numbered checkpoint, even one that was set aside."""
    return name.startswith("model_epoch_")


def latest_name(arch: str) -> str:
    """Return the name of the link to the newest checkpoint of an architecture."""
    return f"{arch}_latest{WEIGHTS_SUFFIX}"


def is_latest(name: str) -> bool:
    """Return whether a name is that of the link to the newest checkpoint."""
    return name.endswith(latest_name(""))


def holds_weights(name: str) -> bool:
    """Return whether a name is that of a checkpoint of any kind, set aside or not."""
    return _WEIGHTS.search(name) is not None
