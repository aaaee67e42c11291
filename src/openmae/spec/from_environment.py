"""References to environment variables, ``${oc.env:NAME}``, which ``experiment.yaml`` keeps instead of the values.

Results and backbones are published, and a variable may contain a secret. A recorded spec can be loaded wherever the
variable is set.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from typing import Any

from openmae.spec.tree import get

_CALL = "${oc.env:"
_STAND_IN = "openmae_env"
_NAME = re.compile(r"\$\{oc\.env:\s*([^,}\s]+)")


def references(tree: Mapping[str, Any], paths: Iterable[tuple[str | int, ...]]) -> dict[str, Any]:
    """Return the values that contain a variable, by dotted key, with the reference instead of the variable's value.

    Every ``${...}`` in ``tree`` must be well formed. ``paths`` lead to the values with one; a list counts as one value.
    """
    if _CALL not in str(tree):
        return {}
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    # OmegaConf 2.3 calls it register_new_resolver
    register = getattr(OmegaConf, "register_resolver", None) or OmegaConf.register_new_resolver
    called: list[str] = []

    def stand_in(name: str, *default: Any) -> str:
        called.append(name)
        return f"{_CALL}{','.join([name, *map(_literal, default)])}}}"

    register(_STAND_IN, stand_in, replace=True)
    config = OmegaConf.create(_standing_in(tree))
    found = {}
    for key in {".".join(part for part in path if isinstance(part, str)) for path in paths}:
        called.clear()
        try:
            value = OmegaConf.select(config, key)
            value = OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
        except (OmegaConfBaseException, RecursionError, ValueError):
            value = None
        if called:  # another resolver may have changed the reference
            found[key] = value if _CALL in str(value) else get(tree, key)
    return found


def environment_of(values: Iterable[Any]) -> dict[str, str]:
    """Return the variables that occur in the values of ``references`` and are set."""
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
    return tree.replace(_CALL, f"${{{_STAND_IN}:") if isinstance(tree, str) else tree
