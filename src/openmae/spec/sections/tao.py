"""Sections of TAO's specs whose options have another name in OpenMAE."""

from __future__ import annotations

from typing import Literal

from openmae.spec.option import TAO_NAME, Count, Section, option

Monitor = Literal["", "train_loss", "val_loss", "ACC_all", "acc", "knn_acc", "probe_acc"]
_TOPK = "train.checkpointer.enable_topk=true"
_ONE_BEST = "the best checkpoint is model_best.pth in the results folder"


class CheckpointerSpec(Section):
    """``train.checkpointer``: the choice of the best checkpoint (nvidia-tao-core 7.3)."""

    enable_topk: bool = option(
        False, "apply monitor and replace_periodic; model_best.pth is always written", **TAO_NAME
    )
    replace_periodic: bool = option(
        False, "keep one checkpoint in addition to the best: train.keep_checkpoints=1", needs=_TOPK, **TAO_NAME
    )
    monitor: Monitor = option(
        "",
        "metric that picks model_best.pth, instead of train.optim.monitor_name; acc is TAO's name for ACC_all",
        needs=_TOPK,
        **TAO_NAME,
    )
    mode: Literal["", "min", "max"] = option(
        "", "direction of the metric, which must be the true one", needs=_TOPK, **TAO_NAME
    )
    save_top_k: Count = option(1, "accepted; one best checkpoint is kept", no_effect=_ONE_BEST, **TAO_NAME)
    filename: str = option(
        "model_best_{epoch:03d}", "accepted; the best checkpoint is model_best.pth", no_effect=_ONE_BEST, **TAO_NAME
    )
    dirpath: str = option("", "accepted; the best checkpoint is in the results folder", no_effect=_ONE_BEST, **TAO_NAME)
    auto_insert_metric_name: bool = option(
        False, "accepted; the names of checkpoints are fixed", no_effect=_ONE_BEST, **TAO_NAME
    )

    @property
    def metric(self) -> str:
        """The metric that selects the best checkpoint; empty if the section does not set one."""
        if not self.enable_topk:
            return ""
        return "ACC_all" if self.monitor == "acc" else self.monitor
