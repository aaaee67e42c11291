"""Patterns of shard names."""

from __future__ import annotations

import pytest

from openmae.data.shards.patterns import expand_braces, is_shard_pattern
from openmae.errors import DataError


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("t-{000..002}.tar", ["t-000.tar", "t-001.tar", "t-002.tar"]),
        ("t-{8..11}.tar", ["t-8.tar", "t-9.tar", "t-10.tar", "t-11.tar"]),
        ("t-{08..10}.tar", ["t-08.tar", "t-09.tar", "t-10.tar"]),
        ("{a,b}/{0..1}.tar", ["a/0.tar", "a/1.tar", "b/0.tar", "b/1.tar"]),
        ("{a-{0..1},b}.tar", ["a-0.tar", "a-1.tar", "b.tar"]),
        ("s3://b/{x,y}.tar", ["s3://b/x.tar", "s3://b/y.tar"]),
        ("{x}.tar", ["{x}.tar"]),
    ],
)
def test_braces_are_expanded_as_a_shell_does(pattern: str, names: list[str]) -> None:
    assert expand_braces(pattern) == names
    assert is_shard_pattern(pattern) == (pattern != "{x}.tar")


@pytest.mark.parametrize("pattern", ["t-{9..2}.tar", "t-{0..99999999}.tar"])
def test_invalid_ranges(pattern: str) -> None:
    with pytest.raises(DataError, match="must run upwards, over at most 1,000,000 numbers"):
        expand_braces(pattern)
