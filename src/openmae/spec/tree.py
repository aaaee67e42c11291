"""The two forms of a spec's values: nested sections, and dotted keys such as ``train.optim.lr``."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

Tree = dict[str, Any]
Key = str | Sequence[str]  # "train.optim.lr", or its parts, which may contain dots
_ABSENT = object()


class NotASectionError(ValueError):
    """A dotted key leads through a plain value.

    Attributes:
        section: the dotted name of that value.
        value: the value.
    """

    def __init__(self, section: str, value: object) -> None:
        self.section, self.value = section, value
        super().__init__(f"{section} is {value!r} and not a section")


def _parts(key: Key) -> Sequence[str]:
    return key.split(".") if isinstance(key, str) else key


def get(tree: object, key: Key, default: Any = None) -> Any:
    """Return the value of a key in nested mappings, or ``default`` if it is absent."""
    for part in _parts(key):
        if not isinstance(tree, Mapping) or part not in tree:
            return default
        tree = tree[part]
    return tree


def has(tree: object, key: Key) -> bool:
    """Return whether nested mappings contain a key."""
    return get(tree, key, _ABSENT) is not _ABSENT


def value_of(section: object, key: str) -> Any:
    """Return the value of a dotted key of a spec, such as ``value_of(spec, "train.optim.lr")``."""
    for part in key.split("."):
        section = getattr(section, part)
    return section


def put(tree: Tree, key: Key, value: Any) -> None:
    """Set a key, creating the sections above it.

    Raises:
        NotASectionError: a key above it has a plain value.
    """
    *parents, name = _parts(key)
    for depth, part in enumerate(parents, 1):
        inner = tree.setdefault(part, {})
        if not isinstance(inner, dict):
            raise NotASectionError(".".join(parents[:depth]), inner)
        tree = inner
    tree[name] = value


def remove(tree: Tree, key: Key) -> None:
    """Remove a key if it exists."""
    *parents, name = _parts(key)
    section = get(tree, parents)
    if isinstance(section, dict):
        section.pop(name, None)


def flatten(tree: Mapping[Any, Any], prefix: str = "") -> Tree:
    """Return the values of nested mappings by dotted key; empty mappings are left out."""
    found: Tree = {}
    for name, value in tree.items():
        key = f"{prefix}{name}"
        found |= flatten(value, f"{key}.") if isinstance(value, Mapping) else {key: value}
    return found


def nest(values: Mapping[str, Any]) -> Tree:
    """Return values by dotted key as nested sections.

    Raises:
        NotASectionError: a key is both a plain value and a section.
    """
    tree: Tree = {}
    for key, value in values.items():
        put(tree, key, value)
    return tree


def merge(target: Tree, source: Mapping[str, Any]) -> None:
    """Copy ``source`` into ``target``, section by section; None does not replace a section."""
    for key, value in source.items():
        if isinstance(value, dict) and isinstance(target.get(key), dict):
            merge(target[key], value)
        elif value is not None or not isinstance(target.get(key), dict):
            target[key] = copy.deepcopy(value)
