"""The review of a search: its facts, its duration and its first trials."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.helpers.simulation import make_spec, open_study

from openmae.automl.preflight import Pace, estimate, preview, review_rows, show_review

COUNTS = {"train": 100, "val": 20, "classes": 2}


def test_review_of_early_stopping(tmp_path: Path) -> None:
    study = open_study(make_spec(tmp_path, algorithm="asha"))
    rows = dict(review_rows(study, COUNTS, Pace(start=3.0, images_per_s=50.0)))
    assert rows["metric"] == "train_loss, smaller is better"
    assert rows["budget"] == "6 trials of 9 epochs, compared after epoch 3 (about one in 3 continues)"
    assert rows["data"] == "100 training images, 20 validation images, 2 classes"
    assert rows["time"] == "about 0:01:24 (50 images/s)"  # 6 starts and 2 continued trials, 18 + 12 epochs of 2 s


def test_review_of_a_population(tmp_path: Path) -> None:
    study = open_study(make_spec(tmp_path, algorithm="pbt", max_recommendations=12, population_size=4))
    rows = dict(review_rows(study, COUNTS, None))
    assert rows["budget"] == "4 training runs of 9 epochs in 3 generations"
    assert "time" not in rows
    assert estimate(study, COUNTS, Pace(0.0, 50.0)) == 4 * 9 * 2


def test_concurrent_trials_take_less_time(tmp_path: Path) -> None:
    pace = Pace(start=0.0, images_per_s=50.0)
    one = estimate(open_study(make_spec(tmp_path / "1", algorithm="random")), COUNTS, pace)
    two = estimate(open_study(make_spec(tmp_path / "2", algorithm="random", max_concurrent=2)), COUNTS, pace)
    assert (one, two) == (6 * 9 * 2, 6 * 9)


def test_preview_shows_the_first_trials(tmp_path: Path) -> None:
    study = open_study(make_spec(tmp_path, algorithm="random"))
    held = [study.next() for _ in range(3)]
    assert preview(study) == [trial and trial.params for trial in held]


def test_preview_of_a_population_shows_its_first_generation(tmp_path: Path) -> None:
    settings = {"algorithm": "pbt", "population_size": 2, "max_recommendations": 6}
    assert len(preview(open_study(make_spec(tmp_path, **settings)))) == 2


def test_show_review(tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    study = open_study(make_spec(tmp_path, parameters=["train.optim.lr", "model.mask_ratio"]))
    with caplog.at_level("INFO", logger="openmae"):
        show_review(study, COUNTS, None)
    text = capsys.readouterr().err
    assert "train.optim.lr    2e-05 to 0.005, log  0.0002" in text
    assert "0  lr 2e-4, mask_ratio 0.75   (yours)" in text
    show_review(open_study(make_spec(tmp_path / "2", ranges={"train.optim.lr": [1e-3, 2e-3]})), COUNTS, None)
    assert "(yours)" not in capsys.readouterr().err, "the first trial has another learning rate"
    assert "Reconstruction losses can be compared only at the same difficulty" in caplog.text
    assert "The validation images have 2 classes: automl.metric=knn_acc" in caplog.text
