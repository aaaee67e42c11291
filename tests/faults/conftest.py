"""One fork server for all the fault tests, and pictures to train on."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.helpers.fault_runs import LIMIT, Server, draw_pictures


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """All of them fight for the same two cores."""
    for item in items:
        if "faults" in Path(item.path).parts:
            item.add_marker(pytest.mark.faults)
            item.add_marker(pytest.mark.xdist_group("faults"))


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """21 pictures: 5 batches of 4."""
    return draw_pictures(tmp_path / "photos", 21)


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    environment = {**os.environ, "OPENMAE_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.helpers.fork_server"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment,
        bufsize=0,
        cwd=Path(__file__).parents[2],
    )
    served = Server(folder, process)
    assert served.readable(LIMIT), "the fork server did not start"
    assert served.answer() == "ready"
    yield served
    assert process.stdin is not None
    process.stdin.close()
    process.wait(timeout=20)
