"""Recipes: values for the options of a training run that are not set, and the reason for each.

A recipe is a sequence of rules. A rule yields choices from the spec, which already has the choices of the rules before
it, and from facts about data, weights and machine. A value that the user has set always wins. Nothing here reads a file
or measures anything; ``actions/facts.py`` does. docs/training-recipes.md explains the rules and shows what each is
worth.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from openmae.spec.choices import Choice, Facts, Rule, even, global_batch, processes
from openmae.spec.describe import fields, traits
from openmae.spec.option import Stage
from openmae.spec.papers import paper_schedule, paper_settings
from openmae.spec.resolved import fill_unset
from openmae.spec.schema import ExperimentSpec
from openmae.spec.tree import value_of

FEW_LABELS = 100  # labelled images of a class below which strong augmentation costs accuracy
FEWEST_UNITS = {"vit": 49, "hiera": 16, "convnextv2": 16}  # mask units of an image
#: Minutes that a run may take by default, without and with a GPU.
BUDGET: dict[Stage, tuple[int, int]] = {"pretrain": (30, 24 * 60), "finetune": (10, 4 * 60)}

_AUGMENTATION = "dataset.augmentation."
_SIZE, _BATCH, _PATCH = f"{_AUGMENTATION}input_size", "dataset.batch_size", "model.patch_size"
_SIZES = (32, 64, 96, 128, 160, 224)  # px
_PATCHES = (16, 8, 4)  # px
_USABLE = 0.6  # share of the free memory, less that of weights and optimizer, that activations may take
_EVALUATED = 32  # images per batch of an action on a trained model
_PRETRAINING_LR, _FINETUNING_LR = (3e-4, 6e-4), (5e-4, 2e-3)  # of large and small models, for 64 images per step
_HIGHEST_LR = 2e-3
_PRETRAINING_EPOCHS, _PRETRAINING_UPDATES = 200, 1500  # for 1,000 images; optimizer steps, at least
_FINETUNING_UPDATES = 1000
_MOST_EPOCHS = 1000
_CHECKPOINT_SECONDS = 20  # between two checkpoints
_VALIDATION_COST = {"pretrain": 1.0, "finetune": 0.4}  # of an image, as a share of its training
_VALIDATION = "train.validation_interval"
_FEW_EPOCHS = 3  # of a run that gains from copies of the images
_WORTH_CACHING = 0.1  # share of the time that copies of the images must save


def choose(spec: ExperimentSpec, facts: Facts) -> ExperimentSpec:
    """Return the spec with the choices of its recipe instead of earlier ones; ``spec.chosen`` has the reasons."""
    values: dict[str, Any] = {}
    reasons: dict[str, str] = {}
    spec = fill_unset(_without_choices(spec))
    for rule in RULES[spec.train.recipe]:
        for key, value, reason in rule(spec, facts):
            if not spec.is_set(key):
                values[key], reasons[key] = value, reason
        spec = fill_unset(spec.choosing(values, reasons))
    return spec


def keep(spec: ExperimentSpec, earlier: Mapping[str, Any]) -> ExperimentSpec:
    """Return the spec with the values of an earlier run, by dotted key, wherever a recipe would choose."""
    spec = _without_choices(spec)
    kept = {key: earlier[key] for key in _choosable() if key in earlier and not spec.is_set(key)}
    return fill_unset(spec.choosing(kept, dict.fromkeys(kept, "as at the start of this run")))


def chosen_values(spec: ExperimentSpec) -> dict[str, Any]:
    """Return the values that a recipe has chosen, by dotted key."""
    return {key: value_of(spec, key) for key in spec.chosen}


def updates_per_epoch(spec: ExperimentSpec, images: int) -> int:
    """Return the number of optimizer steps in a pass over ``images`` training images."""
    return max(1, images // global_batch(spec))


def choose_batch(spec: ExperimentSpec) -> ExperimentSpec:
    """Return the spec of an action on a trained model with a batch size, which does not change the results."""
    if spec.is_set(_BATCH) or spec.train.recipe == "tao":
        return spec
    return spec.choosing({_BATCH: _EVALUATED}, {_BATCH: "results do not depend on it"})


def _choosable() -> Iterator[str]:
    return (key for key in fields() if traits(key).recipe)


def _without_choices(spec: ExperimentSpec) -> ExperimentSpec:
    return spec.choosing({key: fields()[key].default for key in spec.chosen if not spec.is_set(key)}, {})


def _few_labels(facts: Facts) -> bool:
    return facts.per_class is not None and facts.per_class < FEW_LABELS


def _weights(spec: ExperimentSpec, facts: Facts) -> Iterator[Choice]:
    """Keep the architecture, image size, patch size and channels of pretrained weights."""
    for key, value in facts.weights.items():
        yield Choice(key, value, "as in the weights of train.pretrained_model_path")


def _architecture(spec: ExperimentSpec, facts: Facts) -> Iterator[Choice]:
    if facts.on_gpu is None or "model.arch" in facts.weights:
        return
    if facts.on_gpu:
        yield Choice("model.arch", "vit_small_patch16", "a small model, since the architecture is not set")
    else:
        yield Choice("model.arch", "vit_tiny_patch16", "the fastest to pretrain without a GPU")


def _image_size(spec: ExperimentSpec, facts: Facts) -> Iterator[Choice]:
    """Choose the smallest common size that keeps the detail of the images and has enough mask units."""
    row, unit = spec.model.architecture, spec.model.mask_unit
    if facts.side is None or _SIZE in facts.weights:
        return
    wanted = 0.9 * facts.side
    if row.family == "vit" and not spec.is_set(_PATCH):
        unit = min(unit, _PATCHES[-1]) if unit in _PATCHES else unit  # small images get smaller patches
    else:
        wanted = max(wanted, math.isqrt(FEWEST_UNITS[row.family]) * unit)
    if fitting := [size for size in _SIZES if size % unit == 0]:
        size = next((size for size in fitting if size >= wanted), fitting[-1])
        yield Choice(_SIZE, size, f"half of the images have a side of {facts.side} px or less")


def _patch_size(spec: ExperimentSpec, facts: Facts) -> Iterator[Choice]:
    """Cut small images into smaller patches, so that there are enough of them to mask."""
    row, (height, width) = spec.model.architecture, spec.dataset.augmentation.size
    if row.family != "vit" or facts.weights:
        return
    units = (height // row.mask_unit) * (width // row.mask_unit)
    if units >= FEWEST_UNITS["vit"] and height % row.mask_unit == width % row.mask_unit == 0:
        return
    fitting = [side for side in _PATCHES if side < row.mask_unit and height % side == width % side == 0]
    enough = [side for side in fitting if height * width // side**2 >= FEWEST_UNITS["vit"]]
    if fitting:
        reason = f"{height} x {width} px make {units} patches of {row.mask_unit} px, too few or not exactly"
        yield Choice(_PATCH, (enough or fitting[-1:])[0], reason)


def _decoder(spec: ExperimentSpec, facts: Facts) -> Iterator[Choice]:
    light, row = spec.model.architecture.light_decoder, spec.model.architecture
    if spec.train.stage != "pretrain" or light is None:
        return
    reason = f"the paper's {row.decoder_depth} x {row.decoder_embed_dim} is larger than the encoder"
    yield Choice("model.decoder_depth", light[0], reason)
    yield Choice("model.decoder_embed_dim", light[1], reason)


def _augmentation(spec: ExperimentSpec, facts: Facts) -> Iterator[Choice]:
    largest = spec.dataset.augmentation.max_scale
    if spec.train.stage == "pretrain":
        yield Choice(f"{_AUGMENTATION}min_scale", min(0.2, largest), "as in the papers")
        return
    few, odd = _few_labels(facts), spec.is_set(_BATCH) and spec.dataset.batch_size % 2
    reason = f"labelled images per class: {facts.per_class}, fewer than {FEW_LABELS}"
    if few or odd:
        why = reason if few else "images are mixed in pairs, and dataset.batch_size is odd"
        yield Choice(f"{_AUGMENTATION}mixup", 0.0, why)
        if spec.dataset.augmentation.cutmix_minmax is None:
            yield Choice(f"{_AUGMENTATION}cutmix", 0.0, why)
    if not few:
        return
    yield Choice(f"{_AUGMENTATION}auto_aug", "", reason)
    yield Choice(f"{_AUGMENTATION}min_scale", min(0.5, largest), reason)


def _batch(spec: ExperimentSpec, facts: Facts) -> Iterator[Choice]:
    """Choose a batch that leaves enough optimizer steps per epoch and fits into memory."""
    most = (256 if facts.on_gpu else 64) if spec.train.stage == "pretrain" else (128 if facts.on_gpu else 64)
    steps, fewest = (32, 16) if spec.train.stage == "pretrain" else (6, 8)  # per epoch, and images, at least
    total, reason = most, "the usual size"
    if facts.images is not None and facts.images // steps < most:
        total = max(_power_of_two(facts.images // steps), min(fewest, _power_of_two(facts.images // 3)), 2)
        reason = f"training images: {facts.images:,}"
    size = max(total // processes(spec), 1)
    if facts.images is not None and size * processes(spec) > facts.images:
        size = max(facts.images // processes(spec), 1)
    if facts.free_memory is not None and facts.bytes_per_image:
        free = facts.free_memory - facts.bytes_of_state
        fits = _power_of_two(max(int(_USABLE * free / facts.bytes_per_image), 2))
        if fits < size:
            size, reason = fits, f"an image takes {facts.bytes_per_image / 2**20:.0f} MiB of memory in training"
        if free <= 0:
            needed, there = (f"{number / 2**30:.1f} GiB" for number in (facts.bytes_of_state, facts.free_memory))
            reason = f"weights and optimizer need {needed} of {there} of memory: use a smaller model, or fsdp"
    if spec.train.stage == "finetune" and spec.dataset.augmentation.mixes:
        size = even(size)
    yield Choice(_BATCH, size, reason)
    if not spec.is_set(_BATCH) and (parts := total // (size * processes(spec))) > 1:
        yield Choice("train.accum_grad_batches", parts, f"{parts} batches of {size} images make {total}")


def _power_of_two(number: int) -> int:
    """Return the largest power of two that is not above a number, at least 1."""
    return 1 << max(number, 1).bit_length() - 1


def _learning_rate(spec: ExperimentSpec, facts: Facts) -> Iterator[Choice]:
    batch = global_batch(spec)
    if spec.train.optim.base_lr is None:
        row = spec.model.architecture
        small = row.family == "vit" and row.light_decoder is not None
        at_64 = (_PRETRAINING_LR if spec.train.stage == "pretrain" else _FINETUNING_LR)[small]
        rate = float(f"{min(at_64 * math.sqrt(batch / 64), _HIGHEST_LR):.2g}")
        yield Choice("train.optim.lr", rate, f"{at_64:g} x sqrt({batch} / 64), for {batch} images per step")
    if spec.train.stage == "finetune" and not spec.train.pretrained_model_path:
        yield Choice("train.optim.layer_decay", 1.0, "no pretrained layers to protect")
    multistep = ("train.optim.milestones", "train.optim.gamma")  # options of the other schedule
    if not any(spec.is_set(key) or key in spec.automl.parameters for key in multistep):
        yield Choice("train.optim.lr_scheduler", "cosine", "the learning rate falls to 0 at the end")


def _cache(spec: ExperimentSpec, facts: Facts) -> Iterator[Choice]:
    """Decode large images once, if their copies fit and that saves a noticeable part of the time."""
    if not facts.copies or not facts.images or not facts.seconds_per_image:
        return
    key, size, epochs = "dataset.cache", f"{facts.copies / 1e9:.2g} GB", _FEW_EPOCHS
    if spec.is_set("train.num_epochs"):
        epochs = spec.train.num_epochs
    elif facts.images * facts.seconds_per_image * epochs > 60 * BUDGET[spec.train.stage][bool(facts.on_gpu)]:
        return  # the run will be too short to read the copies often
    share = facts.seconds_saved / facts.seconds_per_image
    if share * (1 - 1 / epochs) < _WORTH_CACHING:
        return
    if not facts.room:
        yield Choice(key, "off", "the cache cannot be used, or is full")
    elif facts.copies > facts.room:
        reason = f"scaled copies of the images take {size}, and the cache has room for {facts.room / 1e9:.2g} GB"
        yield Choice(key, "off", reason)
    else:
        yield Choice(key, "on", f"decoding images once saves {share:.0%} of the time; their copies take {size}")


def _length(spec: ExperimentSpec, facts: Facts) -> Iterator[Choice]:
    """Choose enough epochs to make a number of optimizer steps, within the budget of time."""
    if facts.images is None:
        return
    stage, steps = spec.train.stage, updates_per_epoch(spec, facts.images)
    if stage == "pretrain":
        wanted = _PRETRAINING_EPOCHS * (1000 / facts.images) ** 0.3
        wanted = max(wanted, _PRETRAINING_UPDATES / steps, 100 if facts.on_gpu else 1)
    else:
        wanted = max(_FINETUNING_UPDATES / steps, 30)
    epochs = full = _rounded(min(wanted, _MOST_EPOCHS))
    reason = f"training images: {facts.images:,}"
    if facts.seconds_per_image:
        minutes, needed = BUDGET[stage][bool(facts.on_gpu)], estimate(spec, facts, full)
        if needed > 60 * minutes:
            epochs = max(1, int(full * 60 * minutes / needed))
            reason = f"as many as {minutes} minutes allow; {full} epochs would be better, and take {in_words(needed)}"
        reason += f"; duration: about {in_words(estimate(spec, facts, epochs))}"
    yield Choice("train.num_epochs", epochs, f"{reason}; optimizer steps: {epochs * steps:,}")


def _intervals(spec: ExperimentSpec, facts: Facts) -> Iterator[Choice]:
    """Validate and write checkpoints less often if epochs are short."""
    epochs = spec.train.num_epochs
    seldom = 1 if facts.searching else max(1, epochs // 20)
    if facts.val_images:
        yield Choice(_VALIDATION, seldom, f"validations in all: {epochs // seldom}")
    if facts.images and facts.seconds_per_image and spec.train.checkpoint_interval_unit == "epoch":
        epoch = facts.images * _seconds_per_image(spec, facts)
        between = min(max(1, round(_CHECKPOINT_SECONDS / epoch)), max(1, epochs // 4))
        yield Choice("train.checkpoint_interval", between, f"every {_CHECKPOINT_SECONDS} seconds or less often")


def estimate(spec: ExperimentSpec, facts: Facts, epochs: int) -> float:
    """Return the seconds that a run takes, from a measured step."""
    validations = epochs / max(1, epochs // 20 if not spec.is_set(_VALIDATION) else spec.train.validation_interval)
    share = _VALIDATION_COST[spec.train.stage]
    images = (facts.images or 0) * epochs + facts.val_images * validations * share
    first = (facts.images or 0) * facts.seconds_saved if spec.dataset.cache == "on" else 0.0  # it makes the copies
    return _seconds_per_image(spec, facts) * images + first


def _seconds_per_image(spec: ExperimentSpec, facts: Facts) -> float:
    return (facts.seconds_per_image or 0.0) - (facts.seconds_saved if spec.dataset.cache == "on" else 0.0)


def in_words(seconds: float) -> str:
    """Return a duration in words, such as ``12 minutes``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"


def _rounded(number: float) -> int:
    """Return a number of epochs with two significant digits."""
    return max(1, int(float(f"{number:.2g}")))


def _warmup(spec: ExperimentSpec, facts: Facts) -> Iterator[Choice]:
    epochs, share = spec.train.num_epochs, 0.05 if spec.train.stage == "pretrain" else 0.1
    if facts.images is None or any(map(spec.is_set, ("train.optim.warmup_epochs", "train.optim.warmup_steps"))):
        return
    reason = f"{share:.0%} of the run"
    if facts.searching:  # a search varies the epochs of warmup
        yield Choice("train.optim.warmup_epochs", min(max(1, round(share * epochs)), epochs - 1), reason)
    else:
        steps = round(share * epochs * updates_per_epoch(spec, facts.images))
        yield Choice("train.optim.warmup_steps", steps, reason)


def _precision(spec: ExperimentSpec, facts: Facts) -> Iterator[Choice]:
    if facts.fast_bf16 and spec.train.distributed_strategy != "fsdp":
        yield Choice("train.precision", "bf16", "this device computes it faster than fp32")


RULES: dict[str, tuple[Rule, ...]] = {
    "auto": (
        *(_weights, _architecture, _image_size, _patch_size, _decoder, _augmentation, _precision, _batch),
        *(_learning_rate, _cache, _length, _intervals, _warmup),
    ),
    "paper": (_weights, paper_settings, paper_schedule),
    "tao": (),
}
