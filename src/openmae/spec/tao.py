"""Sections that TAO's specs have and OpenMAE reads: the same wishes under TAO's names."""

from __future__ import annotations

from typing import Literal

from openmae.spec.option import Section, option

Monitor = Literal["", "train_loss", "val_loss", "ACC_all", "acc"]


class CheckpointerSpec(Section):
    """``train.checkpointer``: which checkpoint is the best one (nvidia-tao-core 7.3)."""

    enable_topk: bool = option(False, "let monitor and replace_periodic act; model_best.pth is always written")
    replace_periodic: bool = option(False, "keep one checkpoint in addition to the best: train.keep_checkpoints=1")
    monitor: Monitor = option(
        "", "metric that picks model_best.pth, instead of train.optim.monitor_name; acc is TAO's name of ACC_all"
    )
    mode: Literal["", "min", "max"] = option("", "the metric's direction, which must be the true one")
    save_top_k: int = option(1, "accepted; one best checkpoint is kept", ge=1)
    filename: str = option("model_best_{epoch:03d}", "accepted; the best checkpoint is model_best.pth")
    dirpath: str = option("", "accepted; the best checkpoint is in the results folder")
    auto_insert_metric_name: bool = option(False, "accepted; names of checkpoints are fixed")

    @property
    def metric(self) -> str:
        """What picks the best checkpoint; empty: not said here."""
        if not self.enable_topk:
            return ""
        return "ACC_all" if self.monitor == "acc" else self.monitor
