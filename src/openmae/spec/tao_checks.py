"""Rules and notices for specs that were written for TAO."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

from openmae.spec.describe import fields
from openmae.spec.rules import value_of
from openmae.spec.schema import ExperimentSpec
from openmae.spec.yaml_reader import Problem

_CHECKPOINTER = "train.checkpointer."
_CALIBRATION = "gen_trt_engine.tensorrt.calibration."
#: What TAO calls an option of the same section.
_NAMES = {
    f"{_CALIBRATION}cal_image_dir": f"{_CALIBRATION}images",
    f"{_CALIBRATION}cal_batches": f"{_CALIBRATION}count",
    f"{_CALIBRATION}cal_batch_size": f"{_CALIBRATION}batch",
}


#: Options that TAO's MAE accepts and ignores, by the stages in which they act here.
IGNORED_BY_TAO = {
    "model.drop_path_rate": ("pretrain", "finetune"),
    "model.decoder_depth": ("pretrain",),
    "model.decoder_embed_dim": ("pretrain",),
    "model.norm_pix_loss": ("pretrain",),
    "model.global_pool": ("finetune",),
    "train.optim.momentum": ("pretrain", "finetune"),
    "train.optim.backbone_multiplier": ("finetune",),
    "train.optim.layer_decay": ("finetune",),
    "train.optim.warmup_epochs": ("pretrain", "finetune"),
    "train.optim.monitor_name": ("pretrain", "finetune"),
    "train.pretrained_model_path": ("pretrain",),
    **{f"dataset.augmentation.{name}": ("pretrain",) for name in ("min_ratio", "max_ratio", "hflip")},
}

OWN = ("(ours", "not in TAO")  # in the help of a key that TAO does not have


def find_tao_problems(spec: ExperimentSpec, action: str | None) -> Iterator[Problem]:
    """Yield what is wrong in the sections that are TAO's; ``action`` None: of any action."""
    if action in (None, "train"):
        yield from _checkpointer(spec)
    if action in (None, "gen_trt_engine"):
        for alias, key in _NAMES.items():
            if value_of(spec, alias) and value_of(spec, key) != fields()[key].default:
                yield Problem(alias, f"means the same as {key}. Remove one of them.", also=(key,))


def find_tao_notices(spec: ExperimentSpec, action: str | None) -> Iterator[str]:
    """Yield which options that are TAO's have no effect."""
    if action in (None, "train"):
        yield from _checkpointer_notices(spec)
    if action == "gen_trt_engine" and spec.gen_trt_engine.tensorrt.calibration.cal_cache_file:
        yield f"{_CALIBRATION}cal_cache_file has no effect: the ranges are part of the engine, and no cache is written."


def ignored_by_tao(spec: ExperimentSpec, from_file: Collection[str], defaults: Mapping[str, object]) -> Iterator[str]:
    """Yield which values of a training's spec file change the result here, but not in TAO.

    A file with a key that TAO does not have was written for OpenMAE, and nothing is said of it.

    Args:
        spec: resolved.
        from_file: the keys that the file sets.
        defaults: of the keys whose default depends on others.
    """
    if any(mark in (fields()[key].description or "") for key in from_file for mark in OWN if key in fields()):
        return
    found = []
    only = {  # TAO applies them elsewhere
        "train.optim.warmup_epochs": spec.train.optim.lr_scheduler == "MultiStep",
        "model.norm_pix_loss": spec.model.architecture.family == "hiera",
    }
    for key, stages in IGNORED_BY_TAO.items():
        value, default = value_of(spec, key), defaults.get(key, fields()[key].default)
        if spec.train.stage not in stages or (key in only and not only[key]):
            continue
        if key in from_file and value != default:
            found.append(f"{key}={value}" + (f" (default {default})" if default != "" else ""))
    if found:
        yield (
            f"TAO ignores these options of the spec file, and OpenMAE applies them: {', '.join(found)}. Remove one to "
            "have its default."
        )


def _checkpointer(spec: ExperimentSpec) -> Iterator[Problem]:
    checkpointer = spec.train.checkpointer
    metric = checkpointer.metric
    labelled = spec.train.stage == "finetune" and bool(spec.dataset.val_data_sources)
    if metric == "ACC_all" and not labelled:
        text = f"{checkpointer.monitor} is measured when fine-tuning, on dataset.val_data_sources. Use train_loss."
        yield Problem(f"{_CHECKPOINTER}monitor", text, also=("train.stage", "dataset.val_data_sources"))
    direction = "max" if metric == "ACC_all" else "min"
    if metric and checkpointer.mode not in ("", direction):
        text = f"{metric} is best at its {direction}imum, got {checkpointer.mode}. Set {direction}, or remove it."
        yield Problem(f"{_CHECKPOINTER}mode", text, also=(f"{_CHECKPOINTER}monitor",))


def _checkpointer_notices(spec: ExperimentSpec) -> Iterator[str]:
    checkpointer, default = spec.train.checkpointer, type(spec.train.checkpointer)()
    unused = ["save_top_k", "filename", "dirpath", "auto_insert_metric_name"]
    if not checkpointer.enable_topk:
        unused += ["monitor", "mode", "replace_periodic"]
    unused = [_CHECKPOINTER + name for name in unused if getattr(checkpointer, name) != getattr(default, name)]
    if unused:
        yield (
            f"{' and '.join(unused)} has no effect: the best checkpoint is model_best.pth in the results folder"
            f"{'' if checkpointer.enable_topk else ', and monitor, mode and replace_periodic need enable_topk=true'}."
        )
