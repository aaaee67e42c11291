"""Conversion of images to batches that a deployed model accepts."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from openmae.data.decode import MAX_MEGAPIXELS, CorruptImage, ImageFile, TooManyPixels
from openmae.data.transforms import EvalTransform
from openmae.engines.metadata import ModelCard
from openmae.errors import DataError
from openmae.models.normalise import Normaliser

log = logging.getLogger("openmae")


def as_input(images_BCHW: Tensor, card: ModelCard) -> Tensor:
    """Convert uint8 images, or float images in 0..255, to the model's input, contiguous in memory.

    This is uint8 ``[B, H, W, C]`` if the model includes preprocessing, else normalised float32 ``[B, C, H, W]``.

    Raises:
        DataError: the images have another shape or type.
    """
    size = (card.model.in_chans, *card.model.input_size)
    if not isinstance(images_BCHW, Tensor) or images_BCHW.shape[1:] != size:
        found = list(images_BCHW.shape) if isinstance(images_BCHW, Tensor) else type(images_BCHW).__name__
        raise DataError(
            f"The model takes a tensor of shape [N, {', '.join(map(str, size))}], uint8 or float in 0..255, got "
            f"{found}.",
            "openmae.read_images(paths, predictor.card) reads it from image files.",
        )
    if not card.preprocessing:
        return Normaliser(card.mean, card.std)(images_BCHW).contiguous()
    if images_BCHW.is_floating_point():
        images_BCHW = images_BCHW.round().clamp(0, 255).to(torch.uint8)
    return images_BCHW.permute(0, 2, 3, 1).contiguous()


def eval_transform(card: ModelCard) -> EvalTransform:
    """Return the evaluation transform, from an image file to a tensor of the card's size."""
    return EvalTransform(card.model.input_size, card.model.in_chans, card.interpolation, card.crop_pct)


def read_images(paths: Sequence[str | Path], card: ModelCard, *, max_megapixels: float = MAX_MEGAPIXELS) -> Tensor:
    """Read image files for a predictor: the centre crop, resized to the model's input size, as in evaluation.

    Args:
        paths: image files.
        card: metadata of the model.
        max_megapixels: largest number of pixels of an image that is decoded, in millions.

    Returns:
        ``[N, C, H, W]``, uint8, or float32 in 0..255 if a file has 16 bits.

    Raises:
        DataError: a file cannot be read.
    """
    transform = eval_transform(card)
    images = []
    for path in paths:
        try:
            with ImageFile(Path(path), max_pixels=round(max_megapixels * 1_000_000)) as file:
                images.append(transform(file))
                if file.further_images:
                    log.warning("%s has %s, of which only the first is read.", path, file.further_images)
        except TooManyPixels as error:
            raise DataError(
                f"{path} has {error.got} pixels, more than max_megapixels={max_megapixels:g} allows.",
                "Pass a larger max_megapixels if you trust the file, or make the image smaller.",
            ) from error
        except CorruptImage as error:
            raise DataError(f"{path} cannot be read: {error.reason}.", "Give image files.") from error
    if not images:
        raise DataError("There are no images.", "Pass at least one path.")
    same = len({image.dtype for image in images}) == 1
    return torch.stack(images if same else [image.float() for image in images])


def run_split(
    run: Callable[[Tensor], dict[str, Tensor]], images: Tensor, smallest: int, largest: int
) -> dict[str, Tensor]:
    """Run any number of images in batches of ``smallest`` to ``largest``, and return the concatenated outputs.

    ``run`` returns the outputs of a batch by name, each with the batch as its first axis. Outputs for padding are
    dropped.
    """
    results = [(len(part), run(pad_batch(part, smallest))) for part in images.split(largest)]
    return {name: torch.cat([outputs[name][:count] for count, outputs in results]) for name in results[0][1]}


def pad_batch(images: Tensor, smallest: int) -> Tensor:
    """Pad a batch to at least ``smallest`` images with its last image, or with zeros if it is empty."""
    missing = smallest - len(images)
    if missing <= 0:
        return images
    padding = images[-1:] if len(images) else images.new_zeros(1, *images.shape[1:])
    return torch.cat([images, padding.expand(missing, *images.shape[1:])])


def device_name(device: torch.device) -> str:
    """Return a readable name of a device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper()
