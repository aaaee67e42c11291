"""Measure the quality of frozen features with a kNN and a linear probe.

A probe is fitted on one half of each class of a labelled set and tested on the other half, so a validation set is
sufficient.
"""

from __future__ import annotations

import logging
import warnings
from typing import Any

import numpy as np
from numpy.typing import NDArray

KNN_TEMPERATURE = 0.07
NEIGHBOURS = 20  # that vote
MOST_PROBED = 10_000  # images
_CHUNK = 1024  # rows of the similarity matrix computed at once

log = logging.getLogger("openmae")

Array = NDArray[Any]


def probe(features: Array, labels: Array) -> dict[str, float]:
    """Return ``knn_acc`` and ``probe_acc`` of frozen features ``[N, D]``.

    The result is empty, with a warning, if the set is too small or features are not finite. If it has more than
    ``MOST_PROBED`` images, a random but fixed subset is used.
    """
    some = _subset(len(labels))
    features, labels = features[some], labels[some]
    try:
        if not np.isfinite(features).all():
            raise ValueError("the features have non-finite values")
        return {"knn_acc": knn_accuracy(features, labels), "probe_acc": linear_probe_accuracy(features, labels)}
    except ValueError as error:
        log.warning("No kNN or probe accuracy for this validation set: %s.", error)
        return {}


def scored_labels(labels: Array) -> Array:
    """Return the labels of the images that ``probe`` scores, of all labels ``[N]`` of a set.

    Raises:
        ValueError: the set is too small; see ``split_half``.
    """
    known = labels[labels >= 0]
    known = known[_subset(len(known))]
    return known[split_half(known)[1]]


def _subset(count: int) -> Array | slice:
    if count <= MOST_PROBED:
        return slice(None)
    return np.random.default_rng(0).choice(count, MOST_PROBED, replace=False)


def split_half(labels: Array) -> tuple[Array, Array]:
    """Split a labelled set into two random but fixed halves, class by class.

    Args:
        labels: ``[N]`` class numbers; negative ones (unlabelled) are left out.

    Returns:
        ``(fit, score)``: sorted indices into ``labels``. If a class has an odd number of images, ``fit`` gets one more,
        so a class with a single image is never scored.

    Raises:
        ValueError: fewer than two classes, or no class with two images.
    """
    classes, counts = np.unique(labels[labels >= 0], return_counts=True)
    if len(classes) < 2:
        raise ValueError(f"a probe needs images of at least 2 classes; the labels have {len(classes)}")
    if counts.max() < 2:
        raise ValueError("a probe needs a class with at least 2 images; every class here has 1")
    rng = np.random.default_rng(0)
    fit, score = [], []
    for label, count in zip(classes, counts, strict=True):
        members = rng.permutation(np.flatnonzero(labels == label))
        fit.append(members[: (count + 1) // 2])
        score.append(members[(count + 1) // 2 :])
    return np.sort(np.concatenate(fit)), np.sort(np.concatenate(score))


def knn_accuracy(features: Array, labels: Array) -> float:
    """Return the top-1 accuracy of a weighted nearest-neighbour vote on cosine similarity, in [0, 1].

    The 20 nearest images vote for their class with weight exp(similarity / 0.07): Wu et al. 2018 (arXiv:1805.01978), as
    in the evaluation of DINO (arXiv:2104.14294).

    Args:
        features: ``[N, D]``.
        labels: ``[N]`` class numbers; negative means unlabelled.

    Raises:
        ValueError: the set is too small; see ``split_half``.
    """
    fit, score = split_half(labels)
    x = features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
    k = min(NEIGHBOURS, len(fit))
    classes, fit_class = np.unique(labels[fit], return_inverse=True)
    hits = 0
    for start in range(0, len(score), _CHUNK):
        rows = score[start : start + _CHUNK]
        similarity = x[rows] @ x[fit].T
        nearest = np.argpartition(-similarity, k - 1, axis=1)[:, :k]
        weights = np.exp(np.take_along_axis(similarity, nearest, axis=1) / KNN_TEMPERATURE)
        votes = np.zeros((len(rows), len(classes)))
        np.add.at(votes, (np.arange(len(rows))[:, None], fit_class[nearest]), weights)
        hits += int((classes[votes.argmax(axis=1)] == labels[rows]).sum())
    return hits / len(score)


def linear_probe_accuracy(features: Array, labels: Array) -> float:
    """Return the top-1 accuracy of a logistic regression on standardised features, in [0, 1].

    This is fast and deterministic; papers usually train a linear layer for 90 epochs with augmentation instead. The
    arguments and errors are the same as for ``knn_accuracy``.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    fit, score = split_half(labels)
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=300))
    with warnings.catch_warnings():
        # more than 300 iterations do not change the digits that are reported
        warnings.simplefilter("ignore", ConvergenceWarning)
        probe.fit(features[fit], labels[fit])
    return float(probe.score(features[score], labels[score]))
