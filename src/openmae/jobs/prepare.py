"""Turn the arguments of ``Client.create_job`` into the record and the spec of a job, and check them."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openmae.data.presence import missing_files, missing_sources
from openmae.errors import DataError, SpecError, blaming
from openmae.jobs.job import Record, Transition, now
from openmae.jobs.parameters import KEY_VARIABLE, JobSpec, absolute, fill, merge, nested, without_password
from openmae.jobs.policy import Route, route
from openmae.machine import identify
from openmae.spec.actions import ACTIONS, DEVICES, get_action
from openmae.spec.load import load_spec
from openmae.spec.option import KEY_IN_ENVIRONMENT, KEY_IN_FILE, SECRET_MARK, is_secret
from openmae.spec.schema import ExperimentSpec
from openmae.spec.tree import value_of
from openmae.spec.yaml_reader import write_text
from openmae.storage import layout
from openmae.storage.urls import is_remote

_STOPS_EARLY = ("asha", "hyperband", "bohb")


@dataclass(frozen=True)
class JobRequest:
    """The arguments of ``Client.create_job``, and the platform of the client."""

    action: str
    platform: str
    specs: Mapping[str, Any] | None = None
    spec_overrides: Mapping[str, Any] | None = None
    automl_policy: str | None = None
    image: str | None = None
    gpu_count: int | None = None
    num_nodes: int | None = None
    env_vars: Mapping[str, str] | None = None
    name: str | None = None


@dataclass(frozen=True)
class Prepared:
    """A valid job that has not been stored or started. Only ``environment`` has secrets."""

    record: Record
    spec_text: str
    environment: dict[str, str]


def prepare(request: JobRequest, parent: Record | None, job_id: str, folder: Path) -> Prepared:
    """Merge the spec of a job, infer missing values, and check it.

    Results are written to a subfolder of ``folder``, the folder of the new job, unless the spec sets another one.

    Raises:
        UserError: The request is invalid.
    """
    _check_arguments(request)
    action = request.action
    routed = route(action, request.automl_policy)
    draft = merge(action, request.specs, request.spec_overrides)
    draft.searching = routed.where == "automl"
    own_results = not draft.is_set("results_dir") and not draft.is_set(f"{action}.results_dir")
    replaced = _set_counts(draft, request)
    fill(draft, parent, str(folder / "results"))
    environment = dict(request.env_vars or {})
    literal_key = _prepare_key(draft, environment)
    tree = nested(draft.values)
    spec = load_spec(tree, action=routed.where)
    check_sources(spec, action)
    gpus, nodes = _resources(spec, request, draft.searching)
    if literal_key:
        draft.values["encryption_key"] = SECRET_MARK
    output = get_action(action).output
    command = command_of(routed.where, folder / layout.JOB_SPEC)
    if draft.searching:
        command += ["--platform", request.platform]
    record = Record(
        id=job_id,
        action=action,
        name=request.name or action,
        platform=request.platform,
        created_at=now(),
        results_dir=spec.results_dir,
        results_folder=absolute(spec.results_folder(routed.where)),
        parent_job_id=parent.id if parent else None,
        exit_code=None,
        notices=_notices(request, parent, literal_key, routed, spec, replaced),
        transitions=[Transition(now(), "PENDING", "queued")],
        host=socket.gethostname(),
        submitter=identify(os.getpid()),
        command=command,
        cwd=os.getcwd(),
        own_results=own_results,
        outputs=[absolute(value_of(spec, output.key))] if output else [],
        spec=nested({key: without_password(value) for key, value in draft.values.items()}),
        explanation=draft.explanation(),
        gpus=gpus,
        nodes=nodes,
        processes=getattr(spec, action).num_gpus if action in DEVICES else 1,
        image=request.image,
        env_vars=sorted(request.env_vars or {}),
    )
    return Prepared(record, write_text(tree), environment)


def command_of(action: str, spec: Path) -> list[str]:
    """Return the command line that runs an action in this Python environment."""
    return [sys.executable, "-m", "openmae", action, "-e", str(spec)]


def check_sources(spec: ExperimentSpec, action: str) -> None:
    """Check that the data sources of an action exist.

    Raises:
        DataError: Sources are missing (the message lists all local ones), or a store cannot be reached.
    """
    missing = missing_sources(spec, action)
    if missing:
        raise DataError("\n".join(f"{key}: {text}." for key, text in missing.items()), "Check the path.")
    for data in get_action(action).data:
        source = str(value_of(spec, data.key))
        if is_remote(source) and "{" not in source:  # not a pattern of shards
            from openmae.storage.listing import require

            with blaming(data.key):
                require(source)


def _check_arguments(request: JobRequest) -> None:
    if request.action not in ACTIONS:
        raise SpecError(f"action: there is no action {request.action!r}.", f"Use one of: {', '.join(ACTIONS)}.")
    for name, count, least in (("gpu_count", request.gpu_count, 0), ("num_nodes", request.num_nodes, 1)):
        if count is not None and (isinstance(count, bool) or not isinstance(count, int) or count < least):
            raise SpecError(
                f"{name}: must be an integer >= {least}, got {count!r}.", "Leave it out to use the number in the spec."
            )
    for variable, value in (request.env_vars or {}).items():
        if not isinstance(variable, str) or not isinstance(value, str) or "=" in variable or "\0" in variable + value:
            raise SpecError(
                f"env_vars: {variable!r} must be the name of an environment variable, with a string as its value.",
                'For example: {"WANDB_MODE": "offline"}.',
            )
    for argument in ("specs", "spec_overrides"):
        value = getattr(request, argument)
        if value is not None and not isinstance(value, Mapping):
            raise SpecError(
                f"{argument}: must be a mapping, got {type(value).__name__}.",
                'For example: {"train": {"num_epochs": 3}}.',
            )


def _set_counts(draft: JobSpec, request: JobRequest) -> list[str]:
    """Apply ``gpu_count`` and ``num_nodes`` to the section of the action; return the values that they replace."""
    action, gpus, nodes = request.action, request.gpu_count, request.num_nodes
    ids, numbers = (f"{action}.gpu_ids", list(range(gpus or 0))) if action in DEVICES else (f"{action}.gpu_id", 0)
    changes: list[tuple[str, Any, str, str]] = []  # key, value, argument, reason
    if gpus and action in DEVICES:
        changes.append((f"{action}.num_gpus", gpus, "gpu_count", "the argument gpu_count"))
    if gpus and draft.is_set(ids):
        changes.append((ids, numbers, "gpu_count", "the platform decides which GPUs are used"))
    if nodes and action in DEVICES:
        changes.append((f"{action}.num_nodes", nodes, "num_nodes", "the argument num_nodes"))
    replaced = []
    for key, value, argument, why in changes:
        given = draft.values.get(key)
        if draft.is_set(key) and str(list(given) if isinstance(given, tuple) else given) != str(value):
            replaced.append(f"{key}={given}")
        draft.put(key, value, argument, why)
    return replaced


def _prepare_key(draft: JobSpec, environment: dict[str, str]) -> bool:
    """Move a literal encryption key to the environment, or check that the job can read the key; return if it moved."""
    key = str(draft.values.get("encryption_key") or "")
    if "${" in key:  # resolve the reference; otherwise its text would become the key
        key = load_spec({"encryption_key": key}).encryption_key
    if is_secret(key):
        environment[KEY_VARIABLE] = key
        draft.values["encryption_key"] = f"{KEY_IN_ENVIRONMENT}{KEY_VARIABLE}"
        return True
    variable, path = key.removeprefix(KEY_IN_ENVIRONMENT), os.path.expanduser(key.removeprefix(KEY_IN_FILE))
    if key.startswith(KEY_IN_ENVIRONMENT) and not (environment.get(variable) or os.environ.get(variable)):
        raise SpecError(
            f"encryption_key: the environment variable {variable!r} is not set.", "Set it, or pass it in env_vars."
        )
    if key.startswith(KEY_IN_FILE) and not os.path.isfile(path):
        raise SpecError(f"encryption_key: there is no file {path!r}.", "Write the key to it.")
    return False


def _resources(spec: ExperimentSpec, request: JobRequest, searching: bool) -> tuple[int, int]:
    """Return the number of GPUs per node, and of nodes. The spec must not select GPUs, since the platform does."""
    action = request.action
    section = getattr(spec, action)
    if action in DEVICES:
        key, ids, allowed = f"{action}.gpu_ids", sorted(section.gpu_ids), list(range(section.num_gpus))
        default, nodes = section.num_gpus, section.num_nodes
    else:
        key, ids, allowed = f"{action}.gpu_id", [section.gpu_id], [0]
        default, nodes = 0 if action == "export" and section.on_cpu else 1, request.num_nodes or 1
    if ids != allowed:
        raise SpecError(
            f"{key}: a platform numbers the GPUs that it gives to a job from 0, got {', '.join(map(str, ids))}.",
            f"Remove {key}, or use 0, 1, ...",
        )
    gpus = default if request.gpu_count is None else request.gpu_count
    if searching:  # on a cluster, its trials are separate jobs that request resources themselves
        return (gpus * spec.automl.max_concurrent, nodes) if request.platform == "local" else (0, 1)
    return gpus, nodes


def _describe_search(spec: ExperimentSpec) -> str:
    """Describe the number of trials, the time a search takes, and how to train once instead."""
    automl = spec.automl
    count, at_once = automl.max_recommendations, automl.max_concurrent
    limit = "at most" if automl.algorithm in (*_STOPS_EARLY, "grid") else "about"
    return (
        f"It has {'up to ' if automl.algorithm == 'grid' else ''}{count} trials of {spec.trial_epochs} epochs "
        f"({automl.algorithm}, {at_once} at a time) and takes {limit} {-(-count // at_once)} times as long as one "
        "training run; its log gives the expected time before the first trial starts. To train once, submit with "
        '--automl off (mae jobs submit) or automl_policy="off" (Python).'
    )


def _notices(
    request: JobRequest,
    parent: Record | None,
    literal_key: bool,
    routed: Route,
    spec: ExperimentSpec,
    replaced: Sequence[str],
) -> list[str]:
    notices = []
    if literal_key:
        notices.append(
            "A literal encryption_key is never stored: child jobs need it again. env:NAME or file:PATH is passed on."
        )
    if request.image:
        notices.append(f"image {request.image} has no effect: jobs run in this Python environment.")
    if request.action == "train" and routed.policy == "auto":
        notices.append(f"{routed.reason} {_describe_search(spec)}" if routed.where == "automl" else routed.reason)
    elif request.action != "train" and request.automl_policy is not None:
        notices.append(f"automl_policy has no effect on {request.action}.")
    if parent is not None and parent.state != "COMPLETE":
        notices.append(f"The parent {parent.id} is {parent.state}: its results may still change.")
    if replaced:
        notices.append(f"gpu_count and num_nodes of the job replace {', '.join(replaced)} in the spec.")
    return notices + [f"{key}: {text} yet." for key, text in missing_files(spec, request.action).items()]
