"""The verdict on a training run, one test per case."""

from __future__ import annotations

from dataclasses import replace

import pytest

from openmae.results.metrics_csv import Row
from openmae.results.verdict import Evidence, ScoredImages, give_verdict

SCORED = ScoredImages(250, 10, 0.1)
STEPS = 1_000  # per epoch


def rows(before: dict[str, float], *epochs: dict[str, float]) -> list[Row]:
    """The rows of a run, at 500 images per second."""
    found: list[Row] = [{"step": 0, "epoch": 0, **before}] if before else []
    for number, metrics in enumerate(epochs, 1):
        found.append({"step": number * STEPS, "epoch": number, "train_loss": 0.5, "images_per_s": 500})
        found.append({"step": number * STEPS, "epoch": number, **metrics})
    return found


def evidence(*measured: Row, stage: str = "pretrain", scored: ScoredImages | None = SCORED, **kept: str) -> Evidence:
    return Evidence(stage, measured, scored, 100, {int(epoch[1:]) * STEPS: name for epoch, name in kept.items()})


def probes(probe: float, knn: float) -> dict[str, float]:
    return {"val_loss": 0.5, "probe_acc": probe, "knn_acc": knn}


def short(given: Evidence, steps: int) -> Evidence:
    """The same run with fewer updates."""
    return replace(given, rows=[row | {"step": round(row["step"] * steps / given.steps)} for row in given.rows])


def test_the_features_improved() -> None:
    run = evidence(*rows(probes(0.571, 0.5), probes(0.65, 0.55), probes(0.732, 0.602)))
    assert give_verdict(run) == (
        "Linear probe: 57.1 % before, 73.2 % after 2,000 steps; kNN: 50.0 % before, 60.2 % after: the features "
        "improved by 16.1 points."
    )


def test_only_one_measure_improved() -> None:
    run = evidence(*rows(probes(0.571, 0.5), probes(0.572, 0.65)))
    assert give_verdict(run).endswith("kNN: 50.0 % before, 65.0 % after: the features improved by 15.0 points (kNN).")


def test_the_measures_contradict_each_other() -> None:
    run = evidence(*rows(probes(0.571, 0.8), probes(0.8, 0.571)))
    assert "the linear probe improved and the kNN got worse, so the gain is unclear. Too few updates" in give_verdict(
        run
    )


def test_a_difference_within_the_noise_is_no_change() -> None:
    """The standard error of 57 % of 250 images is 3.1 points, of 25,000 images 0.3 points."""
    measured = rows(probes(0.571, 0.5), *[probes(0.62, 0.52)] * 3)
    few, many = (evidence(*measured, scored=replace(SCORED, count=count)) for count in (250, 25_000))
    assert give_verdict(few) == (
        "Linear probe: 57.1 % before, 62.0 % after 3,000 steps; kNN: 50.0 % before, 52.0 % after: no change beyond the "
        "noise of 250 scored images (6.2 points). Try more epochs, another train.optim.lr or more images."
    )
    assert give_verdict(many).endswith("the features improved by 4.9 points.")


@pytest.mark.parametrize(
    ("steps", "advice"),
    [
        (42, "Too few updates: 2,000 would take 7 minutes (train.num_epochs=48)."),
        (1_999, "Too few updates: 2,000 would take 7 minutes (train.num_epochs=2)."),
        (2_000, "Try more epochs, another train.optim.lr or more images."),
    ],
)
def test_too_few_updates(steps: int, advice: str) -> None:
    run = short(evidence(*rows(probes(0.571, 0.571), probes(0.571, 0.571))), steps)
    assert give_verdict(run) == (
        f"Linear probe: 57.1 % before, 57.1 % after {steps:,} steps; kNN: 57.1 % before, 57.1 % after: no change "
        f"beyond the noise of 250 scored images (6.3 points). {advice}"
    )


@pytest.mark.parametrize(
    ("speed", "time"),
    [(400_000, "1 second"), (3_000, "67 seconds"), (50, "67 minutes"), (10, "6 hours"), (1, "2 days")],
)
def test_the_time_that_enough_updates_would_take(speed: float, time: str) -> None:
    run = short(evidence(*rows(probes(0.5, 0.5), probes(0.5, 0.5))), 42)
    slow = replace(run, rows=[row | ({"images_per_s": speed} if "images_per_s" in row else {}) for row in run.rows])
    assert f"2,000 would take {time} (" in give_verdict(slow)
    unknown = replace(run, rows=[row for row in run.rows if "images_per_s" not in row])
    assert "2,000 are usual (" in give_verdict(unknown)


def test_the_features_got_worse() -> None:
    run = evidence(*rows(probes(0.8, 0.8), *[probes(0.6, 0.8)] * 3))
    assert give_verdict(run).endswith(": the features got worse by 20.0 points. Try a lower train.optim.lr.")
    run = evidence(*rows(probes(0.8, 0.8), *[probes(0.8, 0.6)] * 3))
    assert give_verdict(run).endswith(": the features got worse by 20.0 points (kNN). Try a lower train.optim.lr.")


@pytest.mark.parametrize(
    ("kept", "where"),
    [
        ({"e2": "model_best.pth"}, "model_best.pth is from that epoch."),
        (
            {"e3": "model_best.pth"},
            "no checkpoint of that epoch is kept; train.optim.monitor_name=knn_acc keeps it as model_best.pth.",
        ),
    ],
)
def test_an_accuracy_that_peaked_earlier(kept: dict[str, str], where: str) -> None:
    measured = rows(probes(0.5, 0.5), probes(0.6, 0.6), probes(0.75, 0.8), probes(0.73, 0.6))
    said = give_verdict(evidence(*measured, **kept))
    assert said.endswith(f"improved by 23.0 points. The kNN was best after epoch 2 (80.0 %): {where}"), (
        "two points of the linear probe are noise"
    )


def test_accuracies_without_those_before_the_first_step() -> None:
    assert give_verdict(evidence(*rows({}, probes(0.7, 0.6)))) == (
        "Linear probe: 70.0 % after 1,000 steps; kNN: 60.0 % after; chance is 10.0 %. They were not measured before "
        "the first step, so the gain is unknown."
    )


def test_unlabelled_validation_images() -> None:
    run = evidence(*rows({"val_loss": 1.02}, {"val_loss": 0.9}, {"val_loss": 0.5}), scored=None)
    assert give_verdict(run) == (
        "Validation loss: 1.0200 before, 0.5000 after 2,000 steps. A lower loss does not prove better features. Use "
        "validation images in one folder per class, at least two in each, to measure a linear probe and kNN."
    )
    assert "0.5000 after 42 steps. Too few updates: 2,000 would take 7 minutes" in give_verdict(short(run, 42))


def test_a_validation_loss_that_was_lower_or_did_not_fall() -> None:
    losses = [{"val_loss": loss} for loss in (0.9, 0.6, 0.9)]
    said = give_verdict(evidence(*rows({"val_loss": 1.0}, *losses), scored=None, e2="model_best.pth"))
    assert "It was lowest after epoch 2 (0.6000): model_best.pth is from that epoch. A lower loss does" in said
    said = give_verdict(evidence(*rows({"val_loss": 0.8}, *losses), scored=None))
    assert (
        "It was lowest after epoch 2 (0.6000): no checkpoint of that epoch is kept; train.optim.monitor_name=val_"
        in said
    )
    assert "It did not fall: try a lower train.optim.lr." in said
    assert "A lower loss" not in said


def test_no_validation_images() -> None:
    run = evidence(*rows({}, *[{"train_loss_epoch": loss} for loss in (0.9, 0.8, 0.5)]), scored=None)
    assert give_verdict(run) == (
        "Training loss: 0.9000 in epoch 1, 0.5000 in epoch 3. The training loss does not show whether the features "
        "improved: set dataset.val_data_sources to images in one folder per class, at least two in each, to "
        "measure a linear probe and kNN."
    )
    assert give_verdict(evidence(scored=None)).startswith("The training loss does not show"), "without metrics.csv"
    one = evidence(*rows({}, {"train_loss_epoch": 0.9}), scored=None)
    assert give_verdict(one).startswith(
        "Training loss: 0.9000 in epoch 1. Too few updates: 2,000 would take 7 minutes ("
    )
    assert give_verdict(replace(run, stage="finetune")) == (
        "Training loss: 0.9000 in epoch 1, 0.5000 in epoch 3. The accuracy was not measured: set "
        "dataset.val_data_sources to labelled images."
    )


def classifier(*accuracies: float, loss: float = 1.9, scored: ScoredImages = SCORED, **kept: str) -> Evidence:
    before, *epochs = ({"ACC_all": accuracy, "ACC_top5": 0.9, "train_loss_epoch": loss} for accuracy in accuracies)
    return evidence(*rows(before, *epochs), stage="finetune", scored=scored, **kept)


def test_a_classifier_is_compared_with_chance() -> None:
    assert give_verdict(classifier(0.1, 0.9, 0.93, 0.92, e2="model_best.pth")) == (
        "Top-1 accuracy: 92.0 % after 3 epochs; chance is 10.0 %. It was best after epoch 2 (93.0 %): model_best.pth "
        "is from that epoch."
    )
    assert give_verdict(classifier(0.1, 0.9, 0.93, 0.93)) == "Top-1 accuracy: 93.0 % after 3 epochs; chance is 10.0 %."
    uneven = ScoredImages.of([0] * 30 + [1] * 10)
    assert uneven == ScoredImages(40, 2, 0.75)
    assert "; guessing the most frequent class gives 75.0 %" in give_verdict(classifier(0.75, 0.99, scored=uneven))


def test_a_classifier_that_still_improves() -> None:
    said = give_verdict(classifier(0.1, 0.5, 0.6, 0.7, 0.8))
    assert said == (
        "Top-1 accuracy: 80.0 % after 4 epochs; chance is 10.0 %. It was still rising: raise train.num_epochs (4)."
    )
    assert "still rising" in give_verdict(classifier(0.1, 0.5)), "after one epoch"
    assert "still rising" not in give_verdict(classifier(0.1, 0.5, 0.79, 0.79, 0.8))


def test_a_classifier_that_got_worse() -> None:
    said = give_verdict(classifier(0.1, 0.8, 0.93, 0.7, e2="model_best.pth"))
    assert said.endswith(
        "It was best after epoch 2 (93.0 %): model_best.pth is from that epoch. Then it fell: use fewer epochs or "
        "stronger augmentation."
    )


def test_a_classifier_at_chance() -> None:
    start = "Top-1 accuracy: 12.0 % after 3 epochs; chance is 10.0 %: no better than chance. "
    assert give_verdict(classifier(0.1, 0.1, 0.1, 0.12, loss=0.2)) == start + (
        "The training loss is low (0.2000): check the labels of both sets, and use stronger augmentation "
        "(dataset.augmentation)."
    )
    stuck = classifier(0.1, 0.1, 0.1, 0.12, loss=2.3)
    assert give_verdict(stuck) == f"{start}Try another train.optim.lr, and check the labels."
    assert (
        give_verdict(short(stuck, 120)) == f"{start}Too few updates: 2,000 would take 7 minutes (train.num_epochs=50)."
    )


def test_few_images_are_noisy_at_100_percent_too() -> None:
    assert ScoredImages(3, 3, 1 / 3).noise(1.0) == pytest.approx(2 * (0.8 * 0.2 / 3) ** 0.5)
    assert ScoredImages(10_000, 2, 0.5).noise(0.4, 0.6) == pytest.approx(0.01, rel=1e-3)


def test_chance_is_that_of_the_most_frequent_class() -> None:
    assert ScoredImages.of([0, 0, 1, 1]).chance_name == "chance"
    assert ScoredImages.of([0, 0, 0, 1]).chance_name == "most frequent class"
