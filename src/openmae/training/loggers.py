"""Where the numbers of a run go: metrics.csv and TensorBoard always, Weights & Biases when it is set up."""

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
    """One ``write`` for all of them; only rank 0 holds it.

    Args:
        folder: the action's results folder.
        resumed_step: the step that a resumed run goes on from (later rows are dropped), or None for a new run.
        wandb_run: an open Weights & Biases run, or None.
    """

    def __init__(self, folder: Path, resumed_step: int | None, wandb_run: Any = None) -> None:
        self._metrics = MetricsLog(folder, append=resumed_step is not None)
        if resumed_step is not None:
            self._metrics.truncate_after(resumed_step)
        self._tensorboard = SummaryWriter(str(folder), purge_step=None if resumed_step is None else resumed_step + 1)
        self._wandb = wandb_run

    def write(self, step: int, epoch: int, values: Mapping[str, float]) -> None:
        """Log ``values`` measured after ``step`` updates, in ``epoch`` counted from 1."""
        self._metrics.write(step, epoch, values)
        for name, value in values.items():
            self._tensorboard.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log({**values, "epoch": epoch}, step=step)

    def close(self) -> None:
        """Flush and close; a full disk is told by whoever wrote first, not by this.

        TensorBoard waits for its thread without a limit. An interruption inside its queue can leave the two waiting for
        each other, so another thread waits for it here, for some seconds.
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
    """Start a Weights & Biases run if ``wandb.enable`` and a key or WANDB_MODE=offline allow it; else one notice.

    Args:
        settings: the spec's ``wandb`` section.
        folder: where its files go.
        config: the resolved spec, shown with the run.

    Returns:
        The run, or None.
    """
    if not settings["enable"] or os.environ.get("WANDB_MODE") == "disabled":
        return None
    if not _has_wandb_key() and os.environ.get("WANDB_MODE") != "offline":
        log.info("Weights & Biases is off: no API key found. Set WANDB_API_KEY or WANDB_MODE=offline to use it.")
        return None
    if importlib.util.find_spec("wandb") is None:
        log.warning("Weights & Biases is off: the package is missing. Fix: pip install 'openmae[wandb]'.")
        return None
    import wandb

    return wandb.init(
        dir=str(folder),
        config=dict(config),
        project=settings["project"] or None,
        entity=settings["entity"] or None,
        group=settings["group"] or None,
        name=settings["name"] or None,
        tags=list(settings["tags"]),
        id=settings["run_id"] or None,
        resume="allow" if settings["run_id"] else None,
        reinit=settings["reinit"],
        save_code=settings["save_code"],
        sync_tensorboard=settings["sync_tensorboard"],
    )


def _has_wandb_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc.netrc().authenticators("api.wandb.ai") is not None
    except (OSError, netrc.NetrcParseError):
        return False
