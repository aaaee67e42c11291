"""What a search shows on the terminal: a live table with a bar, and a line for each recommendation that ends."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from openmae.automl.objective import Objective
from openmae.automl.study import Study
from openmae.automl.worker import Running
from openmae.results.status import StatusLog
from openmae.results.trials import Trial, best_trial, short_names

_ROWS = 12  # of the live table: the best, and the newest
_STYLES = {"running": "cyan", "failed": "red", "stopped early": "dim", "complete": ""}

log = logging.getLogger("openmae")


def duration(seconds: float) -> str:
    """``0:03:20``."""
    return str(timedelta(seconds=round(seconds)))


def value_words(value: Any) -> str:
    """A value of an option, short."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def params_words(params: Mapping[str, Any], names: Mapping[str, str]) -> str:
    """``lr 0.0012, momentum 0.9``."""
    return ", ".join(f"{names[key]} {value_words(value)}" for key, value in params.items())


def trials_table(trials: Sequence[Trial], objective: Objective, *, rows: int | None = None) -> Table:
    """The recommendations: the best one marked, the newest last.

    Args:
        trials: all of them.
        objective: of the search.
        rows: at the most; None: all.
    """
    best = best_trial(trials, maximize=objective.maximize)
    keys = list(dict.fromkeys(key for trial in trials for key in trial.params))
    names = short_names(keys)
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for head in ("", "#", "state", objective.metric, "epochs", "time", *(names[key] for key in keys)):
        table.add_column(head, justify="left" if head in ("", "state") else "right", no_wrap=True)
    shown = list(trials) if rows is None else [t for t in trials if t is best or t in trials[-rows:]]
    for trial in shown:
        value = objective.shown(trial.value) if trial.state != "failed" else "-"
        cells = ("*" if trial is best else "", str(trial.number), trial.state, value, str(trial.epochs or ""))
        style = "bold" if trial is best else _STYLES.get(trial.state, "")
        options = (value_words(trial.params[key]) if key in trial.params else "-" for key in keys)
        table.add_row(*cells, duration(trial.seconds), *options, style=style)
    return table


class Progress:
    """Follows a search on the terminal, or in lines where there is none, and in ``status.json`` where one is given."""

    def __init__(self, study: Study, live: Live | None, status: StatusLog | None = None) -> None:
        self._study = study
        self._live = live
        self._status = status
        self._told = {trial.number for trial in study.shown() if trial.state != "running"}

    def __call__(self, running: list[Running]) -> None:
        trials, objective = self._study.shown(), self._study.objective
        names = short_names(list(dict.fromkeys(key for trial in trials for key in trial.params)))
        best = best_trial(trials, maximize=objective.maximize)
        for trial in trials:
            if trial.state == "running" or trial.number in self._told:
                continue
            self._told.add(trial.number)
            if self._status is not None:
                kpi = {} if best is None or best.value is None else {objective.metric: best.value}
                done = f"Recommendation {trial.number}: {trial.state}; {len(self._told)} are done"
                self._status.write("RUNNING", done, kpi=kpi)
            if trial.state != "failed" and self._live is None:  # a live table shows it
                so_far = (
                    f" (best so far {objective.shown(best.value)}, of recommendation {best.number})" if best else ""
                )
                log.info(
                    "Recommendation %d %s: %s %s%s; %d epochs in %s; %s", trial.number, _ended(trial.state),
                    objective.metric, objective.shown(trial.value), so_far, trial.epochs, duration(trial.seconds),
                    params_words(trial.params, names),
                )  # fmt: skip
        if self._live is not None:
            self._live.update(self._picture(trials, running))

    def _picture(self, trials: Sequence[Trial], running: Sequence[Running]) -> Group:
        total = self._study.algorithm.recommendations
        done = sum(trial.state != "running" for trial in trials)
        line = Text.assemble(
            (f"{done} of {total} recommendations", "bold"), f"   {len(running)} running here   Ctrl-C pauses the search"
        )
        below = Table.grid(padding=(0, 2))
        below.add_row(ProgressBar(total=total, completed=done, width=30), line)
        now = {item.one.number: item.elapsed for item in running}
        shown = [replace(trial, seconds=now.get(trial.number, trial.seconds)) for trial in trials]
        return Group(trials_table(shown, self._study.objective, rows=_ROWS), below)


def _ended(state: str) -> str:
    return "was stopped early" if state == "stopped early" else "is done"


@contextmanager
def following(study: Study, status: StatusLog | None = None) -> Iterator[Progress]:
    """A ``Progress`` for as long as the block runs."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield Progress(study, None, status)
        return
    with Live(console=console, refresh_per_second=4, redirect_stderr=True) as live:
        yield Progress(study, live, status)
