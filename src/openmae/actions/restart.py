"""``mae train --restart``: begin a new run, and keep the earlier one under a dated name."""

from __future__ import annotations

import logging
from datetime import datetime, timedelta
from pathlib import Path

from openmae.actions.run import Run
from openmae.checkpoints.folder import list_checkpoints
from openmae.data.presence import local_inputs
from openmae.errors import SpecError
from openmae.results.status import StatusLog
from openmae.spec.schema import ExperimentSpec
from openmae.storage import layout
from openmae.storage.urls import is_remote, redact

log = logging.getLogger("openmae")


def check_restart(spec: ExperimentSpec) -> None:
    """Check that the run in the results folder, if there is one, can be renamed.

    Raises:
        SpecError: the folder is in an object store, or the new run would read or resume from it.
    """
    target = spec.results_folder("train")
    if spec.train.resume_training_checkpoint_path:
        raise SpecError(
            "--restart begins a new run, but train.resume_training_checkpoint_path names a checkpoint to resume from.",
            "Remove one of the two, or set train.pretrained_model_path to start the new run from these weights.",
        )
    if is_remote(target):
        raise SpecError(
            f"--restart renames the results folder, but {redact(target)} is in an object store.",
            "Set another results_dir, or rename the folder with the tools of the store.",
        )
    folder = Path(target).resolve()
    if not _holds_run(folder):
        return
    used = {key: Path(path).resolve() for key, paths in local_inputs(spec, "train").items() for path in paths}
    used["the working directory"] = Path.cwd()
    if inside := {key: path for key, path in used.items() if path.is_relative_to(folder)}:
        raise SpecError(
            f"--restart renames {folder}, but the new run needs what is there: "
            + "; ".join(f"{key} is {path}" for key, path in inside.items())
            + ".",
            "Move or copy that elsewhere, or set another results_dir.",
        )


def set_aside(run: Run) -> None:
    """Give the folder of the earlier run a dated name, and begin the new run in an empty folder.

    Called by the leading process, once the new run is known to be valid.

    Raises:
        UserError: the folder cannot be renamed.
    """
    folder = run.folder.resolve()
    if not _holds_run(folder):
        log.info("--restart: there is no earlier run in %s.", run.folder)
        return
    assert run.lock is not None
    moment = datetime.now()
    while (aside := folder.with_name(f"{folder.name}-{moment:%Y-%m-%dT%H-%M-%S}")).exists():
        moment += timedelta(seconds=1)
    run.lock.move_aside(aside)
    StatusLog(aside, append=True).write("SKIPPED", f"A new run began in {folder}, and this one is kept here.")
    run.status.write("STARTED", "train started")
    log.info("The earlier run is kept in %s.", aside)


def _holds_run(folder: Path) -> bool:
    """Return whether a training run has begun in a folder; an attempt with invalid input leaves only its log."""
    return (folder / layout.SPEC).is_file() or bool(list_checkpoints(folder))
