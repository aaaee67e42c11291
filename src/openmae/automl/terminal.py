"""Show the progress of a search on the terminal: a live table, or a log line for each trial that ends."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from openmae.automl.study import Study
from openmae.automl.worker import RunningTrial
from openmae.results.status import StatusLog
from openmae.results.trials import TrialSummary, best_trial, duration, format_value, short_names
from openmae.storage.printable import counted

_NEWEST = 12  # trials in the live table, in addition to the best one
_STYLES = {"running": "cyan", "failed": "red", "stopped early": "dim", "complete": ""}

log = logging.getLogger("openmae")


def format_params(params: Mapping[str, Any], names: Mapping[str, str]) -> str:
    """Return parameters as text, such as ``lr 0.0012, momentum 0.9``."""
    return ", ".join(f"{names[key]} {format_value(value)}" for key, value in params.items())


class SearchProgress:
    """Shows a search in a live table or as log lines, and writes to a ``status.json`` if one is given."""

    def __init__(self, study: Study, live: Live | None, status: StatusLog | None = None) -> None:
        self._study = study
        self._live = live
        self._status = status
        self._ended = {trial.number for trial in study.summaries() if trial.state != "running"}

    def __call__(self, running: list[RunningTrial]) -> None:
        """Show the state of the study; called after each turn of the worker."""
        trials, objective = self._study.summaries(), self._study.objective
        best = best_trial(trials, maximize=objective.maximize)
        for trial in trials:
            if trial.state == "running" or trial.number in self._ended:
                continue
            self._ended.add(trial.number)
            if self._status is not None:
                kpi = {objective.metric: best.value} if best else {}
                done = f"{len(self._ended)} of {self._study.algorithm.trials} trials have ended"
                message = f"Trial {trial.number}: {trial.state}; {done}"
                self._status.write("RUNNING", message, kpi=kpi)
            if trial.state != "failed" and self._live is None:  # the worker logs failures itself
                so_far = f" (best so far: {objective.shown(best.value)}, trial {best.number})" if best else ""
                log.info(
                    "Trial %d %s: %s %s%s; %s in %s; %s", trial.number, trial.state, objective.metric,
                    objective.shown(trial.value), so_far, counted(trial.epochs, "epoch"), duration(trial.seconds),
                    format_params(trial.params, short_names(list(trial.params))),
                )  # fmt: skip
        if self._live is not None:
            self._live.update(self._render(trials, best, running))

    def _render(
        self, trials: Sequence[TrialSummary], best: TrialSummary | None, running: Sequence[RunningTrial]
    ) -> Group:
        total, done = self._study.algorithm.trials, sum(trial.state != "running" for trial in trials)
        line = Text.assemble(
            (f"{done} of {total} trials", "bold"), f"   {len(running)} running here   Ctrl-C pauses the search"
        )
        below = Table.grid(padding=(0, 2))
        below.add_row(ProgressBar(total=total, completed=done, width=30), line)
        now = {item.held.number: item.elapsed for item in running}
        return Group(self._table([replace(t, seconds=now.get(t.number, t.seconds)) for t in trials], best), below)

    def _table(self, trials: Sequence[TrialSummary], best: TrialSummary | None) -> Table:
        objective = self._study.objective
        keys = list(dict.fromkeys(key for trial in trials for key in trial.params))
        table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
        for head in ("", "#", "state", objective.metric, "epochs", "time", *short_names(keys).values()):
            table.add_column(head, justify="left" if head in ("", "state") else "right", no_wrap=True)
        for trial in trials:
            is_best = best is not None and trial.number == best.number
            if not is_best and trial.number < trials[-1].number - _NEWEST + 1:
                continue
            table.add_row(
                "*" if is_best else "",
                str(trial.number),
                trial.state,
                objective.shown(trial.value),
                str(trial.epochs or ""),
                duration(trial.seconds),
                *(format_value(trial.params[key]) if key in trial.params else "-" for key in keys),
                style="bold" if is_best else _STYLES[trial.state],
            )
        return table


@contextmanager
def showing_progress(study: Study, status: StatusLog | None = None) -> Iterator[SearchProgress]:
    """Yield a ``SearchProgress`` that shows the study while the block runs."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield SearchProgress(study, None, status)
        return
    with Live(console=console, refresh_per_second=4, redirect_stderr=True) as live:
        yield SearchProgress(study, live, status)
