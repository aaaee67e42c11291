"""Plain content in memory must not outlive its process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from openmae.storage import memory_folder
from openmae.storage.memory_folder import remove_abandoned

_WORK = """
import sys
from pathlib import Path
from openmae.storage import memory_folder
memory_folder.MEMORY = Path(sys.argv[1])
with memory_folder.memory_folder() as folder:
    Path(folder, "deeper").mkdir()
    Path(folder, "deeper", "weights").write_text("plain")
    print(folder.name, flush=True)
    sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def _memory(tmp_path, monkeypatch):
    """Replace /dev/shm."""
    monkeypatch.setattr(memory_folder, "MEMORY", tmp_path)


def start(tmp_path) -> subprocess.Popen[str]:
    words = [sys.executable, "-c", _WORK, str(tmp_path)]
    process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stdout is not None
    assert process.stdout.readline().startswith("openmae-")
    return process


def children(pid: int) -> list[int]:
    """Return the pid of the shell that waits for the process to end."""
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        return [int(word) for word in file.read().split()]


def wait_for_end(pid: int) -> None:
    """Wait for a process that is not a child of this one."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    with os.fdopen(descriptor) as ended:
        import select

        assert select.select([ended], [], [], 30)[0]


@pytest.mark.integration
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_the_folder_of_a_killed_process_is_removed(tmp_path, number):
    process = start(tmp_path)
    (shell,) = children(process.pid)
    os.killpg(process.pid, number)
    process.wait()
    wait_for_end(shell)
    assert list(tmp_path.iterdir()) == []
    process.communicate()


@pytest.mark.integration
def test_abandoned_folders_are_removed_at_the_next_start(tmp_path):
    killed, alive = start(tmp_path), start(tmp_path)
    os.kill(children(killed.pid)[0], signal.SIGKILL)  # as when a container ends
    killed.kill()
    killed.communicate()
    (tmp_path / "somebody-else").mkdir()
    assert len(list(tmp_path.iterdir())) == 3
    remove_abandoned()
    assert len(list(tmp_path.iterdir())) == 2
    assert (tmp_path / "somebody-else").is_dir()
    alive.communicate("")
    assert alive.returncode == 0
    assert [path.name for path in tmp_path.iterdir()] == ["somebody-else"]


def test_a_system_without_a_memory_file_system(tmp_path, monkeypatch):
    monkeypatch.setattr(memory_folder, "MEMORY", tmp_path / "no")
    remove_abandoned()
