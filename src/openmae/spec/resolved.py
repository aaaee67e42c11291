"""The defaults that depend on the stage, the architecture or the channels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from openmae.spec.schema import ExperimentSpec
from openmae.spec.tree import value_of

_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
DEFAULT_MEAN = {1: (0.449,), 3: _IMAGENET_MEAN, 4: (*_IMAGENET_MEAN, 0.5)}  # by the number of channels
DEFAULT_STD = {1: (0.226,), 3: _IMAGENET_STD, 4: (*_IMAGENET_STD, 0.25)}


@dataclass(frozen=True)
class Resolved:
    """The same options as in the spec, none of them None."""

    mask_ratio: float
    decoder_depth: int
    decoder_embed_dim: int
    drop_path_rate: float
    beta2: float
    mean: tuple[float, ...]
    std: tuple[float, ...]


def dependent_defaults(spec: ExperimentSpec) -> dict[str, Any]:
    """Return the defaults that depend on other options, by dotted key."""
    row, finetune = spec.model.architecture, spec.train.stage == "finetune"
    return {
        "model.mask_ratio": row.mask_ratio,
        "model.decoder_depth": row.decoder_depth,
        "model.decoder_embed_dim": row.decoder_embed_dim,
        "model.drop_path_rate": 0.1 if finetune else row.pretrain_drop_path,
        "train.optim.beta2": 0.999 if finetune else 0.95,
        "dataset.augmentation.mean": DEFAULT_MEAN[spec.model.in_chans],
        "dataset.augmentation.std": DEFAULT_STD[spec.model.in_chans],
    }


def fill_unset(spec: ExperimentSpec) -> ExperimentSpec:
    """Return a copy of the spec in which unset options have their dependent default."""
    defaults = dependent_defaults(spec)
    return spec.replaced({key: value for key, value in defaults.items() if value_of(spec, key) is None})


def resolve(spec: ExperimentSpec) -> Resolved:
    """Return the values of the options that have dependent defaults."""
    filled = fill_unset(spec)
    return Resolved(**{key.rpartition(".")[2]: value_of(filled, key) for key in dependent_defaults(spec)})
