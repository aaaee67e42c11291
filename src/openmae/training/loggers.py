"""Log metrics to metrics.csv, TensorBoard and, if it is set up, Weights & Biases."""

from __future__ import annotations

import importlib.util
import logging
import netrc
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from openmae.results.metrics_csv import MetricsLog

_CLOSE_SECONDS = 10.0

log = logging.getLogger("openmae")


class Loggers:
    """All loggers of a run; created on rank 0 only.

    Args:
        folder: the action's results folder.
        resumed_step: the step from which a resumed run continues (later rows are dropped); None or 0 for a new run.
        wandb_run: an open Weights & Biases run, or None.
    """

    def __init__(self, folder: Path, resumed_step: int | None, wandb_run: Any = None) -> None:
        self._metrics = MetricsLog(folder, append=bool(resumed_step))
        if resumed_step:
            self._metrics.truncate_after(resumed_step)
        self._tensorboard = SummaryWriter(str(folder), purge_step=None if resumed_step is None else resumed_step + 1)
        self._wandb = wandb_run

    def write(self, step: int, epoch: int, values: Mapping[str, float]) -> None:
        """Log ``values`` measured after ``step`` updates of the weights; ``epoch`` is counted from 1, 0 before them."""
        self._metrics.write(step, epoch, values)
        for name, value in values.items():
            self._tensorboard.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log({**values, "epoch": epoch}, step=step)

    def close(self) -> None:
        """Flush and close the loggers. A full disk only causes a warning, since an earlier write has raised an error.

        TensorBoard waits for its thread without a timeout, and an interrupt can leave the two in a deadlock. So it is
        closed in another thread, with a timeout.
        """
        closing = threading.Thread(target=self._close_tensorboard, name="openmae-tensorboard", daemon=True)
        closing.start()
        closing.join(_CLOSE_SECONDS)
        if closing.is_alive():
            log.warning("TensorBoard's events are incomplete: their writer did not end within %g s.", _CLOSE_SECONDS)
        if self._wandb is not None:
            self._wandb.finish()

    def _close_tensorboard(self) -> None:
        try:
            self._tensorboard.close()
        except OSError as error:
            log.warning("TensorBoard's events are incomplete: %s.", error.strerror)


def open_wandb(settings: Mapping[str, Any], folder: Path, config: Mapping[str, Any]) -> Any:
    """Start a Weights & Biases run; return None if it is disabled, or the API key or the package is missing.

    Args:
        settings: the spec's ``wandb`` section.
        folder: where to store the run's files.
        config: the resolved spec, shown with the run.
    """
    mode = os.environ.get("WANDB_MODE")
    if not settings["enable"] or mode == "disabled":
        return None
    if mode != "offline" and not _has_wandb_key():
        log.info("Weights & Biases is off: no API key found. Set WANDB_API_KEY or WANDB_MODE=offline to use it.")
        return None
    if importlib.util.find_spec("wandb") is None:
        log.warning("Weights & Biases is off: the package is missing. Fix: pip install 'openmae[wandb]'.")
        return None
    import wandb

    return wandb.init(
        dir=str(folder),
        config=dict(config),
        **{name: settings[name] or None for name in ("project", "entity", "group", "name")},
        **{name: settings[name] for name in ("reinit", "save_code", "sync_tensorboard")},
        tags=list(settings["tags"]),
        id=settings["run_id"] or None,
        resume="allow" if settings["run_id"] else None,
    )


def _has_wandb_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc.netrc().authenticators("api.wandb.ai") is not None
    except (OSError, netrc.NetrcParseError):
        return False
