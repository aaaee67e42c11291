"""The core installation works without the packages of the extras."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

PROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
MODULES = {"sqlalchemy": "sqlalchemy", "pillow-heif": "pillow_heif", "python-multipart": "python_multipart"}


def extra_modules() -> set[str]:
    """Names of the modules of all extras but dev and fuzz."""
    extras = PROJECT["optional-dependencies"]
    packages = {re.split(r"[\[><=;~! ]", item)[0] for name in extras.keys() - {"dev", "fuzz"} for item in extras[name]}
    return {MODULES.get(name, name.replace("-", "_").removesuffix("_cu13")) for name in packages - {"openmae"}}


def without_extras(code: str) -> subprocess.CompletedProcess[str]:
    blocked = f"import sys\nfor name in {sorted(extra_modules())}: sys.modules[name] = None\n"
    return subprocess.run([sys.executable, "-c", blocked + code], capture_output=True, text=True, check=False)


def test_the_blocked_modules_are_those_of_the_extras() -> None:
    assert {"onnx", "onnxruntime", "optuna", "s3fs", "gcsfs", "fastapi", "tensorrt_rtx", "ray"} <= extra_modules()


@pytest.mark.integration
@pytest.mark.parametrize("command", ["--help", "train --help", "spec keys", "spec template export", "jobs --help"])
def test_commands_answer_without_the_extras(command: str) -> None:
    code = f"import openmae\nfrom openmae.cli.main import main\nsys.exit(main({command.split()}))"
    done = without_extras(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout


@pytest.mark.integration
def test_training_needs_no_extra() -> None:
    modules = ["openmae.actions.train", "openmae.actions.dataset", "openmae.quickstart", "openmae.jobs"]
    done = without_extras("".join(f"import {name}\n" for name in modules))
    assert done.returncode == 0, done.stderr


def test_all_and_dev_name_extras_that_exist() -> None:
    extras = PROJECT["optional-dependencies"]
    for name in ("all", "dev", "tensorrt-rtx"):
        for inner in re.findall(r"openmae\[([^\]]*)\]", " ".join(extras[name])):
            assert set(inner.split(",")) <= extras.keys()
