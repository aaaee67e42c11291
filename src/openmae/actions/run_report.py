"""The report of a training run: refreshed while the run is in progress, and completed at its end."""

from __future__ import annotations

import logging
import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import cached_property
from pathlib import Path

import timm
import torch
from lightning_fabric import Fabric

from openmae._version import __version__
from openmae.actions.evidence import collect_evidence
from openmae.actions.plan import Plan
from openmae.actions.run import Rows
from openmae.actions.sections import best_epoch, reconstructions, train_report
from openmae.data.image_dataset import Batch
from openmae.data.loaders import EvaluationLoader, LoaderSettings
from openmae.data.transforms import EvalTransform
from openmae.evaluation.reconstructions import reconstruct
from openmae.machine import peak_memory
from openmae.models.mae import MaskedAutoencoder
from openmae.results.images import reconstruction_progress, reconstruction_strip
from openmae.results.profile import Breakdown
from openmae.results.report import Figure, Section, Table
from openmae.results.trials import duration
from openmae.results.verdict import Evidence, give_verdict
from openmae.spec.load import choices_of
from openmae.storage import layout
from openmae.training.pretrain import PretrainTask
from openmae.training.trainer import Trainer

REFRESH_SECONDS = 30.0  # at least so long between two reports of an unfinished run
_SHARE = 0.05  # of the time of a run that such reports may take
_MOST_EPOCHS = 5  # with reconstructions
_IMAGES = 4  # reconstructed at these epochs
_PROGRESS = "Predictions for the same images and masks after several epochs, with the visible patches."

log = logging.getLogger("openmae")


class RunReport:
    """The report of a run in this process; only rank 0 writes.

    Args:
        rows: label and value of each row of the recipe.
    """

    def __init__(self, fabric: Fabric, plan: Plan, trainer: Trainer, rows: Rows) -> None:
        self._fabric, self._plan, self._trainer, self._rows = fabric, plan, trainer, rows
        self._epochs = shown_epochs(plan.spec.train.num_epochs) if isinstance(trainer.task, PretrainTask) else ()
        self._folder = plan.folder / layout.RECONSTRUCTIONS
        self._earlier_seconds = trainer.progress.seconds
        self._due = time.monotonic() + REFRESH_SECONDS
        self._peak = 0
        if plan.resume is None and fabric.is_global_zero:
            for path in _strips(self._folder).values():  # of an earlier run
                path.unlink()

    def after_epoch(self) -> None:
        """Reconstruct images after some epochs, and refresh the report if the last one is old enough."""
        progress, train = self._trainer.progress, self._plan.spec.train
        epoch = progress.epoch
        if epoch in self._epochs:
            self._reconstruct(epoch)
        if not self._fabric.is_global_zero:
            return
        last, due = epoch >= train.last_epoch, time.monotonic() >= self._due
        if last or due:
            self._peak = max(self._peak, self._memory())
        if due and not last:
            where = f"after epoch {epoch} of {train.num_epochs}, step {progress.step}"
            self._refresh(f"This run has not finished: the state {where}.")

    def after_stop(self) -> None:
        """Refresh the report of an interrupted run. Called on rank 0."""
        progress, epochs = self._trainer.progress, self._plan.spec.train.num_epochs
        self._peak = max(self._peak, self._memory())
        where = f"in epoch {progress.epoch + 1} of {epochs}, after step {progress.step}"
        self._refresh(f"This run was interrupted {where}. The same command resumes it.")

    def finish(self, model: torch.nn.Module, breakdown: Breakdown | None) -> str:
        """Write the report of a finished run, on rank 0; return the verdict on the run.

        ``model`` is the trained model in eval mode.
        """
        self._peak = max(self._peak, self._memory())
        figures = []
        if isinstance(self._trainer.task, PretrainTask):
            assert isinstance(model, MaskedAutoencoder)
            path = self._folder / layout.RECONSTRUCTIONS_LAST
            figures.append(reconstructions(self._fabric, self._trainer.task, model, self._loader, path))
        return give_verdict(self._write([*figures, *self._progress(fewest=2)], breakdown))

    @property
    def facts(self) -> Mapping[str, int | str]:
        """The duration of the run in all its parts, the peak memory in bytes and versions, for ``status.json``."""
        took = str(timedelta(seconds=self._trainer.seconds))
        return {"duration": took, "peak_memory_bytes": self._peak, "versions": versions()}

    def _refresh(self, state: str) -> None:
        """Write the report of an unfinished run."""
        began = time.monotonic()
        with _tolerated("report.html could not be refreshed"):
            self._write(self._progress(fewest=1), None, unfinished=state)
        took = time.monotonic() - began
        self._due = time.monotonic() + max(REFRESH_SECONDS, took / _SHARE)

    def _write(self, figures: Sequence[Figure], breakdown: Breakdown | None, *, unfinished: str = "") -> Evidence:
        """Write the report; return the facts that its verdict is based on."""
        plan, progress = self._plan, self._trainer.progress
        best = best_epoch(plan.folder, self._trainer.task.monitor, progress.best)
        indexes = [plan.train, plan.val] if plan.val else [plan.train]
        rows = [*self._rows, *self._measured()]
        sections: list[Section] = [*figures, *_chosen(plan)]
        evidence = collect_evidence(plan, progress.best)
        train_report(plan.folder, plan.info, evidence, best, rows, sections, breakdown, *indexes, unfinished=unfinished)
        return evidence

    def _measured(self) -> Rows:
        took = duration(self._trainer.seconds)
        if self._plan.resume:
            since = duration(self._trainer.seconds - self._earlier_seconds)
            earlier = self._earlier_seconds
            took = (
                f"{took}, {since} of it since the run was resumed" if earlier else f"{since}, since the run was resumed"
            )
        each = " per process" if self._fabric.world_size > 1 else ""
        where = f" of GPU memory{each}" if self._fabric.device.type == "cuda" else f"{each}, with the workers"
        resumed = ", since the run was resumed" if self._plan.resume else ""
        return [
            ("duration", took),
            ("peak memory", f"{self._peak / 2**30:.2f} GiB{where}{resumed}"),
            ("versions", versions()),
        ]

    def _memory(self) -> int:
        device = self._fabric.device
        return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_memory()

    def _reconstruct(self, epoch: int) -> None:
        """Draw the reconstructions after an epoch; all processes must call this."""
        model, task = self._trainer.evaluated_model(), self._trainer.task
        if self._fabric.is_global_zero:
            assert isinstance(task, PretrainTask)
            assert isinstance(model, MaskedAutoencoder)
            shown = reconstruct(self._fabric, model, task.normalise, task.mask, self._batch)
            with _tolerated("The reconstructions could not be written"):
                reconstruction_strip(*shown, self._folder / layout.reconstruction_name(epoch))

    def _progress(self, fewest: int) -> list[Figure]:
        """Return the figure of the reconstructions so far, if there are those of at least ``fewest`` epochs."""
        epoch = self._trainer.progress.epoch
        strips = {number: path for number, path in _strips(self._folder).items() if number <= epoch}
        if len(strips) < fewest or not self._epochs:
            return []
        kept = [[*strips][number - 1] for number in shown_epochs(len(strips))]
        path = self._folder / layout.RECONSTRUCTIONS_PROGRESS
        drawn = reconstruction_progress({number: strips[number] for number in kept}, len(self._batch.images), path)
        return [Figure("Progress of the reconstructions", drawn, _PROGRESS)]

    @cached_property
    def _batch(self) -> Batch:
        return self._loader.first(_IMAGES)

    @cached_property
    def _loader(self) -> EvaluationLoader:
        plan, loader = self._plan, self._trainer.val_loader
        return loader or EvaluationLoader(
            plan.train,
            EvalTransform(plan.config.input_size, plan.config.in_chans),
            LoaderSettings(batch_size=1, results=plan.folder, max_corrupt_fraction=1.0),
        )


def _chosen(plan: Plan) -> list[Table]:
    """Return the table of the options that the recipe has chosen, if there are any."""
    caption = "A value in the spec or on the command line replaces a choice."
    choices = choices_of(plan.spec)
    title = f"Options chosen by train.recipe={plan.spec.train.recipe}"
    return [Table(title, ("option", "value", "reason"), choices, caption=caption)] if choices else []


@contextmanager
def _tolerated(problem: str) -> Iterator[None]:
    """Turn an error of the disk into a warning: metrics and checkpoints of the run report a lasting one."""
    try:
        yield
    except OSError as error:
        log.warning("%s (%s).", problem, error.strerror or error)


def shown_epochs(epochs: int, most: int = _MOST_EPOCHS) -> tuple[int, ...]:
    """Return up to ``most`` of the epochs 1 to ``epochs``: the first, the last, and more of the early ones in between.

    >>> shown_epochs(100)
    (1, 7, 26, 57, 100)
    >>> shown_epochs(3)
    (1, 2, 3)
    """
    if epochs <= most:
        return tuple(range(1, epochs + 1))
    return tuple(sorted({1 + round((epochs - 1) * (part / (most - 1)) ** 2) for part in range(most)}))


def versions() -> str:
    """Return the versions that determine the results of a run."""
    python = platform.python_version()
    return f"openmae {__version__}, torch {torch.__version__}, timm {timm.__version__}, Python {python}"


def _strips(folder: Path) -> dict[int, Path]:
    """Return the reconstructions in a folder by epoch, oldest first."""
    found = {layout.reconstruction_epoch(path.name): path for path in folder.glob("*.png")}
    return {epoch: found[epoch] for epoch in sorted(filter(None, found))}
