"""From the arguments of ``create_job`` to what is written and started, or to an error before anything is."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from openmae.data.presence import missing_files, missing_sources
from openmae.errors import DataError, SpecError, blaming
from openmae.jobs.job import Record, state_of
from openmae.jobs.parameters import (
    KEY_VARIABLE,
    Filled,
    Parent,
    fill,
    merge,
    nested,
)
from openmae.jobs.policy import Route, route
from openmae.spec.actions import ACTIONS, DEVICES, get_action
from openmae.spec.load import load_spec
from openmae.spec.option import KEY_IN_ENVIRONMENT, KEY_IN_FILE, SECRET_MARK, is_secret
from openmae.spec.schema import ExperimentSpec
from openmae.spec.tree import value_of
from openmae.spec.yaml_reader import write_text
from openmae.storage.urls import is_remote, redact

_STOPS_EARLY = ("asha", "hyperband", "bohb")


@dataclass(frozen=True)
class Request:
    """The arguments of ``create_job``, as given."""

    action: str
    specs: Mapping[str, Any] | None
    spec_overrides: Mapping[str, Any] | None
    automl_policy: str | None
    image: str | None
    gpu_count: int | None
    num_nodes: int | None
    env_vars: dict[str, str]
    name: str | None
    platform: str


@dataclass(frozen=True)
class Prepared:
    """A request that has proved right.

    Attributes:
        spec_text: of the job's spec file; a literal encryption key is not in it.
        environment: the job's variables, secrets among them.
        gpus, nodes: that it takes, per node and in all.
        facts: what the record says of it.
    """

    spec_text: str
    environment: dict[str, str]
    gpus: int
    nodes: int
    facts: Record


def make_request(request: Request, parent: Record | None, own_results: str) -> Prepared:
    """Merge, fill in and check.

    Args:
        request: as given.
        parent: record of the parent job.
        own_results: results folder for a spec that names none.

    Raises:
        UserError: the request is wrong.
    """
    _check_arguments(request)
    action = request.action
    routed = route(action, request.automl_policy)
    filled = merge(action, request.specs, request.spec_overrides)
    filled.searching = routed.where == "automl"
    own = not filled.typed("results_dir") and not filled.typed(f"{action}.results_dir")
    replaced = _count(filled, request)
    fill(filled, _parent(parent), own_results)
    environment = dict(request.env_vars)
    key = str(filled.values.get("encryption_key") or "")
    if "${" in key:  # else the reference itself would become the key
        key = load_spec({"encryption_key": key}).encryption_key
    if is_secret(key):
        environment[KEY_VARIABLE] = key
        filled.values["encryption_key"] = f"{KEY_IN_ENVIRONMENT}{KEY_VARIABLE}"
    tree = filled.tree
    spec = load_spec(tree, action=routed.where)
    check_sources(spec, action)
    check_key(spec.encryption_key, environment)
    gpus, nodes = _resources(spec, request)
    if filled.searching:  # here its trainings share what it is given; on a cluster they are jobs of their own
        gpus = gpus * spec.automl.max_concurrent if request.platform == "local" else 0
        nodes = nodes if request.platform == "local" else 1  # those are its trainings'
    if is_secret(key):
        filled.values["encryption_key"] = SECRET_MARK
    explanation = filled.explanation()
    for item in explanation:
        item["value"] = _shown(item["value"])
    facts = {
        "action": action,
        "name": request.name or action,
        "parent_job_id": parent["id"] if parent else None,
        "results_dir": spec.results_dir,
        "results_folder": _folder(spec, routed.where),
        "command": routed.where,
        "own_results": own,
        "outputs": _outputs(spec, action),
        "spec": nested({name: _shown(value) for name, value in filled.values.items()}),
        "explanation": explanation,
        "notices": [
            *_notices(request, parent, is_secret(key), routed, spec),
            *_replaced(replaced),
            *(f"{name}: {text} yet." for name, text in missing_files(spec, action).items()),
        ],
        "gpus": gpus,
        "nodes": nodes,
        "processes": getattr(spec, action).num_gpus if action in DEVICES else 1,
        "image": request.image,
        "env_vars": sorted(request.env_vars),
    }
    return Prepared(write_text(tree), environment, gpus, nodes, facts)


def check_sources(spec: ExperimentSpec, action: str) -> None:
    """Refuse data sources that are not there.

    Raises:
        DataError: one does not exist, or its store cannot be reached; the text names all of them.
    """
    missing = missing_sources(spec, action)
    if missing:
        raise DataError("\n".join(f"{key}: {text}." for key, text in missing.items()), "Check the path.")
    for data in get_action(action).data:
        source = str(value_of(spec, data.key))
        if is_remote(source) and "{" not in source:  # else a pattern of shards
            from openmae.storage.listing import require

            with blaming(data.key):
                require(source)


def check_key(text: str, env_vars: Mapping[str, str]) -> None:
    """Refuse an encryption key that the job would not find.

    Raises:
        SpecError: its variable is not set, or its file is not there.
    """
    name = text.removeprefix(KEY_IN_ENVIRONMENT)
    if text.startswith(KEY_IN_ENVIRONMENT) and not (env_vars.get(name) or os.environ.get(name)):
        raise SpecError(f"encryption_key: the environment variable {name!r} is not set.", "Set it, or give env_vars.")
    path = os.path.expanduser(text.removeprefix(KEY_IN_FILE))
    if text.startswith(KEY_IN_FILE) and not os.path.isfile(path):
        raise SpecError(f"encryption_key: there is no file {path!r}.", "Put the key into it.")


def _check_arguments(request: Request) -> None:
    if request.action not in ACTIONS:
        raise SpecError(f"action: there is no action {request.action!r}.", f"Use one of: {', '.join(ACTIONS)}.")
    for name, count, least in (("gpu_count", request.gpu_count, 0), ("num_nodes", request.num_nodes, 1)):
        if count is not None and (isinstance(count, bool) or not isinstance(count, int) or count < least):
            raise SpecError(f"{name}: must be an integer >= {least}, got {count!r}.", "Leave it out for the spec's.")
    for variable, value in request.env_vars.items():
        if not isinstance(variable, str) or not isinstance(value, str) or "=" in variable or "\0" in variable + value:
            raise SpecError(
                f"env_vars: {variable!r} must be the name of an environment variable, with a text as its value.",
                'Give, for example, {"WANDB_MODE": "offline"}.',
            )
    for argument in ("specs", "spec_overrides"):
        value = getattr(request, argument)
        if value is not None and not isinstance(value, Mapping):
            raise SpecError(
                f"{argument}: must be a mapping, got {type(value).__name__}.", 'Give {"train": {"num_epochs": 3}}, say.'
            )


def _count(filled: Filled, request: Request) -> list[str]:
    """Put ``gpu_count`` and ``num_nodes`` into the section of the action; return what they replace there."""
    action, replaced = filled.action, []
    given = {"num_gpus": ("gpu_count", request.gpu_count or None), "num_nodes": ("num_nodes", request.num_nodes)}
    if action not in DEVICES:
        if request.gpu_count and filled.values.get(f"{action}.gpu_id") not in (None, 0):
            replaced.append(f"{action}.gpu_id={filled.values[f'{action}.gpu_id']}")
            filled.put(f"{action}.gpu_id", 0, "gpu_count", "the platform says which GPU")
        return replaced
    for name, (argument, count) in given.items():
        if count is None:
            continue
        key = f"{action}.{name}"
        if filled.typed(key) and str(filled.values[key]) != str(count):
            replaced.append(f"{key}={filled.values[key]}")
        filled.put(key, count, argument, f"the argument {argument}")
        ids, wanted = f"{action}.gpu_ids", list(range(count))
        if name == "num_gpus" and filled.typed(ids) and filled.values[ids] not in (wanted, tuple(wanted)):
            replaced.append(f"{ids}={filled.values[ids]}")
            filled.put(ids, wanted, argument, f"the argument {argument}: the platform says which GPUs")
    return replaced


def _resources(spec: ExperimentSpec, request: Request) -> tuple[int, int]:
    """GPUs per node and nodes; the platform says which GPUs, so the spec must not."""
    action = request.action
    section = getattr(spec, action)
    if action not in DEVICES:
        if section.gpu_id:
            raise _own_gpus(f"{action}.gpu_id", section.gpu_id)
        on_cpu = action == "export" and section.on_cpu
        default, nodes = (0 if on_cpu else 1), request.num_nodes or 1
    else:
        if sorted(section.gpu_ids) != list(range(section.num_gpus)):
            raise _own_gpus(f"{action}.gpu_ids", list(section.gpu_ids))
        default, nodes = section.num_gpus, section.num_nodes
    return (default if request.gpu_count is None else request.gpu_count), nodes


def _own_gpus(key: str, value: Any) -> SpecError:
    return SpecError(
        f"{key}: a job counts the GPUs that its platform gives it from 0, got {value}.",
        f"Remove {key}, or use 0, 1, ...",
    )


def _parent(record: Record | None) -> Parent | None:
    if record is None:
        return None
    return Parent(
        id=record["id"],
        action=record["action"],
        state=state_of(record),
        folder=record["results_folder"],
        outputs=tuple(record["outputs"]),
        spec=record["spec"],
    )


def _folder(spec: ExperimentSpec, action: str) -> str:
    folder = spec.results_folder(action)
    return folder if is_remote(folder) else os.path.abspath(folder)


def _outputs(spec: ExperimentSpec, action: str) -> list[str]:
    written = {"export": spec.export.onnx_file, "gen_trt_engine": spec.gen_trt_engine.trt_engine}.get(action)
    return [written if is_remote(written) else os.path.abspath(written)] if written else []


def _shown(value: Any) -> Any:
    return redact(value) if isinstance(value, str) and is_remote(value) else value


def _replaced(values: list[str]) -> list[str]:
    return [f"gpu_count and num_nodes of the job replace {', '.join(values)} of the spec."] if values else []


def _search_words(spec: ExperimentSpec) -> str:
    """How many trainings a search is, how long that takes, and how to train once instead."""
    automl = spec.automl
    count, epochs, at_once = (
        automl.max_recommendations,
        automl.max_epochs or spec.train.num_epochs,
        automl.max_concurrent,
    )
    times = -(-count // at_once)
    limit = "at most" if automl.algorithm in (*_STOPS_EARLY, "grid") else "about"
    return (
        f"It is a search of {'up to ' if automl.algorithm == 'grid' else ''}{count} trials of {epochs} epochs "
        f"({automl.algorithm}, {at_once} at a time), which takes {limit} {times} times as long as one; its log gives "
        "the expected time before the first trial starts. To train once, submit with --automl off (mae jobs submit) or "
        'automl_policy="off" (Python).'
    )


def _notices(
    request: Request, parent: Record | None, literal_key: bool, routed: Route, spec: ExperimentSpec
) -> list[str]:
    notices = []
    if literal_key:
        notices.append("encryption_key is kept nowhere: children need it again. env:NAME or file:PATH is handed on.")
    if request.image:
        notices.append(f"image {request.image} does not act: jobs run in this Python environment.")
    if request.action == "train" and routed.policy == "auto":
        notices.append(f"{routed.reason} {_search_words(spec)}" if routed.where == "automl" else routed.reason)
    elif request.action != "train" and request.automl_policy is not None:
        notices.append(f"automl_policy does not act on {request.action}.")
    if parent is not None and state_of(parent) != "COMPLETE":
        notices.append(f"The parent {parent['id']} is {state_of(parent)}: its results may still change.")
    return notices
