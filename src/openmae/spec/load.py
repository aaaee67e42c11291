"""A request in YAML, in overrides or from Python -> one checked ``ExperimentSpec``."""

from __future__ import annotations

import difflib
import logging
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from openmae.errors import SpecError
from openmae.spec.describe import bounds_words, choices, fields, sections, type_words
from openmae.spec.option import SECRET_MARK, is_secret
from openmae.spec.rules import find_notices, find_problems, inert_keys, value_of
from openmae.spec.schema import ACTIONS, DEVICES, ExperimentSpec
from openmae.spec.tao_checks import find_tao_notices, find_tao_problems, ignored_by_tao
from openmae.spec.yaml_reader import (
    Problem,
    Reading,
    Tree,
    apply_overrides,
    drop_unset,
    interpolate,
    read_file,
    read_mapping,
    write_text,
)

log = logging.getLogger("openmae")

Source = str | Path | Mapping[str, Any] | ExperimentSpec | None

_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
DEFAULT_MEAN = {1: (0.449,), 3: _IMAGENET_MEAN, 4: (*_IMAGENET_MEAN, 0.5)}  # by the number of channels
DEFAULT_STD = {1: (0.226,), 3: _IMAGENET_STD, 4: (*_IMAGENET_STD, 0.25)}
_REMOVED = {"train.sharded_checkpoints": "checkpoints are always complete"}
ALIASES = {"train.mask_ratio": "model.mask_ratio", "train.norm_pix_loss": "model.norm_pix_loss"}


def load_spec(source: Source, overrides: Sequence[str] = (), action: str | None = None) -> ExperimentSpec:
    """Read and check a spec, and fill in what the stage, the architecture and the channels decide.

    Args:
        source: a YAML file, a nested mapping, a spec, or None for the defaults.
        overrides: ``"train.num_epochs=3"``; the value is YAML.
        action: the action that will run, or automl: its mandatory keys must be set. None: no key is mandatory.

    Raises:
        SpecError: with every mistake, a line each.
    """
    if action not in (None, "automl", *ACTIONS):
        raise SpecError(f"There is no action {action!r}.", f"Use one of: {', '.join(ACTIONS)}.")
    searching = action == "automl"
    action = "train" if searching else action  # every recommendation is one
    reading, typed = _read(source)
    name = str(source) if isinstance(source, str | Path) else "The spec"
    apply_overrides(reading, overrides)
    interpolate(reading, ExperimentSpec().model_dump(mode="json"))
    reading.tree = drop_unset(reading.tree)
    _merge_aliases(reading)
    spec, problems = _validate(reading)
    problems = [_without_secret(problem) for problem in problems]
    spec._typed = frozenset(
        key for key in fields() if _has(reading.tree, key) and (typed is None or key in typed or key in reading.origin)
    )
    unset = {key: value for key, value in _decided(spec).items() if value_of(spec, key) is None}
    spec = _with_checkpointer(spec.replaced({**unset, **_devices(spec)})).standing_for(_shown_texts(reading))
    broken = {problem.key for problem in problems}
    found = chain(find_problems(spec, action), find_tao_problems(spec, action))
    problems += [problem for problem in found if not _touches(problem, broken)]
    if problems:
        raise _spec_error(problems, reading.origin, name)
    for notice in chain(find_notices(spec, action), find_tao_notices(spec, action)):
        log.warning(notice)
    if action == "train" and not searching:
        from_file = [key for key, place in reading.origin.items() if place.startswith("line")]
        for notice in ignored_by_tao(spec, from_file, _decided(spec)):
            log.warning(notice)
    if action == "train" and not searching and any(spec.typed(key) for key in fields() if key.startswith("automl.")):
        log.warning("The automl section does not act in a plain training: `mae automl` searches.")
    return _clamp(spec)


def find_refusals(spec: ExperimentSpec, values: Mapping[str, Any]) -> list[str]:
    """Why ``load_spec`` would refuse a training of a spec with other values of some keys, besides faults of its own."""
    own = list(find_problems(spec, "train"))
    spec = spec.model_copy()
    open_keys = {key: None for key in _decided(spec) if not spec.typed(key)}
    changed = spec.replaced({**open_keys, **values})
    changed = changed.replaced({k: value for k, value in _decided(changed).items() if value_of(changed, k) is None})
    changed._typed = frozenset(key for key in fields() if spec.typed(key)) | values.keys()
    return [f"{problem.key}: {problem.text}" for problem in find_problems(changed, "train") if problem not in own]


def to_dict(spec: ExperimentSpec) -> Tree:
    """The spec as plain nested values, without what is unset and what does not act unless it was typed.

    ``load_spec`` gives the same spec back, unless it holds a key itself, which is left out: ``***`` stands there.
    """
    tree: Tree = spec.model_dump(mode="json", exclude_none=True)
    silent = {key for key in inert_keys(spec) if not spec.typed(key)}
    silent |= {key for key in fields() if key.startswith("automl.") and not spec.typed(key)}
    for key, field in fields().items():
        if key in silent or value_of(spec, key) == field.default == "":
            _pop(tree, key.split("."))
    for parent, name in ((tree, "automl"), (tree["train"], "checkpointer")):
        if not parent[name]:
            del parent[name]
    if is_secret(spec.encryption_key):
        tree["encryption_key"] = SECRET_MARK
    for key, text in spec.shown.items():
        *above, name = key.split(".")
        section = tree
        for part in above:
            section = section[part]
        section[name] = text
    return tree


def to_yaml(spec: ExperimentSpec) -> str:
    """``to_dict`` as YAML text."""
    return write_text(to_dict(spec))


def _read(source: Any) -> tuple[Reading, set[str] | None]:
    """What was given, and which keys of it count as typed (None: all)."""
    if source is None:
        return Reading(), None
    if isinstance(source, ExperimentSpec):
        typed = {ALIASES.get(key, key) for key in fields() if source.typed(key)}
        tree = source.model_dump(mode="json", exclude_none=True)
        unset = ExperimentSpec()
        decided = {**_decided(source), **_devices(source)}
        for key in set(fields()) - typed:
            if value_of(source, key) in (value_of(unset, key), decided.get(key)):
                _pop(tree, key.split("."))
        return Reading(tree=tree, shown=dict(source.shown)), typed
    if isinstance(source, str | Path):
        return read_file(Path(os.path.expanduser(source))), None
    if isinstance(source, Mapping):
        return read_mapping(source), None
    raise SpecError(
        f"A spec is a path, a mapping or an ExperimentSpec, got {type(source).__name__}.",
        "Give, for example, 'spec.yaml' or {'train': {'num_epochs': 3}}.",
    )


def _shown_texts(reading: Reading) -> dict[str, Any]:
    """What is recorded instead of texts from the environment. Numbers and choices hide nothing, and are read back."""
    free = {key for key, field in fields().items() if type_words(field) in ("text", "list of texts")}
    return {key: text for key, text in reading.shown.items() if key in free}


def _merge_aliases(reading: Reading) -> None:
    """Move ``train.mask_ratio`` and ``train.norm_pix_loss`` to the section that means the same."""
    for alias, key in ALIASES.items():
        (alias_section, name), (section, _) = alias.split("."), key.split(".")
        if not _has(reading.tree, alias) or not isinstance(reading.tree.setdefault(section, {}), dict):
            continue
        value, other = reading.tree[alias_section].pop(name), reading.tree[section].get(name)
        if other is None:
            reading.tree[section][name] = value
            reading.origin[key] = f"{reading.origin.get(alias, 'given')}, as {alias}"
        elif other != value:
            text = f"means the same as {key}, but is {value!r} while that is {other!r}. Remove one of them."
            reading.problems.append(Problem(alias, text, also=(key,)))


def _validate(reading: Reading) -> tuple[ExperimentSpec, list[Problem]]:
    """The spec without the keys that break a rule, and a problem for each of them."""
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
                _pop(reading.tree, path)
            problems.extend(found.values())


def _locate(tree: Any, loc: Iterable[str | int]) -> tuple[tuple[str, ...], Any]:
    path: list[str] = []
    for part in loc:
        if not isinstance(tree, dict) or part not in tree:
            break
        path.append(str(part))
        tree = tree[part]
    return tuple(path), tree


def _explain(path: tuple[str, ...], value: Any, detail: Any) -> str:
    """Rule, value and mend for one of pydantic's errors."""
    key, kind, message = ".".join(path), detail["type"], detail["msg"]
    if kind == "extra_forbidden":
        return _unknown(path)
    if kind == "said":
        return str(message)
    if kind == "rule":
        return f"{message}, got {value!r}."
    if key in sections():
        return f"is a section and must have keys below it, got {value!r}."
    field = fields()[key]
    words, bounds = type_words(field), bounds_words(field)
    hint = ""
    if words == "choice":
        near = _close(str(value), choices(field))
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
    names = [*fields(), *sorted(sections())]
    parent, leaf = key.rpartition(".")[0], path[-1]
    siblings = {name.rpartition(".")[2]: name for name in names if name.rpartition(".")[0] == parent}
    near = [siblings[name] for name in _close(leaf, siblings)]
    near += _close(key, [name for name in names if name.rpartition(".")[2] == leaf], cutoff=0.0)
    near = list(dict.fromkeys(near or _close(key, names)))[:3]
    hint = f"Did you mean {' or '.join(near)}?" if near else "`mae spec keys` lists all keys."
    return f"there is no such key. {hint}"


def _close(word: str, names: Iterable[str], cutoff: float = 0.6) -> list[str]:
    by_lower = {name.lower(): name for name in names}
    return [by_lower[match] for match in difflib.get_close_matches(word.lower(), by_lower, n=3, cutoff=cutoff)]


def _decided(spec: ExperimentSpec) -> Tree:
    """What the stage, the architecture or the channels decide for keys that are unset."""
    row, finetune = spec.model.architecture, spec.train.stage == "finetune"
    return {
        "model.mask_ratio": row.mask_ratio,
        "model.decoder_depth": row.decoder_depth,
        "model.decoder_embed_dim": row.decoder_embed_dim,
        "model.drop_path_rate": 0.1 if finetune else row.pretrain_drop_path,
        "train.optim.beta2": 0.999 if finetune else 0.95,
        "dataset.augmentation.mean": DEFAULT_MEAN[spec.model.in_chans],
        "dataset.augmentation.std": DEFAULT_STD[spec.model.in_chans],
    }


def _devices(spec: ExperimentSpec) -> Tree:
    """num_gpus and gpu_ids, the one from the other where only one is typed."""
    values: Tree = {}
    for section in DEVICES:
        own = getattr(spec, section)
        if not spec.typed(f"{section}.gpu_ids") or own.gpu_ids == (0,):  # [0] is the published default
            values[f"{section}.gpu_ids"] = tuple(range(own.num_gpus))
        elif not spec.typed(f"{section}.num_gpus"):
            values[f"{section}.num_gpus"] = len(own.gpu_ids)
    return values


def _with_checkpointer(spec: ExperimentSpec) -> ExperimentSpec:
    """The spec with what ``train.checkpointer`` asks for in the options that act."""
    checkpointer, monitor, keep = spec.train.checkpointer, "train.optim.monitor_name", "train.keep_checkpoints"
    typed = {key for key in fields() if spec.typed(key)}
    if checkpointer.enable_topk and checkpointer.replace_periodic and keep not in typed:
        spec, typed = spec.replaced({keep: 1}), typed | {keep}
    if metric := checkpointer.metric:
        if monitor in typed and spec.train.optim.monitor_name != metric:
            log.warning("train.checkpointer.monitor=%s replaces %s=%s.", metric, monitor, value_of(spec, monitor))
        if metric == "ACC_all":  # what a fine-tuning takes where nothing is typed
            typed -= {monitor}
        else:
            spec, typed = spec.replaced({monitor: metric}), typed | {monitor}
    spec._typed = frozenset(typed)
    return spec


def _clamp(spec: ExperimentSpec) -> ExperimentSpec:
    scale = spec.dataset.augmentation.max_scale
    if scale <= 1:
        return spec
    log.warning(f"dataset.augmentation.max_scale {scale:g} is used as 1: a crop cannot exceed the image.")
    return spec.replaced({"dataset.augmentation.max_scale": 1.0})


def _without_secret(problem: Problem) -> Problem:
    """A problem's text may repeat the value."""
    if not problem.key.startswith("encryption_key"):
        return problem
    return Problem("encryption_key", "cannot be read; its value is not shown. Write env:NAME or file:PATH.")


def _touches(problem: Problem, broken: set[str]) -> bool:
    """Whether a problem may only follow from another one: a key of it, or a section of one, is broken."""
    keys = (problem.key, *problem.also)
    return any(key == bad or key.startswith(f"{bad}.") for key in keys for bad in broken)


def _spec_error(problems: list[Problem], origin: Mapping[str, str], name: str) -> SpecError:
    def place(problem: Problem) -> int:
        where = origin.get(problem.key, "").split(",")[0].removeprefix("line ")
        return int(where) if where.isdecimal() else sys.maxsize

    count = "a mistake" if len(problems) == 1 else f"{len(problems)} mistakes"
    lines = [f"{name} has {count}:"]
    for problem in sorted(problems, key=place):
        where = f" ({origin[problem.key]})" if problem.key in origin else ""
        lines.append(f"  {problem.key}{where}: {problem.text}")
    return SpecError("\n".join(lines))


def _has(tree: Any, key: str) -> bool:
    for part in key.split("."):
        if not isinstance(tree, dict) or part not in tree:
            return False
        tree = tree[part]
    return True


def _pop(tree: Any, path: Sequence[str]) -> None:
    for part in path[:-1]:
        tree = tree.get(part, {})
    tree.pop(path[-1], None)
