"""The verdict on a training run: whether it improved the features, by how much, and what to try if it did not."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from openmae.results.metrics_csv import Row, before_training
from openmae.spec.metrics import EPOCH_TRAIN_LOSS, METRICS, is_share, metrics_of
from openmae.storage.printable import counted

LEAST_UPDATES = 2_000  # a rule of thumb: a run without a gain and with fewer updates should be longer
_STANDARD_ERRORS = 2.0  # of an accuracy: smaller differences count as noise
_LOSS_NOISE = 0.01  # relative difference of two losses that counts as noise
_LOW_LOSS = 0.5  # of the cross entropy of guessing
_RECENT = 0.8  # an accuracy is still rising if it has risen since this fraction of the epochs
_PROOF = "images in one folder per class, at least two in each, to measure a linear probe and kNN"


@dataclass(frozen=True)
class ScoredImages:
    """The labelled validation images on which an accuracy is measured.

    Attributes:
        count: number of images.
        classes: number of their classes.
        chance: the accuracy of always guessing the most frequent class, at least 1 / classes.
    """

    count: int
    classes: int
    chance: float

    @classmethod
    def of(cls, labels: Iterable[int]) -> ScoredImages:
        """Count the class numbers of the images."""
        counts = Counter(labels)
        return cls(counts.total(), len(counts), max(counts.values()) / counts.total())

    @property
    def chance_name(self) -> str:
        """The name of the chance level: that of the most frequent class, if it is not only 1 / classes."""
        return "chance" if self.chance * self.classes < 1.005 else "most frequent class"

    def noise(self, *accuracies: float) -> float:
        """Return the largest difference of the accuracies that counts as noise: two binomial standard errors.

        One hit and one miss are added, because the standard error of few images would be 0 at 0 % and 100 %.
        """
        mean = (sum(accuracies) / len(accuracies) * self.count + 1) / (self.count + 2)
        return _STANDARD_ERRORS * math.sqrt(mean * (1 - mean) / self.count)


@dataclass(frozen=True)
class Evidence:
    """The facts of a finished training run.

    Attributes:
        stage: ``pretrain`` or ``finetune``.
        rows: the content of ``metrics.csv``.
        scored: the images on which accuracies are measured, or None without labels.
        images_per_step: images in an update of the weights.
        kept: the checkpoint files by the step that they were written after.
    """

    stage: str
    rows: Sequence[Row]
    scored: ScoredImages | None
    images_per_step: int
    kept: Mapping[int, str]

    def measured(self, metric: str) -> list[Row]:
        """Return the rows after the first step that have a metric."""
        return [row for row in self.rows if metric in row and row["step"] > 0]

    @property
    def steps(self) -> int:
        """The number of updates."""
        return int(self.rows[-1]["step"]) if self.rows else 0

    @property
    def epochs(self) -> int:
        """The number of epochs."""
        return int(self.rows[-1]["epoch"]) if self.rows else 0


def give_verdict(evidence: Evidence) -> str:
    """Return in some sentences whether a run improved the features, and what to try if it did not."""
    accuracies = [name for name in metrics_of(evidence.stage) if is_share(name) and evidence.measured(name)]
    if evidence.stage == "finetune" and accuracies and evidence.scored:
        return _of_classifier(evidence, evidence.scored, accuracies[0])
    if accuracies and evidence.scored:
        return _of_features(evidence, evidence.scored, accuracies)
    return _of_validation_loss(evidence) if evidence.measured("val_loss") else _of_training_loss(evidence)


def _of_features(evidence: Evidence, scored: ScoredImages, metrics: Sequence[str]) -> str:
    before = before_training(evidence.rows)
    after = {name: evidence.measured(name)[-1][name] for name in metrics}
    peaks = [text for name in metrics if (text := _peak(evidence, scored, name))][:1]
    known = before.keys() >= after.keys()
    begins = {name: f"{_percent(before[name])} before, " if known else "" for name in metrics}
    measured = [f"{_short(name)}: {begins[name]}{_percent(value)} after" for name, value in after.items()]
    measured[0] += f" {counted(evidence.steps, 'step')}"
    shown = _capital("; ".join(measured))
    if not known:
        unknown = "They were not measured before the first step, so the gain is unknown."
        return " ".join([f"{shown}; {_chance(scored)}.", unknown, *peaks])
    said, advice = _conclude(scored, before, after)
    advice = advice and (_more_updates(evidence) or advice)
    return " ".join(filter(None, [f"{shown}: {said}.", *peaks, advice]))


def _conclude(scored: ScoredImages, before: Row, after: Row) -> tuple[str, str]:
    """Return the change of the features in words, and what to try if it is not a clear gain."""
    gains = {name: after[name] - before[name] for name in after}
    clear = {name: gain for name, gain in gains.items() if abs(gain) > scored.noise(before[name], after[name])}
    first = next(iter(after))
    if not clear:
        noise = 100 * scored.noise(before[first], after[first])
        said = f"no change beyond the noise of {counted(scored.count, 'scored image')} ({noise:.1f} points)"
        return said, "Try more epochs, another train.optim.lr or more images."
    rose, fell = [[_short(name) for name in clear if clear[name] * sign > 0] for sign in (1, -1)]
    if rose and fell:
        return f"the {rose[0]} improved and the {fell[0]} got worse, so the gain is unclear", "Try more epochs."
    metric, gain = next(iter(clear.items()))
    points = f"{100 * abs(gain):.1f} points" + (f" ({_short(metric)})" if metric != first else "")
    if rose:
        return f"the features improved by {points}", ""
    return f"the features got worse by {points}", "Try a lower train.optim.lr."


def _peak(evidence: Evidence, scored: ScoredImages, metric: str) -> str:
    """Return when an accuracy was best, if that was clearly better than at the end."""
    rows = evidence.measured(metric)
    best, last = max(rows, key=lambda row: row[metric]), rows[-1]
    if best[metric] - last[metric] <= scored.noise(best[metric], last[metric]):
        return ""
    return f"The {_short(metric)} was best after epoch {best['epoch']} ({_percent(best[metric])}): " + _where(
        evidence, best, metric
    )


def _where(evidence: Evidence, row: Row, metric: str) -> str:
    if file := evidence.kept.get(int(row["step"])):
        return f"{file} is from that epoch."
    return f"no checkpoint of that epoch is kept; train.optim.monitor_name={metric} keeps it as model_best.pth."


def _of_validation_loss(evidence: Evidence) -> str:
    rows, before = evidence.measured("val_loss"), before_training(evidence.rows).get("val_loss")
    lowest, last = min(rows, key=lambda row: row["val_loss"]), rows[-1]
    end = f"{last['val_loss']:.4f} after {counted(evidence.steps, 'step')}"
    said = f"Validation loss: {end}." if before is None else f"Validation loss: {before:.4f} before, {end}."
    texts = [said, _more_updates(evidence)]
    if last["val_loss"] > (1 + _LOSS_NOISE) * lowest["val_loss"]:
        texts.append(
            f"It was lowest after epoch {lowest['epoch']} ({lowest['val_loss']:.4f}): "
            + _where(evidence, lowest, "val_loss")
        )
    if before is not None and last["val_loss"] >= before:
        texts.append("It did not fall: try a lower train.optim.lr.")
    elif evidence.stage == "pretrain":
        texts.append("A lower loss does not prove better features.")
    if evidence.stage == "pretrain":
        texts.append(f"Use validation {_PROOF}.")
    return " ".join(filter(None, texts))


def _of_training_loss(evidence: Evidence) -> str:
    rows = evidence.measured(EPOCH_TRAIN_LOSS)
    texts = [f"Training loss: {_epoch_loss(row)}" for row in rows[:1]]
    texts += [_epoch_loss(row) for row in rows[1:][-1:]]
    said = f"{', '.join(texts)}." if texts else ""
    if evidence.stage == "finetune":
        fix = "The accuracy was not measured: set dataset.val_data_sources to labelled images."
        return " ".join(filter(None, [said, fix]))
    unknown = (
        f"The training loss does not show whether the features improved: set dataset.val_data_sources to {_PROOF}."
    )
    return " ".join(filter(None, [said, _more_updates(evidence), unknown]))


def _epoch_loss(row: Row) -> str:
    return f"{row[EPOCH_TRAIN_LOSS]:.4f} in epoch {row['epoch']}"


def _of_classifier(evidence: Evidence, scored: ScoredImages, metric: str) -> str:
    rows = evidence.measured(metric)
    best, last = max(rows, key=lambda row: row[metric]), rows[-1]
    gain, epochs = best[metric] - scored.chance, counted(evidence.epochs, "epoch")
    said = f"{_capital(METRICS[metric].label)}: {_percent(last[metric])} after {epochs}; {_chance(scored)}"
    if gain <= scored.noise(scored.chance, best[metric]):
        return f"{said}: no better than chance. {_why_at_chance(evidence, scored)}"
    was = f"It was best after epoch {best['epoch']} ({_percent(best[metric])})"
    if best[metric] - last[metric] > scored.noise(best[metric], last[metric]):
        where = _where(evidence, best, metric)
        return f"{said}. {was}: {where} Then it fell: use fewer epochs or stronger augmentation."
    if _is_rising(evidence, scored, metric):
        return f"{said}. It was still rising: raise train.num_epochs ({evidence.epochs})."
    return f"{said}. {was}: {_where(evidence, best, metric)}" if best[metric] > last[metric] else f"{said}."


def _is_rising(evidence: Evidence, scored: ScoredImages, metric: str) -> bool:
    last = evidence.measured(metric)[-1]
    earlier = [row for row in evidence.rows if metric in row and row["epoch"] <= _RECENT * last["epoch"]]
    return bool(earlier) and last[metric] - earlier[-1][metric] > scored.noise(last[metric], earlier[-1][metric])


def _why_at_chance(evidence: Evidence, scored: ScoredImages) -> str:
    losses = evidence.measured(EPOCH_TRAIN_LOSS)
    if losses and losses[-1][EPOCH_TRAIN_LOSS] < _LOW_LOSS * math.log(max(scored.classes, 2)):
        return (
            f"The training loss is low ({losses[-1][EPOCH_TRAIN_LOSS]:.4f}): check the labels of both sets, and use "
            "stronger augmentation (dataset.augmentation)."
        )
    return _more_updates(evidence) or "Try another train.optim.lr, and check the labels."


def _more_updates(evidence: Evidence) -> str:
    """Return that the run had too few updates, and the time that enough would take; empty if it had enough."""
    if not 0 < evidence.steps < LEAST_UPDATES:
        return ""
    speeds = [row["images_per_s"] for row in evidence.rows if row.get("images_per_s", 0) > 0]
    took = f" would take {_time(LEAST_UPDATES * evidence.images_per_step / median(speeds))}" if speeds else " are usual"
    epochs = math.ceil(LEAST_UPDATES * evidence.epochs / evidence.steps)
    return f"Too few updates: {LEAST_UPDATES:,}{took} (train.num_epochs={epochs})."


def _time(seconds: float) -> str:
    for unit, length in (("day", 86400), ("hour", 3600), ("minute", 60)):
        if seconds >= 1.5 * length:
            return counted(round(seconds / length), unit)
    return counted(max(1, round(seconds)), "second")


def _chance(scored: ScoredImages) -> str:
    if scored.chance_name == "chance":
        return f"chance is {_percent(scored.chance)}"
    return f"guessing the {scored.chance_name} gives {_percent(scored.chance)}"


def _short(metric: str) -> str:
    return METRICS[metric].short


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
