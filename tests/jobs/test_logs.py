"""Reading and following logs of any size."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from openmae.errors import SpecError
from openmae.jobs import logs
from openmae.jobs.logs import follow_log, read_log


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150)
@given(
    text=st.lists(st.sampled_from(["a", "é", "\n", "\r", "long " * 3]), max_size=30).map("".join),
    tail=st.none() | st.integers(0, 8),
    block=st.integers(1, 7),
)
def test_the_tail_is_the_last_lines_for_any_size_of_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, tail: int | None, block: int
) -> None:
    monkeypatch.setattr(logs, "_BLOCK", block)
    path = tmp_path / "log.txt"
    path.write_bytes(text.encode())
    lines = [line + "\n" for line in text.split("\n")]
    lines = lines[:-1] + ([lines[-1][:-1]] if text and not text.endswith("\n") else [])
    last = lines if tail is None else lines[len(lines) - min(tail, len(lines)) :]
    assert "".join(read_log(path, tail)) == "".join(last)
    monkeypatch.setattr(logs, "_BLOCK", 1 << 20)
    assert list(follow_log(path, tail, lambda: True)) == [line.removesuffix("\n") for line in last]


def test_a_large_log_takes_little_memory(tmp_path: Path) -> None:
    path = tmp_path / "log.txt"
    with path.open("wb") as file:
        for _ in range(32):
            file.write((b"a line of a log".ljust(1023) + b"\n") * 1024)  # 1 MiB
        file.write(b"\r 1 %" * (1 << 20))  # a line of 5 MiB
    for read in (
        lambda: sum(len(piece) for piece in read_log(path)),
        lambda: sum(len(piece) for piece in read_log(path, 30_000)),
        lambda: sum(len(line) for line in follow_log(path, None, lambda: True)),
    ):
        tracemalloc.start()
        assert read() > 5 << 20
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 16 << 20, f"{peak >> 20} MiB for a log of {path.stat().st_size >> 20} MiB"


def test_lines_are_followed_as_they_are_written(tmp_path: Path) -> None:
    path, told = tmp_path / "log.txt", iter([b"one\ntw", b"o\n", b"th\xc3", b"\xa9ree"])

    def ended() -> bool:
        with path.open("ab") as file:
            file.write(next(told, b""))
        return path.read_bytes().endswith(b"ree")

    assert list(follow_log(path, None, ended)) == ["one", "two", "théree"]


def test_a_log_that_does_not_exist_is_empty(tmp_path: Path) -> None:
    assert list(read_log(tmp_path / "log.txt")) == []
    assert list(follow_log(tmp_path / "log.txt", 3, lambda: True)) == []
    for read in (lambda: read_log(tmp_path, -1), lambda: follow_log(tmp_path, -1, lambda: True)):
        with pytest.raises(SpecError, match=r"tail: must be 0 or more lines, got -1"):
            next(read())
