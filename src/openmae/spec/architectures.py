"""The table of architectures, which contains all differences between them as plain data.

Sources: He et al. 2021 (arXiv:2111.06377), Woo et al. 2023 (arXiv:2301.00808), Ryali et al. 2023 (arXiv:2306.00989). No
other module depends on the name of an architecture.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Literal

from openmae.errors import SpecError

Family = Literal["vit", "hiera", "convnextv2"]
DECODER_HEAD_DIM = 32  # the papers' transformer decoder is 512 wide and has 16 heads


@dataclass(frozen=True)
class Architecture:
    """An architecture.

    Attributes:
        name: the value of ``model.arch``.
        family: the kind of encoder.
        timm_name: the name for ``timm.create_model``.
        mask_unit: side of the square that is masked as one, in pixels (a patch, for ViT).
        mask_ratio: the paper's share of masked units.
        decoder_depth: the paper's number of decoder blocks.
        decoder_embed_dim: the paper's decoder width.
        pretrain_drop_path: the paper's stochastic depth rate for pretraining.
        light_decoder: depth and width of a decoder that is small enough for the encoder; None: the paper's is.
    """

    name: str
    family: Family
    timm_name: str
    mask_unit: int
    mask_ratio: float
    decoder_depth: int
    decoder_embed_dim: int = 512
    pretrain_drop_path: float = 0.0
    light_decoder: tuple[int, int] | None = None


def _vit(name: str, timm_name: str, patch: int, light_decoder: tuple[int, int] | None = None) -> Architecture:
    return Architecture(
        name, "vit", timm_name, mask_unit=patch, mask_ratio=0.75, decoder_depth=8, light_decoder=light_decoder
    )


def _hiera(name: str, drop_path: float, light_decoder: tuple[int, int] | None = None) -> Architecture:
    return Architecture(
        name,
        "hiera",
        name,
        mask_unit=32,
        mask_ratio=0.6,
        decoder_depth=8,
        pretrain_drop_path=drop_path,
        light_decoder=light_decoder,
    )


def _convnextv2(size: str) -> Architecture:
    name = f"convnextv2_{size}"
    return Architecture(name, "convnextv2", name, mask_unit=32, mask_ratio=0.6, decoder_depth=1)


ARCHITECTURES: dict[str, Architecture] = {
    row.name: row
    for row in (
        *map(_convnextv2, ("atto", "femto", "pico", "nano", "tiny", "base", "large", "huge")),
        _hiera("hiera_tiny_224", 0.0, light_decoder=(2, 256)),
        _hiera("hiera_small_224", 0.0, light_decoder=(2, 256)),
        _hiera("hiera_base_224", 0.2),
        _hiera("hiera_base_plus_224", 0.2),
        _hiera("hiera_large_224", 0.2),
        _hiera("hiera_huge_224", 0.3),
        _vit("vit_tiny_patch16", "vit_tiny_patch16_224", 16, light_decoder=(2, 192)),
        _vit("vit_small_patch16", "vit_small_patch16_224", 16, light_decoder=(2, 256)),
        _vit("vit_base_patch16", "vit_base_patch16_224", 16),
        _vit("vit_large_patch16", "vit_large_patch16_224", 16),
        _vit("vit_huge_patch14", "vit_huge_patch14_224", 14),
    )
}


def get_architecture(name: str) -> Architecture:
    """Return the architecture called ``name``, ignoring case.

    Raises:
        SpecError: there is none; the error lists similar names.
    """
    known = str(name).lower()  # a damaged checkpoint may contain anything
    if known in ARCHITECTURES:
        return ARCHITECTURES[known]
    near = difflib.get_close_matches(known, ARCHITECTURES, n=3, cutoff=0.4) or list(ARCHITECTURES)
    raise SpecError(f"model.arch: no architecture is called {name!r}.", f"Use one of: {', '.join(near)}.")


def visible_units(units: int, mask_ratio: float) -> int:
    """Return how many of ``units`` mask units stay visible: floor(L (1 - ratio)), as in the papers' code.

    The small term corrects rounding errors: 10 units at 0.9 leave one visible unit, not none.
    """
    return int(units * (1 - mask_ratio) + 1e-9)
