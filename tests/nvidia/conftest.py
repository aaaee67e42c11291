"""NVIDIA's packages as ``make test-nvidia`` installs them, the wheel in an environment of its own, and the digits."""

from __future__ import annotations

import json
import subprocess
import sys
import tarfile
import venv
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from openmae.quickstart import write_digits
from openmae.skill import NAME

ROOT = Path(__file__).parents[2]
PACKAGES = Path(sys.prefix) / "nvidia"


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the two archives that ``data_sources`` names."""
    folder = tmp_path_factory.mktemp("digits")
    write_digits(folder / "images")
    for archive, part in (("images_train", "labelled"), ("images_val", "held_out")):
        with tarfile.open(folder / f"{archive}.tar.gz", "w:gz") as file:
            file.add(folder / "images" / part, archive)
    return folder


@pytest.fixture(scope="session")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment with the wheel; what the wheel depends on is this environment's."""
    folder = tmp_path_factory.mktemp("environment")
    code = f"from hatchling.build import build_wheel; print(build_wheel({str(folder)!r}))"
    built = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    venv.create(folder / "venv", with_pip=False, symlinks=True)
    (site,) = (folder / "venv").glob("lib/python*/site-packages")
    with zipfile.ZipFile(folder / built.stdout.split()[-1]) as wheel:
        wheel.extractall(site)
    others = [path for path in sys.path if path.endswith("site-packages")]
    (site / "dependencies.pth").write_text("".join(f"{path}\n" for path in others))
    return folder / "venv"


@pytest.fixture(scope="session")
def skill(environment: Path) -> Path:
    """The skill folder in the installed wheel."""
    (folder,) = environment.glob(f"lib/python*/site-packages/openmae/skill/{NAME}")
    return folder


@pytest.fixture
def nvidia(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Call a function of drive.py with the packages of one version."""
    monkeypatch.setenv("OPENMAE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("PYTHONPATH", raising=False)

    def call(version: str, function: str, **request: Any) -> Any:
        packages = [str(PACKAGES / name) for name in (version, "shared")]
        assert all(Path(path).is_dir() for path in packages), f"{packages} are missing: run `make test-nvidia`"
        file = tmp_path / "request.json"
        file.write_text(json.dumps({"call": function, "packages": packages, **request}, default=str))
        drive = [sys.executable, Path(__file__).parent / "drive.py", file]
        done = subprocess.run(drive, capture_output=True, text=True, check=False, cwd=tmp_path)
        assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
        return json.loads(done.stdout.splitlines()[-1])

    return call
