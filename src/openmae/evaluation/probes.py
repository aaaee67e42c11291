"""Probes: how good frozen features are, measured without training the encoder.

Both take the features [N, D] and labels [N] of one labelled set, fit on one half of every class and
score the other half, so a validation set alone is enough to see whether pretraining works.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
from numpy.typing import NDArray

KNN_TEMPERATURE = 0.07
_CHUNK = 1024  # rows of the similarity matrix held at once

Array = NDArray[Any]


def split_half(labels: Array, seed: int = 0) -> tuple[Array, Array]:
    """Split a labelled set into two halves, class by class.

    Args:
        labels: [N] class numbers; negative means unlabelled, and is left out.
        seed: of the split; the same seed and labels give the same split.

    Returns:
        (fit, score): sorted indices into ``labels``. An odd class has one image more to fit on, so a class
        with a single image is learnt but never scored.

    Raises:
        ValueError: fewer than two classes, or no class with two images.
    """
    labels = np.asarray(labels)
    classes, counts = np.unique(labels[labels >= 0], return_counts=True)
    if len(classes) < 2:
        raise ValueError(f"a probe needs images of at least 2 classes; the labels hold {len(classes)}")
    if counts.max() < 2:
        raise ValueError("a probe needs a class with at least 2 images; every class here has 1")
    rng = np.random.default_rng(seed)
    fit, score = [], []
    for label, count in zip(classes, counts, strict=True):
        members = rng.permutation(np.flatnonzero(labels == label))
        fit.append(members[: (count + 1) // 2])
        score.append(members[(count + 1) // 2 :])
    return np.sort(np.concatenate(fit)), np.sort(np.concatenate(score))


def knn_accuracy(features: Array, labels: Array, k: int = 20, *, seed: int = 0) -> float:
    """Top-1 accuracy of a weighted nearest-neighbour vote on cosine similarity.

    The k nearest images vote for their class with weight exp(similarity / 0.07). Wu et al. 2018
    (arXiv:1805.01978), as in DINO's evaluation (arXiv:2104.14294), on one half of ``features``.

    Args:
        features: [N, D], one row an image.
        labels: [N] class numbers; negative means unlabelled.
        k: neighbours that vote; bounded by the size of the fit half.
        seed: of the split.

    Returns:
        A share in [0, 1].

    Raises:
        ValueError: the set is too small (see ``split_half``), shapes differ, or features are not finite.
    """
    x, y = _check(features, labels)
    fit, score = split_half(y, seed)
    x = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
    k = min(k, len(fit))
    classes, fit_class = np.unique(y[fit], return_inverse=True)
    hits = 0
    for start in range(0, len(score), _CHUNK):
        rows = score[start : start + _CHUNK]
        similarity = x[rows] @ x[fit].T
        nearest = np.argpartition(-similarity, k - 1, axis=1)[:, :k]
        weights = np.exp(np.take_along_axis(similarity, nearest, axis=1) / KNN_TEMPERATURE)
        votes = np.zeros((len(rows), len(classes)))
        np.add.at(votes, (np.arange(len(rows))[:, None], fit_class[nearest]), weights)
        hits += int((classes[votes.argmax(axis=1)] == y[rows]).sum())
    return hits / len(score)


def linear_probe_accuracy(features: Array, labels: Array, *, seed: int = 0) -> float:
    """Top-1 accuracy of a logistic regression on standardised features.

    Fitted on one half of ``features``, scored on the other (see ``split_half``). Not the papers' 90-epoch
    probe with augmentation: a quick, deterministic reading of what is linearly separable.

    Args:
        features: [N, D], one row an image.
        labels: [N] class numbers; negative means unlabelled.
        seed: of the split.

    Returns:
        A share in [0, 1].

    Raises:
        ValueError: as for ``knn_accuracy``.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    x, y = _check(features, labels)
    fit, score = split_half(y, seed)
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=300))
    with warnings.catch_warnings():
        # A probe stopped at 300 iterations reads the same to the digit that is shown.
        warnings.simplefilter("ignore", ConvergenceWarning)
        probe.fit(x[fit], y[fit])
    return float(probe.score(x[score], y[score]))


def _check(features: Array, labels: Array) -> tuple[Array, Array]:
    x, y = np.asarray(features, dtype=np.float32), np.asarray(labels)
    if x.ndim != 2 or y.shape != x.shape[:1]:
        raise ValueError(f"features must be [N, D] and labels [N]; got {x.shape} and {y.shape}")
    if not np.isfinite(x).all():
        raise ValueError("the features hold values that are not finite")
    return x, y
