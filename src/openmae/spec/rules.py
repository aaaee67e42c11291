"""Rules that join several options: what an action needs, and what cannot act together."""

from __future__ import annotations

from collections.abc import Iterator

from openmae.spec.architectures import DECODER_HEAD_DIM, visible_units
from openmae.spec.describe import REQUIRED, fields
from openmae.spec.option import EXPAND_USER, SECRET_MARK, is_secret
from openmae.spec.schema import DEVICES, ExperimentSpec
from openmae.spec.yaml_reader import Problem

_REMOTE = ("s3://", "gs://", "http://", "https://")
_READ_ONLY = ("http://", "https://")
_WRITTEN = ("export.onnx_file", "gen_trt_engine.trt_engine")
_LOCAL_ONLY = {"gen_trt_engine.timing_cache": "it is read and written while an engine is built"}
_AUGMENT = "dataset.augmentation."
_DEFAULT_MILESTONES = ExperimentSpec().train.optim.milestones

_FINETUNE_AUGMENTATION = (
    *("interpolation", "color_jitter", "auto_aug", "re_prob", "smoothing"),
    *("mixup", "cutmix", "cutmix_minmax", "mixup_prob", "mixup_switch_prob", "mixup_mode"),
)

#: Options that a stage does not use when it trains.
INERT: dict[str, tuple[str, ...]] = {
    "pretrain": (
        "model.num_classes",
        "model.global_pool",
        "train.optim.layer_decay",
        "train.optim.backbone_multiplier",
        "train.ema_decay",
        *(f"{_AUGMENT}{name}" for name in _FINETUNE_AUGMENTATION),
    ),
    "finetune": (
        *("model.mask_ratio", "model.norm_pix_loss"),
        *(f"model.decoder_{name}" for name in ("depth", "embed_dim", "attention", "targets")),
    ),
}

_INPUT_OF_ENGINE = tuple(f"gen_trt_engine.input_{name}" for name in ("channel", "height", "width"))

#: Options that act only where another one is set.
_NEEDS = {
    "train.allow_partial_weights": "train.pretrained_model_path",
    "train.pretrained_weights_key": "train.pretrained_model_path",
    "train.validation_interval": "dataset.val_data_sources",
}

#: The data that an action reads; the first is the one it cannot do without.
SOURCES: dict[str, tuple[str, ...]] = {
    "train": ("train_data_sources", "val_data_sources"),
    "evaluate": ("val_data_sources",),
    "inference": ("test_data_sources",),
    "export": ("val_data_sources",),
}

#: The files that an action reads, apart from images.
READS: dict[str, tuple[str, ...]] = {
    "train": ("train.pretrained_model_path", "train.resume_training_checkpoint_path"),
    "automl": ("train.pretrained_model_path",),
    "evaluate": ("evaluate.checkpoint", "evaluate.trt_engine"),
    "inference": ("inference.checkpoint", "inference.trt_engine"),
    "export": ("export.checkpoint",),
    "gen_trt_engine": ("gen_trt_engine.onnx_file",),
}


def inert_keys(spec: ExperimentSpec) -> list[str]:
    """Options that do not act in this spec's stage, or because another option replaces them."""
    keys = list(INERT[spec.train.stage])
    if spec.train.optim.lr_scheduler == "cosine":
        keys += ["train.optim.milestones", "train.optim.gamma"]
    if spec.train.optim.base_lr is not None:
        keys.append("train.optim.lr")
    if spec.train.stage == "finetune":
        keys += _unused_mixing(spec)
    keys += [key for key in fields() if ".checkpointer." in key or ".cal_" in key]
    return [*keys, *(key for key, needed in _NEEDS.items() if not value_of(spec, needed))]


def find_problems(spec: ExperimentSpec, action: str | None) -> Iterator[Problem]:
    """Yield every broken rule. ``action`` None: only the rules that hold for all actions."""
    if spec.encryption_key == SECRET_MARK:
        text = "stands for a key that was not written down. Give it again: env:NAME, file:PATH or the key."
        yield Problem("encryption_key", f"{SECRET_MARK} {text}")
    yield from _missing(spec, action)
    yield from _remote(spec, action)
    yield from _model(spec, action)
    yield from _augmentation(spec, action)
    if action in (None, "train"):
        yield from _training(spec)
    for section in DEVICES:
        if action in (None, section):
            yield from _devices(spec, section)
    if _knows_geometry(spec, action):
        yield from _geometry(spec)
    if action in (None, "export"):
        yield from _export(spec)
    if action in (None, "gen_trt_engine"):
        yield from _engine(spec)


def find_notices(spec: ExperimentSpec, action: str | None) -> Iterator[str]:
    """Yield what the user should know although the spec is right."""
    for key in ("dataset.segment", "model_name"):
        if spec.typed(key):
            yield f"{key} stands in published specs; nothing reads it."
    if is_secret(spec.encryption_key):
        yield (
            "encryption_key holds the key itself, which others may read in the file, the shell's history or the list "
            "of processes. Use env:NAME or file:PATH."
        )
    if action not in (None, "train") and spec.typed("model.decoder_targets"):
        yield f"model.decoder_targets does not act on `mae {action}`: it is a share of what a training step predicts."
    if action == "export" and spec.export.quantize != "int8" and spec.typed("export.calibration.images"):
        yield f"export.calibration does not act: export.quantize is {spec.export.quantize}."
    given = [key for key in _INPUT_OF_ENGINE if spec.typed(key)]
    if action == "gen_trt_engine" and given:
        yield f"{' and '.join(given)} does not act: the ONNX file decides."
    if action not in (None, "train"):
        return
    stage, optim = spec.train.stage, spec.train.optim
    if stage == "finetune" and not spec.model.global_pool and spec.model.architecture.family != "vit":
        yield f"model.global_pool=false does not act: {spec.model.arch} has no class token, so it pools."
    inert = [key for key in inert_keys(spec) if spec.typed(key) and key in INERT[stage]]
    if inert:
        yield f"The {stage} stage does not use {', '.join(inert)}."
    if stage == "finetune" and (mixing := [key for key in _unused_mixing(spec) if spec.typed(key)]):
        yield f"With these values of mixup, cutmix and cutmix_minmax, {' and '.join(mixing)} does not act."
    for key, needed in _NEEDS.items():
        if spec.typed(key) and not value_of(spec, needed):
            yield f"{key} does not act without {needed}."
    if optim.lr_scheduler == "cosine":
        unused = [k for k in ("train.optim.milestones", "train.optim.gamma") if spec.typed(k)]
        if unused:
            yield f"The cosine schedule does not use {' and '.join(unused)}."
    elif optim.milestones != _DEFAULT_MILESTONES and all(m >= spec.train.num_epochs for m in optim.milestones):
        yield (
            f"train.optim.milestones {list(optim.milestones)} all lie at or after the last of "
            f"{spec.train.num_epochs} epochs: the learning rate never drops."
        )
    if spec.train.num_epochs <= optim.warmup_epochs:
        yield (
            f"train.optim.warmup_epochs ({optim.warmup_epochs}) is not below train.num_epochs "
            f"({spec.train.num_epochs}): the learning rate only rises."
        )
    if spec.train.cudnn.benchmark and spec.train.cudnn.deterministic:
        yield "train.cudnn.benchmark picks kernels by timing: two runs may differ in spite of deterministic."


def _unused_mixing(spec: ExperimentSpec) -> list[str]:
    augment = spec.dataset.augmentation
    cutmix = augment.cutmix > 0 or augment.cutmix_minmax is not None
    unused = ["cutmix"] if augment.cutmix_minmax is not None else []
    if not (augment.mixup > 0 and cutmix):
        unused.append("mixup_switch_prob")
    if not (augment.mixup > 0 or cutmix):
        unused += ["mixup_prob", "mixup_mode"]
    return [_AUGMENT + name for name in unused]


def _missing(spec: ExperimentSpec, action: str | None) -> Iterator[Problem]:
    for group in REQUIRED.get(action or "", ()):
        given = [key for key in group if value_of(spec, key)]
        if not given:
            verb = f"`mae {action}` needs it, but it is not set"
            key, *others = group
            more = f" (or {others[0]})" if others else ""
            hint = " Example: " + ("photos/ or photos.tar.gz." if "data_sources" in key else "a path to a file.")
            yield Problem(key, f"{verb}{more}.{hint}", also=tuple(others))
        elif len(given) > 1:
            text = f"only one of {' and '.join(given)} can be used, but both are set. Remove one."
            yield Problem(given[0], text, also=tuple(given[1:]))


def _remote(spec: ExperimentSpec, action: str | None) -> Iterator[Problem]:
    """What is read may be remote, and what is written in an object store; a web server takes nothing."""
    for key, field in fields().items():
        section = key.split(".")[0]
        if EXPAND_USER not in field.metadata or (action is not None and section not in (action, "results_dir")):
            continue
        value = str(value_of(spec, key)).strip().lower()
        if key in _LOCAL_ONLY and value.startswith(_REMOTE):
            yield Problem(key, f"must be a local file, since {_LOCAL_ONLY[key]}. Give a path.")
        elif (key.endswith("results_dir") or key in _WRITTEN) and value.startswith(_READ_ONLY):
            yield Problem(key, "a web server takes no files. Give s3://BUCKET/path, gs://BUCKET/path or a local path.")


def _is_known(spec: ExperimentSpec, action: str | None, key: str) -> bool:
    """Whether the spec says it: an action on a trained model takes what is not typed from the checkpoint."""
    return action in (None, "train") or spec.typed(key)


def _model(spec: ExperimentSpec, action: str | None) -> Iterator[Problem]:
    model, row = spec.model, spec.model.architecture
    if model.patch_size is not None and row.family != "vit" and _is_known(spec, action, "model.arch"):
        yield Problem(
            "model.patch_size",
            f"only ViT has a patch size to choose, and {row.name} is not one, got {model.patch_size}. "
            "Remove it, or choose a vit_ architecture.",
            also=("model.arch",),
        )
    cross = spec.train.stage == "pretrain" and model.decoder_attention == "cross"
    if cross and row.family == "convnextv2" and _is_known(spec, action, "model.arch"):
        yield Problem(
            "model.decoder_attention",
            f"cross needs a decoder with attention, and that of {row.name} is a convolution over the whole grid, got "
            "cross. Remove it, or choose a vit_ or hiera_ architecture.",
            also=("model.arch", "train.stage"),
        )
    width = model.decoder_embed_dim
    if spec.train.stage == "pretrain" and row.family != "convnextv2" and width and width % DECODER_HEAD_DIM:
        near = max(DECODER_HEAD_DIM, round(width / DECODER_HEAD_DIM) * DECODER_HEAD_DIM)
        yield Problem(
            "model.decoder_embed_dim",
            f"a transformer decoder's width must be a multiple of {DECODER_HEAD_DIM}, a head's width, got {width}. "
            f"Use {near}.",
            also=("model.arch",),
        )


def _augmentation(spec: ExperimentSpec, action: str | None) -> Iterator[Problem]:
    augment, channels = spec.dataset.augmentation, spec.model.in_chans
    for name in ("mean", "std"):
        values = getattr(augment, name)
        if values is not None and len(values) != channels and _is_known(spec, action, "model.in_chans"):
            yield Problem(
                _AUGMENT + name,
                f"must have a number for each of the {channels} channels of model.in_chans, got "
                f"{list(values)}. Remove it to have the usual values.",
                also=("model.in_chans",),
            )
    for what in ("scale", "ratio"):
        low, high = getattr(augment, f"min_{what}"), getattr(augment, f"max_{what}")
        if low > high:
            text = f"must not be above max_{what} ({high:g}), got {low:g}. Exchange or mend them."
            yield Problem(f"{_AUGMENT}min_{what}", text, also=(f"{_AUGMENT}max_{what}",))


def _training(spec: ExperimentSpec) -> Iterator[Problem]:
    train, batch = spec.train, spec.dataset.batch_size
    if spec.typed("train.optim.lr") and train.optim.base_lr is not None:
        yield Problem(
            "train.optim.base_lr",
            f"lr ({train.optim.lr:g}) and base_lr ({train.optim.base_lr:g}) both set the learning rate. "
            "Remove one of them.",
            also=("train.optim.lr",),
        )
    if train.distributed_strategy == "fsdp" and train.stage == "finetune" and train.ema_decay:
        yield Problem(
            "train.ema_decay",
            f"averaged weights are whole, but fsdp shares the weights out, got {train.ema_decay:g}. "
            "Set it to 0, or use train.distributed_strategy=ddp.",
            also=("train.distributed_strategy", "train.stage"),
        )
    if train.optim.monitor_name == "val_loss" and not spec.dataset.val_data_sources:
        yield Problem(
            "train.optim.monitor_name",
            "val_loss needs validation images, but dataset.val_data_sources is not set. Set it, or use train_loss.",
            also=("dataset.val_data_sources",),
        )
    if train.stage == "finetune" and spec.dataset.augmentation.mixes and batch % 2:
        yield Problem(
            "dataset.batch_size",
            f"Mixup and CutMix mix the images of a batch in pairs, so it must be even, got {batch}. Use "
            f"{batch + 1}, or turn both off: {_AUGMENT}mixup=0 {_AUGMENT}cutmix=0.",
            also=("train.stage", *(_AUGMENT + n for n in ("mixup", "cutmix", "cutmix_minmax", "mixup_prob"))),
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
    """A trained model brings its architecture, patch and image size along unless the spec names them."""
    if action in (None, "train"):
        return True
    keys = ["model.arch", f"{_AUGMENT}input_size"]
    keys += ["model.patch_size"] if spec.model.architecture.family == "vit" else []
    return action in ("evaluate", "inference") and all(map(spec.typed, keys))


def _geometry(spec: ExperimentSpec) -> Iterator[Problem]:
    unit, model = spec.model.mask_unit, spec.model
    height, width = size = spec.dataset.augmentation.size
    parts = ("model.arch", "model.patch_size", "model.in_chans")
    wrong = [side for side in dict.fromkeys(size) if side % unit]
    if wrong:
        what = "patches" if model.architecture.family == "vit" else "mask units"
        near = ", ".join(f"{side} -> {_near_sizes(side, unit)}" for side in wrong)
        yield Problem(
            f"{_AUGMENT}input_size",
            f"must be a multiple of {unit}, the side of {model.arch}'s {what}, got {height}x{width}. "
            f"The nearest sizes: {near}.",
            also=parts,
        )
        return
    if spec.train.stage != "pretrain" or model.mask_ratio is None:
        return
    units = (height // unit) * (width // unit)
    visible = visible_units(units, model.mask_ratio)
    if not 0 < visible < units:
        lowest, highest = 1 / units, (units - 1) / units
        mend = (
            f"Use a ratio from {lowest:.3g} to {highest:.3g}, or a larger image."
            if units > 1
            else f"Use a larger {_AUGMENT}input_size, {2 * unit} or more, to have several units."
        )
        yield Problem(
            "model.mask_ratio",
            f"must leave some mask units visible and some masked, but {model.mask_ratio:g} leaves {visible} "
            f"of {units} visible ({height}x{width} pixels, {unit} pixels a unit). {mend}",
            also=("train.mask_ratio", f"{_AUGMENT}input_size", *parts),
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
            "int8 needs images like those that the model will see, to learn the activations' ranges, but none are set. "
            "Name a folder or an archive of some hundred images.",
            also=("export.quantize",),
        )


def _engine(spec: ExperimentSpec) -> Iterator[Problem]:
    engine, batch, prefix = spec.gen_trt_engine.tensorrt, spec.gen_trt_engine.batch_size, "gen_trt_engine.tensorrt."
    sizes = (engine.min_batch_size, engine.opt_batch_size, engine.max_batch_size)
    lowest, highest = f"{prefix}min_batch_size", f"{prefix}max_batch_size"
    if batch == -1 and list(sizes) != sorted(sizes):
        text = f"min, opt and max_batch_size must rise in this order, got {', '.join(map(str, sizes))}."
        yield Problem(f"{prefix}opt_batch_size", text, also=(lowest, highest))
    for key, outside in ((lowest, batch < engine.min_batch_size), (highest, batch > engine.max_batch_size)):
        if batch != -1 and spec.typed(key) and outside:
            yield Problem(
                "gen_trt_engine.batch_size",
                f"{batch} images per batch are not within {prefix}min_batch_size and max_batch_size, {sizes[0]} and "
                f"{sizes[2]}. Use -1 for all batches from min to max, or remove both.",
                also=(key,),
            )
            break
    for entry in engine.layers_precision:
        name, _, precision = entry.rpartition(":")
        if not name or precision != "fp32":
            yield Problem(
                f"{prefix}layers_precision",
                f"must be name:fp32 each, for the nodes that stay in fp32, got {entry!r}. Write *norm*:fp32, say; "
                "* stands for any characters.",
            )


def value_of(spec: ExperimentSpec, key: str) -> object:
    """The value of a dotted key."""
    value: object = spec
    for part in key.split("."):
        value = getattr(value, part)
    return value
