"""``report.html`` of a search: the best values beside the spec's own, its pictures, every recommendation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import optuna
from optuna.trial import TrialState

from openmae.automl.objective import MISLEADS, misleading
from openmae.automl.preflight import review_rows
from openmae.automl.study import CAUSE, NUMBER, Study
from openmae.automl.terminal import duration, value_words
from openmae.results.report import Code, Numbers, Picture, Section, Table, Text, write_report
from openmae.results.search_section import save_history, save_importances, save_parallel_coordinates, save_slices
from openmae.results.trials import Trial, best_trial, short_names
from openmae.spec.schema import ExperimentSpec
from openmae.storage import layout
from openmae.storage.atomic import make_folder

_ENOUGH = 4  # complete recommendations from which importances say something


def write_study_report(
    folder: Path,
    spec: ExperimentSpec,
    study: Study,
    baseline: Mapping[str, float],
    final: Mapping[str, float],
    counts: Mapping[str, int],
) -> Path:
    """Draw the pictures into ``folder/pictures`` and write ``folder/report.html``.

    Args:
        folder: of the search.
        spec: of the search.
        study: with at least one complete recommendation.
        baseline, final: what evaluation measured of the starting checkpoint and of the best one; may be empty.
        counts: of the images.
    """
    trials, objective = study.shown(), study.objective
    best = best_trial(trials, maximize=objective.maximize)
    assert best is not None
    own = next((trial for trial in trials if trial.number == 0 and trial.state == "complete"), None)
    numbers = {f"best {objective.metric}": objective.shown(best.value)}
    if own is not None:
        numbers["your values"] = objective.shown(own.value)
    keys = [item.key for item in study.space.parameters]
    sections: list[Section] = [
        Numbers("", numbers),
        _best_values(study, best, own, keys),
        *_evaluations(baseline, final),
        *_pictures(folder, study, trials),
        *_misleading(spec, study, keys, counts),
        _all_trials(study, trials, keys),
        Table("How it was searched", ("", ""), review_rows(spec, study, counts, None)),
        Code(layout.BEST_SPEC, (folder / layout.BEST_SPEC).read_text(encoding="utf-8")),
    ]
    subtitle = f"{spec.model.arch} · {spec.train.stage} · {study.algorithm.name}, {len(trials)} recommendations"
    return write_report(folder, "OpenMAE search", sections, subtitle=subtitle)


def _best_values(study: Study, best: Trial, own: Trial | None, keys: Sequence[str]) -> Table:
    yours = {item.key: item.own for item in study.space.parameters}
    rows = [
        (key, value_words(best.params[key]), "" if yours[key] is None else value_words(yours[key]))
        for key in keys
        if key in best.params
    ]
    note = "" if own is None or own.number != best.number else " Nothing was better than your own values."
    return Table(
        "Best values",
        ("option", "best", "yours"),
        rows,
        caption=f"Of recommendation {best.number}; in best.yaml.{note}",
    )


def _evaluations(baseline: Mapping[str, float], final: Mapping[str, float]) -> list[Section]:
    if not final:
        return []
    names = list(dict.fromkeys((*final, *baseline)))
    rows = [(name, baseline.get(name), final.get(name)) for name in names]
    caption = (
        "Measured by mae evaluate on the validation images, by which the search has chosen as well: on images that "
    )
    caption += "neither has seen, expect a little less."
    if baseline:
        return [Table("Evaluation", ("metric", "starting checkpoint", "best"), rows, caption=caption)]
    return [Table("Evaluation", ("metric", "best"), [(name, value) for name, _, value in rows], caption=caption)]


def _pictures(folder: Path, study: Study, trials: Sequence[Trial]) -> list[Section]:
    objective, log_keys = study.objective, study.space.log_keys
    where = make_folder(folder / layout.CHARTS)
    told = {"metric": objective.metric, "maximize": objective.maximize}
    drawn = [
        (
            "History",
            save_history(trials, where / "history.png", metric=objective.metric, maximize=objective.maximize),
            "Each recommendation's value, and the best so far.",
        ),
        (
            "Parallel coordinates",
            save_parallel_coordinates(trials, where / "parallel_coordinates.png", log=log_keys, **told),  # type: ignore[arg-type]
            "A line is a recommendation: from its values to its metric.",
        ),
        (
            "Importances",
            save_importances(importances(study), where / "importances.png"),
            "How much of the metric's spread each option explains (fANOVA); from few recommendations, a hint at most.",
        ),
        (
            "Slices",
            save_slices(trials, where / "slices.png", log=log_keys, **told),  # type: ignore[arg-type]
            "Each option's values against the metric.",
        ),
    ]
    return [Picture(title, path, caption) for title, path, caption in drawn if path is not None]


def importances(study: Study) -> dict[str, float]:
    """The share of the metric's variance that each option explains; empty where there is too little to say."""
    done = study.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    if len(done) < _ENOUGH or len({trial.value for trial in done}) < 2:
        return {}
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
    return dict(optuna.importance.get_param_importances(study.study, evaluator=evaluator))


def _misleading(spec: ExperimentSpec, study: Study, keys: Sequence[str], counts: Mapping[str, int]) -> list[Section]:
    pretraining = spec.train.stage == "pretrain" and not study.objective.is_share
    if misleading(spec, study.objective, tuple(keys)) or (pretraining and counts["classes"]):
        return [Text("What this metric does not say", MISLEADS)]
    return []


def _all_trials(study: Study, trials: Sequence[Trial], keys: Sequence[str]) -> Table:
    names, objective = short_names(keys), study.objective
    causes = {trial.user_attrs[NUMBER]: str(trial.user_attrs.get(CAUSE, "")) for trial in study.trials()}
    rows = [
        (
            str(trial.number),
            f"failed: {causes[trial.number]}" if trial.state == "failed" else trial.state,
            "" if trial.state == "failed" else objective.shown(trial.value),
            str(trial.epochs),
            duration(trial.seconds),
            *(value_words(trial.params[key]) if key in trial.params else "" for key in keys),
        )
        for trial in trials
    ]
    heads = ("#", "state", objective.metric, "epochs", "time", *(names[key] for key in keys))
    return Table("All recommendations", heads, rows, caption="Times are of training jobs, their start included.")
