"""The context in which every action runs: the results folder, ``status.json``, ``experiment.yaml`` and errors."""

from __future__ import annotations

import errno
import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from openmae.actions.staging import local_place
from openmae.data.presence import refuse_missing
from openmae.distributed.topology import World, find_world, gpus_per_node
from openmae.errors import OpenMAEError, Preempted, RunError
from openmae.results.status import Status, StatusLog, Verbosity
from openmae.spec.actions import DEVICES
from openmae.spec.load import to_yaml
from openmae.spec.schema import ExperimentSpec
from openmae.spec.tree import value_of
from openmae.storage import layout
from openmae.storage.atomic import FULL, disk_error, fault_of_disk, write_atomically
from openmae.storage.lock import FolderLock
from openmae.storage.memory_folder import remove_abandoned
from openmae.storage.printable import counted

if TYPE_CHECKING:  # these import torch, and a mistake in the input is reported before that
    from lightning_fabric import Fabric

    from openmae.data.image_dataset import Batch
    from openmae.data.loaders import EvaluationLoader

Rows = Sequence[tuple[str, str]]

_LOADER = re.compile(r"DataLoader worker \(pid.*\) (is killed|exited unexpectedly)")

log = logging.getLogger("openmae")


@dataclass
class Run:
    """A running action.

    Attributes:
        spec: the spec with local paths instead of URLs, and the actual numbers of processes and nodes.
        folder: the local folder for results.
        leads: whether this process writes the results and the log; False if another process of the run does.
        lock: the lock on the folder, if it is local and this process leads.
        skipped: why there was nothing to do; empty if the action did its work.
        facts: further fields of the last line of ``status.json`` if the action succeeds.
    """

    spec: ExperimentSpec
    folder: Path
    leads: bool
    lock: FolderLock | None = None
    skipped: str = ""
    facts: Mapping[str, int | str] = field(default_factory=dict)

    @cached_property
    def status(self) -> StatusLog:
        """The log of the action, opened when it is first used; only for the process that leads."""
        return StatusLog(self.folder, append=True)


@contextmanager
def running(spec: ExperimentSpec, action: str) -> Iterator[Run]:
    """Open the results folder, and write to ``status.json`` how the action began and ended.

    Files of an earlier run are kept until the action replaces them, so that invalid input destroys nothing. Remote
    inputs are downloaded first. Results for an object store are written to a local folder, and uploaded while the
    action runs. If several nodes or a launcher start the action, only the first process writes and uploads results.

    Raises:
        UserError: the folder cannot be written, or an input cannot be downloaded.
        RunError: the disk is full, or results could not be uploaded.
    """
    remove_abandoned()
    refuse_missing(spec, action)
    spec, world = _apply_topology(spec, action)
    with local_place(spec, action, leads=world.leads) as place, _machine_faults(place.folder):
        run = Run(place.spec, place.folder, world.leads, place.lock)
        if not run.leads:
            yield run
            return
        run.status.write("STARTED", f"{action} started")
        try:
            place.begin_uploads()
            with _machine_faults(run.folder):  # status.json gets the same error as the caller
                yield run
            place.finish_uploads()
        except KeyboardInterrupt as stop:
            if place.lost is not None:
                raise place.lost from None
            how = "preempted" if isinstance(stop, Preempted) else "interrupted"
            _write_failure(run.status, f"{action} was {how}", "WARNING")
            raise
        except BaseException as error:
            _write_failure(run.status, f"{type(error).__name__}: {error}", "ERROR")
            raise
        status: Status = "SKIPPED" if run.skipped else "SUCCESS"
        run.status.write(status, run.skipped or f"{action} finished", progress=run.facts)
    for url in place.uploaded:
        log.info("Uploaded to %s.", url)
    log.info("Results are in %s; open report.html there.", place.shown)


def _apply_topology(spec: ExperimentSpec, action: str) -> tuple[ExperimentSpec, World]:
    """Return the spec with the launcher's numbers of processes and nodes, and this process's place in the topology."""
    if action not in DEVICES:
        return spec, World()
    own = getattr(spec, action)
    sets_gpus = spec.is_set(f"{action}.num_gpus") or (spec.is_set(f"{action}.gpu_ids") and own.gpu_ids != (0,))
    nodes = own.num_nodes if spec.is_set(f"{action}.num_nodes") else None
    world = find_world(action, own.num_gpus if sets_gpus else None, nodes)
    values: dict[str, Any] = {f"{action}.num_nodes": world.nodes}
    if world.per_node != own.num_gpus or gpus_per_node():  # else keep gpu_ids: the user may choose GPUs
        values |= {f"{action}.num_gpus": world.per_node, f"{action}.gpu_ids": tuple(range(world.per_node))}
    replaced = [key for key in values if spec.is_set(key) and value_of(spec, key) != values[key]]
    if replaced and world.leads:
        given = [(key, value_of(spec, key)) for key in replaced]
        log.warning(
            "%s set %s on each of %s. This replaces %s in the spec.",
            world.launcher or "WORLD_SIZE and NUM_GPU_PER_NODE",
            counted(world.per_node, "process"),
            counted(world.nodes, "node"),
            ", ".join(f"{key}={list(value) if isinstance(value, tuple) else value}" for key, value in given),
        )
    return spec.replaced(values), world


def _write_failure(status: StatusLog, message: str, verbosity: Verbosity) -> None:
    with suppress(OSError):  # a full disk must not hide the error
        status.write("FAILURE", message, verbosity=verbosity)


@contextmanager
def _machine_faults(folder: Path) -> Iterator[None]:
    try:
        yield
    except OpenMAEError:
        raise
    except Exception as error:
        if isinstance(error, RuntimeError) and _LOADER.search(str(error)):  # torch raises it in a signal handler
            raise RunError(
                f"A worker that loads images was killed: {str(error).splitlines()[0]}",
                "If memory ran out, lower dataset.num_workers_per_gpu or dataset.batch_size; the same command resumes.",
            ) from error
        found = fault_of_disk(error)
        if found is None:
            raise
        within = str(found.filename or folder).startswith(str(folder))
        if not within and found.errno not in FULL | {errno.EROFS}:  # a source that cannot be read
            raise
        raise disk_error(found, folder, "results_dir") from error


def begin_results(folder: Path, spec: ExperimentSpec, *, resumed: bool = False) -> None:
    """Write the resolved spec as ``experiment.yaml``. Must be called after all input has been checked.

    The list of corrupt files is removed, unless an earlier run is ``resumed``.
    """
    if not resumed:
        (folder / layout.CORRUPT_LIST).unlink(missing_ok=True)
    write_atomically(folder / layout.SPEC, to_yaml(spec))


def show_table(title: str, rows: Rows) -> None:
    """Print pairs of label and value below a title."""
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for label, value in rows:
        table.add_row(label, value)
    console = Console(stderr=True, highlight=False, markup=False, emoji=False)
    console.print(f"\n{title}", style="bold")
    console.print(table)
    console.print()


def with_progress(fabric: Fabric, loader: EvaluationLoader) -> Iterable[Batch]:
    """Return the batches of a loader, with a progress bar on a terminal."""
    console = Console(stderr=True)
    if not (console.is_terminal and fabric.is_global_zero):
        return loader
    return track(loader, "batches", total=len(loader), console=console, transient=True)
