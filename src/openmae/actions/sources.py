"""The data sources of a spec: their images as indexes, their classes, and the settings of their loaders."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from unicodedata import normalize

from lightning_fabric import Fabric

from openmae.data.index import ImageIndex
from openmae.data.loaders import LoaderSettings
from openmae.data.open import open_index
from openmae.data.scaled_copies import ScaledCopies, least_size
from openmae.data.transforms import FinetuneTransform, PretrainTransform, Transform
from openmae.errors import DataError, SpecError, blaming
from openmae.models.build import ModelConfig
from openmae.spec.schema import ExperimentSpec
from openmae.spec.tree import value_of
from openmae.storage.printable import counted, listed

_SHOWN = 6  # classes named in a message

log = logging.getLogger("openmae")


def open_images(spec: ExperimentSpec, key: str, *, labelled: bool | None, source: str = "") -> ImageIndex:
    """Index the folder, archive or shards of the option ``key``, or ``source`` if the option has several.

    With ``labelled=True`` classes are required, with False ignored, with None used if there are any.

    Raises:
        DataError: the source cannot be used.
    """
    with blaming(key):
        index = open_index(source or value_of(spec, key), labelled)
    return replace(index, max_pixels=spec.dataset.max_megapixels * 1_000_000)


def loader_settings(
    spec: ExperimentSpec, batch_size: int, results: Path, fabric: Fabric | None = None
) -> LoaderSettings:
    """Return the settings of the data loaders in this process of ``fabric``, or in the only process."""
    return LoaderSettings(
        batch_size=batch_size,
        results=results,
        max_corrupt_fraction=spec.dataset.max_corrupt_fraction,
        num_workers=spec.dataset.num_workers_per_gpu,
        rank=fabric.global_rank if fabric else 0,
        world_size=fabric.world_size if fabric else 1,
    )


def class_count(spec: ExperimentSpec, index: ImageIndex) -> int:
    """Return the number of classes of the training images.

    Raises:
        DataError: there is only one class.
        SpecError: ``model.num_classes`` is set to another number.
    """
    found = len(index.class_names)
    if found < 2:
        raise DataError(
            f"dataset.train_data_sources: fine-tuning needs two classes or more, but {index.place} has one: "
            f"{listed(index.class_names, _SHOWN)}.",
            "Give the folder above the class folders, or add images of another class.",
        )
    if not spec.is_set("model.num_classes"):
        log.info("model.num_classes=%d, from the data: %s", found, listed(index.class_names, _SHOWN))
    elif spec.model.num_classes != found:
        raise SpecError(
            f"model.num_classes is {spec.model.num_classes}, but the data has {found} classes: "
            f"{listed(index.class_names, _SHOWN)}.",
            f"Remove model.num_classes (it is taken from the data), or set it to {found}.",
        )
    return found


def match_classes(index: ImageIndex, class_names: tuple[str, ...], trained_on: str = "the checkpoint") -> ImageIndex:
    """Return the validation images with classes numbered as in ``class_names``; warn about classes without an image.

    ``class_names`` are the classes of training, in order; ``trained_on`` names their source in messages.

    Raises:
        DataError: the images have a class that training does not have.
    """
    number_of = {normalize("NFC", name): number for number, name in enumerate(class_names)}
    if unknown := [name for name in index.class_names if normalize("NFC", name) not in number_of]:
        raise DataError(
            f"dataset.val_data_sources has {counted(len(unknown), 'class')} that {trained_on} does not have: "
            f"{listed(unknown, _SHOWN)}.",
            f"Rename or remove them; the classes of {trained_on} are: {listed(class_names, _SHOWN)}.",
        )
    number = [number_of[normalize("NFC", name)] for name in index.class_names]
    if missing := tuple(name for place, name in enumerate(class_names) if place not in number):
        log.warning(
            "dataset.val_data_sources has no images of %d of the %d classes of %s: %s. The accuracy ignores them.",
            *(len(missing), len(class_names), trained_on, listed(missing, _SHOWN)),
        )
    labels = tuple(number[label] if label >= 0 else -1 for label in index.labels or ())
    return replace(index, labels=labels, class_names=class_names)


def open_training_data(spec: ExperimentSpec) -> tuple[ImageIndex, ImageIndex | None]:
    """Return the training images, and the validation images if there are any.

    Raises:
        DataError: a source cannot be used, or the validation images have other classes.
    """
    finetune = spec.train.stage == "finetune"
    train = open_images(spec, "dataset.train_data_sources", labelled=finetune)
    val = None
    if spec.dataset.val_data_sources:
        val = open_images(spec, "dataset.val_data_sources", labelled=finetune or None)
        if finetune:
            val = match_classes(val, train.class_names, "dataset.train_data_sources")
    return train, val


def model_config(spec: ExperimentSpec) -> ModelConfig:
    """Return the configuration of the model that a spec describes."""
    model = spec.model
    return ModelConfig(
        arch=model.arch,
        input_size=spec.dataset.augmentation.size,
        in_chans=model.in_chans,
        patch_size=model.patch_size,
        drop_path_rate=model.drop_path_rate,
        mask_ratio=model.mask_ratio,
        norm_pix_loss=model.norm_pix_loss,
        decoder_depth=model.decoder_depth,
        decoder_embed_dim=model.decoder_embed_dim,
        decoder_attention=model.decoder_attention,
        global_pool=model.global_pool,
        num_classes=(model.num_classes or 0) if spec.train.stage == "finetune" else 0,
    )


def training_copies(spec: ExperimentSpec) -> ScaledCopies:
    """Return the scaled copies that training samples are made from, kept nowhere yet."""
    augmentation = spec.dataset.augmentation
    return ScaledCopies(least_size(augmentation.size, augmentation.min_scale), spec.model.in_chans)


def train_transform(spec: ExperimentSpec) -> Transform:
    """Return the transform of the training images of a spec."""
    augmentation, finetune = spec.dataset.augmentation, spec.train.stage == "finetune"
    crop = PretrainTransform(
        size=augmentation.size,
        in_chans=spec.model.in_chans,
        scale=(augmentation.min_scale, augmentation.max_scale),
        ratio=(augmentation.min_ratio, augmentation.max_ratio),
        hflip=augmentation.hflip,
        interpolation=augmentation.interpolation if finetune else "bicubic",
    )
    if not finetune:
        return crop
    return FinetuneTransform(
        crop,
        augmentation.mean,
        augmentation.std,
        auto_aug=augmentation.auto_aug,
        color_jitter=augmentation.color_jitter,
        re_prob=augmentation.re_prob,
    )
