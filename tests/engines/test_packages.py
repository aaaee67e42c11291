"""Without the packages of the ``export`` extra: what needs them says how to install them, the rest works."""

from __future__ import annotations

import importlib
import sys

import pytest

from openmae.cli.main import main
from openmae.errors import UserError

USERS = (
    *("openmae.engines.packages", "openmae.engines.onnx", "openmae.engines.session", "openmae.engines.precision"),
    "openmae.engines.predictor",
    *("openmae.engines.tensorrt.source", "openmae.actions.export", "openmae.actions.gen_trt_engine"),
)


@pytest.fixture(params=["onnx", "onnxruntime", "onnxscript"])
def missing(request, monkeypatch) -> str:
    """Make a package look uninstalled, and forget the modules that have imported it."""
    for name in USERS:
        monkeypatch.delitem(sys.modules, name, raising=False)
    for name in [name for name in sys.modules if name.split(".")[0] == request.param]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, request.param, None)
    return request.param


def test_the_missing_package_and_the_fix_are_named(missing):
    with pytest.raises(UserError) as caught:
        importlib.import_module("openmae.engines.precision")
    assert caught.value.problem == (
        f"ONNX files and TensorRT engines need onnx, onnxscript and onnxruntime; missing: {missing}."
    )
    assert caught.value.fix == "pip install 'openmae[export]'"


def test_predictors_of_checkpoints_need_none_of_them(missing):
    importlib.import_module("openmae.engines.predictor")


def test_the_commands_report_it_as_invalid_input(missing, capsys, tmp_path):
    files = [f"export.checkpoint={tmp_path / 'm.pth'}", f"export.onnx_file={tmp_path / 'm.onnx'}"]
    assert main(["export", f"results_dir={tmp_path}", *files]) == 2
    assert "Fix: pip install 'openmae[export]'" in capsys.readouterr().err
