"""The spec of a job: what was given, then what the parent and the job itself decide, each with its origin.

Precedence, highest first: ``spec_overrides`` (dotted keys, then nested sections, then shorthands), ``specs`` (in the
same order), the functions of the contract, what the parent carries forward, the default of the option.
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
from openmae.spec.describe import REQUIRED
from openmae.spec.option import SECRET_MARK, is_secret
from openmae.storage.urls import is_remote

Tree = dict[str, Any]
KEY_VARIABLE = "OPENMAE_ENCRYPTION_KEY"
KINDS = {"train": "checkpoint", "export": "onnx", "gen_trt_engine": "engine"}  # that an action writes for its children
#: Kinds of model that a key takes from a parent.
TAKES = {
    "train.pretrained_model_path": ("checkpoint",),
    "evaluate.checkpoint": ("checkpoint",),
    "evaluate.trt_engine": ("engine", "onnx"),
    "inference.checkpoint": ("checkpoint",),
    "inference.trt_engine": ("engine", "onnx"),
    "export.checkpoint": ("checkpoint",),
    "gen_trt_engine.onnx_file": ("onnx",),
}
#: The contract's table without ``encryption_key`` and ``results_dir``, which every action has.
FILLED = {
    "train": {
        "train.resume_training_checkpoint_path": "resume_model",
        "train.pretrained_model_path": "ptm_if_no_resume_model",
    },
    "evaluate": {"evaluate.checkpoint": "parent_model", "evaluate.trt_engine": "parent_model"},
    "inference": {"inference.checkpoint": "parent_model", "inference.trt_engine": "parent_model"},
    "export": {"export.checkpoint": "parent_model", "export.onnx_file": "create_onnx_file"},
    "gen_trt_engine": {
        "gen_trt_engine.onnx_file": "parent_model",
        "gen_trt_engine.trt_engine": "create_engine_file",
    },
}
CARRIED = ("train.stage", "model.arch", "model.num_classes", "dataset.augmentation.input_size")
_SHAPE = ("model.patch_size", "model.in_chans")  # carried if the parent sets them
_SHORTHANDS = {
    "num_epochs": "train.num_epochs",
    "batch_size": "dataset.batch_size",
    "learning_rate": "train.optim.lr",
    "num_classes": "model.num_classes",
    "stage": "train.stage",
    "arch": "model.arch",
    "image_size": "dataset.augmentation.input_size",
    "resume_checkpoint": "train.resume_training_checkpoint_path",
    "trt_data_type": "gen_trt_engine.tensorrt.data_type",
    "trt_engine": "{action}.trt_engine",
}
_SHORTHANDS_OF = {
    "export": {"batch_size": "export.batch_size"},
    "gen_trt_engine": {"batch_size": "gen_trt_engine.batch_size"},
}


@dataclass(frozen=True)
class Origin:
    """The origin of a value.

    Attributes:
        key: Dotted key.
        value: The value; None if the key was left unset.
        function: A function of the contract, or ``specs``, ``spec_overrides``, ``carried``, ``gpu_count``, ...
        why: An explanation.
    """

    key: str
    value: Any
    function: str
    why: str


@dataclass
class JobSpec:
    """The spec of a job, with the origin of each value.

    Attributes:
        action: The action of the job.
        searching: Whether the job is a hyperparameter search.
        values: Values by dotted key.
        origins: Origins by dotted key, also of keys that were left unset.
    """

    action: str
    searching: bool = False
    values: dict[str, Any] = field(default_factory=dict)
    origins: dict[str, Origin] = field(default_factory=dict)

    def put(self, key: str, value: Any, function: str, why: str) -> None:
        """Set a key, or record why it is left unset if the value is None."""
        if value is not None:
            self.values[key] = value
        self.origins[key] = Origin(key, value, function, why)

    def is_set(self, key: str) -> bool:
        """Return whether a key has a value; an empty string is none."""
        return self.values.get(key) not in (None, "")

    @property
    def tree(self) -> Tree:
        """The values as nested sections."""
        return nested(self.values)

    @property
    def folder(self) -> str:
        """The folder of the action: ``<action>.results_dir``, else ``<results_dir>/<action>``."""
        own = self.values.get(f"{self.action}.results_dir")
        return _absolute(own) if own else below(self.values["results_dir"], self.action)

    def explanation(self) -> list[dict[str, Any]]:
        """Return the origins as plain values, sorted by key, without a secret key."""
        found = [asdict(self.origins[key]) for key in sorted(self.origins)]
        for item in found:
            if item["key"] == "encryption_key" and is_secret(str(item["value"] or "")):
                item["value"] = SECRET_MARK
        return found


def merge(
    action: str, specs: Mapping[str, Any] | None = None, spec_overrides: Mapping[str, Any] | None = None
) -> JobSpec:
    """Merge what was given; see the precedence above. ``???`` and None count as not given.

    Args:
        action: The action of the job.
        specs: Nested sections, dotted keys or shorthands.
        spec_overrides: The same, with precedence.

    Raises:
        SpecError: A shorthand has no meaning for the action.
    """
    spec = JobSpec(action)
    for source, given in (("specs", specs or {}), ("spec_overrides", spec_overrides or {})):
        short: dict[str, tuple[Any, str]] = {}
        nested_keys: dict[str, tuple[Any, str]] = {}
        dotted: dict[str, tuple[Any, str]] = {}
        for name, value in given.items():
            key = str(name)
            if key in _SHORTHANDS:
                short |= {k: (v, f"shorthand {key} in {source}") for k, v in _expand(action, key, value).items()}
            else:
                found = {k: (v, f"given in {source}") for k, v in _flatten(value, key).items()}
                (dotted if "." in key else nested_keys).update(found)
        for layer in (short, nested_keys | dotted):
            for key, (value, why) in layer.items():
                if value is not None and value != "???":
                    spec.put(key, value, source, why)
    return spec


def fill(spec: JobSpec, parent: Record | None, own_results: str) -> None:
    """Set every key that the contract's table names for the action, or record why it is left unset.

    Args:
        spec: What was given; it is changed.
        parent: The job whose child this is.
        own_results: The results folder of this job, used if the spec names none.

    Raises:
        SpecError: The parent has no model that the action could take.
        CheckpointError: The parent should have such a model, but does not.
        DataError: A remote results folder cannot be read.
    """
    _set_key(spec, parent)
    if not spec.is_set("results_dir"):
        spec.put("results_dir", own_results, "output_dir", "this job's results folder")
    else:
        spec.values["results_dir"] = _absolute(spec.values["results_dir"])
    if parent is not None and parent.action not in KINDS:
        raise SpecError(
            f"parent_job_id: {parent.id} is a job of {parent.action}, whose results have no model.",
            "Use a train, export or gen_trt_engine job.",
        )
    for key, function in FILLED[spec.action].items():
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
    if KINDS[parent.action] not in TAKES[key]:
        return None, f"a job of {parent.action} writes {KINDS[parent.action]}, which does not fit"
    given = [other for other in FILLED[spec.action] if other != key and other in TAKES and spec.is_set(other)]
    if given and spec.action in ("evaluate", "inference"):
        return None, f"{given[0]} is set, and only one of them is used"
    held = list_outputs(parent.results_folder, parent.outputs)
    where = f"{key}: job {parent.id} ({parent.action}, {parent.state})"
    chosen, why = choose_model(held, TAKES[key], parent.outputs, where)
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


def _create_onnx_file(spec: JobSpec, key: str, parent: Record | None) -> tuple[str | None, str]:
    return below(spec.folder, "model.onnx"), "in this job's results folder"


def _create_engine_file(spec: JobSpec, key: str, parent: Record | None) -> tuple[str | None, str]:
    return below(spec.folder, "model.engine"), "in this job's results folder"


_FUNCTIONS = {
    "parent_model": _parent_model,
    "resume_model": _resume_model,
    "ptm_if_no_resume_model": _ptm_if_no_resume_model,
    "create_onnx_file": _create_onnx_file,
    "create_engine_file": _create_engine_file,
}


def _require_model(spec: JobSpec, parent: Record) -> None:
    """Refuse a parent whose model no key of the action takes."""
    for group in REQUIRED[spec.action]:
        if group[0] in TAKES and not any(map(spec.is_set, group)):
            kinds = sorted({kind for key in group for kind in TAKES[key]})
            wanted = " or ".join(action for action, kind in KINDS.items() if kind in kinds)
            raise SpecError(
                f"parent_job_id: {spec.action} takes {' or '.join(kinds)}, but {parent.id} is a job of "
                f"{parent.action}, which writes {KINDS[parent.action]}.",
                f"Use a job of {wanted} as the parent, or set {' or '.join(group)}.",
            )


def _carry(spec: JobSpec, parent: Record) -> None:
    """Copy the stage and the shape of the model from the parent."""
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
    """Return a parent's spec by dotted key: the resolved one of a training run, else what was given."""
    if parent.action == "train":
        folder = parent.results_folder
        text = read_text(below(folder, "best.yaml")) or read_text(below(folder, "experiment.yaml"))
        try:
            tree = yaml.safe_load(text) if text else None
        except (yaml.YAMLError, RecursionError) as error:
            raise SpecError(
                f"parent_job_id: experiment.yaml of job {parent.id} is damaged: {str(error).splitlines()[0]}.",
                "Restore it, or remove it and set model.arch and train.stage in the spec.",
            ) from error
        if isinstance(tree, dict):
            return _flatten(tree), "resolved spec"
    return _flatten(parent.spec), "spec"


def _absolute(path: str) -> str:
    return path if is_remote(path) or "${" in path else os.path.abspath(os.path.expanduser(path))


def nested(values: Mapping[str, Any]) -> Tree:
    """Return values by dotted key as nested sections.

    Raises:
        SpecError: A key is both a section and a plain value.
    """
    tree: Tree = {}
    for key, value in values.items():
        *parents, name = key.split(".")
        section = tree
        for part in parents:
            inner = section.setdefault(part, {})
            if not isinstance(inner, dict):
                raise SpecError(
                    f"{key}: cannot be set, since {part} is {inner!r} and not a section.",
                    f"Give {part} as a mapping, or leave it out.",
                )
            section = inner
        if isinstance(section.get(name), dict) and section[name]:
            raise SpecError(f"{key}: is a section, but a plain value is given for it too.", "Remove one of them.")
        section[name] = value
    return tree


def _expand(action: str, word: str, value: Any) -> dict[str, Any]:
    """Return the keys that a shorthand stands for, with their values."""
    if word == "trt_engine" and action not in ("evaluate", "inference", "gen_trt_engine"):
        raise SpecError(
            f"trt_engine: the shorthand has no meaning for {action}.",
            "Use it with gen_trt_engine, evaluate, inference.",
        )
    if word == "image_size" and action == "export":
        sides = value if isinstance(value, list | tuple) and len(value) == 2 else (value, value)
        return dict(zip(("export.input_height", "export.input_width"), sides, strict=True))
    return {_SHORTHANDS_OF.get(action, {}).get(word, _SHORTHANDS[word]).format(action=action): value}


def _flatten(value: Any, path: str = "") -> dict[str, Any]:
    if not isinstance(value, Mapping):
        return {path: value}
    found: dict[str, Any] = {}
    for name, inner in value.items():
        found |= _flatten(inner, f"{path}.{name}" if path else str(name))
    return found
