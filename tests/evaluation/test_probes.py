"""Probes of frozen features."""

from __future__ import annotations

import logging

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from openmae.evaluation import probes
from openmae.evaluation.probes import knn_accuracy, linear_probe_accuracy, probe, scored_labels, split_half


def _blobs(classes: int = 4, per_class: int = 40, spread: float = 0.3) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    centres = np.eye(classes, 16)
    labels = np.repeat(np.arange(classes), per_class)
    return centres[labels] + spread * rng.normal(size=(len(labels), 16)), labels


@given(st.lists(st.integers(-1, 4), min_size=1, max_size=60))
def test_split_takes_half_of_every_class(labels: list[int]) -> None:
    counts = {label: labels.count(label) for label in set(labels) if label >= 0}
    if len(counts) < 2 or max(counts.values()) < 2:
        with pytest.raises(ValueError, match="a probe needs"):
            split_half(np.array(labels))
        return
    fit, score = split_half(np.array(labels))
    assert sorted([*fit, *score]) == [i for i, label in enumerate(labels) if label >= 0]
    for label, count in counts.items():
        assert sum(labels[i] == label for i in fit) == (count + 1) // 2
    again = split_half(np.array(labels))
    assert np.array_equal(fit, again[0])
    assert np.array_equal(score, again[1])


def test_the_scored_images_are_known_from_the_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    assert scored_labels(np.array([0, 0, -1, 1, 1, 1, -1])).tolist() == [0, 1]
    monkeypatch.setattr(probes, "MOST_PROBED", 50)
    features, labels = _blobs()
    assert (scored_labels(labels).size * probe(features, labels)["knn_acc"]).is_integer()
    assert 22 <= scored_labels(labels).size <= 25


@pytest.mark.parametrize("probe", [knn_accuracy, linear_probe_accuracy])
class TestBothProbes:
    def test_separable_classes_are_recognized(self, probe) -> None:  # type: ignore[no-untyped-def]
        assert probe(*_blobs(spread=0.05)) == 1.0

    def test_noise_stays_near_chance(self, probe) -> None:  # type: ignore[no-untyped-def]
        features, labels = _blobs(per_class=200)
        noise = np.random.default_rng(1).normal(size=features.shape)
        assert 0.15 < probe(noise, labels) < 0.35

    def test_is_deterministic(self, probe) -> None:  # type: ignore[no-untyped-def]
        assert probe(*_blobs()) == probe(*_blobs())

    def test_unlabelled_images_are_left_out(self, probe) -> None:  # type: ignore[no-untyped-def]
        features, labels = _blobs(spread=0.05)
        junk = np.full((30, features.shape[1]), 100.0)
        assert probe(np.vstack([features, junk]), np.append(labels, np.full(30, -1))) == 1.0

    def test_a_class_with_one_image_is_accepted(self, probe) -> None:  # type: ignore[no-untyped-def]
        features, labels = _blobs(spread=0.05)
        assert probe(features[:121], np.append(labels[:120], 9)) > 0.95

    def test_tiny_sets_are_an_error(self, probe) -> None:  # type: ignore[no-untyped-def]
        with pytest.raises(ValueError, match="at least 2 classes; the labels have 1"):
            probe(np.ones((5, 3)), np.zeros(5, dtype=int))
        with pytest.raises(ValueError, match="a class with at least 2 images; every class here has 1"):
            probe(np.ones((5, 3)), np.arange(5))


def test_knn_votes_by_similarity(monkeypatch: pytest.MonkeyPatch) -> None:
    """With k = 3, one neighbour at 0 degrees outvotes two at 60: exp(1 / .07) > 2 exp(.5 / .07)."""
    near, far = [1.0, 0.0], [0.5, np.sqrt(0.75)]
    features = np.array([near, near, far, far, far, far])
    labels = np.array([0, 0, 1, 1, 1, 1])
    monkeypatch.setattr(probes, "NEIGHBOURS", 3)
    assert knn_accuracy(features, labels) == 1.0


def test_knn_measures_angles_not_lengths() -> None:
    features, labels = _blobs(spread=0.05)
    scaled = features * np.random.default_rng(2).uniform(0.01, 100, size=(len(features), 1))
    assert knn_accuracy(scaled, labels) == 1.0


def test_knn_k_is_bounded_by_the_fit_half() -> None:
    features = np.array([[1.0, 0], [1, 0], [0, 1], [0, 1]])
    assert knn_accuracy(features, np.array([3, 3, 7, 7])) == 1.0


def test_knn_agrees_with_a_plain_loop() -> None:
    features, labels = _blobs(spread=0.8)
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    fit, score = split_half(labels)
    hits = 0
    for i in score:
        similarity = unit[fit] @ unit[i]
        nearest = np.argsort(-similarity)[:20]
        votes = np.bincount(labels[fit][nearest], np.exp(similarity[nearest] / 0.07), minlength=4)
        hits += votes.argmax() == labels[i]
    assert knn_accuracy(features, labels) == hits / len(score)


def test_one_class_is_a_warning(caplog):
    with caplog.at_level(logging.WARNING, "openmae"):
        assert probe(np.zeros((4, 2)), np.zeros(4, int)) == {}
    assert "images of at least 2 classes" in caplog.text


def test_features_that_are_not_finite_are_a_warning(caplog):
    with caplog.at_level(logging.WARNING, "openmae"):
        assert probe(np.full((4, 3), np.nan), np.array([0, 0, 1, 1])) == {}
    assert "No kNN or probe accuracy for this validation set: the features have non-finite values." in caplog.text


def test_a_large_set_is_probed_by_a_fixed_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(probes, "MOST_PROBED", 30)
    monkeypatch.setattr(probes, "knn_accuracy", lambda features, labels: seen.append(features) or 0.5)
    monkeypatch.setattr(probes, "linear_probe_accuracy", lambda features, labels: float(len(labels)))
    features, labels = np.arange(200.0).reshape(100, 2), np.arange(100) % 2
    assert probes.probe(features, labels) == probes.probe(features, labels) == {"knn_acc": 0.5, "probe_acc": 30.0}
    assert np.array_equal(*seen)
