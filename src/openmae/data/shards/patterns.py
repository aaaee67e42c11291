"""Patterns of shard names with braces, as in a shell: ``train-{000000..000099}.tar``."""

from __future__ import annotations

import os
import re

from openmae.errors import DataError

_MOST_SHARDS = 1_000_000
_RANGE = re.compile(r"(\d+)\.\.(\d+)")


def is_shard_pattern(source: str) -> bool:
    """Return whether ``source`` is a pattern of shards, and not an existing path whose name contains braces."""
    return _first_group(source) is not None and not os.path.exists(os.path.expanduser(source))


def expand_braces(pattern: str) -> list[str]:
    """Expand ``{a,b}`` and ``{000..099}`` as a shell does; the first group varies slowest.

    Raises:
        DataError: a range is descending, or there are more than a million names.
    """
    group = _first_group(pattern)
    if group is None:
        return [pattern]
    start, end, parts = group
    choices: list[str] = []
    for part in parts:
        ends = _RANGE.fullmatch(part)
        choices += expand_braces(part) if ends is None or len(parts) > 1 else _numbers(pattern, ends)
    tails = expand_braces(pattern[end:])
    if len(choices) * len(tails) > _MOST_SHARDS:
        raise DataError(f"{pattern} names more than {_MOST_SHARDS:,} shards.", "Split the set.")
    return [f"{pattern[:start]}{choice}{tail}" for choice in choices for tail in tails]


def _numbers(pattern: str, ends: re.Match[str]) -> list[str]:
    first, last = int(ends[1]), int(ends[2])
    if not first <= last < first + _MOST_SHARDS:
        raise DataError(
            f"The range {{{ends[0]}}} in {pattern} must run upwards, over at most {_MOST_SHARDS:,} numbers.",
            f"Write {{{min(first, last)}..{max(first, last)}}} if that is meant, or split the set.",
        )
    padded = any(len(end) > 1 and end.startswith("0") for end in ends.groups())
    width = max(map(len, ends.groups())) if padded else 0
    return [f"{number:0{width}d}" for number in range(first, last + 1)]


def _first_group(pattern: str) -> tuple[int, int, list[str]] | None:
    """Return the start, end and parts of the first group; braces without a comma or a range are literal."""
    for start in (place for place, char in enumerate(pattern) if char == "{"):
        depth, parts, begin = 0, [], start + 1
        for place in range(start, len(pattern)):
            char = pattern[place]
            depth += (char == "{") - (char == "}")
            if (char == "," and depth == 1) or depth == 0:
                parts.append(pattern[begin:place])
                begin = place + 1
            if depth == 0:
                if len(parts) > 1 or _RANGE.fullmatch(parts[0]):
                    return start, place + 1, parts
                break
    return None
