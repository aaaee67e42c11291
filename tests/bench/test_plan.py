"""The plan of large runs: what is counted, and what follows from it."""

from __future__ import annotations

import pytest

from bench import plan


def test_the_operations_of_a_vit_are_those_of_its_products() -> None:
    """By hand: 12 blocks of width 192 over the visible tokens, the decoder's 8 of width 512 over all of them."""
    work = plan.count("vit_tiny_patch16", 224)
    visible, masked, tokens = 49, 147, 196 + 1

    def attention(width: int, length: int) -> float:
        return length * (8 * width**2 + 4 * length * width)  # projections; the two products

    def mlp(width: int, length: int) -> float:
        return length * 16 * width**2

    encoder = 12 * (attention(192, visible + 1) + mlp(192, visible + 1)) + 2 * visible * 768 * 192
    decoder = 8 * attention(512, tokens) + 7 * mlp(512, tokens) + mlp(512, masked)
    ends = 2 * (visible + 1) * 192 * 512 + 2 * masked * 512 * 768
    assert work.operations / 3 == pytest.approx(encoder + decoder + ends, rel=0.01)
    assert work.parameters > 5.4e6


def test_a_plan_says_what_it_assumes() -> None:
    report = plan.run(quick=True)
    assert len(report.rows[0]) == len(report.columns)
    assert "ASSUMED, not measured" in " ".join(report.notes)
    work = plan.Work("vit_base_patch16", 0.75, 10**9, 1e11)
    assert work.rate("A100") == pytest.approx(312e12 * 0.35 / 1e11)
    row = dict(zip(report.columns, plan._row(work), strict=True))
    assert row["state, ddp and fsdp on 8 [GiB]"] == "14.9, 1.9", "16 bytes a parameter"
    assert row["checkpoint [GiB]"] == "11.2", "12 bytes a parameter"
