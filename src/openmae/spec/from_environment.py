"""Values that come from the environment, ``${oc.env:NAME}``: what is written down in their place.

A results folder and a backbone are published, and a variable may hold a secret. So the spec that is recorded keeps the
reference; it loads back wherever the variable is set.
"""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Iterable, Mapping
from typing import Any

_CALL = "${oc.env:"
_STAND_IN = "openmae_env"
_NAME = re.compile(r"\$\{oc\.env:\s*([^,}\s]+)")


def references(tree: Mapping[str, Any], paths: Iterable[tuple[str | int, ...]]) -> dict[str, Any]:
    """Return the values that contain a variable, by dotted key, with the reference in place of the variable's value.

    Args:
        tree: with ``${...}`` in it, all of them well formed.
        paths: to the values with ``${...}``. A list counts as one value.
    """
    keys = {tuple(part for part in path if isinstance(part, str)) for path in paths}
    if _CALL not in str(tree):
        return {}
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    register = getattr(OmegaConf, "register_resolver", None) or OmegaConf.register_new_resolver  # its name until 2.3
    called: list[str] = []

    def stand_in(name: str, *default: Any) -> str:
        called.append(name)
        return f"{_CALL}{','.join([name, *map(_literal, default)])}}}"

    register(_STAND_IN, stand_in, replace=True)
    config = OmegaConf.create(_standing_in(tree))
    found = {}
    for key in keys:
        dotted = ".".join(key)
        called.clear()
        try:
            value = OmegaConf.select(config, dotted)
            value = OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
        except (OmegaConfBaseException, RecursionError, ValueError):
            value = None
        if called:  # where another function took the text as an argument, it is no longer the reference
            found[dotted] = value if _CALL in str(value) else _at(tree, key)
    return found


def environment_of(values: Iterable[Any]) -> dict[str, str]:
    """Return the variables that ``references`` gives references to, as far as they are set."""
    names = {name for value in values for name in _NAME.findall(str(value))}
    return {name: os.environ[name] for name in names if name in os.environ}


def _literal(value: Any) -> str:
    if value is None:
        return "null"
    return "'" + value.replace("'", r"\'") + "'" if isinstance(value, str) else str(value)


def _standing_in(tree: Any) -> Any:
    if isinstance(tree, Mapping):
        return {key: _standing_in(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_standing_in(value) for value in tree]
    return tree.replace(_CALL, f"${{{_STAND_IN}:") if isinstance(tree, str) else copy.copy(tree)


def _at(tree: Any, key: Iterable[str]) -> Any:
    for part in key:
        tree = tree[part]
    return tree
