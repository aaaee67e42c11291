"""Rules across options: keys that an action requires, and values that contradict each other."""

from __future__ import annotations

from collections.abc import Iterator

from openmae.spec.actions import DEVICES, ROWS
from openmae.spec.architectures import DECODER_HEAD_DIM, visible_units
from openmae.spec.describe import fields, file_use, traits
from openmae.spec.metrics import METRICS
from openmae.spec.option import SECRET_MARK, FileUse
from openmae.spec.resolved import calibration_sizes
from openmae.spec.schema import ExperimentSpec
from openmae.spec.tree import value_of
from openmae.spec.yaml_reader import Problem

_REMOTE = ("s3://", "gs://", "http://", "https://")
_READ_ONLY = ("http://", "https://")


def find_problems(spec: ExperimentSpec, action: str | None) -> Iterator[Problem]:
    """Yield every broken rule. If ``action`` is None, check the rules of all actions, but require no keys."""
    if spec.encryption_key == SECRET_MARK:
        text = "stands for a key that was not recorded. Set encryption_key to env:NAME, file:PATH or the key."
        yield Problem("encryption_key", f"{SECRET_MARK} {text}")
    yield from _missing(spec, action)
    yield from _remote(spec, action)
    yield from _model(spec, action)
    yield from _augmentation(spec, action)
    if action in (None, "train"):
        yield from _training(spec)
        yield from _monitor(spec)
    for section in DEVICES:
        if action in (None, section):
            yield from _devices(spec, section)
    if _knows_geometry(spec, action):
        yield from _geometry(spec)
    if action in (None, "export"):
        yield from _export(spec)
    if action in (None, "gen_trt_engine"):
        yield from _engine(spec)


def _missing(spec: ExperimentSpec, action: str | None) -> Iterator[Problem]:
    for key, *others in ROWS[action].required if action else ():
        given = [name for name in (key, *others) if value_of(spec, name)]
        if not given:
            instead = f" (or {others[0]})" if others else ""
            example = "images/ or images.tar.gz" if "data_sources" in key else "a path to a file"
            text = f"`mae {action}` needs it, but it is not set{instead}. Example: {example}."
            yield Problem(key, text, also=tuple(others))
        elif len(given) > 1:
            text = f"only one of {' and '.join(given)} can be used, but both are set. Remove one."
            yield Problem(given[0], text, also=tuple(given[1:]))


def _remote(spec: ExperimentSpec, action: str | None) -> Iterator[Problem]:
    for key in fields():
        use, section = file_use(key), key.split(".")[0]
        if use is None or (action is not None and section not in (action, "results_dir")):
            continue
        value = str(value_of(spec, key)).strip().lower()
        if use == FileUse.LOCAL and value.startswith(_REMOTE):
            yield Problem(key, "must be a local file, since it is read and written during the build. Give a path.")
        elif use == FileUse.WRITTEN and value.startswith(_READ_ONLY):
            text = "cannot be written to a web server. Give s3://BUCKET/path, gs://BUCKET/path or a local path."
            yield Problem(key, text)


def _is_known(spec: ExperimentSpec, action: str | None, key: str) -> bool:
    """Return whether the spec determines an option; for an action on a trained model, only if the user set it."""
    return spec.is_set(key) or (action in (None, "train") and _has_architecture(spec))


def _has_architecture(spec: ExperimentSpec) -> bool:
    """Return whether the architecture is known; ``train.recipe=auto`` chooses it later, from data and machine."""
    return spec.train.recipe != "auto" or spec.is_set("model.arch") or "model.arch" in spec.chosen


def _model(spec: ExperimentSpec, action: str | None) -> Iterator[Problem]:
    model, row = spec.model, spec.model.architecture
    if model.patch_size is not None and row.family != "vit" and _is_known(spec, action, "model.arch"):
        yield Problem(
            "model.patch_size",
            f"only ViT has a patch size to choose, and {row.name} is not a ViT, got {model.patch_size}. "
            "Remove it, or choose a vit_ architecture.",
            also=("model.arch",),
        )
    cross = spec.train.stage == "pretrain" and model.decoder_attention == "cross"
    if cross and row.family == "convnextv2" and _is_known(spec, action, "model.arch"):
        yield Problem(
            "model.decoder_attention",
            f"cross needs a decoder with attention, but the decoder of {row.name} is convolutional, got cross. "
            "Remove it, or choose a vit_ or hiera_ architecture.",
            also=("model.arch", "train.stage"),
        )
    width = model.decoder_embed_dim
    if spec.train.stage == "pretrain" and row.family != "convnextv2" and width % DECODER_HEAD_DIM:
        near = max(DECODER_HEAD_DIM, round(width / DECODER_HEAD_DIM) * DECODER_HEAD_DIM)
        yield Problem(
            "model.decoder_embed_dim",
            f"must be a multiple of {DECODER_HEAD_DIM}, the width of an attention head, got {width}. Use {near}.",
            also=("model.arch",),
        )


def _augmentation(spec: ExperimentSpec, action: str | None) -> Iterator[Problem]:
    augment, channels = spec.dataset.augmentation, spec.model.in_chans
    for key, values in (("dataset.augmentation.mean", augment.mean), ("dataset.augmentation.std", augment.std)):
        if len(values) != channels and _is_known(spec, action, "model.in_chans"):
            text = f"must have a number for each of the {channels} channels of model.in_chans, got {list(values)}. "
            yield Problem(key, f"{text}Remove it to use ImageNet's values.", also=("model.in_chans",))
    for key in fields():
        sign, other = traits(key).bound
        if sign == "<=" and value_of(spec, key) > value_of(spec, other):
            name, most = other.rpartition(".")[2], value_of(spec, other)
            text = f"must not be above {name} ({most:g}), got {value_of(spec, key):g}. Change one of them."
            yield Problem(key, text, also=(other,))


def _training(spec: ExperimentSpec) -> Iterator[Problem]:
    train, batch = spec.train, spec.dataset.batch_size
    if spec.is_set("train.optim.lr") and train.optim.base_lr is not None:
        yield Problem(
            "train.optim.base_lr",
            f"lr ({train.optim.lr:g}) and base_lr ({train.optim.base_lr:g}) both set the learning rate. "
            "Remove one of them.",
            also=("train.optim.lr",),
        )
    if train.distributed_strategy == "fsdp" and train.stage == "finetune" and train.ema_decay:
        yield Problem(
            "train.ema_decay",
            f"must be 0 with fsdp, which cannot average sharded weights, got {train.ema_decay:g}. "
            "Set it to 0, or use train.distributed_strategy=ddp.",
            also=("train.distributed_strategy", "train.stage"),
        )
    if train.stage == "finetune" and spec.dataset.augmentation.mixes and batch % 2:
        fix = f"got {batch}. Use {batch + 1}"
        if not spec.is_set("dataset.batch_size"):
            fix = f"but it is not set, and the default is {batch}. Set dataset.batch_size, for example to 16"
        yield Problem(
            "dataset.batch_size",
            f"Mixup and CutMix mix the images of a batch in pairs, so it must be even, {fix}, or turn both off: "
            "dataset.augmentation.mixup=0 dataset.augmentation.cutmix=0.",
            also=(
                "train.stage",
                "dataset.augmentation.mixup",
                "dataset.augmentation.cutmix",
                "dataset.augmentation.cutmix_minmax",
                "dataset.augmentation.mixup_prob",
            ),
        )


def _devices(spec: ExperimentSpec, section: str) -> Iterator[Problem]:
    own = getattr(spec, section)
    if len(own.gpu_ids) != own.num_gpus:
        yield Problem(
            f"{section}.gpu_ids",
            f"names {len(own.gpu_ids)} GPUs, {list(own.gpu_ids)}, but {section}.num_gpus is {own.num_gpus}. "
            "Make them agree, or remove one.",
            also=(f"{section}.num_gpus",),
        )


def _knows_geometry(spec: ExperimentSpec, action: str | None) -> bool:
    """Return whether the spec determines architecture, patch size and image size; a trained model has its own."""
    if action in (None, "train"):
        return _has_architecture(spec)
    keys = ["model.arch", "dataset.augmentation.input_size"]
    keys += ["model.patch_size"] if spec.model.architecture.family == "vit" else []
    return action in ("evaluate", "inference") and all(map(spec.is_set, keys))


def _geometry(spec: ExperimentSpec) -> Iterator[Problem]:
    unit, model = spec.model.mask_unit, spec.model
    height, width = size = spec.dataset.augmentation.size
    parts = ("model.arch", "model.patch_size", "model.in_chans")
    wrong = [side for side in dict.fromkeys(size) if side % unit]
    if wrong:
        what = "patches" if model.architecture.family == "vit" else "mask units"
        near = ", ".join(f"{side} -> {_near_sizes(side, unit)}" for side in wrong)
        yield Problem(
            "dataset.augmentation.input_size",
            f"must be a multiple of {unit}, the side of {model.arch}'s {what}, got {height}x{width}. "
            f"The nearest sizes: {near}.",
            also=parts,
        )
        return
    if spec.train.stage != "pretrain":
        return
    units = (height // unit) * (width // unit)
    visible = visible_units(units, model.mask_ratio)
    if not 0 < visible < units:
        lowest, highest = 1 / units, (units - 1) / units
        fix = (
            f"Use a ratio from {lowest:.3g} to {highest:.3g}, or a larger image."
            if units > 1
            else f"Use a larger dataset.augmentation.input_size, {2 * unit} or more, to have several units."
        )
        yield Problem(
            "model.mask_ratio",
            f"must leave some mask units visible and some masked, but {model.mask_ratio:g} leaves {visible} "
            f"of {units} visible ({height}x{width} pixels, {unit} pixels a unit). {fix}",
            also=("train.mask_ratio", "dataset.augmentation.input_size", *parts),
        )


def _near_sizes(side: int, unit: int) -> str:
    below, above = side // unit * unit, -(-side // unit) * unit
    return f"{below} or {above}" if below else str(above)


def _export(spec: ExperimentSpec) -> Iterator[Problem]:
    export = spec.export
    if export.format != "onnx":
        yield Problem("export.format", f"only onnx can be written, got {export.format}. Set it to onnx.")
    if export.quantize == "int8" and not export.calibration.images:
        yield Problem(
            "export.calibration.images",
            "int8 needs images like those that the model will see, to measure the ranges of the activations, but none "
            "are set. Give a folder or an archive of some hundred images.",
            also=("export.quantize",),
        )


def _engine(spec: ExperimentSpec) -> Iterator[Problem]:
    engine, batch = spec.gen_trt_engine.tensorrt, spec.gen_trt_engine.batch_size
    sizes = (engine.min_batch_size, engine.opt_batch_size, engine.max_batch_size)
    lowest, highest = "gen_trt_engine.tensorrt.min_batch_size", "gen_trt_engine.tensorrt.max_batch_size"
    if batch == -1 and list(sizes) != sorted(sizes):
        text = f"min_batch_size <= opt_batch_size <= max_batch_size must hold, got {', '.join(map(str, sizes))}."
        yield Problem("gen_trt_engine.tensorrt.opt_batch_size", text, also=(lowest, highest))
    for key, outside in ((lowest, batch < engine.min_batch_size), (highest, batch > engine.max_batch_size)):
        if batch != -1 and spec.is_set(key) and outside:
            yield Problem(
                "gen_trt_engine.batch_size",
                f"{batch} images per batch are not within gen_trt_engine.tensorrt.min_batch_size and max_batch_size, "
                f"{sizes[0]} and {sizes[2]}. Use -1 for all batches from min to max, or remove both.",
                also=(key,),
            )
            break
    for entry in engine.layers_precision:
        name, _, precision = entry.rpartition(":")
        if not name or precision != "fp32":
            yield Problem(
                "gen_trt_engine.tensorrt.layers_precision",
                f"each entry must be name:fp32, for nodes that stay in fp32, got {entry!r}. Example: *norm*:fp32, "
                "where * matches any characters.",
            )
    yield from _calibration(spec)


def _calibration(spec: ExperimentSpec) -> Iterator[Problem]:
    prefix, calibration = "gen_trt_engine.tensorrt.calibration", spec.gen_trt_engine.tensorrt.calibration
    sizes = calibration_sizes(spec)
    unlike = [key for key, size in sizes.items() if value_of(spec, key) != size]
    unlike += [f"{prefix}.images"] if calibration.cal_image_dir and calibration.images else []
    names = {"images": "cal_image_dir", "count": "cal_batches", "batch": "cal_batch_size"}
    for key in unlike:
        text = f"means the same as {key}. Remove one of them."
        yield Problem(f"{prefix}.{names[key.rpartition('.')[2]]}", text, also=(key,))


def _monitor(spec: ExperimentSpec) -> Iterator[Problem]:
    checkpointer, metric = spec.train.checkpointer, spec.train.optim.monitor_name
    key = "train.checkpointer.monitor" if checkpointer.metric else "train.optim.monitor_name"
    unseen, also = not spec.dataset.val_data_sources, ("train.stage", "dataset.val_data_sources")
    if spec.train.stage not in METRICS[metric].stages or (metric == "ACC_all" and unseen):
        text = f"{value_of(spec, key)} is measured when fine-tuning, on dataset.val_data_sources. Use train_loss."
        yield Problem(key, text, also)
    elif metric == "val_loss" and unseen:
        text = "val_loss needs validation images, but dataset.val_data_sources is not set. Set it, or use train_loss."
        yield Problem(key, text, also)
    direction = METRICS[metric].direction[:3]
    if checkpointer.metric and checkpointer.mode not in ("", direction):
        yield Problem(
            "train.checkpointer.mode",
            f"{metric} is best at its {direction}imum, got {checkpointer.mode}. Set {direction}, or remove it.",
            also=("train.checkpointer.monitor",),
        )
