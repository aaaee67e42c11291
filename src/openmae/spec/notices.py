"""Notices about a valid spec: options without effect, and other things that the user should know."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator

from openmae.spec.actions import ACTIONS
from openmae.spec.choices import Facts
from openmae.spec.describe import fields, traits
from openmae.spec.option import is_secret, meets
from openmae.spec.recipe import updates_per_epoch
from openmae.spec.resolved import dependent_defaults
from openmae.spec.schema import ExperimentSpec
from openmae.spec.tree import value_of

FEWEST_UPDATES = 300  # optimizer steps
_FEWEST_UNITS = 9  # mask units of an image
_DEFAULT_MILESTONES = ExperimentSpec().train.optim.milestones


def why_unused(spec: ExperimentSpec, key: str) -> str:
    """Return why an option has no effect on a training run, as the end of a sentence; empty if it has one."""
    declared, stage = traits(key), spec.train.stage
    if declared.no_effect:
        return f"because {declared.no_effect}"
    if stage not in declared.stages:
        return f"in the {stage} stage"
    if key == "train.optim.lr" and spec.train.optim.base_lr is not None:
        return "because train.optim.base_lr replaces it"
    if key == "train.optim.warmup_epochs" and spec.train.optim.warmup_steps is not None:
        return "because train.optim.warmup_steps replaces it"
    needed, wanted = declared.condition
    if needed and not meets(value_of(spec, needed), wanted):
        return f"without {declared.needs}"
    if key in _unused_mixing(spec):
        return "with these values of mixup, cutmix and cutmix_minmax"
    return ""


def inert_keys(spec: ExperimentSpec) -> list[str]:
    """Return the options that have no effect on a training run, and TAO's aliases."""
    return [key for key in fields() if traits(key).compat or why_unused(spec, key)]


def find_notices(spec: ExperimentSpec, action: str | None) -> Iterator[str]:
    """Yield what the user should know about a valid spec. If ``action`` is None, it is checked as for train."""
    unused: dict[str, list[str]] = {}
    for key, why in _without_effect(spec, action):
        unused.setdefault(why, []).append(key)
    for why, keys in unused.items():
        yield f"{' and '.join(keys)} {'has' if len(keys) == 1 else 'have'} no effect {why}."
    if is_secret(spec.encryption_key):
        yield (
            "encryption_key contains the key itself, which others can read in the file, the shell's history or the "
            "list of processes. Use env:NAME or file:PATH."
        )
    if action == "export" and spec.export.quantize != "int8" and spec.is_set("export.calibration.images"):
        yield f"export.calibration has no effect with export.quantize={spec.export.quantize}."
    if action in (None, "train"):
        yield from _training_notices(spec)


def find_data_notices(spec: ExperimentSpec, facts: Facts) -> Iterator[str]:
    """Yield why the model is likely to learn little from this data, each with a fix."""
    train, (height, width), unit = spec.train, spec.dataset.augmentation.size, spec.model.mask_unit
    units, row = (height // unit) * (width // unit), spec.model.architecture
    if train.stage == "pretrain" and units < _FEWEST_UNITS:
        other = "a smaller model.patch_size" if row.family == "vit" else "a ViT, whose patches can be smaller"
        yield (
            f"An image of {height}x{width} px has only {units} mask units of {unit} px, too few to learn from. Use a "
            f"larger dataset.augmentation.input_size, or {other}."
        )
    if facts.images is None:
        return
    steps = train.num_epochs * updates_per_epoch(spec, facts.images)
    if steps < FEWEST_UPDATES:
        more = math.ceil(train.num_epochs * FEWEST_UPDATES / steps)
        yield (
            f"The run makes only {steps} optimizer steps (training images: {facts.images:,}, train.num_epochs: "
            f"{train.num_epochs}), too few to learn much. Set train.num_epochs to {more} or more, or use a smaller "
            "dataset.batch_size."
        )
    if facts.classes and 0 < facts.val_images < facts.classes:
        yield (
            f"dataset.val_data_sources has {facts.val_images} images for {facts.classes} classes, too few to measure "
            "an accuracy."
        )


def ignored_by_tao(spec: ExperimentSpec, from_file: Collection[str]) -> Iterator[str]:
    """Yield a notice of the options in a spec file for training that TAO ignores and OpenMAE applies.

    ``from_file`` has the keys of the file. If TAO does not have one of them, the file was written for OpenMAE, and
    there is no notice.
    """
    keys = [key for key in fields() if key in from_file]
    if not all(traits(key).in_tao for key in keys):
        return
    applied = {  # TAO ignores these only in the given case
        "train.optim.warmup_epochs": spec.train.optim.lr_scheduler == "MultiStep",
        "model.norm_pix_loss": spec.model.architecture.family == "hiera",
    }
    found = []
    for key in keys:
        value, default = value_of(spec, key), dependent_defaults(spec).get(key, fields()[key].default)
        if spec.train.stage in traits(key).ignored_by_tao and applied.get(key, True) and value != default:
            found.append(f"{key}={value}" + (f" (default {default})" if default != "" else ""))
    if found:
        yield (
            f"TAO ignores these options of the spec file, and OpenMAE applies them: {', '.join(found)}. Remove an "
            "option to use its default."
        )


def _without_effect(spec: ExperimentSpec, action: str | None) -> Iterator[tuple[str, str]]:
    training = action in (None, "train")
    for key, field in fields().items():
        section, declared = key.split(".")[0], traits(key)
        if not spec.is_set(key) or section == "automl" or (section in ACTIONS and section != (action or "train")):
            continue
        if (declared.compat or declared.no_effect) and value_of(spec, key) == field.default:
            continue  # TAO's templates contain it
        if not training and key == "model.decoder_targets":
            yield key, f"on `mae {action}`: only a training step predicts a share of the units"
        elif training or declared.no_effect:
            why = why_unused(spec, key)
            if not why and key == "model.global_pool" and spec.model.architecture.family != "vit":
                why = "" if spec.model.global_pool else f"because {spec.model.arch} has no class token"
            if why:
                yield key, why


def _training_notices(spec: ExperimentSpec) -> Iterator[str]:
    train, optim = spec.train, spec.train.optim
    milestones = list(optim.milestones)
    late = optim.milestones != _DEFAULT_MILESTONES and all(epoch >= train.num_epochs for epoch in milestones)
    if optim.lr_scheduler == "MultiStep" and late:
        yield (
            f"train.optim.milestones {milestones} are all at or after the last of {train.num_epochs} epochs: the "
            "learning rate never drops."
        )
    if train.num_epochs <= optim.warmup_epochs and optim.warmup_steps is None:
        yield (
            f"train.optim.warmup_epochs ({optim.warmup_epochs}) is not below train.num_epochs ({train.num_epochs}): "
            "the learning rate only rises."
        )
    if train.cudnn.benchmark and train.cudnn.deterministic:
        yield "train.cudnn.benchmark picks kernels by timing: runs may differ despite train.cudnn.deterministic."


def _unused_mixing(spec: ExperimentSpec) -> list[str]:
    augment = spec.dataset.augmentation
    unused = ["dataset.augmentation.cutmix"] if augment.cutmix_minmax is not None else []
    if not (augment.mixup > 0 and augment.cuts):
        unused.append("dataset.augmentation.mixup_switch_prob")
    if not (augment.mixup > 0 or augment.cuts):
        unused += ["dataset.augmentation.mixup_prob", "dataset.augmentation.mixup_mode"]
    return unused
