"""What every action does around its work: a results folder, a status log, the resolved spec, and the end told."""

from __future__ import annotations

import errno
import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_fabric import Fabric
from rich.console import Console
from rich.progress import track
from rich.table import Table

from openmae.actions.staging import local_place
from openmae.data.image_dataset import Batch
from openmae.data.loaders import EvaluationLoader
from openmae.data.presence import missing_files, missing_sources
from openmae.distributed.topology import World, find_world, gpus_per_node
from openmae.errors import DataError, OpenMAEError, Preempted, RunError
from openmae.results.status import StatusLog
from openmae.spec.load import to_yaml
from openmae.spec.rules import value_of
from openmae.spec.schema import DEVICES, ExperimentSpec
from openmae.storage import layout
from openmae.storage.atomic import FULL, disk_error, fault_of_disk, write_atomically
from openmae.storage.memory_folder import remove_abandoned

Rows = Sequence[tuple[str, str]]

_LOADER = re.compile(r"DataLoader worker \(pid.*\) (is killed|exited unexpectedly)")

log = logging.getLogger("openmae")


@dataclass
class Run:
    """A running action.

    Attributes:
        spec: with local paths in place of the URLs of files, and the numbers of processes and nodes that act.
        folder: of its results, local.
        status: its log.
        leads: this process writes the results; False: it leaves that, and the log, to another one of the run.
        skipped: why there was nothing to do; empty where there was.
    """

    spec: ExperimentSpec
    folder: Path
    status: StatusLog
    leads: bool = True
    skipped: str = ""


class _NoStatus(StatusLog):
    """Of a process that leaves the log to another one of its run."""

    def __init__(self) -> None:
        pass

    def write(
        self,
        status: str,
        message: str,
        *,
        verbosity: str = "INFO",
        kpi: Mapping[str, float] | None = None,
        progress: Mapping[str, int | str] | None = None,
    ) -> None:
        """It is written once."""


@contextmanager
def running(spec: ExperimentSpec, action: str) -> Iterator[Run]:
    """Open the results folder, and tell ``status.json`` how the action began and ended.

    Lines of an earlier run are kept, and so are its other files until the action has something to put in their place:
    a request that turns out to be wrong costs nothing. What is remote is fetched first; results that go to a store are
    written to a local folder, and uploaded from there while the action runs. Of the processes that several nodes or a
    launcher started, the first one alone does so.

    Args:
        spec: resolved.
        action: names the folder.

    Raises:
        UserError: the folder cannot be written, or what is remote cannot be had.
        RunError: the disk is full, or results could not be uploaded.
    """
    remove_abandoned()
    _refuse_missing(spec, action)
    spec, world = _placed(spec, action)
    if not world.leads:
        with local_place(spec, action, leads=False) as place, _machine_faults(place.folder):
            yield Run(place.spec, place.folder, _NoStatus(), leads=False)
        return
    with local_place(spec, action) as place, _machine_faults(place.folder):
        run = Run(place.spec, place.folder, StatusLog(place.folder, append=True))
        run.status.write("STARTED", f"{action} started")
        try:
            place.begin_uploads()
            with _machine_faults(run.folder):  # the status log gets the error that the caller gets
                yield run
            place.finish_uploads()
        except KeyboardInterrupt as stop:
            if place.loss.error is not None:
                raise place.loss.error from None
            how = "preempted" if isinstance(stop, Preempted) else "interrupted"
            _write_failure(run.status, f"{action} was {how}", "WARNING")
            raise
        except BaseException as error:
            _write_failure(run.status, f"{type(error).__name__}: {error}", "ERROR")
            raise
        run.status.write("SKIPPED" if run.skipped else "SUCCESS", run.skipped or f"{action} finished")
    for url in place.uploaded:
        log.info("Uploaded to %s.", url)
    log.info("Results are in %s; open report.html there.", place.shown)


def _refuse_missing(spec: ExperimentSpec, action: str) -> None:
    """Name all paths that do not exist at once; a single one is explained by whatever opens it."""
    missing = {**missing_sources(spec, "train" if action == "automl" else action), **missing_files(spec, action)}
    if len(missing) > 1:
        raise DataError("\n".join(f"{key}: {text}." for key, text in missing.items()), "Check the paths.")


def _placed(spec: ExperimentSpec, action: str) -> tuple[ExperimentSpec, World]:
    """The spec with the numbers of processes and nodes that a launcher decides, and this process's place."""
    if action not in DEVICES:
        return spec, World()
    own, key = getattr(spec, action), f"{action}."
    counted = spec.typed(f"{key}num_gpus") or (spec.typed(f"{key}gpu_ids") and own.gpu_ids != (0,))
    nodes = own.num_nodes if spec.typed(f"{key}num_nodes") else None
    world = find_world(action, own.num_gpus if counted else None, nodes)
    values: dict[str, Any] = {f"{key}num_nodes": world.nodes}
    if world.per_node != own.num_gpus or gpus_per_node():  # else the user may choose among a node's GPUs
        values |= {f"{key}num_gpus": world.per_node, f"{key}gpu_ids": tuple(range(world.per_node))}
    replaced = [f"{name}={_plain(value_of(spec, name))}" for name in values if value_of(spec, name) != values[name]]
    replaced = [item for item in replaced if spec.typed(item.partition("=")[0])]
    if replaced and world.leads:
        log.warning(
            "%s set %d process(es) on each of %d node(s). This replaces %s of the spec.",
            world.launcher or "WORLD_SIZE and NUM_GPU_PER_NODE", world.per_node, world.nodes, ", ".join(replaced),
        )  # fmt: skip
    return spec.replaced(values), world


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _write_failure(status: StatusLog, message: str, verbosity: str) -> None:
    with suppress(OSError):  # a disk that is full must not hide what happened
        status.write("FAILURE", message, verbosity=verbosity)


@contextmanager
def _machine_faults(folder: Path) -> Iterator[None]:
    try:
        yield
    except OpenMAEError:
        raise
    except Exception as error:
        if isinstance(error, RuntimeError) and _LOADER.search(str(error)):  # torch raises it wherever the loop is
            raise RunError(
                f"A process that loads images was ended from outside: {str(error).splitlines()[0]}",
                "If memory ran out, lower dataset.num_workers_per_gpu or dataset.batch_size; the same command goes on.",
            ) from error
        found = fault_of_disk(error)
        if found is None:
            raise
        within = str(found.filename or folder).startswith(str(folder))
        if not within and found.errno not in FULL | {errno.EROFS}:  # a source that cannot be read
            raise
        raise disk_error(found, folder, "results_dir") from error


def begin_results(folder: Path, spec: ExperimentSpec, *, resumed: bool = False) -> None:
    """Write what acts as ``experiment.yaml``, which loads back; to be called when the request has proved right.

    Args:
        folder: of the results.
        spec: resolved.
        resumed: the run goes on, so its list of corrupt files does as well.
    """
    if not resumed:
        (folder / layout.CORRUPT_LIST).unlink(missing_ok=True)
    write_atomically(folder / layout.SPEC, to_yaml(spec))


def show_table(title: str, rows: Rows) -> None:
    """Print label and value pairs below a title on the terminal."""
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for label, value in rows:
        table.add_row(label, value)
    console = Console(stderr=True, highlight=False, markup=False, emoji=False)
    console.print(f"\n{title}", style="bold")
    console.print(table)
    console.print()


def watched(fabric: Fabric, loader: EvaluationLoader) -> Iterable[Batch]:
    """The loader's batches, with a progress bar where there is a terminal."""
    console = Console(stderr=True)
    if not (console.is_terminal and fabric.is_global_zero):
        return loader
    return track(loader, "batches", total=len(loader), console=console, transient=True)
