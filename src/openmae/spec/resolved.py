"""The values of a spec that depend on other values. ``load_spec`` fills them in, so no action sees an unset one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from openmae.spec.actions import DEVICES
from openmae.spec.schema import ExperimentSpec

_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
DEFAULT_MEAN = {1: (0.449,), 3: _IMAGENET_MEAN, 4: (*_IMAGENET_MEAN, 0.5)}  # by the number of channels
DEFAULT_STD = {1: (0.226,), 3: _IMAGENET_STD, 4: (*_IMAGENET_STD, 0.25)}
_MONITOR = "train.optim.monitor_name"


def resolve(spec: ExperimentSpec) -> tuple[ExperimentSpec, list[str]]:
    """Return the spec with all dependent values, and a notice for each value of the user that another one replaces."""
    if spec.dataset.cache == "auto":  # train.recipe decides, as if it were not set
        spec = spec.replaced({"dataset.cache": "off"}).with_set_keys(spec.set_keys - {"dataset.cache"})
    spec = fill_unset(spec)
    sizes = {key: size for key, size in calibration_sizes(spec).items() if not spec.is_set(key)}
    spec, notices = _apply_checkpointer(spec.replaced({**device_numbers(spec), **sizes}))
    scale = spec.dataset.augmentation.max_scale
    if scale > 1:
        spec = spec.replaced({"dataset.augmentation.max_scale": 1.0})
        notices.append(
            f"dataset.augmentation.max_scale {scale:g} is used as 1: a crop cannot be larger than the image."
        )
    return spec, notices


def dependent_defaults(spec: ExperimentSpec) -> dict[str, Any]:
    """Return the defaults that depend on other options, by dotted key."""
    row, finetune = spec.model.architecture, spec.train.stage == "finetune"
    return {
        "model.mask_ratio": row.mask_ratio,
        "model.decoder_depth": row.decoder_depth,
        "model.decoder_embed_dim": row.decoder_embed_dim,
        "model.drop_path_rate": 0.1 if finetune else row.pretrain_drop_path,
        "train.optim.beta2": 0.999 if finetune else 0.95,
        _MONITOR: ("ACC_all" if finetune else "val_loss") if spec.dataset.val_data_sources else "train_loss",
        "dataset.augmentation.mean": DEFAULT_MEAN[spec.model.in_chans],
        "dataset.augmentation.std": DEFAULT_STD[spec.model.in_chans],
    }


def fill_unset(spec: ExperimentSpec) -> ExperimentSpec:
    """Return the spec with the dependent default of each option that neither the user nor a recipe has set."""
    given = spec.set_keys | spec.chosen.keys()
    return spec.replaced({key: value for key, value in dependent_defaults(spec).items() if key not in given})


def device_numbers(spec: ExperimentSpec) -> dict[str, Any]:
    """Return num_gpus and gpu_ids of each action, each derived from the other if only one is set, by dotted key."""
    values: dict[str, Any] = {}
    for section in DEVICES:
        own = getattr(spec, section)
        if not spec.is_set(f"{section}.gpu_ids") or own.gpu_ids == (0,):  # [0] is the published default
            values[f"{section}.gpu_ids"] = tuple(range(own.num_gpus))
        elif not spec.is_set(f"{section}.num_gpus"):
            values[f"{section}.num_gpus"] = len(own.gpu_ids)
    return values


def calibration_sizes(spec: ExperimentSpec) -> dict[str, int]:
    """Return the calibration options that are set under TAO's names, by the dotted keys that OpenMAE uses."""
    calibration = spec.gen_trt_engine.tensorrt.calibration
    batch, sizes = calibration.cal_batch_size, {}
    if batch is not None:
        sizes["gen_trt_engine.tensorrt.calibration.batch"] = batch
    if calibration.cal_batches is not None:
        sizes["gen_trt_engine.tensorrt.calibration.count"] = calibration.cal_batches * (batch or 1)
    return sizes


def _apply_checkpointer(spec: ExperimentSpec) -> tuple[ExperimentSpec, list[str]]:
    """Return the spec with the options that ``train.checkpointer`` sets under other names, and notices."""
    checkpointer, keep = spec.train.checkpointer, "train.keep_checkpoints"
    notices = []
    if checkpointer.enable_topk and checkpointer.replace_periodic and not spec.is_set(keep):
        spec = spec.replaced({keep: 1}).with_set_keys(spec.set_keys | {keep})
    metric, named = checkpointer.metric, spec.train.optim.monitor_name
    if metric and spec.is_set(_MONITOR) and metric != named:
        notices.append(f"train.checkpointer.monitor={metric} replaces {_MONITOR}={named}.")
    if metric:
        spec = spec.replaced({_MONITOR: metric}).with_set_keys(spec.set_keys | {_MONITOR})
    return spec, notices


def with_actual_monitor(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """Return the recorded values of an earlier run, by dotted key, to compare them with those of this one.

    Older versions recorded ``train_loss`` if the option was unset.
    """
    unset = before.get(_MONITOR) == "train_loss" and now.get(_MONITOR) in ("ACC_all", "val_loss")
    return {**before, **({_MONITOR: now[_MONITOR]} if unset else {})}
