"""From what was typed and whose child it is to one spec; each value remembers where it came from.

Precedence, highest first: ``spec_overrides`` (dotted before nested before shorthand), ``specs`` (likewise), the
contract's functions, what the parent carries forward, the schema's default.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import yaml

from openmae.errors import SpecError
from openmae.jobs.artifacts import Artifact, below, choose_model, list_folder, newest_checkpoint, read_text
from openmae.spec.actions import SHORTHANDS, TABLE, ModelKind, expand_shorthand
from openmae.spec.option import SECRET_MARK, is_secret
from openmae.spec.tree import NotASectionError, Tree, flatten, get, put
from openmae.storage.urls import is_remote

KEY_VARIABLE = "OPENMAE_ENCRYPTION_KEY"
CARRIED = ("train.stage", "model.arch", "model.num_classes", "dataset.augmentation.input_size")
_SHAPE = ("model.patch_size", "model.in_chans")  # belong to the architecture where they were chosen


@dataclass(frozen=True)
class Origin:
    """Where a value came from.

    Attributes:
        key: dotted.
        value: None where the key was left unset.
        function: of the contract, or ``specs``, ``spec_overrides``, ``shorthand``, ``carried``, ``gpu_count``, ...
        why: in words.
    """

    key: str
    value: Any
    function: str
    why: str


@dataclass(frozen=True)
class Parent:
    """The job that a child's model comes from.

    Attributes:
        id, action, state: of its record.
        folder: of its results.
        outputs: files that it was told to write.
        spec: what was typed and filled in for it.
    """

    id: str
    action: str
    state: str
    folder: str
    outputs: tuple[str, ...] = ()
    spec: Tree = field(default_factory=dict)


@dataclass
class Filled:
    """A spec in the making: dotted key -> value, and the origin of each."""

    action: str
    searching: bool = False  # a training that goes to AutoML
    values: dict[str, Any] = field(default_factory=dict)
    origins: dict[str, Origin] = field(default_factory=dict)

    def put(self, key: str, value: Any, function: str, why: str) -> None:
        """Set a key; None leaves it unset, but says why."""
        if value is not None:
            self.values[key] = value
        self.origins[key] = Origin(key, value, function, why)

    def typed(self, key: str) -> bool:
        """Whether it has a value; an empty text is none."""
        return self.values.get(key) not in (None, "")

    @property
    def tree(self) -> Tree:
        """Nested, as a spec file has it."""
        return nested(self.values)

    def explanation(self) -> list[dict[str, Any]]:
        """The origins as plain values, the secret ones hidden."""
        found = [asdict(self.origins[key]) for key in sorted(self.origins)]
        for item in found:
            if item["key"] == "encryption_key" and is_secret(str(item["value"] or "")):
                item["value"] = SECRET_MARK
        return found


def merge(
    action: str, specs: Mapping[str, Any] | None = None, spec_overrides: Mapping[str, Any] | None = None
) -> Filled:
    """Merge what was typed, by the precedence that stands above; ``???`` and None count as not typed.

    Raises:
        SpecError: a shorthand that means nothing for the action.
    """
    filled = Filled(action)
    for source, given in (("specs", specs or {}), ("spec_overrides", spec_overrides or {})):
        short, deep, dotted = {}, {}, {}
        for name, value in given.items():
            key = str(name)
            if key in SHORTHANDS:
                short.update({meant: (key, part) for meant, part in expand_shorthand(action, key, value).items()})
            elif "." in key:
                dotted.update(flatten({key: value}))
            else:
                deep.update(flatten({key: value}))
        for key, (word, value) in short.items():
            _put_typed(filled, key, value, source, f"shorthand {word} in {source}")
        for key, value in {**deep, **dotted}.items():
            _put_typed(filled, key, value, source, f"given in {source}")
    return filled


def fill(filled: Filled, parent: Parent | None, own_results: str) -> None:
    """Give every key of the contract's table a value, or the reason why it has none.

    Args:
        filled: what was typed; is changed.
        parent: the job whose child this is.
        own_results: the results folder of this job, where the spec names none.

    Raises:
        SpecError: the parent leaves no model that the action could take.
        CheckpointError: the parent should have such a model, but has not.
        DataError: a remote results folder cannot be read.
    """
    _key(filled, parent)
    if not filled.typed("results_dir"):
        filled.put("results_dir", own_results, "output_dir", "this job's results folder")
    elif not is_remote(filled.values["results_dir"]) and "${" not in filled.values["results_dir"]:
        filled.values["results_dir"] = os.path.abspath(os.path.expanduser(filled.values["results_dir"]))
    model = _model_of(filled, parent)
    for key, function in TABLE[filled.action].filled.items():
        if filled.typed(key):
            continue
        if function == "parent_model":
            _parent_model(filled, key, parent, model)
        else:
            _FUNCTIONS[function](filled, key, parent, model)
    if parent is not None:
        _require_model(filled, parent)
        _carry(filled, parent)


def action_folder(filled: Filled) -> str:
    """Where the action writes: ``<action>.results_dir``, else ``<results_dir>/<action>``."""
    own = filled.values.get(f"{filled.action}.results_dir")
    if own:
        return own if is_remote(own) else os.path.abspath(os.path.expanduser(own))
    return below(filled.values["results_dir"], filled.action)


def nested(values: Mapping[str, Any]) -> Tree:
    """Dotted keys as sections; what cannot be one, as it stands, for the spec's own checks to name."""
    tree: Tree = {}
    for key, value in values.items():
        if isinstance(get(tree, key), dict):
            raise SpecError(f"{key}: is a section, but a plain value is given for it as well.", "Remove one of them.")
        try:
            put(tree, key, value)
        except NotASectionError as error:
            raise SpecError(
                f"{key}: cannot be set, since {error}.", f"Give {error.section} as a mapping, or leave it out."
            ) from error
    return tree


def _put_typed(filled: Filled, key: str, value: Any, source: str, why: str) -> None:
    if value is None or (isinstance(value, str) and value == "???"):
        return
    filled.put(key, value, source, why)


def _key(filled: Filled, parent: Parent | None) -> None:
    if filled.typed("encryption_key"):
        return
    inherited = parent.spec.get("encryption_key") if parent else None
    if inherited == SECRET_MARK:
        raise SpecError(
            f"encryption_key: the parent's files are encrypted with a key that was given as a value, and a value is "
            f"kept nowhere (parent_job_id {parent.id if parent else ''}).",
            "Give the same key again: encryption_key=env:NAME or file:PATH.",
        )
    why = "the parent's" if inherited else "none was given"
    filled.put("encryption_key", inherited or None, "key", why)


@dataclass(frozen=True)
class _Model:
    """What a parent offers: its kind and, once looked for, the file."""

    kind: str
    parent: Parent

    def take(self, key: str) -> tuple[Artifact, str]:
        held = list_folder(self.parent.folder)
        listed = {item.path for item in held}
        for path in self.parent.outputs:
            if path not in listed:
                folder = path.rpartition("/")[0]
                held += [item for item in list_folder(folder) if item.path == path]
        where = f"{key}: job {self.parent.id} ({self.parent.action}, {self.parent.state})"
        return choose_model(held, kinds_of(key), self.parent.outputs, where)


def _model_of(filled: Filled, parent: Parent | None) -> _Model | None:
    if parent is None:
        return None
    kind = TABLE[parent.action].produces
    if not kind:
        raise SpecError(
            f"parent_job_id: {parent.id} is a job of {parent.action}, whose results hold no model.",
            "Give a train, export or gen_trt_engine job.",
        )
    return _Model(kind, parent)


def kinds_of(key: str) -> tuple[ModelKind, ...]:
    """The kinds of model that a key takes."""
    return next(file.kinds for row in TABLE.values() for file in row.inputs if file.key == key)


def _parent_model(filled: Filled, key: str, parent: Parent | None, model: _Model | None) -> None:
    others = [file.key for file in TABLE[filled.action].inputs if file.key != key and filled.typed(file.key)]
    if parent is None or model is None:
        filled.put(key, None, "parent_model", "there is no parent_job_id")
    elif model.kind not in kinds_of(key):
        filled.put(key, None, "parent_model", _unfit(parent))
    elif others and filled.action in ("evaluate", "inference"):
        filled.put(key, None, "parent_model", f"{others[0]} is given, and only one of them acts")
    else:
        chosen, why = model.take(key)
        filled.put(key, chosen.path, "parent_model", f"{why} (job {parent.id})")


def _unfit(parent: Parent) -> str:
    return f"a job of {parent.action} leaves {TABLE[parent.action].produces}, which does not fit"


def _resume_model(filled: Filled, key: str, parent: Parent | None, model: _Model | None) -> None:
    if filled.searching:
        filled.put(key, None, "resume_model", "a search finds its trainings itself")
        return
    folder = action_folder(filled)
    newest = newest_checkpoint(list_folder(folder)) if "${" not in folder else None
    why = "the newest checkpoint in this job's own results" if newest else "this job's own results hold no checkpoint"
    filled.put(key, newest.path if newest else None, "resume_model", why)


def _ptm(filled: Filled, key: str, parent: Parent | None, model: _Model | None) -> None:
    function = "ptm_if_no_resume_model"
    if filled.typed("train.resume_training_checkpoint_path"):
        filled.put(key, None, function, "training resumes from a checkpoint of its own")
    elif parent is None or model is None:
        filled.put(key, None, function, "no checkpoint to resume from, and no parent_job_id")
    elif model.kind not in kinds_of(key):
        filled.put(key, None, function, _unfit(parent))
    else:
        chosen, why = model.take(key)
        filled.put(key, chosen.path, function, f"nothing to resume; {why} (job {parent.id})")


def _create_onnx_file(filled: Filled, key: str, parent: Parent | None, model: _Model | None) -> None:
    filled.put(key, below(action_folder(filled), "model.onnx"), "create_onnx_file", "in this job's results folder")


def _create_engine_file(filled: Filled, key: str, parent: Parent | None, model: _Model | None) -> None:
    filled.put(key, below(action_folder(filled), "model.engine"), "create_engine_file", "in this job's results folder")


_FUNCTIONS = {
    "resume_model": _resume_model,
    "ptm_if_no_resume_model": _ptm,
    "create_onnx_file": _create_onnx_file,
    "create_engine_file": _create_engine_file,
}


def _require_model(filled: Filled, parent: Parent) -> None:
    """Refuse a parent whose model nothing in the action takes."""
    row = TABLE[filled.action]
    keys = [file.key for file in row.inputs]
    if row.needs_input and not any(map(filled.typed, keys)):
        kinds = sorted({kind for file in row.inputs for kind in file.kinds})
        wanted = " or ".join(name for name, action in TABLE.items() if action.produces in kinds)
        raise SpecError(
            f"parent_job_id: {filled.action} takes {' or '.join(kinds)}, but {parent.id} is a job of "
            f"{parent.action}, which leaves {TABLE[parent.action].produces}.",
            f"Give a job of {wanted} as the parent, or set {' or '.join(keys)}.",
        )


def _carry(filled: Filled, parent: Parent) -> None:
    known, source = _known_of(parent)
    for key in (*CARRIED, *_SHAPE):
        value = known.get(key)
        if filled.typed(key) or (key in _SHAPE and value is None):
            continue
        if value is None:
            filled.put(key, None, "carried", f"job {parent.id} does not name it")
        elif key == "model.num_classes" and (filled.action == "train" or known.get("train.stage") == "pretrain"):
            why = f"the data of this job decides (the parent's: {value})"
            filled.put(key, None, "carried", why)
        else:
            filled.put(key, value, "carried", f"{source} of job {parent.id}")


def _known_of(parent: Parent) -> tuple[dict[str, Any], str]:
    """What a parent says of its model: training's resolved spec knows all; of others only what they were told."""
    if parent.action == "train":
        text = read_text(below(parent.folder, "best.yaml")) or read_text(below(parent.folder, "experiment.yaml"))
        try:
            tree = yaml.safe_load(text) if text else None
        except (yaml.YAMLError, RecursionError) as error:
            raise SpecError(
                f"parent_job_id: experiment.yaml of job {parent.id} is damaged: {str(error).splitlines()[0]}.",
                "Restore it, or remove it and name model.arch and train.stage in the spec.",
            ) from error
        if isinstance(tree, dict):
            return flatten(tree), "resolved spec"
    return flatten(parent.spec), "spec"
