"""Sections of TAO's specs whose options have another name in OpenMAE."""

from __future__ import annotations

from typing import Literal

from openmae.spec.option import Section, option

Monitor = Literal["", "train_loss", "val_loss", "ACC_all", "acc"]
_TOPK = "train.checkpointer.enable_topk=true"
_ONE_BEST = "the best checkpoint is model_best.pth in the results folder"


class CheckpointerSpec(Section):
    """``train.checkpointer``: the choice of the best checkpoint (nvidia-tao-core 7.3)."""

    enable_topk: bool = option(
        False, "apply monitor and replace_periodic; model_best.pth is always written", compat=True, on_resume="allow"
    )
    replace_periodic: bool = option(
        False,
        "keep one checkpoint in addition to the best: train.keep_checkpoints=1",
        compat=True,
        on_resume="allow",
        needs=_TOPK,
    )
    monitor: Monitor = option(
        "",
        "metric that picks model_best.pth, instead of train.optim.monitor_name; acc is TAO's name for ACC_all",
        compat=True,
        on_resume="allow",
        needs=_TOPK,
    )
    mode: Literal["", "min", "max"] = option(
        "", "direction of the metric, which must be the true one", compat=True, on_resume="allow", needs=_TOPK
    )
    save_top_k: int = option(
        1, "accepted; one best checkpoint is kept", ge=1, compat=True, on_resume="allow", no_effect=_ONE_BEST
    )
    filename: str = option(
        "model_best_{epoch:03d}",
        "accepted; the best checkpoint is model_best.pth",
        compat=True,
        on_resume="allow",
        no_effect=_ONE_BEST,
    )
    dirpath: str = option(
        "",
        "accepted; the best checkpoint is in the results folder",
        compat=True,
        on_resume="allow",
        no_effect=_ONE_BEST,
    )
    auto_insert_metric_name: bool = option(
        False,
        "accepted; the names of checkpoints are fixed",
        compat=True,
        on_resume="allow",
        no_effect=_ONE_BEST,
    )

    @property
    def metric(self) -> str:
        """The metric that picks the best checkpoint; empty if the section does not set one."""
        if not self.enable_topk:
            return ""
        return "ACC_all" if self.monitor == "acc" else self.monitor
