"""Any number of images, as they are in memory, for a model that takes certain batches in a certain form."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from openmae.data.decode import MAX_MEGAPIXELS, CorruptImage, ImageFile, TooManyPixels
from openmae.data.normalise import Normaliser
from openmae.data.transforms import EvalTransform
from openmae.engines.metadata import ModelCard
from openmae.errors import DataError

log = logging.getLogger("openmae")


def as_input(images_BCHW: Tensor, card: ModelCard) -> Tensor:
    """Images as the deployed model takes them.

    Args:
        images_BCHW: uint8, or float in 0..255.
        card: says whether the model normalises.

    Raises:
        DataError: they have another shape or type.

    Returns:
        uint8 ``[B, H, W, C]`` with the card's preprocessing, else normalised float32 ``[B, C, H, W]``; contiguous.
    """
    size = (card.model.in_chans, *card.model.input_size)
    if not isinstance(images_BCHW, Tensor) or images_BCHW.shape[1:] != size:
        found = list(images_BCHW.shape) if isinstance(images_BCHW, Tensor) else type(images_BCHW).__name__
        raise DataError(
            f"The model takes a tensor of shape [N, {', '.join(map(str, size))}], uint8 or float in 0..255, got "
            f"{found}.",
            "openmae.read_images(paths, predictor.card) makes one from image files.",
        )
    if not card.preprocessing:
        return Normaliser(card.mean, card.std)(images_BCHW).contiguous()
    if images_BCHW.is_floating_point():
        images_BCHW = images_BCHW.round().clamp(0, 255).to(torch.uint8)
    return images_BCHW.permute(0, 2, 3, 1).contiguous()


def eval_transform(card: ModelCard) -> EvalTransform:
    """From a file to pixels of the card's size, as evaluation sees them."""
    return EvalTransform(card.model.input_size, card.model.in_chans, card.interpolation, card.crop_pct)


def read_images(paths: Sequence[str | Path], card: ModelCard, *, max_megapixels: float = MAX_MEGAPIXELS) -> Tensor:
    """Image files as a predictor takes them: the centre, resized to the card's size, as evaluation sees it.

    Args:
        paths: of the image files.
        card: of the model.
        max_megapixels: size of the largest image that is decoded, in millions of pixels.

    Returns:
        ``[N, C, H, W]``, uint8, or float32 in 0..255 where a file has 16 bits.

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
                "Pass a larger max_megapixels if you trust the file, or scale it down.",
            ) from error
        except CorruptImage as error:
            raise DataError(f"{path} cannot be read: {error.reason}.", "Give image files.") from error
    if not images:
        raise DataError("There are no images.", "Give one path or more.")
    same = len({image.dtype for image in images}) == 1
    return torch.stack(images if same else [image.float() for image in images])


def run_split(
    run: Callable[[Tensor], dict[str, Tensor]], images: Tensor, smallest: int = 1, largest: int | None = None
) -> dict[str, Tensor]:
    """Run batches of ``smallest`` to ``largest`` images; the outputs are joined as if it had been one.

    A batch that is too small is filled up with its last image, and what comes of that is dropped.

    Args:
        run: a batch -> outputs by name, each with the batch as its first axis.
        images: ``[N, ...]``, N from 0 on.
        smallest, largest: images of a batch; None for no limit.
    """
    parts = images.split(largest or max(1, len(images))) if len(images) else (images,)
    results = [_run_filled(run, part, smallest) for part in parts]
    if len(results) == 1:
        return results[0]
    return {name: torch.cat([result[name] for result in results]) for name in results[0]}


def _run_filled(run: Callable[[Tensor], dict[str, Tensor]], images: Tensor, smallest: int) -> dict[str, Tensor]:
    filled = fill_up(images, max(smallest, 1))
    return {name: output[: len(images)] for name, output in run(filled).items()}


def fill_up(images: Tensor, smallest: int) -> Tensor:
    """A batch of ``smallest`` images or more: the last image, or zeros where there is none, stands in."""
    missing = smallest - len(images)
    if missing <= 0:
        return images
    filling = images[-1:] if len(images) else images.new_zeros(1, *images.shape[1:])
    return torch.cat([images, filling.expand(missing, *images.shape[1:])])
