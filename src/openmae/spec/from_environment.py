"""References to environment variables, ``${oc.env:NAME}``, which ``experiment.yaml`` keeps instead of the values.

Results and backbones are published, and a variable may contain a secret. A recorded spec can be loaded wherever the
variable is set.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from typing import Any

from openmae.spec.tree import flatten, get

_CALL = "${oc.env:"
_NAME = re.compile(r"\$\{oc\.env:\s*([^,}\s]+)")
_KEY = re.compile(r"\$\{([\w.]+)\}")  # a reference to another key
_NESTED = re.compile(r"\$\{[^}]*\$\{")  # a reference in another one, where a text may need quotes


def references(tree: Mapping[str, Any], paths: Iterable[tuple[str | int, ...]]) -> dict[str, Any]:
    """Return the values to record as references, by dotted key: those that contain a variable, also through other keys.

    Every ``${...}`` in ``tree`` must be well formed. ``paths`` lead to the values with one; a list counts as one value.
    References to other keys are replaced by what these contain, which may be changed when the spec is loaded again.
    """
    if _CALL not in str(tree):
        return {}

    def target(key: str) -> Any:
        found = inline(get(tree, key))
        movable = found != "???" and "${." not in str(found)  # a relative reference is only valid in its place
        return found if movable else None

    def follow(match: re.Match[str]) -> str:
        found = target(match[1])
        return match[0] if found is None or isinstance(found, list | Mapping) else str(found)

    def inline(value: Any) -> Any:
        if isinstance(value, list):
            return [inline(item) for item in value]
        if isinstance(value, Mapping):
            return {name: inline(item) for name, item in value.items()}
        if not isinstance(value, str) or _NESTED.search(value):
            return value
        only = _KEY.fullmatch(value)
        found = target(only[1]) if only else None
        return _KEY.sub(follow, value) if found is None else found

    kept: dict[str, Any] = {}
    for key in {".".join(part for part in path if isinstance(part, str)) for path in paths}:
        try:
            value = inline(get(tree, key))
        except RecursionError:  # it refers to itself
            continue
        # what is left of "${" is a variable, or another resolver, which may use one
        kept |= {name: item for name, item in flatten({key: value}).items() if "${" in str(item)}
    return kept


def environment_of(values: Iterable[Any]) -> dict[str, str]:
    """Return the variables that occur in the values of ``references`` and are set."""
    names = {name for value in values for name in _NAME.findall(str(value))}
    return {name: os.environ[name] for name in names if name in os.environ}
