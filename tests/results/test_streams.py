"""Standard streams that cannot be written."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from rich.console import Console

from openmae.results.streams import OutputLostError, guarded

FULL = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")


@pytest.fixture
def closed_pipe():
    """Yield a text stream to a pipe without a reader."""
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w", buffering=1) as stream:
        yield stream
        stream.flush()  # the guard must leave nothing behind that fails again when Python ends


def test_progress_to_a_closed_pipe_is_dropped(closed_pipe, monkeypatch):
    monkeypatch.setattr(sys, "stderr", closed_pipe)
    with guarded("stderr"):
        console = Console(stderr=True)
        for number in range(5000):  # more than a buffer holds
            console.print("epoch", number)
            print("epoch", number, file=sys.stderr, flush=True)
    assert sys.stderr is closed_pipe


def test_result_to_a_closed_pipe_ends_the_command(closed_pipe, monkeypatch):
    monkeypatch.setattr(sys, "stdout", closed_pipe)
    with pytest.raises(OutputLostError) as caught, guarded("stdout", needed=True):
        Console().print("row")  # rich would end the process with SystemExit(1)
    assert caught.value.reader_left


@FULL
def test_result_to_a_full_disk_is_an_error(monkeypatch):
    stream = open("/dev/full", "w")  # noqa: SIM115
    monkeypatch.setattr(sys, "stdout", stream)
    with pytest.raises(OutputLostError, match=r"stdout cannot be written \(No space left on device\)\.") as caught:  # noqa: SIM117
        with guarded("stdout", needed=True):
            print("row")
    assert not caught.value.reader_left
    stream.close()


def test_working_stream_is_written_and_restored(capsys):
    before = sys.stdout
    with guarded("stdout", needed=True):
        print("row")
    assert sys.stdout is before
    assert capsys.readouterr().out == "row\n"


@pytest.mark.integration
def test_closed_descriptor_is_not_reused_by_the_next_file(tmp_path):
    code = (
        "import os, subprocess, sys; from openmae.results.streams import open_standard_streams\n"
        "open_standard_streams()\n"
        "file = open(sys.argv[1], 'w'); print('lost'); os.write(2, b'lost')\n"
        "subprocess.run(['/bin/sh', '-c', 'echo lost; echo lost >&2'], check=True)\n"
        "sys.exit(file.fileno() < 3)"
    )
    script = 'exec "$@" >&- 2>&- <&-'
    path = tmp_path / "checkpoint"
    subprocess.run(["/bin/sh", "-c", script, "sh", sys.executable, "-c", code, str(path)], check=True)
    assert path.read_text() == ""
