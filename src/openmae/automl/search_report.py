"""Write ``report.html`` of a search: the best values, figures and all trials."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import optuna
from optuna.trial import TrialState

from openmae.automl.objective import MISLEADING, find_misleading
from openmae.automl.preflight import review_rows
from openmae.automl.study import Study
from openmae.results.report import Code, Figure, Numbers, Section, Table, Text, write_report
from openmae.results.search_section import save_history, save_importances, save_parallel_coordinates, save_slices
from openmae.results.trials import SearchResults, TrialSummary, duration, format_value, short_names
from openmae.spec.metrics import informative
from openmae.storage import layout

_MIN_TRIALS = 4  # complete trials needed to compute importances


def write_search_report(
    study: Study, baseline: Mapping[str, float], final: Mapping[str, float], counts: Mapping[str, int]
) -> Path:
    """Draw the figures into ``pictures/`` in the results folder and write ``report.html``.

    The study must have a complete trial. ``baseline`` and ``final`` are the metrics of the starting checkpoint and of
    the best one, and may be empty; ``counts`` is from ``count_images``.
    """
    trials, objective, folder = study.summaries(), study.objective, study.folder
    has_own = study.space.is_own(trials[0].params)
    search = SearchResults(
        trials, objective.metric, maximize=objective.maximize, log_keys=study.space.log_keys, has_own=has_own
    )
    best = search.trials[search.best]
    own = trials[0] if has_own and trials[0].state == "complete" else None
    numbers = {f"best {objective.metric}": objective.shown(best.value)}
    if own is not None:
        numbers["your values"] = objective.shown(own.value)
    note = "" if own is None or own.number != best.number else " No trial was better than your own values."
    keys = [item.key for item in study.space.parameters]
    sections: list[Section] = [
        Numbers("", numbers),
        Table(
            "Best values",
            ("option", "best", "yours"),
            [
                (item.key, format_value(best.params[item.key]), "" if item.own is None else format_value(item.own))
                for item in study.space.parameters
                if item.key in best.params
            ],
            caption=f"From trial {best.number}; also in best.yaml.{note}",
        ),
        *_evaluation(objective.metric, *(informative(found, counts["classes"]) for found in (baseline, final))),
        *_figures(study, search),
    ]
    of_pixels = study.spec.train.stage == "pretrain" and objective.metric in ("train_loss", "val_loss")
    if find_misleading(study.spec, objective, tuple(keys)) or (of_pixels and counts["classes"]):
        sections.append(Text("Limits of this metric", MISLEADING))
    sections += [
        _all_trials(study, trials, keys),
        Table("Search settings", ("", ""), review_rows(study, counts, None)),
        Code(layout.BEST_SPEC, (folder / layout.BEST_SPEC).read_text(encoding="utf-8")),
    ]
    subtitle = f"{study.spec.model.arch} · {study.spec.train.stage} · {study.algorithm.name}, {len(trials)} trials"
    return write_report(folder, "OpenMAE search", sections, subtitle=subtitle)


def _evaluation(metric: str, baseline: Mapping[str, float], final: Mapping[str, float]) -> list[Section]:
    if not final:
        return []
    names = list(dict.fromkeys((*final, *baseline)))
    caption = "Measured by mae evaluate on the validation images."
    if metric != "train_loss":
        caption += " The search chose the trial by the same images, so expect a little less on new ones."
    if not baseline:
        return [Table("Evaluation", ("metric", "best"), [(name, final[name]) for name in names], caption=caption)]
    rows = [(name, baseline.get(name), final.get(name)) for name in names]
    return [Table("Evaluation", ("metric", "starting checkpoint", "best"), rows, caption=caption)]


def _figures(study: Study, search: SearchResults) -> list[Section]:
    folder = study.folder / layout.CHARTS
    history = save_history(search, folder / "history.png")
    parallel = save_parallel_coordinates(search, folder / "parallel_coordinates.png")
    importances = save_importances(_importances(study), folder / "importances.png")
    slices = save_slices(search, folder / "slices.png")
    share = "Share of the metric's variance that each option explains (fANOVA). With few trials it is only a hint."
    return [
        Figure("History", history, "The value of each trial, and the best one so far."),
        Figure("Parallel coordinates", parallel, "Each line is a trial, from its parameters to its result."),
        *([] if importances is None else [Figure("Importances", importances, share)]),
        Figure("Slices", slices, "The metric over the values of each option."),
    ]


def _importances(study: Study) -> dict[str, float]:
    done = study.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    if len(done) < _MIN_TRIALS or len({trial.value for trial in done}) < 2:
        return {}
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
    return dict(optuna.importance.get_param_importances(study.study, evaluator=evaluator))


def _all_trials(study: Study, trials: Sequence[TrialSummary], keys: Sequence[str]) -> Table:
    rows = [
        (
            str(trial.number),
            f"failed: {trial.cause}" if trial.state == "failed" else trial.state,
            "" if trial.state == "failed" else study.objective.shown(trial.value),
            str(trial.epochs),
            duration(trial.seconds),
            *(format_value(trial.params[key]) if key in trial.params else "" for key in keys),
        )
        for trial in trials
    ]
    heads = ("#", "state", study.objective.metric, "epochs", "time", *short_names(keys).values())
    return Table("All trials", heads, rows, caption="Times include the start of the jobs.")
