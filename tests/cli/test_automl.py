"""``mae automl`` and its subcommands."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from openmae.automl import search
from openmae.cli.automl import with_command
from openmae.cli.main import main


@pytest.fixture
def received(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Calls of ``search.run`` and ``search.work``: name -> the spec's epochs and the platform."""
    calls: dict[str, Any] = {}
    for name in ("run", "work"):
        monkeypatch.setattr(
            search, name, lambda spec, platform, name=name: calls.update({name: (spec.train.num_epochs, platform)})
        )
    return calls


@pytest.mark.parametrize(
    ("command", "name"), [([], "run"), (["search"], "run"), (["worker"], "work")], ids=["default", "search", "worker"]
)
def test_a_command_gets_the_spec_and_the_platform(
    received: dict[str, Any], tmp_path: Path, command: list[str], name: str
) -> None:
    path = tmp_path / "spec.yaml"
    path.write_text("dataset: {train_data_sources: photos}\n")
    assert main(["automl", *command, "-e", str(path), "train.num_epochs=3", "--platform", "slurm"]) == 0
    assert main(["automl", *command, "train.num_epochs=3", "-e", str(path)]) == 0
    assert received == {name: (3, "local")}


@pytest.mark.parametrize(
    ("argv", "completed"),
    [
        (["automl"], ["automl", "search"]),
        (["automl", "a=1"], ["automl", "search", "a=1"]),
        (["automl", "worker", "a=1"], ["automl", "worker", "a=1"]),
        (["automl", "--help"], ["automl", "--help"]),
        (["train", "a=1"], ["train", "a=1"]),
        ([], []),
    ],
)
def test_search_is_the_default_command(argv: list[str], completed: list[str]) -> None:
    assert with_command(argv) == completed


@pytest.mark.parametrize(
    ("command", "text"),
    [
        ([], "worker     run trials of a search in another process"),
        (["search"], "continue the one in the results folder"),
        (["worker"], "until none are left"),
        (["dashboard"], "--port N"),
    ],
)
def test_each_command_has_its_help(command: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["automl", *command, "--help"]) == 0
    assert text in " ".join(capsys.readouterr().out.split()).replace("worker run", "worker     run")


def test_the_dashboard_without_a_search(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["automl", "dashboard", "dataset.train_data_sources=photos", f"results_dir={tmp_path}"]) == 2
    assert "there is no search in" in capsys.readouterr().err


def test_the_dashboard_shows_the_storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[Any] = []
    dashboard = SimpleNamespace(run_server=lambda storage, **address: shown.append((storage, address)))
    monkeypatch.setitem(__import__("sys").modules, "optuna_dashboard", dashboard)
    monkeypatch.setattr("openmae.automl.database.read_storage", lambda spec: spec.results_dir)
    assert main(["automl", "dashboard", "--port", "81", f"results_dir={tmp_path}"]) == 2  # no data: no spec of a search
    overrides = ["dataset.train_data_sources=photos", f"results_dir={tmp_path}"]
    assert main(["automl", "dashboard", "--port", "81", *overrides]) == 0
    assert shown == [(str(tmp_path), {"host": "127.0.0.1", "port": 81})]
