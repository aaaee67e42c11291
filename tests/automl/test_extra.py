"""The packages of the extra openmae[automl]."""

from __future__ import annotations

import importlib
import importlib.util
import sys

import pytest

from openmae.cli.main import main
from openmae.errors import UserError


@pytest.fixture
def without_cmaes(monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "cmaes" else find_spec(name))
    for name in [name for name in sys.modules if name.startswith("openmae.automl")]:
        monkeypatch.delitem(sys.modules, name)


@pytest.mark.usefixtures("without_cmaes")
def test_a_missing_package_is_named_with_the_extra() -> None:
    with pytest.raises(UserError) as caught:
        importlib.import_module("openmae.automl.search")
    assert caught.value.problem == "`mae automl` needs optuna, sqlalchemy, cmaes; missing: cmaes."
    assert caught.value.fix == "pip install 'openmae[automl]'"


@pytest.mark.usefixtures("without_cmaes")
@pytest.mark.parametrize("command", [[], ["worker"], ["dashboard"]])
def test_the_commands_report_a_missing_package(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["automl", *command, "dataset.train_data_sources=photos"]) == 2
    assert "missing: cmaes." in capsys.readouterr().err
