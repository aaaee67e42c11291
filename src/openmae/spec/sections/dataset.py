"""The section ``dataset``: the data sources, and the transforms from a decoded image to the model's input."""

from __future__ import annotations

from typing import Any, Literal

from openmae.spec.option import (
    EXECUTION,
    FINETUNE,
    AutoAugment,
    Count,
    Deviations,
    InputPath,
    InputSize,
    PositiveShare,
    Search,
    Section,
    Share,
    SharePair,
    option,
)


class AugmentationSpec(Section):
    """``dataset.augmentation``."""

    input_size: InputSize = option(
        224,
        "image size in pixels: a number, or [height, width]",
        popular=True,
        recipe=True,
        automl=False,
        on_resume="refuse",
    )
    mean: tuple[float, ...] = option(None, "mean of each channel, 0 to 1; unset: ImageNet's", automl=False)
    std: Deviations = option(None, "standard deviation of each channel; unset: ImageNet's", automl=False)
    min_scale: PositiveShare = option(
        0.1,
        "smallest share of the area that a random crop keeps",
        recipe=True,
        search=Search(0.08, 0.8),
        cond="<= dataset.augmentation.max_scale",
        changes_loss=True,
    )
    max_scale: float = option(
        1.0,
        "largest share of the area that a random crop keeps; above 1 means 1",
        gt=0,
        search=Search(0.6, 1.0),
        cond=">= dataset.augmentation.min_scale",
    )
    min_ratio: float = option(
        0.75,
        "smallest width / height of a random crop",
        gt=0,
        le=100,
        tao="ignores in pretraining",
        cond="<= dataset.augmentation.max_ratio",
    )
    max_ratio: float = option(
        1.33,
        "largest width / height of a random crop",
        gt=0,
        le=100,
        tao="ignores in pretraining",
        cond=">= dataset.augmentation.min_ratio",
    )
    interpolation: Literal["bilinear", "bicubic", "random"] = option(
        "bilinear",
        "resampling filter of training crops; pretraining and evaluation use bicubic",
        stages=FINETUNE,
        recipe=True,
    )
    hflip: Share = option(
        0.5, "probability of a horizontal flip", tao="ignores in pretraining", search=Search(0.0, 0.5)
    )
    color_jitter: float = option(
        0.0, "strength of colour jitter, 0: off", ge=0, le=10, stages=FINETUNE, search=Search(0, 0.4)
    )
    auto_aug: AutoAugment = option(
        "rand-m9-mstd0.5-inc1", "timm's augmentation policy, empty: off", stages=FINETUNE, recipe=True
    )
    re_prob: Share = option(0.0, "probability of random erasing", stages=FINETUNE, recipe=True, search=Search(0.0, 0.4))
    smoothing: float = option(0.1, "label smoothing", ge=0, lt=1, stages=FINETUNE, recipe=True, search=Search(0.0, 0.2))
    mixup: float = option(0.8, "Mixup's alpha, 0: off", ge=0, stages=FINETUNE, recipe=True, search=Search(0.0, 1.0))
    cutmix: float = option(1.0, "CutMix's alpha, 0: off", ge=0, stages=FINETUNE, recipe=True, search=Search(0.0, 1.0))
    cutmix_minmax: SharePair | None = option(
        None, "[min, max] side of CutMix's box as a share of the image; replaces cutmix's alpha", stages=FINETUNE
    )
    mixup_prob: Share = option(1.0, "probability that a batch is mixed", stages=FINETUNE, search=Search(0.2, 1.0))
    mixup_switch_prob: Share = option(
        0.5,
        "probability of CutMix if Mixup and CutMix are both on",
        stages=FINETUNE,
        needs="dataset.augmentation.mixup>0",
        search=Search(0.2, 0.8),
    )
    mixup_mode: Literal["batch", "pair", "elem"] = option(
        "batch", "images that get the same mixing weight", stages=FINETUNE
    )

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        return self.input_size if isinstance(self.input_size, tuple) else (self.input_size, self.input_size)

    @property
    def cuts(self) -> bool:
        """True if CutMix is on."""
        return self.cutmix > 0 or self.cutmix_minmax is not None

    @property
    def mixes(self) -> bool:
        """True if batches are mixed by Mixup or CutMix."""
        return self.mixup_prob > 0 and (self.mixup > 0 or self.cuts)


class DatasetSpec(Section):
    """``dataset``."""

    train_data_sources: InputPath = option("", "training images: a folder, an archive, or shards (a-{000..099}.tar)")
    val_data_sources: InputPath = option("", "validation images: a folder, an archive, or shards")
    test_data_sources: InputPath = option(
        "", "images for inference: a folder, an archive, or shards", on_resume="allow", in_search=False
    )
    batch_size: Count = option(1, "images per batch and device", popular=True, recipe=True)
    num_workers_per_gpu: int = option(2, "workers that load images, per device", ge=0, le=256, **EXECUTION)
    cache: Literal["off", "auto", "on"] = option(
        "off",
        "make training samples from scaled copies of the images, which are kept in the cache; auto: as if unset",
        recipe=True,
        tao="lacks",
        automl=False,
    )
    max_corrupt_fraction: Share = option(
        0.01, "share of unreadable images above which the run fails", tao="lacks", automl=False, on_resume="allow"
    )
    max_megapixels: int = option(
        179,
        "images with more megapixels count as unreadable",
        ge=1,
        le=100_000,
        tao="lacks",
        automl=False,
        on_resume="allow",
    )
    augmentation: AugmentationSpec = option(AugmentationSpec(), "transforms of each image")
    segment: dict[str, Any] | None = option(
        None, "accepted; it has no effect", no_effect="it belongs to another task of TAO", compat=True
    )
