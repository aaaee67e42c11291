"""The table of architectures: every fact that differs between them, as plain data.

Sources: He et al. 2021 (arXiv:2111.06377), Woo et al. 2023 (arXiv:2301.00808), Ryali et al. 2023
(arXiv:2306.00989). Nothing else in the package switches on an architecture's name.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Literal

from openmae.errors import SpecError

Family = Literal["vit", "hiera", "convnextv2"]
DECODER_HEAD_DIM = 32  # of the papers' 512-wide transformer decoder with 16 heads


@dataclass(frozen=True)
class Architecture:
    """One row of the table.

    Attributes:
        name: the value of ``model.arch``.
        family: which encoder runs it.
        timm_name: the model that ``timm.create_model`` builds.
        mask_unit: side of the square that is masked as one, in pixels (a patch, for ViT).
        mask_ratio: the paper's share of masked units.
        decoder_depth, decoder_embed_dim: the paper's decoder.
        pretrain_drop_path: the paper's stochastic depth rate during pretraining.
    """

    name: str
    family: Family
    timm_name: str
    mask_unit: int
    mask_ratio: float
    decoder_depth: int
    decoder_embed_dim: int = 512
    pretrain_drop_path: float = 0.0


def _vit(name: str, timm_name: str, patch: int) -> Architecture:
    return Architecture(name, "vit", timm_name, mask_unit=patch, mask_ratio=0.75, decoder_depth=8)


def _hiera(name: str, drop_path: float) -> Architecture:
    return Architecture(
        name, "hiera", name, mask_unit=32, mask_ratio=0.6, decoder_depth=8, pretrain_drop_path=drop_path
    )


def _convnextv2(size: str) -> Architecture:
    name = f"convnextv2_{size}"
    return Architecture(name, "convnextv2", name, mask_unit=32, mask_ratio=0.6, decoder_depth=1)


ARCHITECTURES: dict[str, Architecture] = {
    row.name: row
    for row in (
        *map(_convnextv2, ("atto", "femto", "pico", "nano", "tiny", "base", "large", "huge")),
        _hiera("hiera_tiny_224", 0.0),
        _hiera("hiera_small_224", 0.0),
        _hiera("hiera_base_224", 0.2),
        _hiera("hiera_base_plus_224", 0.2),
        _hiera("hiera_large_224", 0.2),
        _hiera("hiera_huge_224", 0.3),
        _vit("vit_tiny_patch16", "vit_tiny_patch16_224", 16),
        _vit("vit_small_patch16", "vit_small_patch16_224", 16),
        _vit("vit_base_patch16", "vit_base_patch16_224", 16),
        _vit("vit_large_patch16", "vit_large_patch16_224", 16),
        _vit("vit_huge_patch14", "vit_huge_patch14_224", 14),
    )
}


def get_architecture(name: str) -> Architecture:
    """Return the row called ``name``, in any case; an unknown name is an error that lists the near ones."""
    known = str(name).lower()  # a damaged checkpoint may name anything
    if known in ARCHITECTURES:
        return ARCHITECTURES[known]
    near = difflib.get_close_matches(known, ARCHITECTURES, n=3, cutoff=0.4) or list(ARCHITECTURES)
    raise SpecError(f"model.arch: no architecture is called {name!r}.", f"Use one of: {', '.join(near)}.")


def visible_units(units: int, mask_ratio: float) -> int:
    """How many of ``units`` mask units stay visible: floor(L (1 - ratio)), as the papers' code counts.

    The small term keeps what is whole on paper whole in floating point: 10 units at 0.9 leave one, not none.
    """
    return int(units * (1 - mask_ratio) + 1e-9)
