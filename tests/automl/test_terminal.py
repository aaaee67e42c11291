"""Progress of a search: log lines, status.json and the live table."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from rich.live import Live
from tests.helpers.simulation import BrokenError, loss, make_spec, make_worker

from openmae.automl.terminal import SearchProgress, showing_progress
from openmae.results.status import StatusLog, read_status


def test_log_lines_and_status(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    worker, _ = make_worker(make_spec(tmp_path, algorithm="asha", max_recommendations=3))
    status = StatusLog(tmp_path, append=False)
    with caplog.at_level("INFO", logger="openmae"), showing_progress(worker.study, status) as progress:
        worker.changed = progress
        worker.run()
    first = f"Trial 0 complete: train_loss {0.03**2 + 1 / 9:.4f} (best so far: 0.1120, trial 0); 9 epochs in 0:00:00; "
    assert f"{first}lr 2e-4, momentum 0.9" in caplog.text
    assert "Trial 1 stopped early: train_loss " in caplog.text
    entries = read_status(status.path)
    assert entries[0]["message"] == "Trial 0: complete; 1 of 3 trials have ended"
    assert entries[0]["kpi"] == {"train_loss": pytest.approx(0.1120, abs=1e-4)}
    assert len(entries) == 3


def test_live_table(tmp_path: Path) -> None:
    def learn(overrides: Mapping[str, Any], epoch: int) -> float:
        if overrides["train.results_dir"].endswith("001"):
            raise BrokenError("flood")
        return loss(overrides, epoch)

    worker, _ = make_worker(make_spec(tmp_path, algorithm="random", max_recommendations=3), learn)
    console = Console(width=120, record=True, file=(tmp_path / "terminal").open("w"))
    with Live(console=console, auto_refresh=False) as live:
        worker.changed = SearchProgress(worker.study, live)
        worker.run()
        live.refresh()
    lines = console.export_text().splitlines()
    assert any(line.split()[:2] == ["#", "state"] for line in lines)
    assert any(line.split()[:3] == ["1", "failed", "-"] for line in lines)
    assert sum("*" in line for line in lines) == 1, "the best trial is marked"
    assert any("3 of 3 trials   0 running here   Ctrl-C pauses the search" in line for line in lines)
