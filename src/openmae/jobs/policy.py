"""Decide whether a training job becomes a hyperparameter search: by an explicit value, a few phrases, or the default.

A caller that understands language, such as an agent, should decide itself and pass the value. The phrases are for
callers that only have the text of the user's request.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from openmae.errors import SpecError

Policy = Literal["auto", "off"]

SKILL = Path(__file__).parents[1] / "skill" / "tao-train-mask-auto-encoder"
NOT_RUNNABLE = "AutoML is enabled but not runnable until schemas are generated"
_INFO, _SCHEMA, _TEMPLATE = (
    "references/skill_info.yaml", "schemas/train.schema.json", "references/spec_template_train.yaml"
)  # fmt: skip
_VALUES: dict[str, Policy] = {"auto": "auto", "on": "auto", "off": "off"}
_TOPIC = r"(?:automl|hpo|hyperparameter (?:search|tuning|optimi[sz]ation))"
_OFF = re.compile(
    rf"(?<!not )(?<!n't )(?<!never )\b(?:(?:turn off|switch off|disable|no|without|skip) {_TOPIC}|turn {_TOPIC} off"
    rf"|{_TOPIC} off|(?:do not|don't) use {_TOPIC}|plain training)\b"
)


@dataclass(frozen=True)
class Route:
    """The decision whether an action runs directly (``where`` is the action) or as a search (``automl``)."""

    policy: Policy
    where: str
    reason: str


def resolve_policy(explicit: str | bool | None, words: str = "") -> tuple[Policy, str]:
    """Return the policy of a run and the reason for it.

    Args:
        explicit: ``auto`` or ``on`` (the same), ``off``, or None. YAML parses on and off as True and False.
        words: The user's request, used if ``explicit`` is None. Phrases such as "turn off AutoML", "disable AutoML",
            "no HPO" and "plain training" mean off, unless "not" precedes them.

    Raises:
        SpecError: ``explicit`` has another value.
    """
    if explicit is not None:
        value = {True: "on", False: "off"}.get(explicit) if isinstance(explicit, bool) else explicit
        value = value.strip().lower() if isinstance(value, str) else ""
        if value not in _VALUES:
            raise SpecError(f"automl_policy: must be auto, on or off, got {explicit!r}.", "Use off or auto.")
        return _VALUES[value], f"automl_policy is {value}"
    found = _OFF.search(" ".join(words.lower().replace("’", "'").split()))
    return ("off", f"{found[0]!r} turns AutoML off") if found else ("auto", "auto is the default")


def route(action: str, explicit: str | bool | None = None, words: str = "") -> Route:
    """Return where an action runs: ``train`` with the policy auto becomes a search, if that is possible.

    ``explicit`` and ``words`` are those of ``resolve_policy``.

    Raises:
        SpecError: ``explicit`` is not auto, on or off.
    """
    policy, why = resolve_policy(explicit, words)
    if action != "train":
        return Route(policy, action, f"{action} is never routed to AutoML.")
    if policy == "off":
        return Route(policy, action, f"It trains once, for this run only: {why}.")
    try:
        enabled = _read(_INFO).get("automl_enabled") is True
        if enabled:
            _read(_TEMPLATE)
            if not isinstance(_read(_SCHEMA).get("properties"), dict):
                raise ValueError(f"{_SCHEMA} has no properties")
    except ValueError as error:
        return Route(policy, action, f"{NOT_RUNNABLE} ({error}). It trains once.")
    if not enabled:
        return Route(policy, action, f"It trains once: AutoML is not enabled for this model ({_INFO}).")
    return Route(policy, "automl", f"It becomes a hyperparameter search: {why}.")


def _read(name: str) -> dict[str, Any]:
    """Return the content of a file of the skill; raise a ValueError if it is missing or cannot be parsed."""
    import yaml

    try:
        text = (SKILL / name).read_text(encoding="utf-8")
        tree = json.loads(text) if name.endswith(".json") else yaml.safe_load(text)
    except FileNotFoundError:
        raise ValueError(f"{name} is missing") from None
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        tree = None
    if not isinstance(tree, dict) or not tree:
        raise ValueError(f"{name} cannot be read")
    return tree
