"""Build the spec of a job from given values, its parent and its results folder, with the origin of each value.

Precedence, highest first: ``spec_overrides`` (dotted keys, then nested sections, then shorthands), ``specs`` (in the
same order), the functions in the action table, values carried over from the parent, the default of the option.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import yaml

from openmae.errors import SpecError
from openmae.jobs.artifacts import below, choose_model, list_folder, list_outputs, newest_checkpoint, read_text
from openmae.jobs.job import Record
from openmae.spec.actions import SHORTHANDS, TABLE, expand_shorthand
from openmae.spec.option import SECRET_MARK, is_secret
from openmae.spec.tree import NotASectionError, Tree, flatten, get, put
from openmae.spec.yaml_reader import MISSING
from openmae.storage import layout
from openmae.storage.urls import is_remote, redact

KEY_VARIABLE = "OPENMAE_ENCRYPTION_KEY"
CARRIED = ("train.stage", "model.arch", "model.num_classes", "dataset.augmentation.input_size")
_SHAPE = ("model.patch_size", "model.in_chans")  # also carried over, if set in the parent


@dataclass(frozen=True)
class Origin:
    """The origin of a value.

    Attributes:
        value: The value, without secrets; None if the key was left unset.
        function: A function in the action table, or ``specs``, ``spec_overrides``, ``carried``, ``gpu_count``, ...
        why: An explanation for the user.
    """

    key: str
    value: Any
    function: str
    why: str


@dataclass
class JobSpec:
    """The spec of a job, with the origin of each value.

    Attributes:
        searching: True if the job is a hyperparameter search.
        values: Values by dotted key.
        origins: Origins by dotted key, including keys that were left unset.
    """

    action: str
    searching: bool = False
    values: dict[str, Any] = field(default_factory=dict)
    origins: dict[str, Origin] = field(default_factory=dict)

    def put(self, key: str, value: Any, function: str, why: str) -> None:
        """Set a key and record its origin; None leaves the key unset and only records the reason."""
        if value is not None:
            self.values[key] = value
        literal_key = key == "encryption_key" and is_secret(str(value or ""))
        self.origins[key] = Origin(key, SECRET_MARK if literal_key else without_password(value), function, why)

    def is_set(self, key: str) -> bool:
        """Return whether a key has a value other than an empty string."""
        return self.values.get(key) not in (None, "")

    @property
    def folder(self) -> str:
        """The results folder of the action: ``<action>.results_dir``, else ``<results_dir>/<action>``."""
        own = self.values.get(f"{self.action}.results_dir")
        return absolute(own) if own else below(self.values["results_dir"], self.action)

    def explanation(self) -> list[dict[str, Any]]:
        """Return the origins as dicts, sorted by key."""
        return [asdict(self.origins[key]) for key in sorted(self.origins)]


def merge(
    action: str, specs: Mapping[str, Any] | None = None, spec_overrides: Mapping[str, Any] | None = None
) -> JobSpec:
    """Merge nested sections, dotted keys and shorthands by precedence. ``???`` and None count as not given.

    Raises:
        SpecError: A shorthand has no meaning for the action.
    """
    spec = JobSpec(action)
    for source, given in (("specs", specs or {}), ("spec_overrides", spec_overrides or {})):
        for name, value in sorted(given.items(), key=lambda item: _precedence(str(item[0]))):
            name = str(name)
            if name in SHORTHANDS:
                found, why = expand_shorthand(action, name, value), f"shorthand {name} in {source}"
            else:
                found, why = flatten({name: value}), f"given in {source}"
            for key, one in found.items():
                if one is not None and one != MISSING:
                    spec.put(key, one, source, why)
    return spec


def _precedence(name: str) -> int:
    return 0 if name in SHORTHANDS else 2 if "." in name else 1


def fill(spec: JobSpec, parent: Record | None, own_results: str) -> None:
    """Infer missing values: each key that the action table lists is set, or the reason why it is not is recorded.

    Args:
        spec: The given values; modified in place.
        parent: The parent job, or None.
        own_results: Results folder of this job, used if the spec does not set one.

    Raises:
        SpecError: The action cannot use a model of the parent's action.
        CheckpointError: The parent's results have no such model.
        DataError: A remote results folder cannot be read.
    """
    _set_key(spec, parent)
    if not spec.is_set("results_dir"):
        spec.put("results_dir", own_results, "output_dir", "this job's results folder")
    else:
        spec.values["results_dir"] = absolute(spec.values["results_dir"])
    if parent is not None and not TABLE[parent.action].produces:
        raise SpecError(
            f"parent_job_id: {parent.id} is a job of {parent.action}, whose results have no model.",
            "Use a train, export or gen_trt_engine job.",
        )
    for key, function in TABLE[spec.action].filled.items():
        if not spec.is_set(key):
            value, why = _FUNCTIONS[function](spec, key, parent)
            spec.put(key, value, function, why)
    if parent is not None:
        _require_model(spec, parent)
        _carry(spec, parent)


def _set_key(spec: JobSpec, parent: Record | None) -> None:
    if spec.is_set("encryption_key"):
        return
    inherited = parent.spec.get("encryption_key") if parent else None
    if parent is not None and inherited == SECRET_MARK:
        raise SpecError(
            "encryption_key: the parent's files are encrypted with a key that was given as a literal value, which is "
            f"never stored (parent_job_id {parent.id}).",
            "Give the same key again: encryption_key=env:NAME or file:PATH.",
        )
    spec.put("encryption_key", inherited or None, "key", "the parent's" if inherited else "none was given")


def _parent_model(spec: JobSpec, key: str, parent: Record | None) -> tuple[str | None, str]:
    if parent is None:
        return None, "there is no parent_job_id"
    inputs = TABLE[spec.action].inputs
    kinds = next(item.kinds for item in inputs if item.key == key)
    produced = TABLE[parent.action].produces
    if produced not in kinds:
        return None, f"a job of {parent.action} writes {produced}, which does not fit"
    given = [item.key for item in inputs if item.key != key and spec.is_set(item.key)]
    if given and spec.action in ("evaluate", "inference"):
        return None, f"{given[0]} is set, and only one of them is used"
    held = list_outputs(parent.results_folder, parent.outputs)
    where = f"{key}: job {parent.id} ({parent.action}, {parent.state})"
    chosen, why = choose_model(held, kinds, parent.outputs, where)
    return chosen.path, f"{why} (job {parent.id})"


def _resume_model(spec: JobSpec, key: str, parent: Record | None) -> tuple[str | None, str]:
    if spec.searching:
        return None, "a search finds the checkpoints of its trials"
    newest = newest_checkpoint(list_folder(spec.folder)) if "${" not in spec.folder else None
    if newest is None:
        return None, "this job's own results have no checkpoint"
    return newest.path, "the newest checkpoint in this job's own results"


def _ptm_if_no_resume_model(spec: JobSpec, key: str, parent: Record | None) -> tuple[str | None, str]:
    if spec.is_set("train.resume_training_checkpoint_path"):
        return None, "training resumes from its own checkpoint"
    if parent is None:
        return None, "there is no checkpoint to resume from, and no parent_job_id"
    return _parent_model(spec, key, parent)


def _create_file(spec: JobSpec, key: str, parent: Record | None) -> tuple[str | None, str]:
    output = TABLE[spec.action].output
    assert output is not None
    return below(spec.folder, output.file), "in this job's results folder"


_FUNCTIONS = {
    "parent_model": _parent_model,
    "resume_model": _resume_model,
    "ptm_if_no_resume_model": _ptm_if_no_resume_model,
    "create_onnx_file": _create_file,
    "create_engine_file": _create_file,
}


def _require_model(spec: JobSpec, parent: Record) -> None:
    action = TABLE[spec.action]
    keys = [item.key for item in action.inputs]
    if action.needs_input and not any(map(spec.is_set, keys)):
        kinds = sorted({kind for item in action.inputs for kind in item.kinds})
        wanted = " or ".join(name for name, other in TABLE.items() if other.produces in kinds)
        raise SpecError(
            f"parent_job_id: {spec.action} takes {' or '.join(kinds)}, but {parent.id} is a job of {parent.action}, "
            f"which writes {TABLE[parent.action].produces}.",
            f"Use a job of {wanted} as the parent, or set {' or '.join(keys)}.",
        )


def _carry(spec: JobSpec, parent: Record) -> None:
    """Copy the stage and the model's architecture and shape from the parent."""
    known, source = _read_parent_spec(parent)
    for key in (*CARRIED, *_SHAPE):
        value = known.get(key)
        if spec.is_set(key) or (key in _SHAPE and value is None):
            continue
        if value is None:
            spec.put(key, None, "carried", f"job {parent.id} does not set it")
        elif key == "model.num_classes" and (spec.action == "train" or known.get("train.stage") == "pretrain"):
            spec.put(key, None, "carried", f"the data of this job decides (the parent's: {value})")
        else:
            spec.put(key, value, "carried", f"{source} of job {parent.id}")


def _read_parent_spec(parent: Record) -> tuple[dict[str, Any], str]:
    """Return a parent's spec by dotted key (the resolved spec of a training run, else the given one) and its name."""
    if parent.action == "train":
        folder = parent.results_folder
        for name in (layout.BEST_SPEC, layout.SPEC):
            if text := read_text(below(folder, name)):
                break
        try:
            tree = yaml.safe_load(text) if text else None
        except (yaml.YAMLError, RecursionError) as error:
            raise SpecError(
                f"parent_job_id: {name} of job {parent.id} is damaged: {str(error).splitlines()[0]}.",
                "Restore it, or remove it and set model.arch and train.stage in the spec.",
            ) from error
        if isinstance(tree, dict):
            return flatten(tree), "resolved spec"
    return flatten(parent.spec), "spec"


def absolute(path: str) -> str:
    """Return an absolute path; a URL or a reference such as ``${oc.env:NAME}`` is returned unchanged."""
    return path if is_remote(path) or "${" in path else os.path.abspath(os.path.expanduser(path))


def without_password(value: Any) -> Any:
    """Return a value without the password or the signature of a URL."""
    return redact(value) if isinstance(value, str) and is_remote(value) else value


def nested(values: Mapping[str, Any]) -> Tree:
    """Convert values by dotted key to nested sections.

    Raises:
        SpecError: A key is both a section and a plain value.
    """
    tree: Tree = {}
    for key, value in values.items():
        if isinstance(get(tree, key), dict):
            raise SpecError(f"{key}: is a section, but a plain value is given for it too.", "Remove one of them.")
        try:
            put(tree, key, value)
        except NotASectionError as error:
            raise SpecError(
                f"{key}: cannot be set, since {error}.", f"Give {error.section} as a mapping, or leave it out."
            ) from error
    return tree
