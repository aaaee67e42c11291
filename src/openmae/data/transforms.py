"""Transforms from an image file to a tensor of the model's size, for pretraining, fine-tuning and evaluation.

The random numbers of a sample depend only on (seed, epoch, index), so the number of workers and interruptions do not
change them. Tensors stay uint8 until ``Normaliser`` converts the batch on the device.
"""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from openmae.data.decode import Box, ImageFile, Size
from openmae.data.scaled_copies import ScaledImage
from openmae.errors import SpecError

log = logging.getLogger("openmae")

Resampling = Literal["bilinear", "bicubic"]
Interpolation = Resampling | Literal["random"]
ImagePolicy = Callable[[Image.Image], Image.Image]

_STREAMS = {"augment": 0, "shuffle": 1}
_ERASE_AREA = (0.02, 1 / 3)
_ERASE_LOG_ASPECT = (math.log(0.3), math.log(1 / 0.3))
_LUMA = (0.299, 0.587, 0.114)


def rng_at(
    seed: int, epoch: int, index: int = 0, stream: Literal["augment", "shuffle"] = "augment"
) -> np.random.Generator:
    """Return the random generator of (seed, epoch, index), independent of earlier draws.

    Philox is counter-based: the seed is its key, and (epoch, index) is its counter.
    """
    key = np.array([seed % 2**64, _STREAMS[stream]], dtype=np.uint64)
    counter = np.array([0, 0, index, epoch], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


@dataclass(frozen=True)
class PretrainTransform:
    """Random resized crop and horizontal flip; only the crop is resized, and JPEGs are decoded at a reduced scale.

    Args:
        size: (height, width) of the output.
        in_chans: 1, 3 or 4.
        scale: lower and upper bound of the crop's fraction of the image area.
        ratio: lower and upper bound of the crop's width / height.
        hflip: probability of a horizontal flip.
        interpolation: bilinear, bicubic, or random (one of the two per sample); always antialiased.
    """

    size: Size
    in_chans: int = 3
    scale: tuple[float, float] = (0.2, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    hflip: float = 0.5
    interpolation: Interpolation = "bicubic"

    def __call__(self, file: ImageFile | ScaledImage, rng: np.random.Generator) -> torch.Tensor:
        """Return [C, H, W]: uint8, or float32 in 0..255 for a 16-bit file."""
        box = random_box(file.size, self.scale, self.ratio, rng)
        flip = rng.random() < self.hflip
        bicubic = self.interpolation == "bicubic" or (self.interpolation == "random" and rng.random() < 0.5)
        image = _crop_and_resize(file, self.in_chans, box, self.size, "bicubic" if bicubic else "bilinear")
        return image.flip(-1) if flip else image


@dataclass
class FinetuneTransform:
    """The pretraining transform followed by an auto-augmentation policy, colour jitter and random erasing.

    Args:
        crop: the random crop and flip.
        mean, std: per channel, in 0..1. Random erasing fills with noise of this distribution, and rotations fill empty
            corners with ``mean``.
        auto_aug: a timm policy such as ``rand-m9-mstd0.5-inc1``, or "" for none. Policies need 8-bit images of 1 or 3
            channels: 16-bit files are rounded to 8 bits; with 4 channels the policy is off, with a warning.
        color_jitter: c; brightness, contrast and saturation are scaled by factors from 1 - c to 1 + c.
        re_prob: probability of random erasing (Zhong et al. 2017, arXiv:1708.04896).

    Attributes:
        size, in_chans: (height, width) and channels of the output.

    Raises:
        SpecError: timm cannot read ``auto_aug``.
    """

    crop: PretrainTransform
    mean: Sequence[float]
    std: Sequence[float]
    auto_aug: str = ""
    color_jitter: float = 0.0
    re_prob: float = 0.0

    def __post_init__(self) -> None:
        self.size, self.in_chans = self.crop.size, self.crop.in_chans
        self._policy = self._make_policy()

    def __call__(self, file: ImageFile | ScaledImage, rng: np.random.Generator) -> torch.Tensor:
        """Return [C, H, W]: uint8, or float32 in 0..255 for a 16-bit file."""
        image = self.crop(file, rng)
        if self._policy is not None:
            image = _apply_policy(self._policy, image, rng)
        if self.color_jitter > 0:
            image = _jitter(image, self.color_jitter, rng)
        if rng.random() < self.re_prob:
            image = _erase(image, self.mean, self.std, rng)
        return image

    def _make_policy(self) -> ImagePolicy | None:
        if self.auto_aug.lower() in ("", "none"):
            return None
        if self.in_chans == 4:
            log.warning("dataset.augmentation.auto_aug is off: it works on 1 or 3 channels, not on 4.")
            return None
        fill = [min(255, round(255 * value)) for value in self.mean]
        params: dict[str, object] = {
            "translate_const": int(min(self.size) * 0.45),
            "img_mean": fill[0] if self.in_chans == 1 else tuple(fill),
        }
        if self.crop.interpolation != "random":
            params["interpolation"] = getattr(Image.Resampling, self.crop.interpolation.upper())
        return _timm_policy(self.auto_aug, params)


@dataclass(frozen=True)
class EvalTransform:
    """Resize and centre crop in one step, the same for every action.

    Args:
        size: (height, width) of the output.
        in_chans: 1, 3 or 4.
        interpolation: bilinear or bicubic; random means bicubic.
        kept: fraction of the image's sides that the crop keeps; None for :func:`crop_pct`.
    """

    size: Size
    in_chans: int = 3
    interpolation: Interpolation = "bicubic"
    kept: float | None = None

    def __call__(self, file: ImageFile | ScaledImage, rng: np.random.Generator | None = None) -> torch.Tensor:
        """Return [C, H, W]: uint8, or float32 in 0..255 for a 16-bit file. ``rng`` is not used."""
        box = centre_box(file.size, self.size, self.kept)
        mode: Resampling = "bilinear" if self.interpolation == "bilinear" else "bicubic"
        # Decode at twice the resolution, since the box is rounded to whole pixels of the scaled-down JPEG.
        return _crop_and_resize(file, self.in_chans, box, self.size, mode, finer=2)


Transform = PretrainTransform | FinetuneTransform | EvalTransform


def crop_pct(size: Size) -> float:
    """Return the fraction of the sides that evaluation keeps, as in MAE's util/datasets.py: 0.875 up to 224 px."""
    return 224 / 256 if max(size) <= 224 else 1.0


def random_box(size: Size, scale: tuple[float, float], ratio: tuple[float, float], rng: np.random.Generator) -> Box:
    """Draw a crop: its fraction of the area is uniform in ``scale``, its width / height log-uniform in ``ratio``.

    After ten draws that do not fit, return the largest centred crop within ``ratio``, as torchvision does (Szegedy et
    al. 2015, arXiv:1409.4842).
    """
    height, width = size
    log_ratio = math.log(ratio[0]), math.log(ratio[1])
    for _ in range(10):
        area = height * width * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(*log_ratio))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
            return left, top, left + w, top + h
    aspect = min(max(width / height, ratio[0]), ratio[1])
    return _centred(size, min(width, round(height * aspect)), min(height, round(width / aspect)))


def centre_box(size: Size, out: Size, kept: float | None = None) -> Box:
    """Return the box that ``EvalTransform`` crops for an output of size ``out``."""
    height, width = size
    unit = min(height / out[0], width / out[1]) * (crop_pct(out) if kept is None else kept)
    return _centred(size, min(width, round(out[1] * unit)), min(height, round(out[0] * unit)))


def _centred(size: Size, w: int, h: int) -> Box:
    w, h = max(w, 1), max(h, 1)
    left, top = (size[1] - w) // 2, (size[0] - h) // 2
    return left, top, left + w, top + h


def _crop_and_resize(
    file: ImageFile | ScaledImage, in_chans: int, box: Box, size: Size, mode: Resampling, finer: int = 1
) -> torch.Tensor:
    """Decode, crop and resize to ``size``; a JPEG is decoded at ``finer`` times that size or larger."""
    at_least = finer * size[0], finer * size[1]
    pixels = torch.from_numpy(file.pixels(in_chans, box, at_least)).permute(2, 0, 1)
    if pixels.shape[1:] != size:
        pixels = F.interpolate(pixels[None], size, mode=mode, antialias=True)[0]
        if pixels.is_floating_point():
            pixels = pixels.clamp_(0, 255)  # bicubic interpolation overshoots
    return pixels


def _timm_policy(config: str, params: dict[str, object]) -> ImagePolicy:
    from timm.data import auto_augment

    make: Callable[[str, dict[str, object]], Any]
    if config.startswith("rand"):
        make = auto_augment.rand_augment_transform
    elif config.startswith("augmix"):
        make = auto_augment.augment_and_mix_transform
    else:
        make = auto_augment.auto_augment_transform
    try:
        policy: ImagePolicy = make(config, params)
    except (AssertionError, KeyError, ValueError) as error:
        raise SpecError(
            f"dataset.augmentation.auto_aug: timm cannot read the policy {config!r} ({error}).",
            "Use one such as rand-m9-mstd0.5-inc1, augmix-m5-w4-d2, original-mstd0.5, or '' for none.",
        ) from error
    _fix_posterize(policy)
    return policy


def _fix_posterize(policy: Any) -> None:
    """Keep at least one bit: timm may draw 0 bits, which Pillow 13 rejects."""
    groups = [getattr(policy, "ops", []), *getattr(policy, "policy", [])]
    for op in (op for group in groups for op in group):
        if op.name.startswith("Posterize"):
            op.level_fn = partial(_at_least_one_bit, level_fn=op.level_fn)


def _at_least_one_bit(level: float, hparams: dict[str, Any], level_fn: Callable[..., tuple[int]]) -> tuple[int]:
    return (max(1, level_fn(level, hparams)[0]),)


def _apply_policy(policy: ImagePolicy, image: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    pixels = image.permute(1, 2, 0).round().to(torch.uint8).numpy()
    # timm draws from the global generators, so seed them and restore their state afterwards.
    python_state, numpy_state = random.getstate(), np.random.get_state()
    seed = int(rng.integers(2**32))
    random.seed(seed)
    np.random.seed(seed)
    try:
        augmented = policy(Image.fromarray(pixels if image.shape[0] == 3 else pixels[..., 0]))
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
    result = torch.from_numpy(np.array(augmented)).reshape(pixels.shape).permute(2, 0, 1)
    return result.to(image.dtype)


def _jitter(image: torch.Tensor, strength: float, rng: np.random.Generator) -> torch.Tensor:
    """Scale brightness, contrast and saturation in random order; alpha is unchanged."""
    colour = image[:3].to(torch.float32)
    luma = torch.tensor(_LUMA if colour.shape[0] == 3 else (1.0,)).view(-1, 1, 1)
    factors = rng.uniform(max(0.0, 1 - strength), 1 + strength, size=3)
    for change in rng.permutation(3):
        grey = (colour * luma).sum(0, keepdim=True)
        anchor = (torch.zeros(()), grey.mean(), grey)[change]
        colour = (anchor + (colour - anchor) * float(factors[change])).clamp_(0, 255)
    if not image.is_floating_point():
        colour = colour.round_()
    return torch.cat([colour.to(image.dtype), image[3:]])


def _erase(image: torch.Tensor, mean: Sequence[float], std: Sequence[float], rng: np.random.Generator) -> torch.Tensor:
    """Fill a random rectangle with noise that is standard normal after normalisation, clipped to 0..255."""
    chans, height, width = image.shape
    for _ in range(10):
        area = rng.uniform(*_ERASE_AREA) * height * width
        aspect = math.exp(rng.uniform(*_ERASE_LOG_ASPECT))
        h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if h < height and w < width:
            top, left = int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1))
            noise = torch.from_numpy(rng.standard_normal((chans, h, w), dtype=np.float32))
            centre, spread = (255 * torch.tensor(values).view(-1, 1, 1) for values in (mean, std))
            patch = (centre + spread * noise).clamp_(0, 255).to(image.dtype)
            image = image.clone()
            image[:, top : top + h, left : left + w] = patch
            break
    return image
