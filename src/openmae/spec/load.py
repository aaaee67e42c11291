"""Read and check a spec given as YAML, overrides or Python values, and write it as YAML."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from openmae.errors import SpecError
from openmae.spec import tree
from openmae.spec.actions import ROWS, SEARCH, get_action
from openmae.spec.choices import Facts
from openmae.spec.describe import bounds_words, choices, fields, sections, similar, similar_keys, type_words
from openmae.spec.notices import find_notices, ignored_by_tao, inert_keys, why_unused
from openmae.spec.option import SECRET_MARK, is_secret
from openmae.spec.recipe import choose, choose_batch
from openmae.spec.resolved import dependent_defaults, device_numbers, resolve
from openmae.spec.rules import find_problems
from openmae.spec.schema import ExperimentSpec
from openmae.spec.tree import Tree, value_of
from openmae.spec.yaml_reader import (
    Problem,
    Reading,
    apply_overrides,
    drop_unset,
    interpolate,
    read_file,
    read_mapping,
    write_text,
)

log = logging.getLogger("openmae")

Source = str | Path | Mapping[str, Any] | ExperimentSpec | None

_REMOVED = {"train.sharded_checkpoints": "checkpoints are always complete"}
#: Keys of TAO's published schema that are other names of a key.
ALIASES = {"train.mask_ratio": "model.mask_ratio", "train.norm_pix_loss": "model.norm_pix_loss"}


def load_spec(source: Source, overrides: Sequence[str] = (), action: str | None = None) -> ExperimentSpec:
    """Read and check a spec, and fill in the values that depend on others.

    Args:
        source: a YAML file, a nested mapping, a spec, or None for the defaults.
        overrides: such as ``"train.num_epochs=3"``; the value is YAML.
        action: the action that will run, or ``automl``: its required keys must be set. None: no key is required.

    Raises:
        SpecError: lists all mistakes, one per line.
    """
    if action is not None and action not in ROWS:
        get_action(action)  # raises
    searching = action == SEARCH.name
    action = "train" if searching else action  # every trial is a training run
    reading = _read(source)
    name = str(source) if isinstance(source, str | Path) else "The spec"
    apply_overrides(reading, overrides)
    interpolate(reading, tree.nest({key: field.default for key, field in fields().items()}))
    reading.tree = drop_unset(reading.tree)
    _merge_aliases(reading)
    spec, problems = _validate(reading)
    problems = [_without_secret(problem) for problem in problems]
    spec = spec.with_set_keys(spec.set_keys - (reading.derived - reading.origin.keys()))
    spec, notices = resolve(spec.standing_for(_shown_texts(reading)))
    spec = choose(spec, Facts()) if action in (None, "train") else choose_batch(spec)
    broken = {problem.key for problem in problems}
    problems += [problem for problem in find_problems(spec, action) if not _follows_from(problem, broken)]
    if problems:
        raise _spec_error(problems, reading.origin, name, given=source is not None)
    notices += find_notices(spec, action)
    if action == "train" and not searching:
        notices += ignored_by_tao(spec, [key for key, at in reading.origin.items() if at.startswith("line")])
        if any(key.startswith("automl.") for key in spec.set_keys):
            notices.append("The automl section has no effect on `mae train`; `mae automl` uses it.")
    for notice in notices:
        log.warning(notice)
    return spec


def check(spec: ExperimentSpec) -> None:
    """Check the rules of a training run again, after a recipe has chosen values.

    Raises:
        SpecError: lists all broken rules.
    """
    if problems := list(find_problems(spec, "train")):
        raise _spec_error(problems, {}, "The spec", given=True)


def find_refusals(spec: ExperimentSpec, values: Mapping[str, Any]) -> list[str]:
    """Return the rules that a training run would break only if these values, by key, replaced those of the spec."""
    own = list(find_problems(spec, "train"))
    changed = choose(spec.replaced(values).with_set_keys(spec.set_keys | values.keys()), Facts())
    return [f"{problem.key}: {problem.text}" for problem in find_problems(changed, "train") if problem not in own]


def to_dict(spec: ExperimentSpec) -> Tree:
    """Return the spec as plain nested values, without options that are unset, or have no effect and were not set.

    ``load_spec`` returns the same spec for it, except for a secret, which is replaced by ``***``.
    """
    values: Tree = spec.model_dump(mode="json", exclude_none=True)
    silent = {*inert_keys(spec), *(key for key in fields() if key.startswith("automl."))} - spec.set_keys
    for key, field in fields().items():
        if key in silent or value_of(spec, key) == field.default == "":
            tree.remove(values, key)
    for section in ("automl", "train.checkpointer"):
        if not tree.get(values, section):
            tree.remove(values, section)
    if is_secret(spec.encryption_key):
        values["encryption_key"] = SECRET_MARK
    for key, text in spec.shown.items():
        tree.put(values, key, text)
    return values


def to_yaml(spec: ExperimentSpec) -> str:
    """Return ``to_dict`` as YAML text, below a comment with the values that a recipe has chosen and the reasons."""
    lines = [f"#   {key}={value}: {reason}" for key, value, reason in choices_of(spec)]
    head = [f"# Chosen by train.recipe={spec.train.recipe}, for options that are not set:", *lines, ""] if lines else []
    return "\n".join(head) + write_text(to_dict(spec))


def choices_of(spec: ExperimentSpec) -> list[tuple[str, str, str]]:
    """Return key, value and reason of each option that a recipe has chosen and that has an effect."""
    keys = [key for key in fields() if key in spec.chosen and not why_unused(spec, key)]
    return [
        (key, write_text({"value": value_of(spec, key)}).removeprefix("value: ").strip(), spec.chosen[key])
        for key in keys
    ]


def _read(source: Any) -> Reading:
    if source is None:
        return Reading()
    if isinstance(source, ExperimentSpec):
        return _read_spec(source)
    if isinstance(source, str | Path):
        return read_file(Path(os.path.expanduser(source)))
    if isinstance(source, Mapping):
        return read_mapping(source)
    raise SpecError(
        f"A spec is a path, a mapping or an ExperimentSpec, got {type(source).__name__}.",
        "Give, for example, 'spec.yaml' or {'train': {'num_epochs': 3}}.",
    )


def _read_spec(source: ExperimentSpec) -> Reading:
    """Read a spec without the values that follow from others, which an override may change."""
    values = source.model_dump(mode="json", exclude_none=True)
    derived = fields().keys() - {ALIASES.get(key, key) for key in source.set_keys}
    dependent = {**dependent_defaults(source), **device_numbers(source)}
    for key in derived:
        if key in source.chosen or value_of(source, key) in (fields()[key].default, dependent.get(key)):
            tree.remove(values, key)
    return Reading(tree=values, shown=dict(source.shown), derived=frozenset(derived))


def _shown_texts(reading: Reading) -> dict[str, Any]:
    """Return the references to record instead of values; numbers and choices are no secrets and are recorded."""
    free = {key for key, field in fields().items() if type_words(field) in ("text", "list of texts")}
    return {key: text for key, text in reading.shown.items() if key in free}


def _merge_aliases(reading: Reading) -> None:
    for alias, key in ALIASES.items():
        section = key.split(".")[0]
        if not tree.has(reading.tree, alias) or not isinstance(reading.tree.get(section, {}), dict):
            continue
        value, other = tree.get(reading.tree, alias), tree.get(reading.tree, key)
        tree.remove(reading.tree, alias)
        if other is None:
            tree.put(reading.tree, key, value)
            reading.origin[key] = f"{reading.origin.get(alias, 'given')}, as {alias}"
        elif other != value:
            text = f"means the same as {key}, but is {value!r} while that is {other!r}. Remove one of them."
            reading.problems.append(Problem(alias, text, also=(key,)))


def _validate(reading: Reading) -> tuple[ExperimentSpec, list[Problem]]:
    """Return the spec without the keys that break a rule, and a problem for each of them."""
    problems = reading.problems
    while True:
        try:
            return ExperimentSpec.model_validate(reading.tree), problems
        except ValidationError as error:
            found: dict[tuple[str, ...], Problem] = {}
            for detail in error.errors(include_url=False):
                path, value = _locate(reading.tree, detail["loc"])
                found.setdefault(path, Problem(".".join(path), _explain(path, value, detail)))
            for path in found:
                tree.remove(reading.tree, path)
            problems.extend(found.values())


def _locate(value: Any, loc: Iterable[str | int]) -> tuple[tuple[str, ...], Any]:
    path: list[str] = []
    for part in loc:
        if not isinstance(value, dict) or part not in value:
            break
        path.append(str(part))
        value = value[part]
    return tuple(path), value


def _explain(path: tuple[str, ...], value: Any, detail: Any) -> str:
    """Return a message with rule, value and fix for one of pydantic's errors."""
    key, kind, message = ".".join(path), detail["type"], detail["msg"]
    if kind == "extra_forbidden":
        return _unknown(path)
    if kind == "message":
        return str(message)
    if kind == "rule":
        return f"{message}, got {value!r}."
    if key in sections():
        return f"is a section and must have keys below it, got {value!r}."
    field = fields()[key]
    words, bounds = type_words(field), bounds_words(field)
    hint = ""
    if words == "choice":
        near = similar(str(value), choices(field))
        hint = f" Did you mean {near[0]}?" if near else ""
        return f"must be one of {bounds}, got {value!r}.{hint}"
    if words == "text" and not isinstance(value, dict | list):
        hint = f' Put it in quotes: "{value}".'
    elif words.startswith("list") and isinstance(value, str):
        hint = f" Write [{value}]."
    article = {"t": "", "i": "an "}.get(words[0], "a ")
    return f"must be {article}{words}{f' {bounds}' if bounds else ''}, got {value!r}.{hint}"


def _unknown(path: tuple[str, ...]) -> str:
    key = ".".join(path)
    if key in _REMOVED:
        return f"this option was removed: {_REMOVED[key]}. Remove the key."
    if any("." in part for part in path) and key in fields():
        section, name = key.rsplit(".", 1)
        return f"a file has sections, not dotted keys. Write {name}: below {section}: instead."
    near = similar_keys(key)
    hint = f"Did you mean {' or '.join(near)}?" if near else "`mae spec keys` lists all keys."
    return f"there is no such key. {hint}"


def _without_secret(problem: Problem) -> Problem:
    if not problem.key.startswith("encryption_key"):
        return problem
    return Problem("encryption_key", "cannot be read; its value is not shown. Write env:NAME or file:PATH.")


def _follows_from(problem: Problem, broken: set[str]) -> bool:
    """Return whether another mistake may cause this one: one of its keys, or a section above it, is broken."""
    keys = (problem.key, *problem.also)
    return any(key == bad or key.startswith(f"{bad}.") for key in keys for bad in broken)


def _spec_error(problems: list[Problem], origin: Mapping[str, str], name: str, *, given: bool) -> SpecError:
    """Return the error for the problems of a spec; ``given`` is False if it consists of overrides only."""

    def place(problem: Problem) -> int:
        where = origin.get(problem.key, "").split(",")[0].removeprefix("line ")
        return int(where) if where.isdecimal() else sys.maxsize

    count = "a mistake" if len(problems) == 1 else f"{len(problems)} mistakes"
    overriding = [origin.get(problem.key, "").startswith("override") for problem in problems]
    if given and any(overriding):
        name = "The overrides" if all(overriding) else f"{name} and the overrides"
    lines = [f"{name} {'have' if given and any(overriding) else 'has'} {count}:"]
    for problem in sorted(problems, key=place):
        where = f" ({origin[problem.key]})" if problem.key in origin else ""
        lines.append(f"  {problem.key}{where}: {problem.text}")
    return SpecError("\n".join(lines))
