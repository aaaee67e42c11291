"""The benchmark of attention."""

from __future__ import annotations

from bench import attention


def test_both_forms_are_timed() -> None:
    report = attention.run(quick=True)
    assert [row[:2] for row in report.rows[::2]] == [
        ("bfloat16", "training"),
        ("bfloat16", "inference"),
        ("float32", "training"),
        ("float32", "inference"),
    ]
    assert all(float(row[5]) > 0 for row in report.rows)
    assert report.rows[0][2] == "8 x 12 x 17 x 64"
