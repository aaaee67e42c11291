"""``mae serve``: its arguments."""

import sys
from pathlib import Path
from types import ModuleType

import pytest

from openmae.cli.main import main
from openmae.serving.settings import Settings


def test_serve_gets_its_arguments(monkeypatch):
    calls = []
    module = ModuleType("openmae.serving.server")
    module.serve = lambda *arguments: calls.append(arguments)
    monkeypatch.setitem(sys.modules, "openmae.serving.server", module)
    assert main(["serve", "-m", "model.onnx"]) == 0
    limits = ("--max-batch", "2", "--max-request-mb", "0.5", "--max-pixels", "1000")
    more = ("--device", "cpu", "--encryption-key", "env:NAME")
    assert main(["serve", "--model", "m.pth", "--host", "::", "--port", "0", *more, *limits]) == 0
    assert calls == [
        (Path("model.onnx"), "127.0.0.1", 8000, Settings(), "auto", ""),
        (Path("m.pth"), "::", 0, Settings(max_batch=2, max_request_mb=0.5, max_pixels=1000), "cpu", "env:NAME"),
    ]


def test_wrong_limits_of_serve(capsys):
    assert main(["serve", "-m", "model.pth", "--max-batch", "0"]) == 2
    assert capsys.readouterr().err == "--max-batch must be 1 or more, got 0.\n  Fix: Omit it to use the default, 8.\n"


@pytest.mark.parametrize("package", ["fastapi", "uvicorn", "python_multipart"])
def test_a_missing_package_of_serve(package, monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "openmae.serving.server", raising=False)
    monkeypatch.setitem(sys.modules, package, None)
    assert main(["serve", "-m", "model.pth"]) == 2
    assert capsys.readouterr().err == (
        f"`mae serve` needs fastapi, uvicorn and python-multipart; missing: {package}.\n"
        "  Fix: pip install 'openmae[serve]'\n"
    )
