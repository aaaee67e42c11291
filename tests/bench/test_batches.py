"""The table of batches that fit on GPUs, and that the documentation has it."""

from __future__ import annotations

from pathlib import Path

from bench import batches


def test_the_documentation_has_the_counted_numbers() -> None:
    report = batches.run(quick=True)
    (row,) = report.rows
    text = (Path(__file__).parents[2] / "docs" / "distributed-training.md").read_text(encoding="utf-8")
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {row[0]} ")]
    assert [cell.strip() for cell in line.strip("|").split("|")] == list(row)
